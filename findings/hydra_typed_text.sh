#!/usr/bin/env bash
# hydra-core 1.3.8: an override of a key whose type is `str` is read as a number first, and comes out as other text.
#
# Expected: with a structured configuration that declares `name: str`, `name=2024_11_28` gives "2024_11_28". Seen: Hydra's
# grammar parses values before it knows their type: the result is "20241128", and `name=1.10` gives "1.1"; both are valid
# strings for OmegaConf, so nothing is said. Output: "{'2024_11_28': '20241128', '1.10': '1.1', '007': '007'}".
# Why a user minds: folders of runs named by date or version become other folders, and a script that looks for the one it
# asked for finds nothing. Quoting inside the argument ('name="1.10"') keeps the text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 omegaconf==2.3.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
import tempfile


@dataclass
class Config:
    name: str = ""


ConfigStore.instance().store(name="config", node=Config)
seen = {}
with tempfile.TemporaryDirectory() as folder, initialize_config_dir(folder, version_base="1.3"):
    for text in ("2024_11_28", "1.10", "007"):
        seen[text] = compose("config", [f"name={text}"]).name
    quoted = compose("config", ['name="1.10"']).name
print(seen, "quoted:", repr(quoted))
assert seen == {"2024_11_28": "20241128", "1.10": "1.1", "007": "007"}, "text is kept as it stands now"
assert quoted == "1.10"
PYTHON
