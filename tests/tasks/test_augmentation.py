from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from often import others_slow

from seqzoo.spec import Batch, TaskSpec
from seqzoo.tasks import AUGMENTATIONS, TASKS, TaskConfig, build_task, from_arrays
from seqzoo.tasks.augmentation import NOISE, crop, move
from seqzoo.tasks.characters import EOS, PAD, SPECIALS

LETTERS = 26


def pictures(side: int, n: int = 200, channels: int = 1) -> tuple[Batch, TaskSpec]:
    """Pictures of noise without level 0."""
    spec = TaskSpec(name="noise", kind="pixels", vocab_size=256, max_length=side**2, num_classes=2, channels=channels)
    inputs = torch.randint(1, 256, (n, side**2, channels), dtype=torch.uint8)
    return Batch(inputs, torch.full((n,), side**2), torch.arange(n) % 2, torch.arange(n)), spec


def moved(picture: np.ndarray, down: int, right: int, mirror: bool) -> np.ndarray:
    """[side, side, channels] moved so, level 0 where nothing is known."""
    side = len(picture)
    seen = np.zeros_like(picture)
    for row, column in itertools.product(range(side), repeat=2):
        there = row - down, column - right
        if all(0 <= place < side for place in there):
            seen[row, column] = (picture[:, ::-1] if mirror else picture)[there]
    return seen


@pytest.mark.parametrize(
    ("side", "channels", "reach", "mirror"),
    others_slow(
        [(*size, mirror) for size in ((7, 2, 0), (16, 1, 2), (17, 3, 2)) for mirror in (False, True)],
        [(7, 2, 0, True), (16, 1, 2, False), (17, 3, 2, True)],
    ),
)
def test_pictures_are_moved_and_mirrored(side, channels, reach, mirror):
    batch, spec = pictures(side, channels=channels)
    changed = move(batch, spec, seed=3, mirror=mirror)
    assert changed.inputs.dtype == torch.uint8
    assert all(torch.equal(getattr(changed, name), getattr(batch, name)) for name in ("lengths", "labels", "index"))
    steps, sides = range(-reach, reach + 1), (False, True) if mirror else (False,)
    found = set()
    for before, after in zip(batch.inputs.numpy(), changed.inputs.numpy(), strict=True):
        before, after = (each.reshape(side, side, channels) for each in (before, after))
        ways = itertools.product(steps, steps, sides)
        (way,) = [way for way in ways if np.array_equal(moved(before, *way), after)]
        found.add(way)
    assert len(found) >= 0.95 * len(steps) ** 2 * len(sides)


@pytest.mark.parametrize(("side", "reach"), [(28, 3), (32, 4), (128, 16)])
def test_the_reach_is_an_eighth_of_the_side(side, reach):
    batch, spec = pictures(side)
    empty_rows = (move(batch, spec, seed=0).inputs.view(-1, side, side) == 0).all(2).sum(1)
    assert empty_rows.max() == reach


def texts(n: int = 400, T: int = 64, num_inputs: int = 1) -> tuple[Batch, TaskSpec]:
    """Texts of 0 to T - 1 letters, closed by <eos>."""
    spec = TaskSpec(
        name="letters",
        kind="tokens",
        vocab_size=len(SPECIALS) + LETTERS,
        max_length=T,
        num_classes=2,
        pad_id=PAD,
        mask_id=0,
        num_inputs=num_inputs,
    )
    rows = n * num_inputs
    lengths = 1 + torch.arange(rows) % T
    steps = torch.arange(T)
    inputs = torch.randint(len(SPECIALS), spec.vocab_size, (rows, T))
    inputs = torch.where(steps < lengths[:, None] - 1, inputs, PAD)
    inputs[torch.arange(rows), lengths - 1] = EOS
    if num_inputs == 2:
        inputs, lengths = inputs.view(n, 2, T), lengths.view(n, 2)
    return Batch(inputs, lengths, torch.arange(n) % 2, torch.arange(n)), spec


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_texts_are_cropped_and_still_closed(num_inputs):
    batch, spec = texts(num_inputs=num_inputs)
    changed = crop(batch, spec, seed=3)
    assert changed.inputs.shape == batch.inputs.shape
    assert changed.lengths.shape == batch.lengths.shape
    assert torch.equal(changed.labels, batch.labels)
    rows = (changed.inputs, changed.lengths, batch.inputs, batch.lengths)
    shares, places, others, letters = [], set(), 0, 0
    for after, kept, before, length in zip(*(each.flatten(0, num_inputs - 1) for each in rows), strict=True):
        window, whole = int(kept) - 1, int(length) - 1
        assert (whole + 1) // 2 <= window <= whole
        assert after[window] == EOS
        assert (after[window + 1 :] == PAD).all()
        assert (after[:window] >= len(SPECIALS)).all()
        differing = [int((after[:window] != before[at : at + window]).sum()) for at in range(whole - window + 1)]
        if whole >= 20:
            place = int(np.argmin(differing))
            places.add(0 if whole == window else round(place / (whole - window), 1))
            others, letters = others + differing[place], letters + window
            shares.append(window / whole)
    assert 0.7 < np.mean(shares) < 0.8
    assert {0, 0.5, 1} <= places
    rate = NOISE * (1 - 1 / LETTERS)
    assert abs(others / letters - rate) < 4 * (rate / letters) ** 0.5


def test_the_texts_of_a_pair_are_changed_each_for_itself():
    batch, spec = texts(num_inputs=2)
    same = batch._replace(inputs=batch.inputs[:, :1].expand(-1, 2, -1), lengths=batch.lengths[:, :1].expand(-1, 2))
    changed = crop(same, spec, seed=0)
    assert (changed.lengths[:, 0] != changed.lengths[:, 1]).double().mean() > 0.8


@pytest.mark.parametrize(("change", "batch"), [(move, pictures(16)), (crop, texts())])
def test_a_seed_decides_alone(change, batch):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, again, other = (change(*batch, seed=seed).inputs for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_task_says_which_it_allows(monkeypatch, tmp_path):
    assert AUGMENTATIONS.keys() < TASKS.keys()

    def toy(config, **places):
        task = from_arrays("toy", kind="tokens", inputs=[[1, 2]] * 40, labels=[0, 1] * 20)
        return replace(task, spec=replace(task.spec, name=config.name))

    for name in TASKS:
        monkeypatch.setitem(TASKS, name, toy)
        config = TaskConfig(name=name, max_length=16, mask_ratio=0.1)
        built = build_task(config, data_dir=None, cache_dir=tmp_path)
        assert built.augmentation is AUGMENTATIONS.get(name)
        assert (built.augmentation is None) == (name not in AUGMENTATIONS)
    config = TaskConfig(name="lra_image", max_length=16, mask_ratio=0.1, permuted=True)
    assert build_task(config, data_dir=None, cache_dir=tmp_path).augmentation is None


@pytest.mark.parametrize("name", ["lra_pathfinder", "lra_pathx", "lra_pathx256"])
def test_contours_are_not_moved_out_of_the_picture(name):
    batch, spec = pictures(16)
    before, after = (each.inputs.view(-1, 16, 16) for each in (batch, AUGMENTATIONS[name](batch, spec, seed=0)))
    mirrored = (after == before.flip(2)).flatten(1).all(1)
    assert torch.equal(after[~mirrored], before[~mirrored])
    assert 0.35 < mirrored.double().mean() < 0.65
