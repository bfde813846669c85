"""What others may rely on: packages by their names, and commands."""

import importlib
import runpy
import sys
import tomllib
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "seqzoo",
    "seqzoo.analysis",
    "seqzoo.blocks",
    "seqzoo.config",
    "seqzoo.hf",
    "seqzoo.interop.onnx",
    "seqzoo.kernels",
    "seqzoo.models",
    "seqzoo.tasks",
    "seqzoo.testing",
)
SCRIPTS = ("train.py", "eval_lra.py")
RUN_AS_MODULES = ("seqzoo.analysis", "seqzoo.blocks", "seqzoo.doctor", "seqzoo.generate", "seqzoo.tasks")
INSTALLED = ("seqzoo-eval", "seqzoo-train")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_hold_what_they_list(name):
    package = importlib.import_module(name)
    for listed in getattr(package, "__all__", ()):
        assert hasattr(package, listed), listed


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("entry", [*SCRIPTS, *RUN_AS_MODULES])
def test_commands_say_what_they_do(entry, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [entry, "--help"])
    run = partial(runpy.run_path, str(ROOT / entry)) if entry in SCRIPTS else partial(runpy.run_module, entry)
    with pytest.raises(SystemExit) as ended:
        run(run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_no_other_package_is_a_command():
    rooms = {path.relative_to(ROOT).parent for path in (ROOT / "seqzoo").rglob("__main__.py")}
    modules = {
        path.relative_to(ROOT).with_suffix("")
        for path in (ROOT / "seqzoo").glob("*.py")
        if "__main__" in path.read_text()
    }
    assert sorted(".".join(found.parts) for found in rooms | modules) == list(RUN_AS_MODULES)


def test_installed_commands_are_there():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert sorted(scripts) == sorted(INSTALLED)
    for name, value in scripts.items():
        assert callable(EntryPoint(name, value, "console_scripts").load())
