"""What a model is trained for: a batch and a model in, a loss and sums for metrics out.

Masked self-pretraining hides positions drawn independently with the task's ratio, always behind <mask> (tokens) or a
zero and a flag (pixels), and asks for what stood there (Amos, Berant and Gupta 2024; no 80/10/10 split, loss on hidden
positions only). Causal self-pretraining asks every position for the next one. Padding is never asked for.

What a task itself asks for is a class, an answer at some positions, or the next position. The first two can be asked
together with hidden positions, in one phase.

A batch in which nothing is asked has the loss 0, gradients of zero and sums of 0.

On a CPU the positions that are asked are picked out before they are scored. A GPU would be waited for, to know how many
they are: there, all are scored, and the others left out of the sums.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .draws import WHOLE, derive_seed, uniform
from .kernels.common import valid_positions
from .kernels.documents import Documents
from .messages import unknown
from .metrics import METRICS, sums_of
from .spec import IGNORED, Batch, TaskSpec

DRAWS = 2  # how whole sequences are drawn: 1, before, moved what stayed whole the other way than what did not


class Measure(NamedTuple):
    loss: Tensor  # scalar, mean over what was asked for; 0 where that is nothing
    totals: dict[str, Tensor]  # float64 sums: "count" and "loss", and "correct" where there is a right answer


class Objective(Protocol):
    head: str  # of the model it trains, for `build_model`
    monitor: str  # the validation metric that chooses the best weights
    maximise: bool
    nothing: str  # what to say of data in which it asks nothing
    passes: int = 1  # over a batch in a step, in each of which its positions count

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        """bool, true where an answer is asked for: [B] of a class, [B, T] of positions (of 2B sequences, if pairs, and
        of one row if packed)."""
        ...

    def count(self, batch: Batch, *, seed: int) -> Tensor:
        """int64, how many answers a step asks for, of this rank; [n] where its loss is a sum of n means."""
        return _own(batch, self.asked(batch, seed=seed)).sum()

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        """What is measured."""
        ...

    def weighed(self, model: nn.Module, batch: Batch, *, seed: int, shares: Tensor | float) -> Measure:
        """What a step minimises: its means are multiplied by `shares`, one for each that `count` gives."""
        loss, totals = self(model, batch, seed=seed)
        return Measure(shares * loss, totals)


class Classification(Objective):
    """Cross entropy of the class."""

    head = "classify"
    monitor = "accuracy"
    maximise = True
    nothing = "no example is there; valid: one and more"

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        return torch.ones_like(batch.labels, dtype=torch.bool)

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        return self.measure(_told(model, batch, batch.inputs, batch.lengths), batch)

    def measure(self, scores: Tensor, batch: Batch) -> Measure:
        """Scores [B, classes] against the labels."""
        scores, labels = _own_examples(batch, scores), _own(batch, batch.labels)
        return _with_own_metrics(_cross_entropy(scores, labels), scores, labels)


class Positions(Objective):
    """Cross entropy of the answers at the positions that are asked."""

    head = "per_position"
    monitor = "accuracy"
    maximise = True
    nothing = f"all targets are {IGNORED}, so that nothing is asked; valid: an answer at one position and more"

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        assert batch.targets is not None
        return batch.targets != IGNORED

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        return self.measure(_told(model, batch, batch.inputs, batch.lengths), batch)

    def measure(self, scores: Tensor, batch: Batch) -> Measure:
        """Scores [B, T, vocabulary] against the targets."""
        assert batch.targets is not None
        targets, asked = _own(batch, batch.targets), _own(batch, self.asked(batch, seed=0))
        return _with_own_metrics(_cross_entropy(scores, targets, asked), scores, targets)


class SelfPretraining(Objective):
    """What masked and causal self-pretraining share: positions are asked for what stands there."""

    monitor = "loss"
    maximise = False

    def __init__(self, spec: TaskSpec, *, regress: bool) -> None:
        self.head = "regress" if regress else "per_position"
        self.spec = spec

    def measure(self, answers: Tensor, truth: Tensor, asked: Tensor) -> Measure:
        """Scores or values [B, T, ...] against the inputs [B, T] or [B, T, channels] where `asked` [B, T]."""
        if self.head == "regress":
            return _absolute_error(answers, truth, asked, self.spec)
        return _cross_entropy(answers, truth, asked)


class Masked(SelfPretraining):
    """Self-pretraining on hidden positions; `seed` draws them, so that validation always hides the same ones.

    With probability `whole`, an example stays as it is, with nothing hidden. Where that is 0 and no position of a batch
    is drawn, the first one of each sequence is hidden.
    """

    nothing = Classification.nothing

    def __init__(self, spec: TaskSpec, *, regress: bool, whole: float = 0.0) -> None:
        super().__init__(spec, regress=regress)
        self.whole = whole

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        inputs, lengths = _sequences(batch, self.spec)
        mask = uniform(inputs.shape[:2], seed, inputs.device) < self.spec.mask_ratio
        if batch.cu_seqlens is None:
            mask &= valid_positions(lengths, inputs.shape[1])
        if self.whole:
            return mask & self._in_part(inputs, batch.cu_seqlens, seed)
        nothing = ~mask.any()
        if batch.cu_seqlens is None:
            mask[:, 0] |= (lengths > 0) & nothing
            return mask
        first = torch.zeros_like(mask).index_fill(1, batch.cu_seqlens[:-1], True)
        return mask | (first & nothing)

    def _in_part(self, inputs: Tensor, starts: Tensor | None, seed: int) -> Tensor:
        """bool [B, 1], or [T] of documents in one row: where sequences may have hidden positions, both of a pair or
        neither."""
        n = len(inputs) if starts is None else len(starts) - 1
        drawn = uniform((n // self.spec.num_inputs,), derive_seed(seed, WHOLE), inputs.device)
        in_part = (drawn >= self.whole).repeat_interleave(self.spec.num_inputs)
        return in_part[:, None] if starts is None else in_part[Documents(starts, inputs.shape[1]).of_steps()]

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        inputs, lengths = _sequences(batch, self.spec)
        mask = self.asked(batch, seed=seed)
        return self.measure(_told(model, batch, inputs, lengths, mask), _own(batch, inputs), _own(batch, mask))


class Causal(SelfPretraining):
    """Self-pretraining on the next position."""

    nothing = "no sequence has a second step; valid: sequences of 2 steps and more, or objective=masked"

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        inputs, lengths = _sequences(batch, self.spec)
        if batch.cu_seqlens is not None:
            last = batch.cu_seqlens[1:] - 1
            return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device).index_fill(1, last, False)
        return valid_positions(lengths - 1, inputs.shape[1])

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        inputs, lengths = _sequences(batch, self.spec)
        asked = self.asked(batch, seed=seed)
        if batch.part is not None:  # the next position may be another rank's
            following = torch.cat((inputs[:, 1:], inputs[:, :1]), 1)
            return self.measure(_told(model, batch, inputs, lengths), _own(batch, following), _own(batch, asked))
        return self.measure(_told(model, batch, inputs, lengths)[:, :-1], inputs[:, 1:], asked[:, :-1])


class LanguageModelling(Causal):
    """The next position as the task itself, measured in bits too."""

    nothing = "no sequence has a second step; valid: sequences of 2 steps and more"

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec, regress=False)

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        loss, totals = super().__call__(model, batch, seed=seed)
        return Measure(loss, {**totals, "bits_per_character": totals["loss"] / math.log(2)})


class Joint(Objective):
    """What the task asks and masked self-pretraining in one: a step minimises the mean over the answers of the first
    plus `weight` times the mean over the hidden positions of the second.

    In one pass both are told from the same inputs: some sequences whole, in the others positions are hidden. In two
    passes, the task's answers are told from whole inputs. What is measured are the task's answers, told from whole
    inputs, and nothing else: a model that has seen none in training may not know them.
    """

    def __init__(self, task: Classification | Positions, masked: Masked, *, weight: float, passes: int) -> None:
        self.task, self.masked, self.weight, self.passes = task, masked, weight, passes
        self.head = f"{task.head}+{masked.head}"
        self.monitor, self.maximise, self.nothing = task.monitor, task.maximise, task.nothing

    def asked(self, batch: Batch, *, seed: int) -> Tensor:
        return self.task.asked(batch, seed=seed)

    def count(self, batch: Batch, *, seed: int) -> Tensor:
        return torch.stack([part.count(batch, seed=seed) for part in (self.task, self.masked)])

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int) -> Measure:
        return self.task(model, batch, seed=seed)

    def weighed(self, model: nn.Module, batch: Batch, *, seed: int, shares: Tensor | float) -> Measure:
        inputs, lengths = _sequences(batch, self.masked.spec)
        mask = self.masked.asked(batch, seed=seed)
        answers, filled = _told(model, batch, inputs, lengths, mask, whole=self.passes == 2)
        task = self.task.measure(answers, batch)
        masked = self.masked.measure(filled, _own(batch, inputs), _own(batch, mask))
        losses = torch.stack((task.loss, self.weight * masked.loss))
        totals = {**task.totals, **{f"masked/{name}": total for name, total in masked.totals.items()}}
        return Measure((shares * losses).sum(), totals)


def build_objective(
    name: str,
    spec: TaskSpec,
    *,
    pixel_loss: str = "cross_entropy",
    weight: float = 1.0,
    passes: int = 1,
    whole: float = 0.0,
) -> Objective:
    """An objective by name.

    Args:
        name: "task" for what the task asks, by its `answer`; "masked" or "causal" for self-pretraining; "joint" for
            the task and masked self-pretraining in one.
        spec: the task's description.
        pixel_loss: of pretraining on pixels, "cross_entropy" over their levels or "l1" of normalised values.
        weight: of the masked loss in "joint".
        passes: of "joint" over a batch, 1 or 2.
        whole: of "joint", the probability that a sequence stays as it is, with nothing hidden.

    Raises:
        ValueError: an unknown name, masking a task that has no mask id or asks for the next position, or cross entropy
            over the levels of sound.
    """
    regress = spec.kind == "pixels" and pixel_loss == "l1"
    if name == "task":
        return _task(spec)
    if spec.kind == "pixels" and spec.vocab_size > 256 and not regress:
        raise ValueError(
            f"{spec.name} has {spec.vocab_size:,} levels, too many to score one by one; valid: pixel_loss=l1"
        )
    if name == "causal":
        return Causal(spec, regress=regress)
    if name not in ("masked", "joint"):
        raise ValueError(unknown("objective", name, ("task", "masked", "causal", "joint")))
    task = _task(spec)
    if name == "joint" and isinstance(task, LanguageModelling):
        raise ValueError(
            f"{spec.name} asks each position for the next one, so none can be hidden beside it; valid: "
            "objective=masked, with which pretrain=false is training from scratch"
        )
    if spec.kind == "tokens" and spec.mask_id is None:
        causal = "objective=causal" if name == "masked" else "pretrain=true objective=causal"
        raise ValueError(f"{spec.name} has no mask_id, so it cannot be masked; valid: {causal}")
    masked = Masked(spec, regress=regress, whole=whole if name == "joint" else 0.0)
    if name == "masked" or isinstance(task, LanguageModelling):
        return masked
    return Joint(task, masked, weight=weight, passes=passes)


def _task(spec: TaskSpec) -> Classification | Positions | LanguageModelling:
    """What a task asks, by its answer."""
    if spec.answer == "class":
        return Classification()
    return Positions() if spec.answer == "positions" else LanguageModelling(spec)


def _sequences(batch: Batch, spec: TaskSpec) -> tuple[Tensor, Tensor]:
    """The batch's sequences and lengths, the two of a pair one by one."""
    if spec.num_inputs == 2 and batch.cu_seqlens is None:
        return batch.inputs.flatten(0, 1), batch.lengths.flatten()
    return batch.inputs, batch.lengths


def _own(batch: Batch, x: Tensor) -> Tensor:
    """What this rank answers for, where ranks have parts of the time: of [B, T, ...] its part, of [B] every so many
    examples, which all of them score."""
    if batch.part is None:
        return x
    return x[batch.part.rank :: batch.part.ranks] if x.dim() == 1 else batch.part.own(x)


def _own_examples(batch: Batch, scores: Tensor) -> Tensor:
    return scores if batch.part is None else scores[batch.part.rank :: batch.part.ranks]


def _told(
    model: nn.Module, batch: Batch, inputs: Tensor, lengths: Tensor, mask: Tensor | None = None, **options: Any
) -> Any:
    """What the model says of `batch`, given its inputs as its objective reads them."""
    if batch.part is not None:
        options["part"] = batch.part
    if batch.cu_seqlens is not None:
        return model(inputs, None, mask, batch.cu_seqlens, **options)
    return model(inputs, lengths, **options) if mask is None else model(inputs, lengths, mask, **options)


def _cross_entropy(scores: Tensor, targets: Tensor, asked: Tensor | None = None) -> Measure:
    """`scores` [..., classes] against `targets` [...], where `asked` [...] if it is given; more axes may follow."""
    if asked is not None and _may_wait_for(asked.device):
        scores, targets = scores[asked], targets[asked]
    elif asked is not None:
        others = ~asked.reshape(asked.shape + (1,) * (targets.dim() - asked.dim()))
        targets = targets.long().masked_fill(others, IGNORED)
    scores, targets = scores.flatten(0, -2).float(), targets.flatten().long()
    total = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
    correct = (scores.argmax(-1) == targets).sum().double()
    return _mean(total, (targets != IGNORED).sum(), correct=correct)


def _with_own_metrics(measure: Measure, scores: Tensor, answers: Tensor) -> Measure:
    """What is measured of `scores` [..., classes] with sums of the metrics that were registered, in evaluation."""
    if not METRICS or torch.is_grad_enabled():
        return measure
    asked = answers != IGNORED
    return measure._replace(totals={**measure.totals, **sums_of(scores[asked].float(), answers[asked].long())})


def _absolute_error(values: Tensor, targets: Tensor, asked: Tensor, spec: TaskSpec) -> Measure:
    """Predicted against true values [B, T, channels], normalised as the model sees them, where `asked` [B, T]."""
    errors = (values.float() - spec.normalise(targets)).abs()
    errors = errors[asked] if _may_wait_for(asked.device) else errors.masked_fill(~asked[..., None], 0)
    return _mean(errors.sum(), asked.sum() * spec.channels)


def _mean(total: Tensor, count: Tensor, **sums: Tensor) -> Measure:
    """Of losses that add up to `total` over the `count` answers that were asked for."""
    loss = total / count.clamp(min=1)
    count = count.double()
    return Measure(loss, {"count": count, "loss": loss.detach().double() * count, **sums})


def _may_wait_for(device: torch.device) -> bool:
    return device.type == "cpu"
