"""One run: pretraining if asked for, fine-tuning, one look at the test set, and the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import Config, ConfigError, StageConfig, to_dict
from ..files import LinkError, inside, write_json, write_text
from ..messages import printable, printable_lines
from ..models import SequenceModel, build_model
from ..models.size import count_parameters, flops_per_token
from ..objectives import Objective, build_objective
from ..study import is_packed, read_metrics
from ..tasks import AUGMENTATIONS, OWN, Task, build_task, nested
from ..training.cores import cpu_share
from ..training.evaluation import evaluate, require_questions
from ..training.forecast import forecast, training_rate
from ..training.loggers import check_logger
from ..training.loop import Stage
from ..training.memory import keep_freed_memory
from ..training.optimizer import recorded
from ..training.tracker import Callback, Tracker
from ..training.transfer import transfer_backbone
from ..training.tuning import tune
from . import provenance
from .feasible import check_answer, check_parts, check_stage
from .folder import (
    RESULT,
    cell_name,
    check_task,
    checked_task,
    finished_run,
    in_hand,
    joint_record,
    pretraining_key,
    read_config,
    read_result,
    read_summary,
    reusable_pretraining,
    run_name,
    shared_pretraining,
    write_description,
)
from .learnt import learnt, sentence
from .parts import (
    SUBSET_SEED,
    absolute_data_dir,
    blaming,
    build_fabric,
    finetuning_of,
    model_of,
    objective_of,
    part_of,
    sized,
    task_of,
)
from .search import search_lr

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def run(
    config: Config,
    *,
    task: Task | None = None,
    deadline: float | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Trains what `config` asks for, or continues it, and returns its result with the run's "folder".

    A finished run, be it a line of a study in `runs_dir`, is not repeated: its result is returned. Nor is a finished
    pretraining that another run beside it, in the same `runs_dir`, shares: fine-tuning starts from that.

    Args:
        config: from `seqzoo.config.compose`.
        task: data of one's own, from `seqzoo.tasks.from_arrays`, in place of the task that `config` names.
        deadline: of `time.monotonic()`, after which training stops as if interrupted.
        callbacks: called with stage, step, numbers by name and model at each line of metrics, see `Tracker`.

    Raises:
        ConfigError: `config` cannot be run.
        DataError: the task's data are missing or damaged.
        TrainingError: training failed; what had been saved is kept.
        Busy: another process has this run, or its pretraining, in hand.
        Interrupted: by a signal or the deadline, with everything saved.
        LinkError: a symbolic link stands where the run would write; the folder that `config.resume` names may be one.
    """
    if config.resume is not None:
        folder = Path(config.resume)
        config = read_config(folder)
    else:
        if isinstance(config.pretrain, str):
            config = replace(config, pretrain=str(Path(config.pretrain).resolve()))
        runs_dir = Path(config.runs_dir)
        with _reaching(runs_dir):
            folder = inside(runs_dir, run_name(config, task))
            folder = finished_run(folder) or folder
    config = replace(config, data_dir=absolute_data_dir(config))
    with _reaching(folder):
        result = read_result(folder, RESULT)
    if result is not None:
        if task is None and config.task.name in OWN:  # only what it builds says which data these are
            check_task(folder, build_task(config.task, data_dir=config.data_dir, cache_dir=config.cache_dir))
        again = "another runs_dir runs it again" if is_packed(folder) else "delete it to run again"
        print(printable(f"{folder} is finished; {again}"), file=sys.stderr)
        return {**result, "folder": str(folder)}

    check_logger(config.logger)
    fabric = build_fabric(config)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    key = pretraining_key(config, task) if config.pretrain is True else None
    task = checked_task(folder, config, task, lambda: task_of(config, fabric))
    planned = _Run(config, task, folder, key, fabric, deadline)  # what cannot be run ends here, and leaves no folder
    with ExitStack() as held:
        tracker = None
        if fabric.is_global_zero:
            with _reaching(folder):
                held.enter_context(in_hand(folder))
            write_description(folder, config, task)
            group = cell_name(config, task.spec.name)
            tracker = Tracker(folder, to_dict(config), group=group, callbacks=callbacks)
        fabric.barrier()
        try:
            result = planned.result(tracker)
        except BaseException:
            if tracker:
                tracker.finish(None)
            raise
        if tracker:
            tracker.require_folder()
            write_json(folder / "result.json", result)
            tracker.finish(result)
    fabric.barrier()
    return {**result, "folder": str(folder)}


class _Run:
    """A run: both stages, and the test. Making one reads and writes nothing of its own, and allocates no model.

    Args:
        key: of the pretraining that it needs; None: it needs none of its own.

    Raises:
        ConfigError: it cannot be run.
    """

    tracker: Tracker | None = None

    def __init__(
        self,
        config: Config,
        task: Task,
        folder: Path,
        key: str | None,
        fabric: Fabric,
        deadline: float | None,
    ) -> None:
        check_answer(config, task.spec)
        if config.augment and task.augmentation is None:
            valid = f"augment=false, or a task that has one: {', '.join(AUGMENTATIONS)}"
            shown = f"{task.spec.name} with {task.note}" if config.task.permuted else task.spec.name
            raise ConfigError(f"augment=true: {shown} has none; valid: {valid}")
        self.objective = finetuning_of(config, task.spec)
        self.config, self.task, self.folder, self.key = config, task, folder, key
        self.fabric, self.deadline = fabric, deadline
        check_parts(config, task.spec)
        self.examples = task.train
        if config.train_fraction is not None:
            kept = nested(task.train.labels, config.train_fraction, SUBSET_SEED)
            self.examples = task.train.subset(kept)
        self.val, self.test = part_of(task.val, config.n_val), part_of(task.test, config.n_test)
        splits = {"train": self.examples, "val": self.val}
        if key is not None:
            with blaming(f"objective={config.objective}"):
                require_questions(objective_of(config, task.spec), splits)
        with blaming(f"task={task.spec.name}"):
            require_questions(build_objective("task", task.spec), {**splits, "test": self.test})
        with blaming(f"model={config.model.name}"):
            self.sized = sized(config, task.spec)
        if key is not None:
            model = self.on_meta(objective_of(config, task.spec).head)
            check_stage("pretraining", config.pretraining, model, self.examples, fabric, packing=config.packing)
        model = self.on_meta(self.objective.head)
        with blaming(f"tuning={config.tuning}"), torch.device("meta"):
            model = tune(model, config)
        check_stage(
            "finetuning",
            config.finetuning,
            model,
            self.examples,
            fabric,
            passes=self.objective.passes,
            packing=config.packing,
        )
        with blaming(f"model={config.model.name}"):
            self.params = count_parameters(self.sized, task.spec, causal=config.causal)
            self.flops = flops_per_token(self.sized, task.spec, causal=config.causal)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.trained = self.params if config.tuning == "full" else trained
        self.reused = reusable_pretraining(config, task) if isinstance(config.pretrain, str) else None

    def on_meta(self, head: str) -> SequenceModel:
        """The model with `head`, of tensors without memory."""
        with blaming(f"model={self.config.model.name}"), torch.device("meta"):
            return build_model(self.sized, self.task.spec, head=head, causal=self.config.causal)

    def result(self, tracker: Tracker | None) -> dict[str, Any]:
        """Trains, or goes on training, and tests; the content of `result.json`. `tracker` is the first rank's."""
        self.tracker = tracker
        config, fabric, size = self.config, self.fabric, f"width {self.sized.d_model}, {self.params:,} parameters"
        asked = "" if config.size is None else f", the nearest to size={config.size}"
        self.say(f"{self.sized.name}: {size}, {self.flops / 1e6:.3g} MFLOP a token{asked}, in {config.precision}")
        if config.tuning != "full":
            alone = "" if config.pretrain else "; without pretraining: the backbone stays a random one"
            self.say(f"tuning={config.tuning} moves {self.trained:,} parameters{alone}")
        self.say_how_long()
        source, pretraining = self.pretrain()
        objective = self.objective
        model = model_of(config, self.task.spec, objective.head)
        if pretraining is not None:  # also when fine-tuning continues: its checkpoint is loaded over it
            transfer = transfer_backbone(model, source / "pretrain" / "best.safetensors")
            self.say(f"hand-over from {source}: {transfer}")
        model = tune(model, config)
        finetuning = self.train(model, objective, config.finetuning, "finetune")
        batch_size = config.finetuning.batch_size
        tested = evaluate(model, objective, self.test.to(fabric.device), batch_size=batch_size, fabric=fabric)
        return self.describe(source, pretraining, finetuning, tested)

    def say_how_long(self) -> None:
        """Says of each stage that is left how long it will take, from a few steps of a model of its own."""
        config, spec, fabric = self.config, self.task.spec, self.fabric
        stages: dict[str, tuple[Objective, StageConfig]] = {"finetune": (self.objective, config.finetuning)}
        if self.key is not None and not (self.pretraining_folder() / "pretrain" / "summary.json").exists():
            stages = {"pretrain": (objective_of(config, spec), config.pretraining), **stages}
        fitting = "short" if fabric.device.type == "cuda" else "tiny"
        advice = f"recipe={fitting} is made for this machine"
        if config.recipe == fitting:
            advice = "fewer tokens or a smaller model would make it shorter"
        seen = {line["stage"]: line["tokens"] for line in read_metrics(self.folder, "tokens")}

        @cache
        def flops_at(length: int) -> float:
            return flops_per_token(self.sized, replace(spec, max_length=length), causal=config.causal)

        for name, (objective, stage) in stages.items():
            model = model_of(config, spec, objective.head)
            rate = training_rate(
                tune(model, config) if name == "finetune" else model,
                objective,
                self.examples,
                stage,
                flops=self.flops,
                flops_at=flops_at,
                name=name,
                seed=config.seed,
                folder=self.folder / "forecast",
                fabric=fabric,
                packing=config.packing,
            )
            said = forecast(
                name,
                stage,
                self.examples,
                self.val,
                rate,
                passes=objective.passes,
                seen=seen.get(name, 0),
                trials=config.search.share * len(config.search.rates)
                if config.lr == "search" and name not in seen
                else 0.0,
                advice=advice,
            )
            self.say(f"{said}, not compiled" if config.compile else said)

    def pretraining_folder(self) -> Path:
        """Where the run's own pretraining is, or is to be. The first rank looks: several find each other's locks."""
        assert self.key is not None
        found = shared_pretraining(self.config, self.folder, self.key) if self.fabric.is_global_zero else None
        return self.fabric.broadcast(found) or self.folder

    def pretrain(self) -> tuple[Path, dict[str, Any] | None]:
        """The run folder that fine-tuning starts from, and the summary of its pretraining; None: it starts anew."""
        config, folder = self.config, self.folder
        if isinstance(config.pretrain, str):
            return Path(config.pretrain), self.reused
        if self.key is None:
            return folder, None
        source = self.pretraining_folder()
        if source != folder:
            check_task(source, self.task)
        summary = read_summary(source)
        if summary is None:
            if self.fabric.is_global_zero:
                write_text(folder / "pretrain" / "key", self.key)
            objective = objective_of(config, self.task.spec)
            model = model_of(config, self.task.spec, objective.head)
            summary = self.train(model, objective, config.pretraining, "pretrain")
            summary["learnt"] = learnt(
                model,
                objective,
                self.examples,
                self.val,
                loss=summary["val"]["loss"],
                batch_size=config.pretraining.batch_size,
                fabric=self.fabric,
            )
            if self.fabric.is_global_zero:
                write_json(folder / "pretrain" / "summary.json", summary)
        found = summary.get("learnt")  # pretrainings of before have none
        if found is not None and not found["learnt"]:
            self.say(sentence(found))
        return source, summary

    def train(self, model: nn.Module, objective: Objective, stage: StageConfig, name: str) -> dict[str, Any]:
        """One stage, of `name`; its summary."""
        config, folder = self.config, self.folder / name
        shared: dict[str, Any] = {
            "name": name,
            "seed": config.seed,
            "fabric": self.fabric,
            "compile": config.compile,
            "deadline": self.deadline,
            "augmentation": self.task.augmentation if config.augment else None,
            "packing": config.packing,
        }
        if config.lr == "search":
            trials = inside(folder, "search")
            lr = search_lr(model, objective, self.examples, self.val, stage, config.search, folder=trials, **shared)
            stage = replace(stage, lr=lr)
        flops = None  # what is frozen is passed forward alone, so that a step is less than three of its passes
        if name == "pretrain" or config.tuning == "full":
            flops = flops_per_token(
                self.sized, self.task.spec, causal=config.causal, head=objective.head, passes=objective.passes
            )
        trainer = Stage(
            model,
            objective,
            self.examples,
            self.val,
            stage,
            **shared,
            folder=folder,
            tracker=self.tracker,
            flops_per_token=flops,
        )
        if stage.warmup_steps > trainer.total_steps:
            steps = f"{stage.warmup_steps:,} steps of warmup in {trainer.total_steps:,}"
            self.say(f"{name}: {steps}: the learning rate never reaches {stage.lr:g}")
        state = trainer.run()
        tokens_per_second = state.tokens / state.training_seconds
        return {
            "tokens_seen": state.tokens,
            "token_budget": trainer.budget,
            "epochs": stage.epochs,
            "seconds": state.seconds,
            "tokens_per_second": tokens_per_second,
            "mfu": trainer.utilisation(tokens_per_second),
            "cpu_share": cpu_share(state.cpu_ran, state.cpu_waited),
            "val": state.best,
            "lr": stage.lr,
            "optimizer": recorded(stage.optimizer),
            "precision": config.precision,
            "hardware": provenance.hardware(self.fabric.device, self.fabric.world_size),
        }

    def describe(
        self, source: Path, pretraining: dict[str, Any] | None, finetuning: dict[str, Any], tested: dict[str, float]
    ) -> dict[str, Any]:
        """The content of `result.json`, from the summaries of the stages and the test's metrics."""
        config, own = self.config, source == self.folder
        none = {"tokens_seen": 0, "token_budget": 0, "seconds": 0.0, "tokens_per_second": 0.0, "lr": None}
        stages = {"pretrain": pretraining or none, "finetune": finetuning}

        def of_stages(key: str) -> dict[str, Any]:
            return {name: stage[key] for name, stage in stages.items()}

        def of_training(key: str, before: str) -> str:  # summaries of before there was a choice do not say which
            return " after ".join(dict.fromkeys(each.get(key, before) for each in (finetuning, pretraining) if each))

        seconds = of_stages("seconds")
        made_with = provenance.made_with(self.fabric.device, self.fabric.world_size)
        return {
            "schema": 1,
            "model": config.model.name,
            "task": self.task.spec.name,
            "causal": config.causal,
            "objective": config.objective,
            "pretrain": pretraining is not None,
            "pretrain_run": None if own else source.name,
            "recipe": config.recipe,
            "precision": of_training("precision", config.precision),
            "seed": config.seed,
            "params": self.params,
            "trained_params": self.trained,
            "init": config.model.init,
            "tuning": config.tuning,
            "joint": joint_record(config) if config.objective == "joint" else None,
            "optimizer": of_training("optimizer", "adamw"),
            "augment": config.augment,
            "packing": config.packing,
            "train_fraction": 1.0 if config.train_fraction is None else config.train_fraction,
            "flops_per_token": self.flops,
            "tokens_seen": of_stages("tokens_seen"),
            "token_budget": of_stages("token_budget"),
            "epochs": {name: stage.get("epochs") for name, stage in stages.items()},
            "lr": of_stages("lr"),
            "learnt": pretraining.get("learnt") if pretraining else None,
            "val": finetuning["val"],
            "test": tested,
            "n_test": len(self.test),
            "majority": self.test.majority,
            "task_note": self.task.note,
            "seconds": {**seconds, "total": sum(seconds.values())},
            "tokens_per_second": of_stages("tokens_per_second"),
            "mfu": {"pretrain": pretraining.get("mfu") if pretraining and own else None, "finetune": finetuning["mfu"]},
            "cpu_share": {name: stage.get("cpu_share") for name, stage in stages.items()},
            **made_with,
            "hardware": of_training("hardware", made_with["hardware"]),
        }

    def say(self, message: str) -> None:
        """Prints to stderr, on the first rank only."""
        if self.fabric.is_global_zero:
            print(printable_lines(message), file=sys.stderr)


@contextmanager
def _reaching(folder: Path) -> Iterator[None]:
    """Says of an OSError that it is where the run's folder was to be."""
    try:
        yield
    except LinkError:
        raise
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; valid: runs_dir=<a folder that can be written>") from None
