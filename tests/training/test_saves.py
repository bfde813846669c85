"""What saving takes of the time, on a clock that is told."""

import pytest

from seqzoo.training import saves


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(saves.time, "monotonic", lambda: self.now)


def trained(monkeypatch, *, seconds: float, saving: float, validations: int) -> tuple[float, int]:
    """The share of the time that went into saving, and how many checkpoints were made between validations."""
    clock = Clock(monkeypatch)
    kept, made = saves.Saves(), 0
    every = seconds / (validations + 1)
    left, start = validations, clock.now
    while clock.now - start < seconds:
        clock.now += 0.05
        validating = left and clock.now - start >= (validations - left + 1) * every
        if validating or kept.due():
            with kept.one():
                clock.now += saving
            left, made = (left - 1, made) if validating else (left, made + 1)
    return kept.spent / (clock.now - start), made


@pytest.mark.parametrize("saving", [0.01, 0.2, 1.0])
def test_checkpoints_take_a_hundredth_of_the_time(monkeypatch, saving):
    share, made = trained(monkeypatch, seconds=1800, saving=saving, validations=0)
    assert share <= 0.0101
    assert made >= 0.009 * 1800 / saving


def test_what_validations_save_counts(monkeypatch):
    share, made = trained(monkeypatch, seconds=600, saving=0.2, validations=20)
    assert share <= 0.0101
    assert 3 <= made <= 10
    share, made = trained(monkeypatch, seconds=600, saving=2.0, validations=20)
    assert made == 1  # the first, which tells how long one takes; then validations leave no room for more


def test_the_longest_wait_is_ten_minutes(monkeypatch):
    _, made = trained(monkeypatch, seconds=7200, saving=30.0, validations=0)
    assert 11 <= made <= 12
