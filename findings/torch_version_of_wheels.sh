#!/usr/bin/env bash
# torch 2.14.1: the metadata of its wheel do not name the build that torch.__version__ names.
#
# Expected: importlib.metadata.version("torch") is torch.__version__, as it is for the CPU wheel of version 2.13.0
# ("2.13.0+cpu" both). Seen: "2.14.1" in the metadata of PyPI's wheel for Linux, "2.14.1+cu130" in the module.
# Why a user minds: a record of versions that is made from metadata, as experiment trackers and `pip freeze` make them,
# cannot say which CUDA a result was computed with; and a test that compares the two passes with one wheel and fails
# with another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps torch==2.14.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import runpy
from importlib.metadata import distribution

torch = distribution("torch")
module = runpy.run_path(str(torch.locate_file("torch/version.py")))["__version__"]  # importing all of it needs CUDA's libraries
print(f"metadata {torch.version}, module {module}")
assert (torch.version, module) == ("2.14.1", "2.14.1+cu130")
PYTHON
