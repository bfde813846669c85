"""Run folders: their names, what lies in them, and when one run's pretraining may serve another.

<runs_dir>/<task>-<model>-<recipe>-<none|masked|causal|joint-w<weight>-p<passes>[-whole<share>]>[-augmented][-packed]-s<seed>-<hash>/
    config.yaml  task.json  metrics.jsonl  result.json  lock
    pretrain/    key  summary.json  best.safetensors  last.safetensors
    finetune/    best.safetensors  last.safetensors
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import NoneType
from typing import Any

from .. import records, study
from ..config import Config, ConfigError, SearchConfig, from_dict, to_dict
from ..extras import require
from ..files import inside, lock, remove_left, write_json, write_text
from ..messages import say_once, unknown
from ..objectives import DRAWS
from ..records import NUMBER
from ..settings import OF_FINE_TUNING, WITHOUT_EFFECT, unused
from ..spec import TaskSpec
from ..tasks import Fingerprint, Task, fingerprint, origin_of
from ..tasks.identity import digest_of_arrays
from ..training import TrainingError
from ..training.optimizer import recorded

BUSY = 4  # the status of an attempt at what another process has in hand
WITHOUT_WEIGHTS = "a line of a study has no weights; valid: the folder of a run that trained here"
SIZES = ("vocab_size", "max_length", "num_classes", "channels", "num_inputs")  # in a task.json
LARGEST_SIZE = 1 << 20
AGAIN = "a copy of the run has it as it was; without one, delete the folder, and the same command trains anew"
TASK = {  # the shape of a task.json, see `records.check`: a `TaskSpec`, and the `Fingerprint` of its data
    **{"name": str, "kind": str, "vocab_size": int, "max_length": int, "num_classes": int, "answer?": str},
    **{"channels?": int, "pad_id?": int, "mask_id?": (int, NoneType), "num_inputs?": int, "mask_ratio?": NUMBER},
    **{"mean": [NUMBER], "std": [NUMBER], "data?": {"sha256": str, "source": str}},
    "symbols?": [str],  # what each id stands for, of text
}
SUMMARY = {  # what fine-tuning, and its result, take from a pretraining's
    **dict.fromkeys(("tokens_seen", "seconds", "tokens_per_second", "lr"), NUMBER),
    **dict.fromkeys(("token_budget", "epochs?", "mfu?", "cpu_share?"), (*NUMBER, NoneType)),
    **{"optimizer?": str, "precision?": str, "hardware?": str},
    "learnt?": ({"learnt": bool, "loss": NUMBER, "symbols": NUMBER, "neighbours": NUMBER}, NoneType),
}
RESULT = {  # what is said of a finished run
    **{"model": str, "task": str, "task_note": str, "n_test": int, "majority": NUMBER},
    "test": {"accuracy": NUMBER, "bits_per_character?": NUMBER},
}
FOLDERS = ("pretrain", "finetune", "wandb", ".wandb", "tensorboard")  # that a run, or W&B, makes in its own
# The head of a classifier and dropout are fine-tuning's own business.
MAY_DIFFER = ("model.pooling", "model.head", "model.dropout", "task.workers")


class Busy(TrainingError):
    """What another process has in hand; it can be had when that process has ended."""

    status = BUSY


def run_name(config: Config, task: Task | None = None) -> str:
    """The name of a run's folder; equal for two runs if and only if they compute the same.

    Args:
        config: its configuration.
        task: the user's own, if it is not the one that `config` names.

    Raises:
        DataError: the task reads a text of the user's that is not there, or published files that are damaged.
    """
    name = config.task.name if task is None else task.spec.name
    return f"{cell_name(config, name)}-s{config.seed}-{_digest(config, task)}"


def pretraining_key(config: Config, task: Task | None = None) -> str:
    """Equal for two runs, of `pretrain=true`, if and only if their pretraining is the same; see `run_name`."""
    # The head is counted in a size that widths are fitted to.
    dropped = tuple(name for name in OF_FINE_TUNING if config.size is None or name != "model.head")
    return _digest(config, task, without=dropped)


def shared_pretraining(config: Config, folder: Path, key: str) -> Path | None:
    """The run folder whose finished pretraining has this key: `folder` itself, or another one beside it, or None.

    Raises:
        Busy: it is not finished, and another process is at work on it.
    """
    if finished := finished_pretraining(config, folder, key):
        return finished
    for other in _with_pretraining(config, folder, key):
        with in_hand(other):
            pass
    return None


def finished_pretraining(config: Config, folder: Path, key: str) -> Path | None:
    """As `shared_pretraining`, but None also where another process is at work on it."""
    runs = (folder, *_with_pretraining(config, folder, key))
    return next((run for run in runs if (run / "pretrain" / "summary.json").exists()), None)


def _with_pretraining(config: Config, folder: Path, key: str) -> list[Path]:
    """Runs beside `folder` that have a pretraining of this key, be it finished or not."""
    keys = folder.parent.glob(f"*-{config.model.name}-*-s{config.seed}-*/pretrain/key")
    return [path.parents[1] for path in sorted(keys) if path.parents[1] != folder and _key_in(path) == key]


def _key_in(path: Path) -> str | None:
    try:
        return records.read_text(path, records.LARGEST)
    except ValueError:
        return None


@contextmanager
def in_hand(folder: Path) -> Iterator[None]:
    """Keeps every other process from a run while it lasts.

    Raises:
        Busy: another process has it.
        LinkError: a folder in it, or its lock, is a symbolic link.
    """

    def busy() -> None:
        raise Busy(f"another process is at work on {folder}; the same command later goes on")

    folder.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        inside(folder, name)
    with lock(folder / "lock", busy):
        remove_left(folder, "pretrain", "finetune")
        yield


def finished_run(folder: Path) -> Path | None:
    """Where the run of this folder has ended: there, or as a line of a study beside it; None: it has not.

    Raises:
        ConfigError: its result is damaged.
    """
    if read_result(folder, RESULT) is not None:
        return folder
    return study.packed_run(folder.parent, folder.name)


def require_weights(run: Path) -> None:
    """Raises ConfigError for a line of a study."""
    if study.is_packed(run):
        raise ConfigError(f"{run}: {WITHOUT_WEIGHTS}")


def cell_name(config: Config, task: str) -> str:
    """What the seeds of an experiment have in common in their names."""
    objective = config.objective if config.pretrain else "none"
    if config.objective == "joint":
        objective = f"joint-w{config.joint.weight:g}-p{config.joint.passes}"
        objective += f"-whole{whole:g}" if (whole := config.joint.whole) else ""
    marks = f"{'-augmented' if config.augment else ''}{'-packed' if config.packing else ''}"
    return f"{task}-{config.model.name}-{config.recipe}-{objective}{marks}"


def joint_record(config: Config) -> dict[str, Any]:
    """How a run learns in one phase."""
    return {**asdict(config.joint), **({"draws": DRAWS} if config.joint.whole else {})}


def write_description(folder: Path, config: Config, task: Task) -> None:
    """`config.yaml` and `task.json`, from which `read_config` and `read_spec` rebuild the run, `check_task` knows its
    data again, and `read_symbols` what its ids stand for."""
    from omegaconf import OmegaConf

    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    symbols = {"symbols": list(task.symbols)} if task.symbols else {}
    write_json(folder / "task.json", {**asdict(task.spec), "data": fingerprint(task)._asdict(), **symbols})


def read_config(folder: Path) -> Config:
    """The configuration a run was started with.

    Raises:
        ConfigError: `folder` is not a run folder, or its config.yaml is more than plain values, or not valid.
    """
    require("a run folder", "omegaconf", "yaml")
    path = folder / "config.yaml"
    try:
        return from_dict(study.read(path))
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; {AGAIN}") from None


def read_spec(folder: Path) -> TaskSpec:
    """The task a run was trained on.

    Raises:
        ConfigError: `folder` has no task.json, or one that cannot be read.
    """
    values = _read_task(folder)
    for key in ("data", "symbols"):
        values.pop(key, None)
    try:
        return spec_of(values)
    except ValueError as error:
        raise ConfigError(f"{folder / 'task.json'}: {error}") from None


def spec_of(values: Mapping[str, Any]) -> TaskSpec:
    """The description of a task in values of the shape `TASK`.

    Raises:
        ValueError: a size is out of range.
    """
    for key in SIZES:
        if not 1 <= (value := values.get(key, 1)) <= LARGEST_SIZE:
            raise ValueError(f"{key}={value!r}: valid: 1 to {LARGEST_SIZE:,}")
    return TaskSpec(**{**values, **{key: tuple(values[key]) for key in ("mean", "std")}})


def read_symbols(folder: Path) -> tuple[str, ...] | None:
    """What each id of the run's task stands for; None: its folder does not say, as older ones do not.

    Raises:
        ConfigError: as `read_spec` does, or there are others than one for each id.
    """
    values = _read_task(folder)
    symbols = values.get("symbols")
    if symbols is not None and len(symbols) != values["vocab_size"]:
        raise ConfigError(
            f"{folder / 'task.json'}: {len(symbols):,} symbols for ids up to {values['vocab_size'] - 1:,}; {AGAIN}"
        )
    return None if symbols is None else tuple(symbols)


def _read_task(folder: Path) -> dict[str, Any]:
    path = folder / "task.json"
    values = read_json(path, TASK, AGAIN)
    if values is None:
        raise ConfigError(f"{folder} is not a run folder: it has no task.json")
    if others := sorted(values.keys() - {key.rstrip("?") for key in TASK}):
        raise ConfigError(f"{path}: {unknown('key', others[0], (key.rstrip('?') for key in TASK))}; {AGAIN}")
    return values


def checked_task(folder: Path, config: Config, task: Task | None, build: Callable[[], Task]) -> Task:
    """The task of the run in `folder`: `task`, or else what `build` makes; if begun, what it was trained on so far.

    Raises:
        ConfigError: the run needs `task` and got none; or as `check_task` does.
    """
    begun = study.exists(folder / "task.json")
    if task is not None:
        task = replace(task, folder=None)  # its arrays may be others by now
    elif begun and (name := read_spec(folder).name) != config.task.name:
        raise ConfigError(f"{folder} was trained on the user's own task {name!r}: pass it as task=")
    else:
        task = build()
    if begun:
        check_task(folder, task)
    return task


def check_task(folder: Path, task: Task) -> None:
    """Holds `task` against what the run in `folder` was trained on.

    A run of an earlier version, which did not note its data, is let through, and that is said once.

    Raises:
        ConfigError: it was trained on another task, or on other data; says both.
    """
    spec = read_spec(folder)
    if task.spec != spec:
        raise ConfigError(f"{folder} was trained on another task: {spec}, given {task.spec}")
    noted = _read_task(folder).get("data")
    if noted is None:
        say_once(f"{folder} does not say which data it was trained on, being of an earlier version: not compared")
        return
    there, here = Fingerprint(**noted), fingerprint(task)
    if there.sha256 != here.sha256:
        raise ConfigError(
            f"{folder} was trained on other data: {there}; given: {here}. Give it its own, from where data_dir and "
            f"cache_dir in {folder / 'config.yaml'} say, or train anew on these in another runs_dir"
        )


def read_json(path: Path, shape: Mapping[str, Any], advice: str) -> dict[str, Any] | None:
    """A JSON file of a run, in its folder or its line of a study, or None where there is none.

    Args:
        shape: what is needed of it, see `records.check`.
        advice: what to do where it is damaged.

    Raises:
        ConfigError: it cannot be read, or is not of that shape.
    """
    try:
        value = study.read(path)
        records.check(value, shape)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; {advice}") from None
    return value


def read_result(folder: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """A run's `result.json`, of which `shape` is needed, or None: it has none yet.

    Raises:
        ConfigError: it is damaged.
    """
    return read_json(folder / "result.json", shape, "delete it, and the same command tests the run once more")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """`summary.json` of a pretraining in the run `folder`, or None: it has not ended.

    Raises:
        ConfigError: it is damaged.
    """
    advice = f"delete {folder / 'pretrain'} to pretrain from the beginning"
    return read_json(folder / "pretrain" / "summary.json", SUMMARY, advice)


def reusable_pretraining(config: Config, task: Task) -> dict[str, Any]:
    """The summary of the pretraining in the folder `config.pretrain`, once it is known to suit `config`, with its
    precision.

    Raises:
        ConfigError: it is no run folder, its pretraining is unfinished, or the two runs differ in their data or in a
            key that the backbone depends on; names the key.
    """
    folder = Path(config.pretrain)
    if study.is_packed(folder):
        raise ConfigError(f"pretrain={folder}: {WITHOUT_WEIGHTS}")
    if not folder.is_dir():
        raise ConfigError(f"pretrain={folder}: no such folder; valid: true, false, or the folder of a run")
    there, here = read_config(folder), config
    for key in ("causal", "objective", "pixel_loss", "size", "train_fraction", "augment", "packing", "model", "task"):
        for name, (theirs, ours) in _differences(key, getattr(there, key), getattr(here, key)):
            if name not in MAY_DIFFER:
                raise ConfigError(f"pretrain={folder}: {name} is {theirs} there and {ours} here")
    for name, (theirs, ours) in _differences("task", read_spec(folder), task.spec):
        raise ConfigError(f"pretrain={folder}: {name} is {theirs} there and {ours} here")
    check_task(folder, task)
    summary = read_summary(folder)
    if summary is None:
        raise ConfigError(f"pretrain={folder}: that run has no finished pretraining of its own")
    return {"precision": there.precision, **summary}


def _differences(prefix: str, there: Any, here: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if not hasattr(there, "__dataclass_fields__"):
        if there != here:
            yield prefix, (there, here)
        return
    theirs, ours = asdict(there), asdict(here)
    for key in theirs:
        if theirs[key] != ours[key]:
            yield f"{prefix}.{key}", (theirs[key], ours[key])


def _digest(config: Config, task: Task | None, *, without: tuple[str, ...] = ()) -> str:
    """Of everything that shapes what `config` computes but the keys `without`."""
    shaping = to_dict(config)
    if isinstance(config.pretrain, str):
        shaping["pretrain"] = _pretraining_of(Path(config.pretrain))
    dropped = [*WITHOUT_EFFECT, *unused(shaping), *without]
    # What they were before there was a choice counts as a key that is not there, see below.
    if config.objective == "joint":
        shaping["joint"] = joint_record(config)
        dropped += [] if config.joint.whole else ["joint.whole"]
    dropped += ["tuning"] if config.tuning == "full" else []
    dropped += ["model.init"] if config.model.init == "structured" else []
    dropped += ["search"] if config.search == SearchConfig() else []
    dropped += [name for name in ("augment", "packing") if not getattr(config, name)]
    for name in ("pretraining", "finetuning"):
        optimizer = getattr(config, name).optimizer
        shaping[name]["optimizer"] = None if optimizer == "adamw" else recorded(optimizer)
    for key in dropped:
        _drop(shaping, key)
    if task is not None:
        shaping["task"] = {"spec": asdict(task.spec), "data": digest_of_arrays(task)}
    else:  # what the data are, not where: data_dir itself has no effect
        shaping["task"] |= origin_of(config.task, data_dir=config.data_dir, cache_dir=config.cache_dir)
    # A key that is not set counts as one that is not there: adding an option leaves the names of old runs as they are.
    return hashlib.sha256(json.dumps(_without_none(shaping), sort_keys=True).encode()).hexdigest()[:8]


def _pretraining_of(folder: Path) -> str:
    """What tells the pretraining there from others: its run's name, and beside a name that it was given, its key."""
    key = folder / "pretrain" / "key"
    if re.fullmatch(r".+-s\d+-[0-9a-f]{8}", folder.name) or not key.exists():
        return folder.name
    return f"{folder.name} {_key_in(key)}"


def _drop(values: dict[str, Any], key: str) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    values.pop(last, None)


def _without_none(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _without_none(value) for key, value in values.items() if value is not None}
