"""What an installation is: the wheel's contents, a clean environment it works in, and what importing it costs."""

import os
import shutil
import stat
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import seqzoo
from seqzoo.extras import TRAIN

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


WITHOUT_THE_EXTRA = f"""
import sys
for name in {[*TRAIN, "triton", "einops"]}:
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import torch, seqzoo, seqzoo.models
from seqzoo.analysis import mixing_matrix
from seqzoo.extras import MissingPackages
"""


def test_blocks_need_torch_numpy_and_numba_alone(tmp_path):
    program = """
for name in seqzoo.BLOCKS:
    for causal in (True, False):
        block = seqzoo.build_block(name, 16, causal=causal)
        x = torch.randn(1, 5, 16, requires_grad=True)
        block(x).sum().backward()
        assert x.grad.isfinite().all()
mixing_matrix(seqzoo.build_block("gla", 16), x)
print("done")
"""
    assert run(sys.executable, "-c", WITHOUT_THE_EXTRA + program, cwd=tmp_path).endswith("done\n")


def test_commands_say_what_to_install(tmp_path):
    program = """
from seqzoo.analysis.__main__ import main as analyse
from seqzoo.report.cli import main as report
from seqzoo.runs.cli import main as train
from seqzoo.tasks.__main__ import main as tasks
commands = (train, ["seed=1"]), (report, ["checkpoint=."]), (analyse, ["."]), (tasks, ["prepare", "lra_listops"])
for main, arguments in commands:
    assert main(arguments) == 2, main
try:
    seqzoo.load(".")
except MissingPackages as error:
    print(error)
"""
    needed = f"{', '.join(TRAIN)}: pip install 'seqzoo[train]'"
    said = run(sys.executable, "-c", WITHOUT_THE_EXTRA + program, cwd=tmp_path).splitlines()
    commands = ("train.py", "eval_lra.py", "seqzoo.analysis", "seqzoo.tasks")
    assert [line.split(":")[0] for line in said[1:]] == [*commands]
    assert all(line.endswith(needed) for line in said)
    assert said[0].startswith("a run folder needs ")


def test_the_extra_is_what_is_looked_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {Requirement(line).name.lower() for line in extras["train"]}
    assert named == {packages_distributions()[package][0].lower() for package in TRAIN}
    for other in ("dev", "lora", "slurm"):
        assert any("seqzoo" in line and "train" in line for line in extras[other])


@pytest.mark.slow
def test_a_block_adds_little_to_an_installed_torch(wheel, tmp_path):
    """What pip brings along where PyTorch alone is installed, with a network or pip's own cache."""
    site = tmp_path / "torch"
    site.mkdir()
    wanted, linked = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name not in linked:
            linked.add(name)
            found = distribution(name)
            for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."} - {"__pycache__"}:
                (site / top).symlink_to(found.locate_file(top))
            needed = [Requirement(line) for line in found.requires or ()]
            wanted += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (packages / "torch.pth").write_text(str(site))

    def size() -> float:
        return sum(file.lstat().st_size for file in packages.rglob("*") if file.is_file()) / 1e6

    before = size()
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    added = size() - before
    program = "import torch, seqzoo; print(seqzoo.build_block('mamba', 16)(torch.randn(1, 100, 16)).shape)"
    assert "[1, 100, 16]" in run(python, "-c", program, cwd=tmp_path)
    assert added < 350, f"{added:.0f} MB"
    print(f"{added:.0f} MB: {sorted(path.name for path in packages.iterdir() if path.suffix == '.dist-info')}")


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
