#!/usr/bin/env bash
# recurrentgemma 1.0.1: what the extra `torch` installs cannot import recurrentgemma.torch, which needs JAX and Flax.
#
# Expected: `pip install "recurrentgemma[torch]"` is enough for the PyTorch model of the package, as there are extras
# `jax` and `torch` side by side and the PyTorch modules import nothing of JAX.
# Seen: ModuleNotFoundError: the package's own __init__ imports its JAX half first, so neither `import recurrentgemma` nor
# `import recurrentgemma.torch` works until jax and flax are installed too.
# Why a user minds: a machine set up for PyTorch, or its CI, fails at the import of a package that installed without a
# complaint, and needs a second framework if it is to work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 "recurrentgemma[torch]==1.0.1"
cd "$folder"
for module in recurrentgemma recurrentgemma.torch; do
    if seen=$("$folder/venv/bin/python" -W ignore -c "import $module" 2>&1); then
        echo "import $module: works" && exit 1
    fi
    line=$(tail -n 1 <<<"$seen")
    echo "import $module: $line"
    [[ $line == "ModuleNotFoundError: No module named '"@(jax|flax)"'" ]]
done
