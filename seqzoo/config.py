"""The configuration of a run: typed groups, composed by Hydra from `configs/` and the command line's overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from operator import getitem
from typing import Annotated, Any

from .blocks import check_block
from .entries import CONFIGS, GROUPS, available, registered
from .extras import require
from .failures import Said
from .groups import (
    JointConfig,
    LadderConfig,
    LauncherConfig,
    LoraConfig,
    SearchConfig,
    StageConfig,
    WandbConfig,
)
from .messages import printable, shortened, unknown
from .models import ModelConfig
from .models.size import parse_size
from .plugins import KEY, import_plugins
from .precision import native_precision
from .tasks import TaskConfig
from .valid import (
    AS_IT_STANDS,
    BelowOne,
    Fraction,
    Limit,
    Number,
    Range,
    Text,
    check_ranges,
    hints_of,
    kinds_of,
    marks_of,
)

CHOICES = {
    "objective": ("masked", "causal", "joint"),
    "pixel_loss": ("cross_entropy", "l1"),
    "lr": (None, "search"),
    "tuning": ("full", "head", "lora", "ladder"),
    "precision": ("fp32", "bf16", "auto"),
    "device": ("auto", "cpu", "cuda"),
    "strategy": ("auto", "ddp", "fsdp"),
    "optimizer": (None, "adamw", "muon"),
    "pretraining.optimizer": ("adamw", "muon"),
    "finetuning.optimizer": ("adamw", "muon"),
    "pretraining.schedule": ("constant", "cosine"),
    "finetuning.schedule": ("constant", "cosine"),
    "launcher.cluster": (None, "local", "slurm"),
    "wandb.mode": (None, "online", "offline", "disabled"),
}
PATHS = ("runs_dir", "data_dir", "cache_dir", "resume", "pretrain", "task.text")
# A block's options are its class's, a launcher's submitit's, and a task of one's own has its own: any may be given, and
# they name the valid ones.
FREE = ("model.block.", "launcher.options.", "task.options.")


class ConfigError(Said, ValueError):
    """A configuration that cannot be run; the message, one line, says which key, what was given and what is valid."""

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(kw_only=True)
class Config:
    """Everything a run depends on. `configs/train.yaml` says what each key is for."""

    model: ModelConfig
    task: TaskConfig
    recipe: str
    pretrain: Annotated[Any, AS_IT_STANDS] = (
        False  # false, true, or the folder of a run whose pretraining is to be reused
    )
    objective: str = "masked"
    joint: JointConfig = field(default_factory=JointConfig)
    causal: bool = False
    size: str | None = None
    optimizer: str | None = None  # of both stages; None once they say it
    lr: str | None = None
    search: SearchConfig = field(default_factory=SearchConfig)
    pixel_loss: str = "cross_entropy"
    pretraining: StageConfig = field(default_factory=StageConfig)
    finetuning: StageConfig = field(default_factory=StageConfig)
    share: BelowOne | None = None  # of both budgets together, for pretraining; None once the budgets say it
    train_fraction: Fraction | None = None  # of the train split, for both stages; None: all of it
    augment: bool = False  # training batches, in all stages
    packing: bool = False  # of the sequences of training batches in one row, in all stages
    tuning: str = "full"  # what fine-tuning moves
    lora: LoraConfig = field(default_factory=LoraConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    seed: Number = 0
    n_val: Limit | None = None
    n_test: Limit | None = None
    precision: str = "fp32"
    device: str = "auto"
    compile: bool = False
    strategy: str = "auto"
    sequence_parallel: Annotated[int, Range(1, 1024)] = 1
    data_dir: Text | None = None
    cache_dir: Text | None = None
    runs_dir: Text = "runs"
    resume: Text | None = None
    plugins: list[str] = field(default_factory=list)  # as the command line named them; nothing here imports any
    logger: str = "wandb"
    budget: str | None = None
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `overrides` ask for: Hydra's syntax, `model=lru seed=1 finetuning.lr=3e-4`.

    Keys that are text, such as `runs_dir`, are no matter of syntax: `parse_text` says what they are given.

    Raises:
        ConfigError: an unknown group entry or key, or a value of the wrong type or out of its range; names the valid
            ones.
    """
    require("a configuration", "hydra", "omegaconf")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_keys(overrides)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group in GROUPS:
        for name, keys in registered(group).items():
            store.store(group=group, name=name, node=keys)
    texts = [override for override in overrides if is_text(override)]
    others = [
        f"++{override}" if override.startswith(FREE) else _listed(override)
        for override in overrides
        if override not in texts
    ]
    try:
        with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            raw = hydra_compose("train", overrides=others)
        plain: Any = OmegaConf.to_container(raw, resolve=True)
    except (HydraException, OmegaConfBaseException, OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(_explain(error)) from None
    for override in texts:
        key, _, value = override.partition("=")
        *path, last = key.split(".")
        reduce(getitem, path, plain)[last] = parse_text(key, value)
    config = from_dict(plain)
    _check_budget("pretraining", config.pretraining)
    return config


def from_dict(plain: Any) -> Config:
    """The typed configuration of a mapping, such as a run folder's `config.yaml`.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or one that is not among the valid ones.
    """
    require("a configuration", "hydra", "omegaconf")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from None
    except (OverflowError, ValueError) as error:  # of a group's own checks, or a number that is no float
        raise ConfigError(str(error)) from None
    return validated(config)


def validated(config: Config) -> Config:
    """`config` with what its keys decide together decided, in place.

    Raises:
        ConfigError: a value that is not among the valid ones, or that does not go with another.
    """
    try:
        _validate(config)
    except ConfigError:
        raise
    except (OverflowError, ValueError) as error:
        raise ConfigError(str(error)) from None
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


def _listed(override: str) -> str:
    """`plugins=a` as `plugins=[a]`."""
    return f"{KEY}[{override.removeprefix(KEY).strip('[]')}]" if override.startswith(KEY) else override


def check_keys(overrides: Sequence[str]) -> None:
    """Raises ConfigError where an override names a key or a group's entry that does not exist; says which do.

    What `plugins=` among them names is imported first.
    """
    import_plugins(overrides)
    for override in overrides:
        shown, (key, equals, value) = shortened(override), override.partition("=")
        if not (key and equals):
            raise ConfigError(f"{shown or repr(shown)}: valid: key=value")
        if key.lstrip("+~").startswith(FREE):
            continue
        if key.startswith(("+", "~")):
            raise ConfigError(f"{shown}: no key can be added or taken away; valid: {shown.lstrip('+~')}")
        _hint_of(key)
        if key in GROUPS and value not in available(key):
            raise ConfigError(unknown(key, value, available(key)))


def is_text(override: str) -> bool:
    """Whether it sets a key whose value is text, taken as it stands."""
    key, _, _ = override.partition("=")
    try:
        return not key.startswith(FREE) and AS_IT_STANDS in marks_of(_hint_of(key))
    except ConfigError:
        return False


def parse_text(key: str, value: str) -> str | bool | None:
    """The value of a text key as it stands on the command line; all that has a meaning is

    - null and, for `pretrain`, true and false;
    - quotes around the whole, as Hydra reads them, which are left away.

    Raises:
        ConfigError: it is not UTF-8, or an interpolation.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    word = value.lower()
    if word == "null":
        return None
    if word in ("true", "false") and str not in kinds_of(_hint_of(key)):
        return word == "true"
    if value[:1] in ("'", '"') and value[-1:] == value[:1]:
        try:
            quoted = OverridesParser.create().parse_override(f"{key}={value}")._value
        except HydraException:
            quoted = None
        if isinstance(quoted, QuotedString):
            value = quoted.text
    if "${" in value:
        raise ConfigError(f"{key}={value}: valid: text without ${{, which would be an interpolation")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key}={value}: valid: UTF-8") from None
    return value


def _hint_of(key: str) -> Any:
    """The annotation of a dotted key.

    Raises:
        ConfigError: there is no such key.
    """
    declared: Any = Config
    hint: Any = None
    prefix = ""
    for part in key.split("."):
        hints = hints_of(declared) if hasattr(declared, "__dataclass_fields__") else {}
        if part not in hints:
            raise ConfigError(unknown("key", key, (prefix + name for name in hints)))
        hint = hints[part]
        prefix += f"{part}."
        declared = kinds_of(hint)[0]
    return hint


def _explain(error: BaseException) -> str:
    """What Hydra or OmegaConf found wrong, in one sentence, with the valid keys where one is unknown."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and is_dataclass(cause.object_type):
        key = cause.full_key or ""
        prefix = key.rpartition(".")[0]
        names = [f.name for f in fields(cause.object_type)]
        return unknown("key", key, (f"{prefix}.{name}" if prefix else name for name in names))
    return f"{cause.full_key}: {str(cause).splitlines()[0]}"


def _validate(config: Config) -> None:
    for key, valid in CHOICES.items():
        value = reduce(getattr, key.split("."), config)
        if value not in valid:
            shown = ", ".join("null" if choice is None else choice for choice in valid)
            raise ConfigError(f"{key}={value}: valid: {shown}")
    if not isinstance(config.pretrain, bool | str):
        raise ConfigError(f"pretrain={config.pretrain}: valid: true, false, or the folder of a run")
    check_ranges(config)
    for key in PATHS:
        *path, last = key.split(".")
        group = reduce(getattr, path, config)
        place = getattr(group, last)
        if place == "":
            raise ConfigError(f"{key}='': valid: a path")
        if isinstance(place, str):
            setattr(group, last, os.path.expanduser(place))
    if config.budget is not None:
        seconds(config.budget)
        if config.launcher.cluster is not None:
            raise ConfigError(
                f"budget={config.budget}: jobs have a limit of their own; valid: launcher.options.timeout_min=<minutes>"
            )
    if config.precision == "auto":
        if config.launcher.cluster == "slurm":
            raise ConfigError(
                "precision=auto: jobs of a cluster run on machines that are not known here; valid: fp32, bf16"
            )
        config.precision = native_precision(config.device)
    if config.size is not None:
        try:
            parse_size(config.size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if config.packing and config.compile:
        raise ConfigError(
            "packing=true compile=true: the model is compiled for each shape of a batch, and packed ones are all of "
            "another; valid: one of the two"
        )
    if config.strategy == "fsdp" and config.compile:
        raise ConfigError(
            "strategy=fsdp compile=true: shards are of models that are not compiled; valid: one of the two"
        )
    if config.sequence_parallel > 1:
        _check_parts(config)
    if config.train_fraction == 1:  # the same run as without it, in the same folder
        config.train_fraction = None
    for name in ("pretraining", "finetuning"):
        stage: StageConfig = getattr(config, name)
        stage.optimizer = config.optimizer or stage.optimizer
        if (stage.tokens is None) == (stage.epochs is None):
            raise ConfigError(
                f"{name} takes one budget: tokens or epochs, got tokens={stage.tokens} epochs={stage.epochs}"
            )
    config.optimizer = None
    if config.share is not None:
        _split_budget(config, config.share)
    if config.objective == "joint":
        _check_joint(config)
    _check_budget("finetuning", config.finetuning)
    if config.pretrain:  # folders of before have a budget of 0 where nothing is pretrained
        _check_budget("pretraining", config.pretraining)
    for block in config.model.blocks():
        check_block(**block)
    if config.objective == "causal" and config.pretrain:
        config.causal = True


def _check_parts(config: Config) -> None:
    chosen = {
        "packing=true": config.packing,
        "compile=true": config.compile,
        "tuning=ladder": config.tuning == "ladder",
    }
    for choice in (choice for choice, made in chosen.items() if made):
        raise ConfigError(
            f"sequence_parallel={config.sequence_parallel} {choice}: parts of the time are of padded batches, in "
            "models of layers as they are, not compiled; valid: one of the two"
        )


def _check_joint(config: Config) -> None:
    if config.pretrain:
        raise ConfigError(
            f"objective=joint: it is one phase, the masked loss beside the labels, and pretrain={config.pretrain} asks "
            "for a phase before; valid: pretrain=false, or objective=masked"
        )
    if config.tuning != "full":
        raise ConfigError(
            f"objective=joint: all of the model learns to fill in, and tuning={config.tuning} moves a part of a "
            "pretrained one; valid: tuning=full"
        )


def _check_budget(name: str, stage: StageConfig) -> None:
    for key in ("tokens", "epochs"):
        if getattr(stage, key) == 0:
            raise ConfigError(f"{name}.{key}=0: valid: null, or above 0")


def _split_budget(config: Config, share: float) -> None:
    """Gives pretraining its share of both stages' budgets together, and fine-tuning the rest.

    What is left is the plain configuration of that run, so that it has the same run folder however it was asked for.
    """
    pretraining, finetuning = config.pretraining, config.finetuning
    if isinstance(config.pretrain, str):
        raise ConfigError(f"share={share}: pretrain={config.pretrain} has had its budget; valid: pretrain=true")
    if share > 0 and not config.pretrain:
        raise ConfigError(f"share={share}: nothing is pretrained; valid: pretrain=true, or share=0")
    if pretraining.tokens is not None and finetuning.tokens is not None:
        tokens = pretraining.tokens + finetuning.tokens
        part = round(share * tokens)
        if share > 0 and part in (0, tokens):
            raise ConfigError(f"share={share}: of {tokens:,} tokens a stage gets none; valid: 0, or a share for both")
        finetuning.tokens = tokens - part
        pretraining.tokens = part or pretraining.tokens
    elif pretraining.epochs is not None and finetuning.epochs is not None:
        epochs = pretraining.epochs + finetuning.epochs
        finetuning.epochs = epochs - share * epochs
        pretraining.epochs = share * epochs or pretraining.epochs
    else:
        raise ConfigError(
            f"share={share}: pretraining has tokens={pretraining.tokens} epochs={pretraining.epochs}, finetuning "
            f"tokens={finetuning.tokens} epochs={finetuning.epochs}; valid: both in tokens, or both in epochs"
        )
    config.pretrain, config.share = share > 0, None
