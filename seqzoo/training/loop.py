"""The training loop of one stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..blocks import after_step, auxiliary_loss
from ..config import StageConfig
from ..draws import AUGMENTED, PART, derive_seed
from ..models import JointModel
from ..objectives import Objective
from ..records import check
from ..spec import Batch
from ..tasks import Augmentation, Split, pack
from .checkpoint import Checkpoint, load_checkpoint, load_weights, reading, save_checkpoint, save_weights
from .compilation import compile_model
from .cores import Cores, cpu_share
from .diagnosis import first_nonfinite
from .errors import Interrupted, TrainingError
from .evaluation import evaluate, means, module_metrics
from .guard import Guard
from .interrupt import interruption
from .optimizer import build_optimizer, restore, set_lr
from .order import Order, budget, room_for
from .peak import peak_flops
from .progress import Pace, ProgressBar
from .ranks import place_of, set_up, without_sync
from .saves import Saves
from .schedule import lr_factor
from .shards import load_whole, shard, whole, whole_weights
from .state import STATE, State
from .tracker import STAGES, Tracker
from .transfer import require_fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric

READ_EVERY = 16  # steps, between two looks at how a GPU fares
CURVE_POINTS = 200  # training lines in metrics.jsonl, per stage


class MicroBatch(NamedTuple):
    """A rank's share of one of the batches that a step accumulates.

    Times the number of ranks, whose gradients are averaged, it has `asked` of all that the step asks for, [n] where the
    loss is a sum of n means, and `positions` of all its valid positions, over which auxiliary losses are means.
    """

    examples: Tensor  # int64 [batch], on the CPU
    batch: Batch
    seed: int
    asked: Tensor | float = 1.0
    positions: Tensor | float = 1.0


class Stage:
    """Trains `model` on `train` and keeps the weights that do best on `val`.

    A step is a function of (seed, stage, step, weights): the examples it sees, their augmentation and masks and its
    dropout are drawn from nothing else, so that continuing from a checkpoint is exact. Batches are cut from the endless
    row of epochs, so all are full, and those of one step do not depend on how many devices share them. Packed, they
    have as many positions as `batch_size` of the longest examples would, and no padding. A budget counts the positions
    of `train`, as they are before augmentation, once for each pass over them.

    The loss of a step is the mean over all answers that it asks for, on all ranks and in all batches that it
    accumulates, however unevenly they are spread; losses that blocks have of their own are means over valid positions
    likewise. A step that asks for nothing has a gradient of zero, and the optimiser's momentum and decay act alone.

    Nothing in a step waits for the device. How it fares is read after every step on a CPU, after every `READ_EVERY` on
    a GPU, and before each line of metrics, validation and checkpoint; till then a `Guard` keeps failures from the
    weights.

    Args:
        name: "pretrain" or "finetune".
        stage: budget, batch and optimiser.
        folder: `<run folder>/<name>`, for checkpoints; training continues from the one it finds there.
        fabric: device, precision and ranks, launched.
        tracker: for metrics; None on all ranks but the first.
        augmentation: of the training batches; None: they stay as they are.
        packing: the sequences of a training batch lie one behind the other in a single row. (After an augmentation a
            GPU is waited for, to know how long they are.)
        compile: compile the model, forward and backward, once for each shape of a batch.
        flops_per_token: of the forward pass; with it, the model-flops utilisation is measured, as of a model that is
            trained whole.
        deadline: the moment of `time.monotonic()` at which to stop as if interrupted.

    Raises:
        TrainingError: the checkpoint in `folder` is damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        train: Split,
        val: Split,
        stage: StageConfig,
        *,
        name: str,
        seed: int,
        folder: Path,
        fabric: Fabric,
        tracker: Tracker | None = None,
        augmentation: Augmentation | None = None,
        packing: bool = False,
        compile: bool = False,
        flops_per_token: float | None = None,
        deadline: float | None = None,
    ):
        self.objective, self.config, self.name, self.seed = objective, stage, name, seed
        self.folder, self.fabric, self.place, self.tracker = folder, fabric, place_of(fabric), tracker
        self.augmentation, self.packing = augmentation, packing
        self.flops_per_token, self.deadline = flops_per_token, deadline
        self.peak = None if flops_per_token is None else peak_flops(fabric)
        self.model = model.to(fabric.device)
        self.kept = model.without_second() if isinstance(model, JointModel) else model  # what its best weights are of
        self.train, self.val = train.to(fabric.device), val.to(fabric.device)
        # int64 [N], of all inputs of an example, in all passes
        self.lengths = objective.passes * train.lengths.reshape(len(train), -1).sum(1)
        room = room_for(train, objective.passes) if packing else None
        self.order = Order(self.lengths, seed=seed, room=room)
        self.places_per_step = stage.batch_size * stage.accumulate
        self.budget, self.total_steps = budget(stage, len(train), int(self.lengths.sum()), room)
        self.log_every = max(1, self.total_steps // CURVE_POINTS)
        self.evaluations = {(k + 1) * self.total_steps // stage.evaluations for k in range(stage.evaluations)}
        self.read_every = 1 if fabric.device.type == "cpu" else READ_EVERY
        self.saves = Saves()
        if compile:
            compile_model(self.model)

        self.state = State()
        self.window: dict[str, Tensor] = {}  # sums of the training metrics since their last line, on the device
        if self.place.sharded:
            shard(self.model, fabric.device)
        optimizer = build_optimizer(self.model, stage)
        self.guard = Guard(optimizer, fabric.device)
        self.last = folder / "last.safetensors"
        if checkpoint := load_checkpoint(self.last):
            require_fit(self.model, checkpoint.weights, self.last)
            load_whole(self.model, checkpoint.weights)
            try:
                restore(optimizer, checkpoint.optimizer)
            except TrainingError as error:
                raise TrainingError(f"{self.last}: {error}; delete {folder} to start the stage again") from None
            with reading(self.last):
                check(checkpoint.state, STATE)
                self.state = State(**checkpoint.state)
            for key, total in self.state.window.items():  # of all ranks, which the first has from now on
                own = total if fabric.is_global_zero else 0.0
                self.window[key] = torch.tensor(own, dtype=torch.float64, device=fabric.device)
        self.wrapped, self.optimizer = set_up(fabric, self.model, optimizer)

    def run(self) -> State:
        """Trains to the end of the budget and leaves the best validation's weights in the model.

        Raises:
            TrainingError: a loss or gradient is not finite; the last checkpoint stays as it was.
            Interrupted: by a signal or at the deadline, with everything saved.
        """
        state = self.state
        if self.tracker:
            self.tracker.rewind(self.name, state.step, state.evaluated, expected=state.step >= self.log_every)
        self.started = self.timed = time.monotonic()
        self.saves.begin()
        self.seconds_before = state.seconds
        self.logged = (state.tokens, state.training_seconds)
        self.cores = Cores()
        pace = Pace(self.total_steps)
        bar = ProgressBar(self.name, done=state.step, total=self.total_steps, visible=self.fabric.is_global_zero)
        with bar, interruption() as self.interrupted:
            if state.step > 0:
                bar.say(f"{self.name} continues after step {state.step} of {self.total_steps}")
            try:
                while True:
                    if state.step in self.evaluations and state.evaluated < state.step:
                        bar.validation(self.validate(), seconds_left=pace.seconds_left)
                        self.save()
                    if state.step >= self.total_steps:
                        break
                    if self.must_stop_alone() and self.wait():
                        raise Interrupted(self.folder.parent)
                    self.take_step()
                    bar.advance(state.step)
                    pace.observe(state.step)
                    logs = state.step % self.log_every == 0 or state.step == self.total_steps
                    if not logs and state.step % self.read_every:
                        continue
                    stopping = self.wait()
                    if logs:
                        bar.train(self.log_training())
                    if stopping:
                        raise Interrupted(self.folder.parent)
                    if self.due:
                        self.save()
            except Interrupted:
                self.save()
                raise
        self.fabric.barrier()
        load_whole(self.kept, load_weights(self.folder / "best.safetensors"))
        return state

    def take_step(self) -> None:
        """One optimiser step over `accumulate` batches."""
        state, config = self.state, self.config
        self.model.train()
        factor = lr_factor(
            state.step,
            total_steps=self.total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
        )
        set_lr(self.optimizer, factor)
        loss = self.differentiate()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters]))
        self.guard.watch(state.step + 1, torch.isfinite(loss + norm))
        if config.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with self.guard.sparing(self.model.buffers()):
            after_step(self.model)
        state.tokens += self.positions(self.examples(0, self.places_per_step))
        state.step += 1

    def differentiate(self) -> Tensor:
        """Adds the coming step's gradients to those of the parameters; returns its loss, of which each rank has a part
        and the mean is the whole."""
        loss = torch.zeros((), device=self.fabric.device)
        for left, micro in zip(reversed(range(self.config.accumulate)), self.micro_batches(), strict=True):
            with without_sync(self.fabric, self.wrapped, left > 0):
                micro_loss, totals = self.forward(self.wrapped, micro)
                self.fabric.backward(micro_loss)
            loss += micro_loss.detach()
            for key, total in totals.items():
                self.window[key] = self.window.get(key, 0) + total.detach()
        return loss

    def wait(self) -> bool:
        """Waits until the device has taken all steps. Returns whether any rank must stop; `due`: all are to save.

        Raises:
            TrainingError: a step failed.
        """
        state = self.state
        due = self.fabric.is_global_zero and self.saves.due()
        asked = torch.tensor([not self.must_stop(), not due]).to(self.guard.failed)
        earliest = self.fabric.all_reduce(torch.cat((self.guard.failed[None], asked)), reduce_op="min")
        failed, all_going, not_due = cast(Tensor, earliest).tolist()
        self.due = not not_due
        now = time.monotonic()
        state.training_seconds += now - self.timed
        self.timed = now
        if math.isfinite(failed):
            state.step = int(failed) - 1
            raise TrainingError(self.explain_failure())
        return not all_going

    def must_stop(self) -> bool:
        """Whether a signal has arrived or the deadline has passed."""
        return self.interrupted() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def must_stop_alone(self) -> bool:
        """Whether to stop at once, with no other rank to agree with."""
        return self.fabric.world_size == 1 and self.must_stop()

    def micro_batches(self) -> list[MicroBatch]:
        """This rank's share of the coming step."""
        rank, ranks, size = self.place.rank, self.place.ranks, self.config.batch_size
        micros = []
        for number in range(self.config.accumulate):
            index = self.examples(number * size, size)[rank::ranks]
            seed = derive_seed(self.seed, STAGES.index(self.name), self.state.step, number, rank)
            batch = self.train.batch(index)
            if self.augmentation is not None:
                batch = self.augmentation(batch, self.train.spec, seed=derive_seed(seed, AUGMENTED))
            if self.packing:
                batch = pack(batch, self.train.spec, None if self.augmentation else self.train.lengths[index])
            length = batch.inputs.shape[1 if self.packing else self.train.spec.num_inputs]
            batch = batch._replace(part=self.place.part(length))
            micros.append(MicroBatch(index, batch, seed))
        if len(micros) * self.fabric.world_size == 1:
            return micros
        asked = self.shares([self.objective.count(micro.batch, seed=micro.seed) for micro in micros])
        positions: Iterable[Tensor | float]
        if self.augmentation is None:
            total = self.positions(self.examples(0, self.places_per_step))
            positions = [ranks * self.positions(micro.examples) / total for micro in micros]
        else:
            positions = self.shares([micro.batch.lengths.sum() for micro in micros])
        return [
            micro._replace(asked=share, positions=part)
            for micro, share, part in zip(micros, asked, positions, strict=True)
        ]

    def shares(self, counts: Sequence[Tensor]) -> Tensor:
        """Counts of this rank's batches, int64 [] or [n] each, as parts of those of all ranks, times their number."""
        counted = torch.stack(list(counts))
        total = counted.sum(0)
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)  # Fabric's would have a GPU waited for
        return self.fabric.world_size * counted / total.clamp(min=1)

    def forward(self, model: nn.Module, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of a step's loss that is `micro`'s, and the sums its metrics are made of."""
        part = micro.batch.part
        torch.manual_seed(micro.seed if part is None else derive_seed(micro.seed, PART, part.rank))
        with self.fabric.autocast():
            loss, totals = self.objective.weighed(model, micro.batch, seed=micro.seed, shares=micro.asked)
            return loss + micro.positions * auxiliary_loss(self.model), totals

    def examples(self, start: int, count: int) -> Tensor:
        """The examples of `count` of the coming step's places, int64 [n], from its `start`-th on."""
        return self.order.examples(self.state.step * self.places_per_step + start, count)

    def positions(self, examples: Tensor) -> int:
        """How many valid positions `examples` of training have."""
        return int(self.lengths[examples].sum())

    def validate(self) -> dict[str, float]:
        """Measures the validation split, and keeps the weights if none did better."""
        state = self.state
        self.wait()
        metrics = evaluate(
            self.model,
            self.objective,
            self.val,
            batch_size=self.config.batch_size,
            fabric=self.fabric,
            before_batch=self.leave_early,
        )
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(f"{self.name} step {state.step}: the validation loss is {metrics['loss']}")
        state.evaluated = state.step
        monitor, maximise = self.objective.monitor, self.objective.maximise
        best = state.best.get(monitor, -math.inf if maximise else math.inf)
        if metrics[monitor] > best if maximise else metrics[monitor] < best:
            state.best = {**metrics, "step": state.step}
            if self.tracker:
                self.tracker.require_folder()
            weights = whole_weights(self.kept)
            if self.fabric.is_global_zero:
                with self.saves.one():
                    save_weights(self.folder / "best.safetensors", weights, state.best)
        if self.tracker:
            named = {f"val/{key}": value for key, value in metrics.items()} | self.reports()
            named |= {"training_seconds": state.training_seconds} | self.share_of_cores()
            self.tracker.log(self.name, state.step, state.tokens, named, self.model)
        self.timed = time.monotonic()
        return metrics

    def reports(self) -> dict[str, float]:
        """What the modules reported of themselves after the last step, even if that was before a checkpoint."""
        self.state.reports |= module_metrics(self.model)
        return self.state.reports

    def leave_early(self) -> None:
        """Leaves a validation early. Several ranks agree to stop after a later step instead."""
        if self.must_stop_alone():
            raise Interrupted(self.folder.parent)

    def log_training(self) -> dict[str, float]:
        """Writes the means of the training metrics since their last line, and begins the next line's."""
        state = self.state
        metrics = means(self.summed())
        self.window = {}
        tokens, seconds = self.logged
        self.logged = (state.tokens, state.training_seconds)
        metrics["tokens_per_second"] = (state.tokens - tokens) / (state.training_seconds - seconds)
        if (mfu := self.utilisation(metrics["tokens_per_second"])) is not None:
            metrics["mfu"] = mfu
        if self.tracker:
            named = {f"train/{key}": value for key, value in metrics.items()}
            named["train/lr"] = max(group["lr"] for group in self.optimizer.param_groups)
            self.tracker.log(self.name, state.step, state.tokens, named | self.share_of_cores(), self.model)
            self.timed = time.monotonic() if self.tracker.callbacks else self.timed  # theirs is none of training's
        return metrics

    def summed(self) -> dict[str, Tensor]:
        """The window of all ranks."""
        totals = {key: total.clone() for key, total in self.window.items()}  # which reducing overwrites
        return {key: cast(Tensor, self.fabric.all_reduce(total, reduce_op="sum")) for key, total in totals.items()}

    def share_of_cores(self) -> dict[str, float]:
        """`cpu_share` since the last line of metrics, as "cpu_share", of training on a CPU where that is known."""
        if self.fabric.device.type != "cpu":
            return {}
        ran, waited = self.cores.lap()
        self.state.cpu_ran += ran
        self.state.cpu_waited += waited
        share = cpu_share(ran, waited)
        return {} if share is None else {"cpu_share": share}

    def utilisation(self, tokens_per_second: float) -> float | None:
        """The share of the devices' measured matrix-product rate that the model's own operations make up.

        A step counts as three forward passes, its backward pass being two. Tokens do not include padding, which costs
        time and counts for nothing.
        """
        if self.flops_per_token is None or self.peak is None:
            return None
        return 3 * self.flops_per_token * tokens_per_second / self.peak

    def save(self) -> None:
        """Makes the present state the last checkpoint."""
        self.state.seconds = self.seconds_before + time.monotonic() - self.started
        self.state.window = {key: total.item() for key, total in self.summed().items()}
        self.reports()
        if self.tracker:
            self.tracker.require_folder()
        if self.fabric.is_global_zero or self.place.sharded:
            optimizer = self.optimizer.state_dict()["state"]
            checkpoint = Checkpoint(self.model.state_dict(), optimizer, asdict(self.state))
            with self.saves.one():
                save_checkpoint(self.last, checkpoint, self.fabric if self.place.sharded else None)
        self.timed = time.monotonic()

    def explain_failure(self) -> str:
        """Which step, and which module was the first to compute something that is not finite: the step is repeated."""
        micros = self.micro_batches()

        def forward() -> None:
            for micro in micros:
                self.forward(self.model, micro)

        loss = self.differentiate().item()
        return (
            f"{self.name} step {self.state.step + 1}: loss {loss} or its gradient is not finite; "
            f"{first_nonfinite(self.model, forward)}. "
            + (f"The last good checkpoint is {self.last}. " if self.last.exists() else "There is no checkpoint yet. ")
            + "A smaller learning rate, a longer warmup, a clip or precision=fp32 may help"
        )
