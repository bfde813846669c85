import math

import numpy as np
import pytest

from seqzoo.objectives import build_objective
from seqzoo.tasks import from_arrays
from seqzoo.training.counting import counted


def task_of(draw, **options):
    generator = np.random.default_rng(0)
    inputs = [draw(generator) for _ in range(600)]
    labels = [i % 2 for i in range(600)]
    return from_arrays("toy", inputs=inputs, labels=labels, val_fraction=0.2, test_fraction=0.2, **options)


def alternating(generator):
    return (np.arange(40) + generator.integers(2)) % 2


@pytest.mark.parametrize("name", ["masked", "causal"])
def test_neighbours_tell_what_frequencies_do_not(name):
    task = task_of(alternating, kind="tokens")
    found = counted(build_objective(name, task.spec), task.train, task.val)
    assert found.symbols == pytest.approx(math.log(2), abs=1e-3)
    assert found.neighbours < 0.3  # those further away tell less


@pytest.mark.parametrize("kind", ["tokens", "pixels"])
def test_independent_symbols_are_told_by_their_frequency_alone(kind):
    p = np.array([0.5, 0.3, 0.2])
    shape = {"tokens": (50,), "pixels": (50, 1)}[kind]
    task = task_of(lambda g: g.choice(3, p=p, size=shape).astype(np.uint8), kind=kind)
    found = counted(build_objective("masked", task.spec), task.train, task.val)
    entropy = -(p * np.log(p)).sum()
    assert found.symbols == pytest.approx(entropy, abs=0.02)
    assert found.neighbours == pytest.approx(entropy, abs=0.05)


def test_a_symbol_that_train_does_not_have_costs_something_finite():
    task = task_of(alternating, kind="tokens")
    values = task.val.values.clone()
    values[::7] = task.spec.vocab_size - 1
    object.__setattr__(task.val, "values", values)
    assert math.isfinite(counted(build_objective("masked", task.spec), task.train, task.val).neighbours)
