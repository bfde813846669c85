"""What follows from the rows of a run: where "auto" takes the fused form, and which block sizes."""

from __future__ import annotations

import json

import pytest
from on_gpu import apply

from seqzoo.kernels.measured import Key, Measured

RUN = {"architecture": 90, "card": "a card", "began": "2026-01-02 03:04:05 UTC"}


def check(operation="attention", dtype="bfloat16", width=64, few_warps=0, status="passed", case="a"):
    return {
        "operation": operation, "dtype": dtype, "width": width, "few_warps": few_warps, "status": status, "case": case
    }  # fmt: skip


def times(fused, chunked, operation="attention", dtype="bfloat16", width=64, shape="B=32", lra=True, name="fused"):
    at = {"operation": operation, "dtype": dtype, "width": width, "shape": shape, "lra": lra}
    return [
        {**at, "name": form, "both_ms": ms, "both_eager_ms": ms, "forward_ms": ms, "forward_eager_ms": ms}
        for form, ms in ((name, fused), ("chunked", chunked))
        if ms is not None
    ]


def decided(checks, bench, known=None):
    return apply.decide(known or {}, RUN, checks, bench, "a run")


def test_what_passed_and_is_faster_is_taken_and_nothing_else():
    checks = [
        check(),
        check(case="b"),
        check(width=128),
        check(dtype="float16"),
        check(operation="diagonal_scan", width=0),
    ]
    bench = [*times(1.0, 2.0), *times(3.0, 2.0, width=128), *times(1.0, 2.0, "linear_attention")]
    assert decided(checks, bench) == {Key(90, "attention", "bfloat16", 64): Measured(0, "a card", "a run")}


@pytest.mark.parametrize("status", ["above", "failed", "died", "not checked", "not reached"])
def test_one_check_that_has_not_passed_is_enough(status):
    assert not decided([check(), check(status=status, case="b")], times(1.0, 2.0))


def test_nothing_is_taken_that_was_not_checked_or_not_timed():
    assert not decided([], times(1.0, 2.0))
    assert not decided([check()], [])
    assert not decided([check()], times(1.0, None))
    assert not decided([check()], times(1.0, 2.0, lra=False))


def test_the_median_over_shapes_decides_in_both_ways_of_launching():
    bench = [*times(1.0, 2.0), *times(1.0, 2.0, shape="B=64"), *times(3.0, 2.0, shape="B=8")]
    assert decided([check()], bench)
    for row in bench:
        if row["name"] == "fused":
            row["both_eager_ms"] = 9.0
    assert not decided([check()], bench)


@pytest.mark.parametrize(("status", "taken"), [("died", False), ("failed", False), ("not reached", True)])
def test_shape_that_the_kernel_died_of_decides(status, taken):
    bench = times(1.0, 2.0)
    lost = {key: y for key, y in bench[0].items() if not key.endswith("_ms")}
    lost |= {"shape": "B=64", "status": status, "said": "signal"}
    assert bool(decided([check()], [*bench, lost])) == taken


@pytest.mark.parametrize(("form", "taken"), [("fused", False), ("chunked", True)])
def test_shape_that_cannot_be_captured_decides_if_the_kernel_is_to_blame(form, taken):
    other = times(1.0, 2.0, shape="B=64")
    for row in other:
        if row["name"] == form:
            del row["both_ms"], row["forward_ms"]
            row["no_graph"] = "operation not permitted when stream is capturing"
    assert bool(decided([check()], [*times(1.0, 2.0), *other])) == taken


def test_narrow_heads_take_few_warps_where_only_those_passed():
    checks = [check(width=32, status="died"), check(width=32, few_warps=1), check(width=64)]
    fast = times(1.0, 2.0, width=32, name="fused, few warps")
    bench = [*fast, *times(0.5, 2.0, width=32), *times(1.0, 2.0)]
    rows = decided(checks, bench)
    assert rows[Key(90, "attention", "bfloat16", 32)].few_warps == 1
    assert rows[Key(90, "attention", "bfloat16", 64)].few_warps == 0
    both = [check(width=32), *checks[1:]]
    assert decided(both, bench)[Key(90, "attention", "bfloat16", 32)].few_warps == 0


def test_choice_of_few_warps_is_one_for_all_narrow_heads():
    """A width that passed with many warps alone is not taken with few, which it would run with."""
    checks = [check(width=32, status="died"), check(width=32, few_warps=1), check(width=16)]
    bench = [*times(1.0, 2.0, width=32, name="fused, few warps"), *times(1.0, 2.0, width=16)]
    assert list(decided(checks, bench)) == [Key(90, "attention", "bfloat16", 32)]


def test_rows_of_other_runs_stay_where_this_one_says_nothing():
    other = {Key(80, "attention", "bfloat16", 64): Measured(0, "old", "old")}
    older = {Key(90, "attention", "float16", 64): Measured(0, "old", "old")}
    undone = {Key(90, "attention", "bfloat16", 64): Measured(0, "old", "old")}
    rows = decided([check(status="above")], times(1.0, 2.0), {**other, **older, **undone})
    assert rows == {**other, **older}


def test_operation_without_backward_is_decided_by_forward():
    bench = [{key: y for key, y in row.items() if "both" not in key} for row in times(1.0, 2.0, "nearest_code")]
    assert decided([check("nearest_code")], bench)


@pytest.fixture
def tables(monkeypatch):
    """Block sizes that no other test sees, and no file."""
    from on_gpu import tables

    from seqzoo.kernels.attention import fused
    from seqzoo.kernels.blocks import Blocks

    own = Blocks("attention", fused.BLOCKS.path, fused.Config)
    monkeypatch.setattr(own, "write", lambda: None)
    monkeypatch.setattr(tables, "table", lambda operation: own)
    return own


def sized(ms, sizes, own=False, status="passed"):
    row = [80, "bfloat16", 64, 0, "forward"]
    return {
        "operation": "attention", "kernel": "forward", "row": row, "sizes": sizes, "own": own, "ms": ms,
        "status": status,
    }  # fmt: skip


def test_faster_sizes_become_a_row_of_the_cards_own(tables):
    from seqzoo.kernels.blocks import Key as Row

    before = dict(tables.rows)
    said = apply.resize(
        RUN, [sized(1.0, [128, 64, 8, 3], own=True), sized(0.9, [64, 64, 4, 3]), sized(1.1, [64, 64, 8, 2])]
    )
    assert len(said) == 1
    changed = {key: row for key, row in tables.rows.items() if before.get(key) != row}
    assert changed == {Row(90, "bfloat16", 64, 0, "forward"): tables.make(64, 64, 4, 3)}


@pytest.mark.parametrize(
    "rows",
    [
        [sized(1.0, [128, 64, 8, 3], own=True), sized(0.98, [64, 64, 4, 3])],
        [sized(1.0, [128, 64, 8, 3], own=True), sized(0.5, [64, 64, 4, 3], status="above")],
        [sized(0.5, [64, 64, 4, 3])],
    ],
    ids=["hardly faster", "wrong", "beside nothing"],
)
def test_other_sizes_change_nothing(tables, rows):
    before = dict(tables.rows)
    assert not apply.resize(RUN, rows)
    assert tables.rows == before


def test_rehearsal_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**RUN, "sham": True}))
    with pytest.raises(SystemExit, match="rehearsal"):
        apply.main(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "bench.jsonl").write_text(json.dumps({"sham": True}) + "\n")
    with pytest.raises(SystemExit, match="rehearsal"):
        apply.main(tmp_path)
    with pytest.raises(SystemExit, match=r"no run\.json"):
        apply.main(tmp_path / "nowhere")


def test_tables_are_written(tmp_path, monkeypatch):
    from seqzoo.kernels import measured

    written = {}
    monkeypatch.setattr(measured, "write", written.update)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    for name, rows in (("checks", [check()]), ("bench", times(1.0, 2.0))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert apply.main(tmp_path) == 0
    assert written[Key(90, "attention", "bfloat16", 64)].source.endswith("2026-01-02")
