"""Run folders: their names, what lies in them, and when one run's pretraining may serve another.

<runs_dir>/<task>-<model>-<recipe>-<none|masked|causal>-s<seed>-<hash>/
    config.yaml  task.json  metrics.jsonl  result.json  lock
    pretrain/    key  summary.json  best.safetensors  last.safetensors
    finetune/    best.safetensors  last.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import Config, ConfigError, from_dict, to_dict
from ..spec import TaskSpec
from ..tasks import Task
from ..tasks.char_lm import read_text
from .checkpoint import replacing
from .errors import Busy

# Where a run reads, writes and computes, which is not what it computes.
WITHOUT_EFFECT = (
    *("runs_dir", "data_dir", "cache_dir", "wandb", "device", "resume", "task.workers"),
    *("budget", "launcher"),
)
OF_PRETRAINING = ("objective", "pixel_loss", "pretraining")
OF_FINE_TUNING = (
    *("finetuning", "tuning", "lora", "ladder", "pretrain", "recipe", "n_test"),
    *("model.pooling", "model.head"),
)
# The head of a classifier and dropout are fine-tuning's own business.
MAY_DIFFER = ("model.pooling", "model.head", "model.dropout", "task.workers")


def run_name(config: Config, task: Task | None = None) -> str:
    """The name of a run's folder; equal for two runs if and only if they compute the same.

    Args:
        config: its configuration.
        task: the user's own, if it is not the one that `config` names.

    Raises:
        DataError: the task reads a text of the user's that is not there.
    """
    dropped = () if config.pretrain is True else OF_PRETRAINING
    name = config.task.name if task is None else task.spec.name
    return f"{cell_name(config, name)}-s{config.seed}-{_digest(config, task, without=dropped)}"


def pretraining_key(config: Config, task: Task | None = None) -> str:
    """Equal for two runs, of `pretrain=true`, if and only if their pretraining is the same; see `run_name`."""
    return _digest(config, task, without=OF_FINE_TUNING)


def shared_pretraining(config: Config, folder: Path, key: str) -> Path | None:
    """The run folder whose finished pretraining has this key: `folder` itself, or another one beside it, or None.

    Raises:
        Busy: it is not finished, and another process is at work on it.
    """
    if (folder / "pretrain" / "summary.json").exists():
        return folder
    beside = folder.parent.glob(f"*-{config.model.name}-*-s{config.seed}-*/pretrain/key")
    same = [path.parent for path in sorted(beside) if path.read_text() == key and path.parents[1] != folder]
    for pretraining in same:
        if (pretraining / "summary.json").exists():
            return pretraining.parent
    for pretraining in same:
        with in_hand(pretraining.parent):
            pass
    return None


@contextmanager
def in_hand(folder: Path) -> Iterator[None]:
    """Keeps every other process from a run while it lasts.

    Raises:
        Busy: another process has it.
    """
    import fcntl  # POSIX only, so not where the module is imported

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is at work on {folder}; the same command later goes on") from None
        yield


def cell_name(config: Config, task: str) -> str:
    """What the seeds of an experiment have in common in their names."""
    return f"{task}-{config.model.name}-{config.recipe}-{config.objective if config.pretrain else 'none'}"


def write_description(folder: Path, config: Config, spec: TaskSpec) -> None:
    """`config.yaml` and `task.json`, from which `read_config` and `read_spec` rebuild the run."""
    from omegaconf import OmegaConf

    with replacing(folder / "config.yaml") as temporary:
        OmegaConf.save(OmegaConf.create(to_dict(config)), temporary)
    write_json(folder / "task.json", asdict(spec))


def read_config(folder: Path) -> Config:
    """The configuration a run was started with.

    Raises:
        ConfigError: `folder` is not a run folder.
    """
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    return from_dict(OmegaConf.to_container(OmegaConf.load(path)))


def read_spec(folder: Path) -> TaskSpec:
    """The task a run was trained on."""
    values: dict[str, Any] = json.loads((folder / "task.json").read_text())
    values |= {key: tuple(values[key]) for key in ("mean", "std")}
    return TaskSpec(**values)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file that is there as a whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def reusable_pretraining(config: Config, spec: TaskSpec) -> dict[str, Any]:
    """The summary of the pretraining in the folder `config.pretrain`, once it is known to suit `config`.

    Raises:
        ConfigError: it is no run folder, its pretraining is unfinished, or the two runs differ in a key that the
            backbone depends on; names the key.
    """
    folder = Path(config.pretrain)
    if not folder.is_dir():
        raise ConfigError(f"pretrain={folder}: no such folder; valid: true, false, or the folder of a run")
    there, here = read_config(folder), config
    for key in ("causal", "objective", "size", "train_fraction", "model", "task"):
        for name, (theirs, ours) in _differences(key, getattr(there, key), getattr(here, key)):
            if name not in MAY_DIFFER:
                raise ConfigError(f"pretrain={folder}: {name} is {theirs} there and {ours} here")
    for name, (theirs, ours) in _differences("task", read_spec(folder), spec):
        raise ConfigError(f"pretrain={folder}: {name} is {theirs} there and {ours} here")
    summary = read_json(folder / "pretrain" / "summary.json")
    if summary is None:
        raise ConfigError(f"pretrain={folder}: that run has no finished pretraining of its own")
    return summary


def _differences(prefix: str, there: Any, here: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if not hasattr(there, "__dataclass_fields__"):
        if there != here:
            yield prefix, (there, here)
        return
    theirs, ours = asdict(there), asdict(here)
    for key in theirs:
        if theirs[key] != ours[key]:
            yield f"{prefix}.{key}", (theirs[key], ours[key])


def _digest(config: Config, task: Task | None, *, without: tuple[str, ...]) -> str:
    """Of everything that shapes what `config` computes but the keys `without`."""
    shaping = to_dict(config)
    if isinstance(config.pretrain, str):
        shaping["pretrain"] = Path(config.pretrain).name
    unused = [name for name in ("lora", "ladder") if name != config.tuning]
    # What they were before there was a choice counts as a key that is not there, see below.
    unused += ["tuning"] if config.tuning == "full" else []
    unused += ["model.init"] if config.model.init == "structured" else []
    for key in (*WITHOUT_EFFECT, *unused, *without):
        _drop(shaping, key)
    if task is not None:
        shaping["task"] = {"spec": asdict(task.spec), "data": _fingerprint(task)}
    elif config.task.text is not None:  # what it says, not where it is: data_dir has no effect
        data_dir = None if config.data_dir is None else Path(os.path.expanduser(config.data_dir))
        shaping["task"]["text"] = hashlib.sha256(read_text(config.task.text, data_dir)[1]).hexdigest()
    # A key that is not set counts as one that is not there: adding an option leaves the names of old runs as they are.
    return hashlib.sha256(json.dumps(_without_none(shaping), sort_keys=True).encode()).hexdigest()[:8]


def _drop(values: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    values.pop(last, None)


def _without_none(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_none(value) for key, value in values.items() if value is not None}


def _fingerprint(task: Task) -> str:
    digest = hashlib.sha256()
    for split in (task.train, task.val, task.test):
        for tensor in (split.values, split.lengths, split.labels, split.targets):
            if tensor is not None:
                digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
