import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from seqzoo.draws import AUGMENTED, WHOLE, derive_seed, uniform
from seqzoo.models import ModelConfig, build_model, task_head
from seqzoo.objectives import Masked, build_objective
from seqzoo.spec import IGNORED, Batch, TaskSpec
from seqzoo.tasks import pack

TOKENS = TaskSpec(
    name="tokens", kind="tokens", vocab_size=12, max_length=32, num_classes=3, pad_id=1, mask_id=0, mask_ratio=0.3
)
PIXELS = TaskSpec(
    name="pixels", kind="pixels", vocab_size=256, max_length=32, num_classes=10, mean=(0.4,), std=(0.2,), mask_ratio=0.5
)


class Recorder(nn.Module):
    """Answers with fixed scores and remembers what it was asked."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, inputs, lengths, mask=None):
        self.mask = mask
        return self.scores


def batch(spec, B=5, T=32):
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "pixels":
        inputs = torch.randint(256, (B, T, 1), generator=generator, dtype=torch.uint8)
    else:
        inputs = torch.randint(2, 12, (B, T), generator=generator)
    lengths = torch.tensor([32, 20, 1, 9, 31])
    return Batch(inputs, lengths, torch.randint(spec.num_classes, (B,), generator=generator), torch.arange(B))


def test_classification():
    data, scores = batch(TOKENS), torch.randn(5, 3)
    measure = build_objective("task", TOKENS)(Recorder(scores), data, seed=0)
    torch.testing.assert_close(measure.loss, F.cross_entropy(scores, data.labels))
    assert measure.totals["count"] == 5
    assert measure.totals["correct"] == (scores.argmax(-1) == data.labels).sum()


def test_answers_at_positions():
    data, scores = batch(TOKENS), torch.randn(5, 32, 12)
    targets = torch.full((5, 32), IGNORED)
    targets[0, 3], targets[1, 0], targets[1, 7] = 4, 5, scores[1, 7].argmax()
    objective = build_objective("task", replace(TOKENS, answer="positions"))
    measure = objective(Recorder(scores), data._replace(targets=targets), seed=0)
    asked = torch.stack((scores[0, 3], scores[1, 0], scores[1, 7]))
    torch.testing.assert_close(measure.loss, F.cross_entropy(asked, torch.tensor([4, 5, targets[1, 7]])))
    assert measure.totals["count"] == 3
    assert measure.totals["correct"] >= 1


def test_language_modelling_is_causal_pretraining_in_bits():
    data, scores = batch(TOKENS), torch.randn(5, 32, 12)
    task, causal = (
        build_objective(name, replace(TOKENS, answer="next"))(Recorder(scores), data, seed=0)
        for name in ("task", "causal")
    )
    assert task.loss == causal.loss
    nats = task.totals["loss"] / task.totals["count"]
    assert task.totals["bits_per_character"] / task.totals["count"] == pytest.approx(nats.item() / math.log(2))


@pytest.mark.parametrize("answer", ["class", "positions", "next"])
def test_the_head_suits_the_answer(answer):
    spec = replace(TOKENS, answer=answer)
    assert build_objective("task", spec).head == task_head(spec)


def test_masked_tokens():
    data, scores = batch(TOKENS), torch.randn(5, 32, 12)
    model = Recorder(scores)
    objective = build_objective("masked", TOKENS)
    measure = objective(model, data, seed=3)
    mask = model.mask
    for b, n in enumerate(data.lengths.tolist()):
        assert not mask[b, n:].any()
    torch.testing.assert_close(measure.loss, F.cross_entropy(scores[mask], data.inputs[mask]))
    assert measure.totals["count"] == mask.sum()
    objective(model, data, seed=3)
    assert torch.equal(model.mask, mask), "the same seed hides the same positions"
    objective(model, data, seed=4)
    assert not torch.equal(model.mask, mask)


def test_masked_share_is_the_ratio():
    inputs = torch.full((200, 100), 3)
    model = Recorder(torch.zeros(200, 100, 12))
    build_objective("masked", TOKENS)(model, Batch(inputs, torch.full((200,), 100), None, None), seed=0)
    assert abs(model.mask.double().mean() - 0.3) < 4 * (0.3 * 0.7 / 20_000) ** 0.5


def test_masked_always_asks_for_something():
    data = Batch(torch.full((1, 1), 3), torch.tensor([1]), torch.tensor([0]), torch.tensor([0]))
    for seed in range(20):
        measure = build_objective("masked", TOKENS)(Recorder(torch.zeros(1, 1, 12)), data, seed=seed)
        assert measure.totals["count"] == 1
        assert measure.loss.isfinite()


def test_padding_is_never_hidden():
    data = Batch(torch.full((3, 4), 3), torch.tensor([0, 1, 0]), None, None)
    for seed in range(20):
        mask = build_objective("masked", TOKENS).asked(data, seed=seed)
        assert mask.tolist() == [[False] * 4, [True, False, False, False], [False] * 4]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("name", ["positions", "next", "masked", "causal", "masked pixels", "causal values"])
@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_what_is_not_asked_counts_nothing(name, on_cpu, lengths, seed):
    """Any batch adds to sums and gradients what its examples do one by one: those of which nothing is asked, zero."""
    objective_name, _, kind = name.partition(" ")
    spec = PIXELS if kind else TOKENS
    pixel_loss = "l1" if kind == "values" else "cross_entropy"
    if objective_name in ("positions", "next"):
        spec, objective_name = replace(TOKENS, answer=objective_name), "task"
    objective = build_objective(objective_name, spec, pixel_loss=pixel_loss)
    data = batch(spec, B=5, T=3)._replace(lengths=torch.tensor(lengths))
    inputs = data.inputs[: len(lengths)]
    valid = torch.arange(3) < data.lengths[:, None]
    targets = torch.where(valid & (inputs % 2 == 0), inputs, IGNORED) if spec.answer == "positions" else None
    data = data._replace(inputs=inputs, targets=targets)
    answers = {"": (12,), "pixels": (1, 256), "values": (1,)}[kind]
    scores = torch.randn(len(lengths), 3, *answers, generator=torch.Generator().manual_seed(seed))

    def measured(rows):
        part = Batch(
            *(None if t is None else t[rows] for t in data[:2]), None, None, None if targets is None else targets[rows]
        )
        leaf = scores[rows].requires_grad_()
        loss, totals = objective(lambda *_: leaf, part, seed=seed)
        (loss * totals["count"]).backward()
        assert totals["count"] == objective.asked(part, seed=seed).sum()
        return totals, leaf.grad

    with (
        patch("seqzoo.objectives._may_wait_for", lambda device: on_cpu),
        patch("seqzoo.objectives.uniform", lambda shape, seed, device: torch.tensor([0.0, 0.9, 0.1]).expand(shape)),
    ):
        totals, gradient = measured(torch.arange(len(lengths)))
        single = [measured(torch.tensor([row])) for row in range(len(lengths))]
    for key, total in totals.items():
        assert total.item() == pytest.approx(sum(part[key].item() for part, _ in single), rel=1e-5, abs=1e-12)
    torch.testing.assert_close(gradient, torch.cat([part for _, part in single]))
    nothing = [gradient[row] for row, (part, _) in enumerate(single) if part["count"] == 0]
    assert all(not part.any() for part in nothing)
    assert nothing or min(lengths) > 0


def test_masked_pixels_by_level_and_by_value():
    data = batch(PIXELS)
    scores = torch.randn(5, 32, 1, 256)
    model = Recorder(scores)
    measure = build_objective("masked", PIXELS)(model, data, seed=0)
    mask = model.mask
    torch.testing.assert_close(
        measure.loss, F.cross_entropy(scores[mask].flatten(0, 1), data.inputs[mask].flatten().long())
    )

    values = torch.randn(5, 32, 1)
    objective = build_objective("masked", PIXELS, pixel_loss="l1")
    assert objective.head == "regress"
    measure = objective(Recorder(values), data, seed=0)
    truth = (data.inputs / 255 - 0.4) / 0.2
    torch.testing.assert_close(measure.loss, (values - truth)[mask].abs().mean())
    assert "correct" not in measure.totals


class TwoHeaded(Recorder):
    """Answers both as `JointModel` does, and remembers how it was called."""

    def forward(self, inputs, lengths, mask=None, *, whole=False):
        self.mask, self.whole = mask, whole
        return self.scores[0] if mask is None else self.scores


@pytest.mark.parametrize("passes", [1, 2])
def test_one_phase_adds_two_means(passes):
    data, scores = batch(TOKENS), (torch.randn(5, 3), torch.randn(5, 32, 12))
    model = TwoHeaded(scores)
    objective = build_objective("joint", TOKENS, weight=0.5, passes=passes)
    assert (objective.head, objective.monitor, objective.passes) == ("classify+per_position", "accuracy", passes)
    task, masked = (build_objective(name, TOKENS) for name in ("task", "masked"))
    expected = [one(Recorder(part), data, seed=3) for one, part in zip((task, masked), scores, strict=True)]
    shares = torch.tensor([0.25, 3.0])
    measure = objective.weighed(model, data, seed=3, shares=shares)
    assert torch.equal(model.mask, masked.asked(data, seed=3))
    assert model.whole == (passes == 2)
    torch.testing.assert_close(measure.loss, 0.25 * expected[0].loss + 3.0 * 0.5 * expected[1].loss)
    named = {f"masked/{name}": total for name, total in expected[1].totals.items()}
    assert measure.totals == {**expected[0].totals, **named}
    assert objective.count(data, seed=3).tolist() == [5, expected[1].totals["count"]]


@pytest.mark.parametrize("packed", [False, True])
def test_in_one_phase_some_examples_stay_whole(packed):
    data = Batch(torch.full((400, 32), 3), torch.full((400,), 32), torch.zeros(400), torch.arange(400))
    objective = build_objective("joint", TOKENS, whole=0.25)
    model = TwoHeaded((torch.zeros(400, 3), torch.zeros(400, 32, 12)))
    objective.weighed(model, data, seed=3, shares=torch.ones(2))
    mask = model.mask
    if packed:
        mask = objective.masked.asked(pack(data, TOKENS), seed=3).view(400, 32)
    hidden = mask.any(1)
    assert abs(hidden.double().mean() - 0.75) < 4 * (0.25 * 0.75 / 400) ** 0.5
    assert abs(mask[hidden].double().mean() - 0.3) < 4 * (0.3 * 0.7 / 9_600) ** 0.5
    assert torch.equal(mask.view(-1), objective.masked.asked(pack(data, TOKENS) if packed else data, seed=3).view(-1))
    assert not torch.equal(hidden, objective.masked.asked(data, seed=4).any(1))


def test_what_is_to_stay_whole_has_nothing_hidden_in_any_batch():
    objective = build_objective("joint", TOKENS, whole=0.5).masked
    few = Batch(torch.full((1, 32), 3), torch.full((1,), 32), torch.zeros(1), torch.arange(1))
    whole = [not objective.asked(few, seed=seed).any() for seed in range(400)]
    assert abs(sum(whole) / 400 - 0.5) < 4 * (0.25 / 400) ** 0.5
    assert Masked(replace(TOKENS, mask_ratio=0.0), regress=False).asked(few, seed=0).tolist() == [[True] + [False] * 31]


def test_whether_an_example_stays_whole_and_how_it_is_augmented_are_two_draws():
    whole = [uniform((64,), derive_seed(seed, WHOLE), torch.device("cpu")) for seed in range(50)]
    moved = [uniform((64,), derive_seed(seed, AUGMENTED), torch.device("cpu")) for seed in range(50)]
    together = torch.corrcoef(torch.stack((torch.cat(whole), torch.cat(moved))))
    assert abs(together[0, 1]) < 4 / 3200**0.5


@pytest.mark.parametrize("packed", [False, True])
def test_both_of_a_pair_stay_whole(packed):
    pairs = replace(TOKENS, num_inputs=2)
    data = Batch(torch.full((50, 2, 32), 3), torch.full((50, 2), 32), torch.zeros(50), torch.arange(50))
    masked = build_objective("joint", pairs, whole=0.5).masked
    hidden = masked.asked(pack(data, pairs) if packed else data, seed=0).view(50, 2, 32).any(2)
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert 10 < hidden[:, 0].sum() < 40


def test_with_all_examples_whole_the_labels_alone_are_learnt():
    data, scores = batch(TOKENS), (torch.randn(5, 3), torch.randn(5, 32, 12))
    joint = build_objective("joint", TOKENS, whole=1 - 1e-9)
    assert joint.count(data, seed=0).tolist() == [5, 0]
    measure = joint.weighed(TwoHeaded(scores), data, seed=0, shares=torch.ones(2))
    torch.testing.assert_close(measure.loss, build_objective("task", TOKENS)(Recorder(scores[0]), data, seed=0).loss)


def test_of_one_phase_the_task_alone_is_measured():
    data, scores = batch(TOKENS), (torch.randn(5, 3), torch.randn(5, 32, 12))
    measured = build_objective("joint", TOKENS)(model := TwoHeaded(scores), data, seed=3)
    assert model.mask is None
    assert measured == build_objective("task", TOKENS)(Recorder(scores[0]), data, seed=3)


def test_causal_asks_for_the_next_position():
    data, scores = batch(TOKENS), torch.randn(5, 32, 12)
    measure = build_objective("causal", TOKENS)(Recorder(scores), data, seed=0)
    losses = [
        F.cross_entropy(scores[b, t], data.inputs[b, t + 1])
        for b, n in enumerate(data.lengths.tolist())
        for t in range(n - 1)
    ]
    torch.testing.assert_close(measure.loss, torch.stack(losses).mean())
    assert measure.totals["count"] == sum(n - 1 for n in data.lengths.tolist())


@pytest.mark.parametrize("objective", ["masked", "causal"])
@pytest.mark.parametrize("spec", [TOKENS, PIXELS], ids=lambda spec: spec.name)
def test_a_model_learns_from_it(objective, spec):
    """Constant sequences are soon predicted."""
    torch.manual_seed(0)
    goal = build_objective(objective, spec)
    config = ModelConfig(name="m", d_model=32, num_layers=1, block={"name": "lru"})
    model = build_model(config, spec, head=goal.head, causal=objective == "causal")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = torch.arange(2, 10)[:, None].expand(8, 32) * (1 if spec.kind == "tokens" else 20)
    values = values if spec.kind == "tokens" else values[..., None].to(torch.uint8)
    data = Batch(values, torch.full((8,), 32), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    losses = []
    for step in range(80):
        loss = goal(model, data, seed=step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_errors_say_what_is_valid():
    with pytest.raises(ValueError, match="valid: task, masked, causal, joint"):
        build_objective("mask", TOKENS)
    unmasked = TaskSpec(name="plain", kind="tokens", vocab_size=5, max_length=8, num_classes=2)
    with pytest.raises(ValueError, match="valid: objective=causal"):
        build_objective("masked", unmasked)
    sound = TaskSpec(name="sound", kind="pixels", vocab_size=65_536, max_length=8, num_classes=2)
    for objective in ("masked", "causal"):
        with pytest.raises(
            ValueError, match="sound has 65,536 levels, too many to score one by one; valid: pixel_loss=l1"
        ):
            build_objective(objective, sound)
        assert build_objective(objective, sound, pixel_loss="l1").head == "regress"
