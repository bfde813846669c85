"""What was measured on a GPU, and is taken there."""

from __future__ import annotations

import pytest

from seqzoo.kernels import measured
from seqzoo.kernels.measured import Key, Measured


@pytest.mark.parametrize(("channels", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (300, 512)])
def test_widths_come_in_classes(channels, width):
    assert measured.width_class(channels) == width


def test_what_is_written_is_read(tmp_path, monkeypatch):
    rows = {
        Key(90, "attention", "bfloat16", 32): Measured(1, "a card, of some kind", "a run"),
        Key(90, "attention", "float16", 64): Measured(0, "a card", "a run"),
    }
    measured.write(rows, tmp_path / "measured.csv")
    assert measured.read(tmp_path / "measured.csv") == rows
    monkeypatch.setattr(measured, "FASTER", rows)
    measured.few_warps.cache_clear()
    assert measured.few_warps(90, "attention", "bfloat16")
    assert not measured.few_warps(90, "attention", "float16")
    measured.few_warps.cache_clear()


def test_every_row_of_the_table_says_where_it_was_measured():
    for key, found in measured.FASTER.items():
        assert found.card, key
        assert found.source, key
