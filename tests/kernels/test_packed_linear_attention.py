"""linear_attention of documents in one row, and of grouped heads, against the reference of each alone."""

from __future__ import annotations

from importlib import import_module
from itertools import product

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, poisoned
from often import others_slow
from torch import Tensor

from seqzoo.kernels import linear_attention
from seqzoo.kernels.linear_attention import chunked

TIMED = ("q", "k", "v", "o", "dq", "dk", "dv")
LENGTHS = [37, 1, 0, 64, 5, 90, 0]
SHORT = [17, 1, 0, 33, 40, 0]
MANY = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(0)).tolist()
FORMS = [(decay, causal) for causal in (True, False) for decay in ("none", "head", "step", "channel")]


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """As on other devices, where one decay of a head is not taken step by step."""
    monkeypatch.setattr(chunked, "SMALL", 0)


def starts_of(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


def make(lengths, H, Dk, Dv, *, decay="none", state=False, normalize=False, dtype=torch.float64):
    """Inputs by name; positive q and k where they are normalised, as any feature map in use makes them."""
    N, T = len(lengths), sum(lengths)
    q, k, v = torch.randn(1, T, H, Dk) / Dk**0.5, torch.randn(1, T, H, Dk), torch.randn(1, T, H, Dv)
    if normalize:
        q, k = q.exp(), k.exp()
    g = {"none": None, "head": -torch.rand(H) / 8, "step": -torch.rand(1, T, H) / 4}.get(decay)
    if decay == "channel":
        g = -torch.rand(1, T, H, Dk) / 4
    S = torch.randn(N, H, Dk, Dv + normalize).abs() if state else None
    inputs = {"q": q, "k": k, "v": v, "log_decay": g, "initial_state": S}
    return {name: x.to(dtype) for name, x in inputs.items() if x is not None}


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradient of each input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = linear_attention(**leaves, output_final_state=w_state is not None, **options)
    outputs, weights = ((outputs,), (w,)) if w_state is None else (outputs, (w, w_state))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return dict(zip(("o", "state"), outputs, strict=False)) | dict(
        zip((f"d{name}" for name in leaves), gradients, strict=True)
    )


def each_alone(lengths, inputs, w, w_state, **options) -> dict[str, Tensor]:
    """What `run` gives, of the reference in double precision with each document for itself."""
    per_step = "log_decay" in inputs and inputs["log_decay"].dim() > 1
    timed = {*TIMED, *(("log_decay", "dlog_decay") if per_step else ())}
    inputs = {name: x.double() for name, x in inputs.items()}
    found, start = [], 0
    for n, length in enumerate(lengths):
        of_n = {name: x[:, start : start + length] if name in timed else x for name, x in inputs.items()}
        if "initial_state" in inputs:
            of_n["initial_state"] = inputs["initial_state"][n : n + 1]
        w_n, w_state_n = w[:, start : start + length].double(), None if w_state is None else w_state[n : n + 1].double()
        start += length
        if length:
            found.append(run(of_n, w_n, w_state_n, **options, backend="reference"))
        else:  # a state that nothing changes
            found.append({name: torch.zeros_like(x) for name, x in found[0].items() if name not in timed})
            if "initial_state" in inputs and w_state is not None:
                found[-1] |= {"state": of_n["initial_state"], "dinitial_state": w_state_n}
    whole = {}
    for name in found[0]:
        values = [each[name] for each in found if name in each]
        whole[name] = sum(values) if name == "dlog_decay" and not per_step else torch.cat(values, int(name in timed))
    return whole


def weights(lengths, inputs, normalize, *, state):
    v, (_, _, H, Dk) = inputs["v"], inputs["q"].shape
    w = torch.randn(*v.shape[:2], H, v.shape[-1], dtype=v.dtype)
    return w, torch.randn(len(lengths), H, Dk, v.shape[-1] + normalize, dtype=v.dtype) if state else None


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("lengths", others_slow([LENGTHS, MANY, [197]], [LENGTHS, MANY]), ids=["few", "many", "one"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("decay", "causal", "state"), [(*form, state) for form in FORMS for state in (False, True) if form[1] or not state]
)
def test_each_document_is_as_if_it_were_alone(decay, causal, state, normalize, lengths, backend):
    inputs = make(lengths, 2, 6, 4, decay=decay, state=state, normalize=normalize)
    w, w_state = weights(lengths, inputs, normalize, state=state)
    options = {"causal": causal, "normalize": normalize}
    values = run(inputs, w, w_state, cu_seqlens=starts_of(lengths), **options, backend=backend)
    expected = each_alone(lengths, inputs, w, w_state, **options)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value, expected[name], 1e-12, name)


# Where a document's first step is normalised, its gradient of q is zero, which single precision is not.
@pytest.mark.parametrize(("lengths", "normalize"), [(LENGTHS, False), ([90, 70, 37], True)])
@pytest.mark.parametrize(("decay", "causal"), FORMS)
def test_in_single_precision_with_int64(decay, causal, lengths, normalize):
    heads = 8 if decay == "head" else 2  # of one number a head, two may come out next to nothing
    inputs = make(lengths, heads, 24, 10, decay=decay, normalize=normalize, dtype=torch.float32)
    w, _ = weights(lengths, inputs, normalize, state=False)
    options = {"causal": causal, "normalize": normalize}
    values = run(inputs, w, None, cu_seqlens=starts_of(lengths, torch.int64), **options)
    expected = each_alone(lengths, inputs, w, None, **options)
    for name, value in values.items():
        assert_close(value, expected[name], 5e-6, name)


FUSED = [(decay, causal) for decay, causal in FORMS if causal or decay == "none"]


@pytest.mark.parametrize(
    ("decay", "causal", "normalize", "segment_len"),
    others_slow(
        [(*form, *how) for form in FUSED for how in product((False, True), (None, 32))],
        [(*form, *how) for form in FUSED for how in ((False, None), (True, 32))],
    ),
)
def test_in_triton(decay, causal, normalize, segment_len, monkeypatch):
    fused = import_module("seqzoo.kernels.linear_attention.fused")
    monkeypatch.setattr(fused, "_segment_len", lambda programs, T, steps, device: segment_len or T)
    inputs = make(SHORT, 2, 9, 5, decay=decay, state=causal, normalize=normalize, dtype=torch.float32)
    w, w_state = weights(SHORT, inputs, normalize, state=causal)
    options = {"causal": causal, "normalize": normalize}
    expected = each_alone(SHORT, inputs, w, w_state, **options)
    on_device = {name: x.to(DEVICE) for name, x in inputs.items()}
    w, w_state = w.to(DEVICE), None if w_state is None else w_state.to(DEVICE)
    with poisoned():
        values = run(on_device, w, w_state, cu_seqlens=starts_of(SHORT).to(DEVICE), **options, backend="fused")
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert_close(value.cpu(), expected[name], 5e-6, name)


@pytest.mark.parametrize("backend", ["reference", "chunked", "fused"])
@pytest.mark.parametrize(("decay", "causal"), FORMS)
def test_nothing_leaks_from_one_document_into_others(decay, causal, backend):
    inputs = make(SHORT, 1, 4, 3, decay=decay, normalize=True, dtype=torch.float32)
    w, _ = weights(SHORT, inputs, True, state=False)
    options = {"causal": causal, "normalize": True, "cu_seqlens": starts_of(SHORT), "backend": backend}
    clean = run(inputs, w, None, **options)
    start, end = options["cu_seqlens"][3:5].tolist()
    in_triton = backend == "fused" and (decay, causal) in FUSED
    in_chunks = backend != "reference" and not in_triton and (causal or decay != "none") and decay != "channel"
    bad = 1e8 if in_chunks else float("nan")  # neighbours may be spoilt
    timed = [name for name, x in inputs.items() if x.dim() > 2]
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in timed:
        dirty[name][:, start:end] = -bad if name == "log_decay" else bad
    values = run(dirty, w, None, **options)
    for name in ("o", *(f"d{name}" for name in timed)):
        for part in (slice(0, start), slice(end, None)):
            assert torch.equal(values[name][:, part], clean[name][:, part]), name


@pytest.mark.parametrize("causal", [False, True])
def test_has_second_derivatives(causal):
    inputs = make([3, 0, 1, 4], 1, 2, 2, normalize=True)
    starts = starts_of([3, 0, 1, 4])
    leaves = [x.requires_grad_() for x in inputs.values()]

    def f(*leaves):
        return linear_attention(*leaves, causal=causal, normalize=True, cu_seqlens=starts)

    assert torch.autograd.gradgradcheck(f, leaves)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)


@pytest.mark.parametrize(
    ("decay", "causal", "state"),
    others_slow(
        [(*form, state) for form in FORMS for state in (False, True)],
        [(*form, n % 2 == 0) for n, form in enumerate(FORMS)],
    ),
)
def test_compiles_whole(decay, causal, state):
    state = state and causal
    inputs = make(LENGTHS, 2, 6, 4, decay=decay, state=state)
    options = {"causal": causal, "output_final_state": state}
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    expected = linear_attention(**inputs, cu_seqlens=starts_of(LENGTHS), **options)
    values = compiled(**inputs, cu_seqlens=starts_of(LENGTHS), **options)
    others = starts_of(LENGTHS[::-1])  # the same graph
    for value, other in zip(values, expected, strict=True) if state else [(values, expected)]:
        assert_close(value, other, 1e-13)
    with torch._dynamo.config.patch(error_on_recompile=True):
        values = compiled(**inputs, cu_seqlens=others, **options)
    o = linear_attention(**inputs, cu_seqlens=others, **options)
    assert_close(*((values[0], o[0]) if state else (values, o)), 1e-13)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1)])
@pytest.mark.parametrize(("decay", "causal"), [("step", True), ("none", False), ("channel", True)])
def test_grouped_heads_read_their_key_and_value_head(decay, causal, H, G, normalize):
    inputs = make([40], H, 6, 4, decay=decay, normalize=normalize)
    w, _ = weights([40], inputs, normalize, state=False)
    options = {"causal": causal, "normalize": normalize}
    of_groups = inputs | {name: inputs[name][:, :, :G] for name in "kv"}
    copied = inputs | {name: inputs[name][:, :, [h // (H // G) for h in range(H)]] for name in "kv"}
    values, expected = run(of_groups, w, None, **options), run(copied, w, None, **options)
    for name in ("dk", "dv"):
        expected[name] = expected[name].unflatten(2, (G, H // G)).sum(3)
    for name, value in values.items():
        assert_close(value, expected[name], 1e-13, name)


def test_errors():
    inputs = make(LENGTHS, 2, 4, 6)
    q, k, v = inputs.values()
    starts = starts_of(LENGTHS)
    with pytest.raises(ValueError, match="linear_attention: got cu_seqlens and lengths"):
        linear_attention(q, k, v, cu_seqlens=starts, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"initial_state must be \[7, 2, 4, 6\] .*got \[1, 2, 4, 6\]"):
        linear_attention(q, k, v, causal=True, cu_seqlens=starts, initial_state=torch.zeros(1, 2, 4, 6))
    with pytest.raises(ValueError, match="2 key/value heads do not divide 3 query heads"):
        linear_attention(torch.cat([q, q[:, :, :1]], 2), k, v)
    with pytest.raises(ValueError, match=r"k and v with G heads where G divides H, got .* \[1, 197, 1, 6\]"):
        linear_attention(q, k, v[:, :, :1])
