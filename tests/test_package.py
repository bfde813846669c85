"""What an installation is: the wheel's contents, a clean environment it works in, and what importing it costs."""

import os
import shutil
import stat
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import seqzoo

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("numba", "wandb", "hydra", "matplotlib", "pooch", "rich", "lightning_fabric", "lightning", "triton")


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """What a command prints, in an environment without Python's own variables; fails on another exit status."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel built, without network, from a copy of the repository: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"

    def leave(inside: str, names: list[str]) -> set[str]:
        everywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")(inside, names)
        return everywhere | ({"runs", "data", "wandb"} if Path(inside) == ROOT else set())

    shutil.copytree(ROOT, source, symlinks=True, ignore=leave)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def environment(wheel, tmp_path_factory):
    """A virtual environment with the wheel installed; dependencies are found where this process finds them.

    A path file reaches them and, unlike `--system-site-packages`, does not run the path files it finds there, so an
    editable installation of the project stays out.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    parents = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(parents))
    return python


def test_wheel_holds_kernels_and_configurations_as_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}
        assert {name.split("/")[0].split("-")[0] for name in names} == {"seqzoo"}
        for folder, pattern in (("kernels", "*.py"), ("configs", "*.yaml")):
            files = list((ROOT / folder).rglob(pattern))
            assert files
            for path in files:
                inside = f"seqzoo/{path.relative_to(ROOT).as_posix()}"
                assert inside in names
                assert not stat.S_ISLNK(archive.getinfo(inside).external_attr >> 16)
                assert archive.read(inside) == path.read_bytes()
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "seqzoo").rglob("*.py")} <= names
        assert "seqzoo/py.typed" in names


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert seqzoo.__version__ == project["version"] == cited["version"]
    assert (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changelog\n\n## {seqzoo.__version__} (")
    assert cited["license"] == project["license"]
    assert cited["authors"] == project["authors"]


def test_installed_package_works_outside_the_repository(environment, tmp_path):
    program = """
import importlib.util
import seqzoo, seqzoo.kernels
from seqzoo.config import compose
print(seqzoo.__file__)
print(seqzoo.kernels.__file__)
print(compose(["model=lru"]).model.name)
assert importlib.util.find_spec("kernels") is None
assert importlib.util.find_spec("configs") is None
"""
    package, kernels, model = run(environment, "-I", "-c", program, cwd=tmp_path).splitlines()[-3:]
    assert Path(package).is_relative_to(environment.parents[1])
    assert Path(kernels).is_relative_to(Path(package).parent)
    assert model == "lru"


def test_installed_commands_start(environment, tmp_path):
    program = """
from importlib.metadata import distribution
print(sorted(command.name for command in distribution("seqzoo").entry_points if callable(command.load())))
"""
    assert run(environment, "-I", "-c", program, cwd=tmp_path).strip() == "['seqzoo-eval', 'seqzoo-train']"
    assert run(environment.parent / "seqzoo-eval", cwd=tmp_path, status=2).startswith("usage: seqzoo-eval FOLDER")


def test_import_brings_nothing_heavy(tmp_path):
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
before = set(sys.modules)
import seqzoo
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    brought = run(sys.executable, "-c", program, cwd=tmp_path).split()
    assert "seqzoo" in brought
    assert set(brought).isdisjoint(HEAVY)


@pytest.mark.slow
def test_import_costs_little_more_than_torch(tmp_path):
    """The fastest of five fresh interpreters each, taken in turns so that a busy machine slows both."""
    program = (
        "import sys, time; sys.path.insert(0, {!r}); t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    )

    def seconds(module: str) -> float:
        return float(run(sys.executable, "-c", program.format(str(ROOT), module), cwd=tmp_path))

    pairs = [(seconds("torch"), seconds("seqzoo")) for _ in range(5)]
    torch_alone, seqzoo = map(min, zip(*pairs, strict=True))
    assert seqzoo <= 1.3 * torch_alone, f"import seqzoo takes {seqzoo:.2f} s, import torch {torch_alone:.2f} s"


def test_a_package_of_the_name_kernels_is_not_found_in_a_checkout():
    """transformers imports one if it can; a second import of ours would register its operators anew."""
    script = (
        "import sys, seqzoo.kernels, kernels\n"
        "assert kernels.__file__ is None\n"
        "assert not [name for name in sys.modules if name.startswith('kernels.')]"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
