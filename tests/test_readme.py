"""The Python of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1][:30])
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict = {}
    exec(snippet, names)
    if "result" in names:
        assert names["result"]["test"]["accuracy"] > 0.6
        assert (tmp_path / names["result"]["folder"] / "result.json").exists()


def test_the_commands_name_what_exists():
    from seqzoo.config import available

    for group in ("model", "task", "recipe"):
        for values in re.findall(rf"^    python train.py.*\b{group}=([\w,]+)", README, re.MULTILINE):
            assert set(values.split(",")) <= set(available(group))
        listed = "".join(line for line in README.splitlines() if line.startswith(f"| `{group}=`"))
        assert all(f"`{name}`" in listed for name in available(group))
