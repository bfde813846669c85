"""What the kernels are held against on a GPU: the cases, their answers, and the bounds of right ones."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from on_gpu import bounds, checks, shapes, sweep
from on_gpu.case import Maker
from on_gpu.cases import FULL, TINY, every

from seqzoo.kernels import backends

CPU = torch.device("cpu")
CASES = {f"{case.operation}: {case.label}": case for case in every(TINY)}
OPERATIONS = sorted({case.operation for case in CASES.values()})


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "nearest_code"])
def test_chunked_forms_in_float64_are_the_definitions(operation):
    """Where a definition takes too long, they are what is right."""
    cases = [case for case in CASES.values() if case.operation == operation]
    for case in cases[:2] if operation == "diagonal_scan" else cases:  # each kind is compiled, and tested elsewhere
        dtype = case.dtypes[0]
        x = {name: checks.wide(y) for name, y in case.make(Maker(dtype, CPU)).items()}
        expected, w = checks.evaluate(case, x, "reference")
        found, _ = checks.evaluate(case, x, "chunked", w)
        for name, y in expected.items():
            assert bounds.Errors.of(found[name], y).whole < 1e-9, (case.label, name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_case_counts_for_the_class_that_auto_asks_about(operation):
    asked = []
    with mock.patch.object(backends, "_fused_is_faster", lambda *fit: asked.append(fit) or False):
        for case in (case for case in CASES.values() if case.operation == operation):
            asked.clear()
            case.call(case.make(Maker(torch.float32, CPU)), "auto")
            found = {(fit.width, fit.dtype) for name, fit in asked if name == operation}
            assert found == {(case.width, torch.float32)}


def test_shape_counts_for_the_class_that_auto_asks_about():
    asked = []
    with mock.patch.object(backends, "_fused_is_faster", lambda *fit: asked.append(fit) or False):
        for shape in shapes.every(rehearse=True):
            asked.clear()
            shape.call(shape.make(Maker(shape.dtype, CPU)), "auto")
            found = {(fit.width, fit.dtype) for name, fit in asked if name == shape.operation}
            assert found == {(shape.width, shape.dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["attention: D=16 causal", "linear_attention: D=16 decay=none causal"])
def test_right_results_lie_within_their_bounds_and_wrong_ones_do_not(name, dtype):
    case = CASES[name]
    x = case.make(Maker(dtype, CPU))
    found, w = checks.evaluate(case, x, "chunked")
    truth = checks.Truth.of(case, dtype, x, w)
    assert not truth.judge(found)["above"]
    for factor in (1.5, float("nan")):
        for tensor in found:
            wrong = {key: y.clone() for key, y in found.items()}
            wrong[tensor][1, 3] *= factor  # a row of each head
            assert tensor in truth.judge(wrong)["above"], (factor, tensor)


def test_bound_grows_as_its_derivation_says():
    half = bounds.Bound(torch.float16, roundings=4, terms=1, size=1.0)
    assert half.whole(1.0, 1.0) == pytest.approx(2 * 2 * 2**-12, rel=1e-2)
    assert half.whole(3.0, 1.0) == pytest.approx(3 * half.whole(1.0, 1.0), rel=1e-2)
    single = bounds.Bound(torch.float32, roundings=1, terms=10_000, size=1.0)
    assert single.whole(1.0, 1.0) == pytest.approx(2 * (2**-25 + 2**-22 + 100 * 2**-24))
    small = bounds.Bound(torch.float16, roundings=1, terms=1, size=2**-14)
    assert small.whole(1.0, 1.0) == pytest.approx(2 * (2**-12 + 2**-11), rel=1e-2)


def test_call_that_a_kernel_refuses_is_not_checked():
    case = CASES["attention: D=16 causal"]
    refusing = mock.patch("seqzoo.kernels.attention.MAX_CHANNELS", {})
    with refusing:
        row = checks.check(case.operation, case.label, "float32", 16, 0, rehearse=True)
    assert row["status"] == "not checked"
    assert row["launches"] == 0


def test_nearest_code_is_judged_by_how_much_farther_it_is():
    case = next(case for case in CASES.values() if case.operation == "nearest_code")
    x = case.make(Maker(torch.float32, CPU))
    found, w = checks.evaluate(case, x, "chunked")
    truth = checks.Truth.of(case, torch.float32, x, w)
    assert not truth.judge(found)["above"]
    assert truth.judge({"distance": found["distance"] * 1.001})["above"]


def test_full_plan_has_every_class_riskiest_first_and_no_label_twice():
    cases = every(FULL)
    assert len({(case.operation, case.label) for case in cases}) == len(cases)
    risks = [case.risk for case in cases]
    assert risks == sorted(risks)
    known = {(case.operation, case.width) for case in cases}
    assert known >= {("attention", width) for width in (16, 32, 64, 128, 256)}
    labels = {(case.operation, case.label) for case in cases}
    for swept in sweep.SWEPT:
        assert all((swept.operation, case) in labels for case in swept.cases), swept
        times = {(shape.operation, shape.label) for shape in shapes.every(rehearse=False)}
        assert (swept.operation, swept.shape) in times


def test_neighbours_differ_in_one_place():
    names, sizes = ("queries", "keys", "num_warps", "num_stages"), [128, 16, 8, 3]
    found = sweep.neighbours(names, sizes, fixed=())
    assert found[0] == sizes
    assert [128, 16, 4, 3] in found
    assert [64, 16, 8, 3] in found
    assert [128, 8, 8, 3] not in found  # no product has so short a side
    assert all(sum(a != b for a, b in zip(other, sizes, strict=True)) == 1 for other in found[1:])
