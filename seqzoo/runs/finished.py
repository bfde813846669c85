"""What a run has left: its trained model, and its test."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config, ConfigError
from ..messages import printable_lines
from ..models import task_head
from ..objectives import build_objective
from ..records import NUMBER, is_name
from ..tasks import Task
from ..training.checkpoint import load_weights
from ..training.evaluation import evaluate
from ..training.transfer import require_fit, transfer_backbone
from ..training.tuning import tune
from .feasible import check_model
from .folder import checked_task, read_config, read_result, read_spec, require_weights
from .parts import build_fabric, model_of, part_of, task_of

LOADABLE = ("initial", "pretrain", "finetune")
# The share of answers that another order of summation may turn: those whose two best scores are as good as equal.
# Scores differ by about 1 between classes, and by rounding, over all layers, a few times 1e-4 or, in bf16, 1e-2.
ROUNDING = {"fp32": 1e-3, "bf16": 1e-2}


def load(run_folder: str | Path, stage: str = "finetune") -> nn.Module:
    """The classifier of a run as it was after `stage`, in eval mode on the CPU.

    Args:
        run_folder: its folder.
        stage: "finetune", the weights of its best validation; "pretrain", the backbone of pretraining's best validation
            under a new head; or "initial", what the run's seed makes of it.

    Raises:
        ConfigError: `run_folder` is not a run folder, or had no pretraining, or one that is not there, or there is no
            such stage.
        TrainingError: its weights are missing or damaged.
    """
    folder = Path(run_folder)
    require_weights(folder)
    config, spec = read_config(folder), read_spec(folder)
    if stage not in LOADABLE:
        raise ConfigError(f"stage={stage}: valid: {', '.join(LOADABLE)}")
    if stage == "pretrain" and not config.pretrain:
        raise ConfigError(f"stage=pretrain: {folder} was trained from scratch; valid: initial, finetune")
    with torch.device("meta"):  # nothing is allocated for a model that its weights or this machine do not know
        model = model_of(config, spec, task_head(spec))
        if stage == "finetune":
            model = tune(model, config)
    check_model(model, torch.device("cpu"))
    weights, path = {}, folder / "finetune" / "best.safetensors"
    if stage == "finetune":
        weights = load_weights(path)
        require_fit(model, weights, path)
    model = model_of(config, spec, task_head(spec))
    if stage == "finetune":
        model = tune(model, config)
        model.load_state_dict(weights)
    elif stage == "pretrain":
        named = _beside(folder)
        given = Path(config.pretrain) if isinstance(config.pretrain, str) else None
        source = given if given and given.exists() else named or folder
        path = source / "pretrain" / "best.safetensors"
        if source != folder and not path.is_file():
            raise ConfigError(
                f"{folder}: {str(path)!r}, which it was fine-tuned from, is not there; a run that is moved needs "
                "the one whose pretraining it shares moved too"
            )
        transfer_backbone(model, path)
    return model.eval()


def evaluate_run(
    run_folder: str | Path, *, data_dir: str | Path | None = None, task: Task | None = None
) -> dict[str, Any]:
    """Test metrics of a run's best weights: {"model", "task", "accuracy", "loss", "n_test", "folder"}, of text also
    "bits_per_character".

    Where the accuracy is not that of the run's own result, by more than rounding explains, that is said on stderr.

    Args:
        run_folder: its folder.
        data_dir: where the data are now, if not where the run found them.
        task: the data, for a run on a task of the user's own.

    Raises:
        ConfigError: `run_folder` is not a run folder, or needs `task` and got none, or got another one.
        DataError: the data are missing or damaged.
        TrainingError: its weights are missing or damaged.
    """
    folder = Path(run_folder)
    model = load(folder)
    config, spec = read_config(folder), read_spec(folder)
    if data_dir is not None:
        config.data_dir = str(data_dir)
    device = "cpu" if config.device == "cpu" else "auto"  # a GPU trained it, and there may be none here
    fabric = build_fabric(replace(config, device=device, strategy="auto", sequence_parallel=1))
    task = checked_task(folder, config, task, lambda: task_of(config, fabric, read=True))
    test = part_of(task.test, config.n_test)
    metrics = evaluate(
        model.to(fabric.device),
        build_objective("task", spec),
        test.to(fabric.device),
        batch_size=config.finetuning.batch_size,
        fabric=fabric,
    )
    if fabric.is_global_zero:
        _compare(folder, config, metrics["accuracy"], len(test))
    return {"model": config.model.name, "task": spec.name, **metrics, "n_test": len(test), "folder": str(folder)}


def _beside(folder: Path) -> Path | None:
    """The run folder whose pretraining a run reused, by the name that its result gives; None: it was its own.

    Raises:
        ConfigError: it is not the name of a folder beside it.
    """
    name = (read_result(folder, {}) or {}).get("pretrain_run")
    if name is None:
        return None
    if not is_name(name):
        raise ConfigError(f"{folder / 'result.json'}: pretrain_run={name!r}: valid: the name of a folder beside it")
    return folder.parent / name


def _compare(folder: Path, config: Config, accuracy: float, n: int) -> None:
    """Says where an accuracy on `n` test examples is not what the run's own result has, if it has one."""
    before = (read_result(folder, {"test?": {"accuracy?": NUMBER}}) or {}).get("test", {}).get("accuracy")
    explained = max(1 / n, ROUNDING[config.precision])
    if before is not None and abs(accuracy - before) > explained + 1e-9:
        said = (
            f"{folder}: the accuracy is {accuracy:.4f} here and {before:.4f} in its result.json. Rounding explains "
            f"{explained:.4f} of difference, on {n:,} examples in {config.precision}; more says that weights, data or "
            "code are not what they were"
        )
        print(printable_lines(said), file=sys.stderr)
