#!/usr/bin/env bash
# transformers 5.23.0: importing it imports whatever is named `kernels` on the path, a plain folder included.
#
# Expected: transformers looks for the distribution `kernels` of that name on PyPI. Seen: the folder beside the script is
# imported, and its code runs, once transformers looks whether that package is there. Output: "imported: kernels".
# Why a user minds: projects of this field often keep a folder `kernels/`. With operators registered in it (torch.library),
# it is imported a second time under a second name, and registering the same operators anew breaks those in use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys
from pathlib import Path

Path("kernels").mkdir()
Path("kernels/__init__.py").write_text('print("imported:", __name__)\n')
look = "import transformers, transformers.integrations.hub_kernels; from transformers import PreTrainedModel"
seen = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
print(seen.stdout.strip())
assert "imported: kernels" in seen.stdout, "a folder of that name is left alone now"
PYTHON
