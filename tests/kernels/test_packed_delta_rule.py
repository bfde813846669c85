"""delta_rule of documents in one row, against the reference of each alone."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_close
from delta_cases import DECAYS, FORMS, TIMED, computed, make, run, weights, wide
from often import others_slow
from torch import Tensor

from seqzoo.kernels import delta_rule

LENGTHS = [37, 1, 0, 64, 5, 90, 0]
MANY = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(0)).tolist()


def starts_of(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


def packed(lengths, H, Dk, Dv, *, state=False, **options):
    inputs = make(1, sum(lengths), H, Dk, Dv, **options)
    if state:
        inputs["initial_state"] = torch.randn(len(lengths), H, Dk, Dv, dtype=inputs["v"].dtype)
    return inputs


def each_alone(lengths, inputs, w, w_state) -> dict[str, Tensor]:
    """What `run` gives, of the reference in double precision with each document for itself."""
    inputs, found, start = wide(inputs), [], 0
    for n, length in enumerate(lengths):
        of_n = {name: x[:, start : start + length] if name in TIMED else x[n : n + 1] for name, x in inputs.items()}
        w_n, w_state_n = w[:, start : start + length].double(), None if w_state is None else w_state[n : n + 1].double()
        start += length
        if length:
            found.append(run(of_n, w_n, w_state_n, backend="reference"))
        elif w_state is not None:  # a state that nothing changes
            state = of_n.get("initial_state", torch.zeros_like(w_state_n))
            found.append({"state": state} | ({"dinitial_state": w_state_n} if "initial_state" in of_n else {}))
    names = dict.fromkeys(name for each in found for name in each)
    return {name: torch.cat([each[name] for each in found if name in each], int(name in TIMED)) for name in names}


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("lengths", others_slow([LENGTHS, MANY, [197]], [LENGTHS, MANY]), ids=["few", "many", "one"])
@pytest.mark.parametrize(("decay", "erase"), [("none", False), ("none", True), ("head", False), ("channel", True)])
@pytest.mark.parametrize("state", ["", "last", "first and last"])
def test_each_document_is_as_if_it_were_alone(state, decay, erase, lengths, form):
    inputs = packed(lengths, 4, 6, 4, G=2, decay=decay, erase=erase, state="first" in state)
    w, w_state = weights(inputs, len(lengths))
    w_state = w_state if state else None
    with computed(form):
        backend = "reference" if form == "reference" else "chunked"
        values = run(inputs, w, w_state, cu_seqlens=starts_of(lengths), backend=backend)
    expected = each_alone(lengths, inputs, w, w_state)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_in_single_precision_with_int64(decay, state):
    inputs = packed(LENGTHS, 2, 24, 10, decay=decay, state=state, dtype=torch.float32)
    w, w_state = weights(inputs, len(LENGTHS))
    w_state = w_state if state else None
    values = run(inputs, w, w_state, cu_seqlens=starts_of(LENGTHS, torch.int64))
    expected = each_alone(LENGTHS, inputs, w, w_state)
    for name, value in values.items():
        assert_close(value, expected[name], 5e-6, name)


@pytest.mark.parametrize("form", ["reference", *FORMS])
@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_leaks_from_one_document_into_others(decay, form):
    lengths = [17, 1, 0, 33, 40, 0]
    inputs = packed(lengths, 1, 4, 3, decay=decay, state=True, dtype=torch.float32)
    w, w_state = weights(inputs, len(lengths))
    options = {"cu_seqlens": starts_of(lengths), "backend": "reference" if form == "reference" else "chunked"}
    start, end = options["cu_seqlens"][3:5].tolist()
    timed = [name for name in inputs if name in TIMED]
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in timed:
        dirty[name][:, start:end] = float("nan")
    with computed(form):
        clean, values = run(inputs, w, w_state, **options), run(dirty, w, w_state, **options)
    for name in ("o", *(f"d{name}" for name in timed)):
        for part in (slice(0, start), slice(end, None)):
            assert torch.equal(values[name][:, part], clean[name][:, part]), name
    others = [0, 1, 2, 4, 5]
    for name in ("state", "dinitial_state"):
        assert torch.equal(values[name][others], clean[name][others]), name


@pytest.mark.parametrize("state", [False, True])
def test_has_second_derivatives(state):
    lengths = [3, 0, 1, 4]
    inputs = packed(lengths, 1, 2, 2, state=state)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def f(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return delta_rule(**given, cu_seqlens=starts_of(lengths), output_final_state=state)

    assert torch.autograd.gradgradcheck(f, [*leaves.values()])
    assert torch.autograd.gradcheck(f, [*leaves.values()], check_forward_ad=True)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_compiles_whole(decay, state):
    inputs = packed(LENGTHS, 2, 6, 4, decay=decay, state=state)
    torch.compiler.reset()
    compiled = torch.compile(delta_rule, fullgraph=True, backend="aot_eager")
    options = {"output_final_state": state}
    expected = delta_rule(**inputs, cu_seqlens=starts_of(LENGTHS), **options)
    values = compiled(**inputs, cu_seqlens=starts_of(LENGTHS), **options)
    for value, other in zip(values, expected, strict=True) if state else [(values, expected)]:
        assert_close(value, other, 1e-13)
    others = starts_of(LENGTHS[::-1])
    with torch._dynamo.config.patch(error_on_recompile=True):  # the same graph
        values = compiled(**inputs, cu_seqlens=others, **options)
    o = delta_rule(**inputs, cu_seqlens=others, **options)
    assert_close(*((values[0], o[0]) if state else (values, o)), 1e-13)


def test_errors():
    inputs = packed(LENGTHS, 2, 4, 6)
    starts = starts_of(LENGTHS)
    with pytest.raises(ValueError, match="delta_rule: got cu_seqlens and lengths"):
        delta_rule(**inputs, cu_seqlens=starts, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"initial_state must be \[7, 2, 4, 6\] .*got \[1, 2, 4, 6\]"):
        delta_rule(**inputs, cu_seqlens=starts, initial_state=torch.zeros(1, 2, 4, 6))
