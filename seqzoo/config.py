"""The configuration of a run: typed groups, composed by Hydra from `configs/` and the command line's overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from .messages import unknown
from .models import ModelConfig
from .models.size import parse_size
from .tasks import TaskConfig

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("model", "task", "recipe", "launcher")
CHOICES = {
    "objective": ("masked", "causal"),
    "pixel_loss": ("cross_entropy", "l1"),
    "lr": (None, "search"),
    "tuning": ("full", "head", "lora", "ladder"),
    "precision": ("fp32", "bf16"),
    "device": ("auto", "cpu", "cuda"),
    "pretraining.schedule": ("constant", "cosine"),
    "finetuning.schedule": ("constant", "cosine"),
    "launcher.cluster": (None, "local", "slurm"),
    "wandb.mode": (None, "online", "offline", "disabled"),
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, what was given and what is valid."""


@dataclass(kw_only=True)
class StageConfig:
    """How long and how fast one stage, pretraining or fine-tuning, learns."""

    tokens: int | None = None  # budget in tokens, padding not counted; this or `epochs`
    epochs: float | None = None
    batch_size: int = 32
    accumulate: int = 1  # batches summed into one optimiser step
    lr: float = 1e-3
    recurrence_lr_factor: float = 0.5  # learning rate of recurrence parameters (decay rates, phases), times lr
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"  # after the warmup: cosine to zero, or constant
    clip: float | None = None  # largest global gradient norm
    evaluations: int = 10  # validations in the stage; the best one's weights are kept


@dataclass(kw_only=True)
class LoraConfig:
    """Of `tuning=lora`; see `seqzoo.training.lora`."""

    rank: int = 8
    alpha: int = 16  # the product of the low-rank factors counts alpha / rank times
    lr_ratio: float = 16.0  # learning rate of the second factor, which starts at zero, over that of the first


@dataclass(kw_only=True)
class LadderConfig:
    """Of `tuning=ladder`; see `seqzoo.models.ladder`."""

    reduction: int = 8  # d_model over the width of the side network


@dataclass(kw_only=True)
class WandbConfig:
    mode: str | None = None  # null: online when a key is set, else offline
    project: str = "seqzoo"
    entity: str | None = None


@dataclass(kw_only=True)
class LauncherConfig:
    """Where the runs of a sweep are computed."""

    cluster: str | None = None  # null: this process, one run after another; local or slurm: submitit's, a job a run
    parallel: int = 1  # jobs at a time
    options: dict[str, Any] = field(default_factory=dict)  # of submitit's AutoExecutor.update_parameters


@dataclass(kw_only=True)
class Config:
    """Everything a run depends on. `configs/train.yaml` says what each key is for."""

    model: ModelConfig
    task: TaskConfig
    recipe: str
    pretrain: Any = False  # false, true, or the folder of a run whose pretraining is to be reused
    objective: str = "masked"
    causal: bool = False
    size: str | None = None
    lr: str | None = None
    pixel_loss: str = "cross_entropy"
    pretraining: StageConfig = field(default_factory=StageConfig)
    finetuning: StageConfig = field(default_factory=StageConfig)
    share: float | None = None  # of both budgets together, for pretraining; None once the budgets say it
    train_fraction: float | None = None  # of the train split, for both stages; None: all of it
    tuning: str = "full"  # what fine-tuning moves
    lora: LoraConfig = field(default_factory=LoraConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    seed: int = 0
    n_val: int | None = None
    n_test: int | None = None
    precision: str = "fp32"
    device: str = "auto"
    compile: bool = False
    data_dir: str | None = None
    cache_dir: str | None = None
    runs_dir: str = "runs"
    resume: str | None = None
    budget: str | None = None
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `overrides` (Hydra's syntax, `model=lru seed=1 finetuning.lr=3e-4`) ask for.

    Raises:
        ConfigError: an unknown group entry or key, or a value of the wrong type; names the valid ones.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_choices_of_groups(overrides)
    ConfigStore.instance().store(name="schema", node=Config)
    # A block's options are its class's, a launcher's are submitit's, neither the configuration's: any may be added, and
    # they name the valid ones.
    free = ("model.block.", "launcher.options.")
    overrides = [f"++{override}" if override.startswith(free) else override for override in overrides]
    try:
        with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            raw = hydra_compose("train", overrides=overrides)
        plain = OmegaConf.to_container(raw, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from None
    return from_dict(plain)


def from_dict(plain: Any) -> Config:
    """The typed configuration of a mapping, such as a run folder's `config.yaml`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that is not among the valid ones.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    except ValueError as error:  # raised by a group's own checks
        raise ConfigError(str(error)) from None
    _validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, what `from_dict` reads."""
    from dataclasses import asdict

    return asdict(config)


def seconds(duration: str) -> float:
    """The seconds of a duration like "45s", "9m", "1.5h" or "2d".

    Raises:
        ConfigError: it is not of that form, or is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", duration)
    if not found or float(found[1]) == 0:
        raise ConfigError(f"budget={duration}: valid: a number above 0 and s, m, h or d, such as 9m")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def available(group: str) -> list[str]:
    """The entries of a configuration group, e.g. `available("model")`."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _check_choices_of_groups(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        if key in GROUPS and value not in available(key):
            raise ConfigError(unknown(key, value, available(key)))


def _explain(error: BaseException) -> str:
    """What Hydra or OmegaConf found wrong, in one sentence, with the valid keys where one is unknown."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None:
        return str(error).strip().splitlines()[0]
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and is_dataclass(cause.object_type):
        key = cause.full_key or ""
        prefix = key.rpartition(".")[0]
        names = [f.name for f in fields(cause.object_type)]
        return unknown("key", key, (f"{prefix}.{name}" if prefix else name for name in names))
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


def _validate(config: Config) -> None:
    for key, valid in CHOICES.items():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in valid:
            shown = ", ".join("null" if choice is None else choice for choice in valid)
            raise ConfigError(f"{key}={value}: valid: {shown}")
    if not isinstance(config.pretrain, bool | str):
        raise ConfigError(f"pretrain={config.pretrain}: valid: true, false, or the folder of a run")
    if config.seed < 0:
        raise ConfigError(f"seed={config.seed}: valid: 0 or more")
    if config.launcher.parallel < 1:
        raise ConfigError(f"launcher.parallel={config.launcher.parallel}: valid: 1 or more")
    if config.budget is not None:
        seconds(config.budget)
        if config.launcher.cluster is not None:
            raise ConfigError(
                f"budget={config.budget}: jobs have a limit of their own; valid: launcher.options.timeout_min=<minutes>"
            )
    if config.size is not None:
        try:
            parse_size(config.size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for key, value in (
        ("lora.rank", config.lora.rank),
        ("lora.alpha", config.lora.alpha),
        ("lora.lr_ratio", config.lora.lr_ratio),
        ("ladder.reduction", config.ladder.reduction),
    ):
        if value <= 0:
            raise ConfigError(f"{key}={value}: valid: above 0")
    if config.train_fraction is not None and not 0 < config.train_fraction <= 1:
        raise ConfigError(f"train_fraction={config.train_fraction}: valid: null, or above 0 and up to 1")
    if config.train_fraction == 1:  # the same run as without it, in the same folder
        config.train_fraction = None
    for name in ("pretraining", "finetuning"):
        stage: StageConfig = getattr(config, name)
        if (stage.tokens is None) == (stage.epochs is None):
            raise ConfigError(
                f"{name} takes one budget: tokens or epochs, got tokens={stage.tokens} epochs={stage.epochs}"
            )
        for key, lowest in (("batch_size", 1), ("accumulate", 1), ("evaluations", 1), ("warmup_steps", 0)):
            if getattr(stage, key) < lowest:
                raise ConfigError(f"{name}.{key}={getattr(stage, key)}: valid: {lowest} or more")
    if config.share is not None:
        _split_budget(config, config.share)
    if config.objective == "causal" and config.pretrain:
        config.causal = True


def _split_budget(config: Config, share: float) -> None:
    """Gives pretraining its share of both stages' budgets together, and fine-tuning the rest.

    What is left is the plain configuration of that run, so that it has the same run folder however it was asked for.
    """
    pretraining, finetuning = config.pretraining, config.finetuning
    if not 0 <= share < 1:
        raise ConfigError(f"share={share}: valid: null, or 0 and more and below 1")
    if isinstance(config.pretrain, str):
        raise ConfigError(f"share={share}: pretrain={config.pretrain} has had its budget; valid: pretrain=true")
    if share > 0 and not config.pretrain:
        raise ConfigError(f"share={share}: nothing is pretrained; valid: pretrain=true, or share=0")
    if pretraining.tokens is not None and finetuning.tokens is not None:
        tokens = pretraining.tokens + finetuning.tokens
        pretraining.tokens = round(share * tokens)
        finetuning.tokens = tokens - pretraining.tokens
    elif pretraining.epochs is not None and finetuning.epochs is not None:
        epochs = pretraining.epochs + finetuning.epochs
        pretraining.epochs = share * epochs
        finetuning.epochs = epochs - pretraining.epochs
    else:
        raise ConfigError(
            f"share={share}: pretraining has tokens={pretraining.tokens} epochs={pretraining.epochs}, finetuning "
            f"tokens={finetuning.tokens} epochs={finetuning.epochs}; valid: both in tokens, or both in epochs"
        )
    config.pretrain, config.share = share > 0, None
