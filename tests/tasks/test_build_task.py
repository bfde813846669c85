from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seqzoo.tasks import TASKS, TaskConfig, build_task
from seqzoo.tasks.config import USUAL

CONFIGS = Path(__file__).parents[2] / "configs" / "task"


def load(name: str, **changes) -> TaskConfig:
    raw = OmegaConf.merge(OmegaConf.structured(TaskConfig), OmegaConf.load(CONFIGS / f"{name}.yaml"), changes)
    return OmegaConf.to_object(raw)


def test_unknown_task(tmp_path):
    config = TaskConfig(name="lra_txt", max_length=10, mask_ratio=0.1)
    with pytest.raises(ValueError, match=r"no task 'lra_txt'; valid: acl_retrieval, .*lra_text"):
        build_task(config, data_dir=None, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "max_length", "mask_ratio"),
    [
        ("acl_retrieval", 4000, 0.15),
        ("fsdd", 8192, 0.25),
        ("lra_image", 1024, 0.5),
        ("lra_listops", 2048, 0.1),
        ("lra_pathfinder", 1024, 0.5),
        ("lra_pathx", 16_384, 0.5),
        ("lra_pathx256", 65_536, 0.5),
        ("lra_retrieval", 4000, 0.15),
        ("lra_text", 4096, 0.15),
        ("scifar", 1024, 0.5),
        ("smnist", 784, 0.5),
        ("speech_commands", 16000, 0.25),
    ],
)
def test_every_task_has_a_typed_configuration_file(name, max_length, mask_ratio):
    config = load(name)
    assert (config.name, config.max_length, config.mask_ratio) == (name, max_length, mask_ratio)
    with pytest.raises(OmegaConfBaseException):
        load(name, max_length="long")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_the_file_has_otherwise_is_noted(name):
    usual = load(name)
    assert usual.unusual == ""
    noted = {"val_fraction", "test_fraction", "split_seed", "min_frequency", *USUAL.get(name, ())}
    for key in sorted(noted):
        if (value := getattr(usual, key)) is not None:
            changed = value + (1e-7 if "fraction" in key else 1_234_567 if key == "split_seed" else 1)
            assert load(name, **{key: changed}).unusual == f"{key} {changed}"


def test_whatever_draws_other_pairs_of_papers_is_noted():
    given = {key for key, value in load("acl_retrieval").__dict__.items() if value is not None}
    assert {*USUAL["acl_retrieval"]} == given - {"name", "mask_ratio"}


@pytest.mark.parametrize("name", TASKS)
def test_a_key_of_another_task_is_refused(name, tmp_path):
    foreign = "max_depth" if name != "lra_listops" else "min_frequency"
    with pytest.raises(ValueError, match=f"{name} has no use for {foreign}; valid: name, max_length"):
        build_task(load(name, **{foreign: 3}), data_dir=None, cache_dir=tmp_path)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "speech_commands"])  # which has no key of its own
def test_a_missing_key_is_named(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} needs .*; see configs/task/{name}.yaml"):
        build_task(TaskConfig(name=name, max_length=1024, mask_ratio=0.1), data_dir=None, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"val_fraction": 0.0}, "val_fra"),
        ({"test_fraction": 1.5}, "test_fraction=1.5"),
        ({"num_test": 0}, "num_test=0: valid: 1 or more"),
        ({"workers": -1}, "workers=-1: valid: 1 or more"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**{"name": "lra_text", "max_length": 10, "mask_ratio": 0.1, **change})


def test_heavy_imports_wait_until_they_are_needed():
    command = (
        "import sys, seqzoo.tasks; print([m for m in ('numba', 'pooch', 'rich', 'omegaconf') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
