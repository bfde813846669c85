"""What a configuration names, built: device, data, model, objective."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..config import Config, ConfigError
from ..draws import derive_seed
from ..models import ModelConfig, SequenceModel, build_model
from ..models.size import fit_width
from ..objectives import Objective, build_objective
from ..spec import TaskSpec
from ..tasks import Split, Task, build_task, stratified
from ..training.ranks import arrange

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SUBSET_SEED = 0  # of the examples that n_val, n_test and train_fraction keep: the same in every run


def build_fabric(config: Config) -> Fabric:
    """Device, precision and, under `torchrun`, ranks and what they share, ready to use.

    Raises:
        ConfigError: `config.device` is unknown or absent, or `config.sequence_parallel` does not divide the processes.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and found == "cpu":
        raise ConfigError("device=cuda: PyTorch finds no GPU here; valid: auto, cpu")
    world_size, local_size = 1, 1
    if torch.distributed.is_torchelastic_launched():
        world_size, local_size = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size % config.sequence_parallel:
        raise ConfigError(
            f"sequence_parallel={config.sequence_parallel}: {world_size} processes; valid: a multiple of it, under "
            f"torchrun --nproc-per-node {config.sequence_parallel}"
        )
    fabric = Fabric(
        accelerator=found if config.device == "auto" else config.device,
        devices=local_size,
        num_nodes=world_size // local_size,
        # A backbone holds what only pretraining uses, such as the embedding of hidden pixels. Buffers are codebooks,
        # which `after_step` keeps equal.
        strategy=DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if world_size > 1 else "auto",
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[config.precision],  # type: ignore[arg-type]
    )
    if world_size > 1:
        _meet("nccl" if fabric.device.type == "cuda" else "gloo")
    fabric.launch()
    sharded = config.strategy == "fsdp" and world_size > 1
    if sharded or config.sequence_parallel > 1:
        arrange(fabric, parts=config.sequence_parallel, sharded=sharded)
    return fabric


def _meet(backend: str) -> None:
    """Joins the processes of torchrun, as Fabric would; but those of an attempt meet each other alone.

    Where torchrun starts them anew, the addresses of the attempt before are still in its store: a process that is early
    would call one that has ended.
    """
    if torch.distributed.is_initialized():
        return
    store, rank, ranks = next(torch.distributed.rendezvous("env://"))
    attempt = torch.distributed.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(backend, store=attempt, rank=rank, world_size=ranks)


@contextmanager
def blaming(choice: str) -> Iterator[None]:
    """What a room says of its options, as an error of the configuration."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{choice}: {error}") from None


def task_of(config: Config, fabric: Fabric, *, read: bool = False) -> Task:
    """The task that a run trains on and tests with.

    Args:
        read: `config` was read from a folder that may be somebody else's, so that nothing is written where it says:
            prepared data may lie there, and are kept in the user's own cache folder.

    Raises:
        ConfigError: an option of the task is out of its range.
        DataError: its data are missing or damaged.
    """
    # One process downloads and generates, the others read.
    with fabric.rank_zero_first(), blaming(f"task={config.task.name}"):
        cache_dir, filled = (None, config.cache_dir) if read else (config.cache_dir, None)
        return build_task(config.task, data_dir=config.data_dir, cache_dir=cache_dir, filled=filled)


def absolute_data_dir(config: Config) -> str | None:
    """What `data_dir` means here, wherever the run goes on; a text's relative path is under it, or here."""
    data_dir, text = config.data_dir, config.task.text
    if data_dir is None and text is not None and not os.path.isabs(os.path.expanduser(text)):
        data_dir = "."
    return None if data_dir is None else os.path.abspath(os.path.expanduser(data_dir))


def sized(config: Config, spec: TaskSpec) -> ModelConfig:
    """The model's configuration, of the width that `config.size` asks for."""
    if config.size is None:
        return config.model
    return fit_width(config.model, spec, config.size, causal=config.causal)


def model_of(config: Config, spec: TaskSpec, head: str) -> SequenceModel:
    """The model, with the weights that the run's seed makes of it."""
    torch.manual_seed(derive_seed(config.seed))
    with blaming(f"model={config.model.name}"):
        return build_model(sized(config, spec), spec, head=head, causal=config.causal)


def objective_of(config: Config, spec: TaskSpec) -> Objective:
    """What pretraining minimises or, with `objective=joint`, the one phase that there is."""
    with blaming(f"objective={config.objective}"):
        return build_objective(config.objective, spec, pixel_loss=config.pixel_loss, **asdict(config.joint))


def finetuning_of(config: Config, spec: TaskSpec) -> Objective:
    """What fine-tuning minimises: what the task asks, be it alone or in one phase with masked self-pretraining."""
    return objective_of(config, spec) if config.objective == "joint" else build_objective("task", spec)


def part_of(split: Split, n: int | None) -> Split:
    """`n` examples of `split`, each class as frequent as in the whole; None, or more than it has: all of them."""
    if n is None or n >= len(split):
        return split
    return split.subset(stratified(split.labels, n, SUBSET_SEED))
