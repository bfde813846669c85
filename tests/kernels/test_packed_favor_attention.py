"""favor_attention of documents in one row, and of grouped heads, against the reference of each alone."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from agreement import assert_close
from fused_cases import DEVICE, poisoned
from torch import Tensor

from seqzoo.kernels.favor_attention import FavorState, favor_attention

TIMED = ("q", "k", "v", "o", "dq", "dk", "dv")
OF_STATES = ("sums", "log_scale", "dsums")
LENGTHS = [37, 1, 0, 64, 5, 90, 0]
MANY = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(0)).tolist()


def starts_of(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=dtype)


def make(lengths, H, D, M, Dv, *, state=False, scale=1.0, dtype=torch.float64):
    """Inputs by name; states are some that keys of the same size could have left, and those of no key."""
    N, T = len(lengths), sum(lengths)
    q, k, v = (torch.randn(1, T, H, width) for width in (D, D, Dv))
    size = scale * D**-0.25
    inputs = {"q": q * size, "k": k * size, "v": v, "projection": torch.randn(H, M, D)}
    if state:
        sums, log_scale = torch.randn(N, H, M, Dv + 1).abs() + 0.1, (torch.randn(N, H, M) - scale) * scale
        sums[1::3], log_scale[1::3] = 0, -torch.inf
        inputs |= {"sums": sums, "log_scale": log_scale}
    return {name: x.to(dtype) for name, x in inputs.items()}


def run(inputs: dict[str, Tensor], w: Tensor, w_state: Tensor | None, learnt=True, **options) -> dict[str, Tensor]:
    """The output, the final state if there is a w_state, and the gradients, with that of the projection if learnt."""
    leaves = {name: x.detach().clone() for name, x in inputs.items()}
    constant = ("log_scale",) if learnt else ("log_scale", "projection")
    asked_of = {name: x.requires_grad_() for name, x in leaves.items() if name not in constant}
    state = FavorState(leaves["sums"], leaves["log_scale"]) if "sums" in leaves else None
    outputs = favor_attention(
        *(leaves[name] for name in ("q", "k", "v", "projection")),
        initial_state=state,
        output_final_state=w_state is not None,
        **options,
    )
    o, last = outputs if w_state is not None else (outputs, None)
    asked, given = ((o,), (w,)) if last is None else ((o, last.sums), (w, w_state))
    gradients = torch.autograd.grad(asked, list(asked_of.values()), given)
    found = {"o": o} if last is None else {"o": o, **last._asdict()}
    return found | dict(zip((f"d{name}" for name in asked_of), gradients, strict=True))


def each_alone(lengths, inputs, w, w_state, **options) -> dict[str, Tensor]:
    """What `run` gives, of the reference in double precision with each document for itself."""
    inputs = {name: x.double() for name, x in inputs.items()}
    found, start = [], 0
    for n, length in enumerate(lengths):
        end = start + length
        of_n = {name: x[:, start:end] if name in TIMED else x for name, x in inputs.items()}
        of_n |= {name: inputs[name][n : n + 1] for name in OF_STATES if name in inputs}
        w_n, w_state_n = w[:, start:end].double(), None if w_state is None else w_state[n : n + 1].double()
        start = end
        if length:
            found.append(run(of_n, w_n, w_state_n, **options, backend="reference"))
        else:  # a state that nothing changes
            found.append({"dprojection": torch.zeros_like(inputs["projection"])})
            if w_state is not None:
                H, M, V = w_state.shape[1:]
                empty = FavorState.empty(1, H, M, V - 1, device=None, dtype=torch.float64)
                found[-1] |= {name: of_n.get(name, x) for name, x in empty._asdict().items()}
            if "sums" in inputs:
                found[-1]["dsums"] = w_state_n
    whole = {}
    for name in found[0]:
        values = [each[name] for each in found if name in each]
        whole[name] = sum(values) if name == "dprojection" else torch.cat(values, int(name in TIMED))
    return whole


def weights(lengths, inputs, *, state):
    v, (H, M, _) = inputs["v"], inputs["projection"].shape
    w = torch.randn(*v.shape[:2], H, v.shape[-1], dtype=v.dtype)
    return w, torch.randn(len(lengths), H, M, v.shape[-1] + 1, dtype=v.dtype) if state else None


def check(lengths, inputs, tolerance, *, state, causal, starts=None, backend="auto", learnt=True):
    w, w_state = weights(lengths, inputs, state=state)
    expected = each_alone(lengths, inputs, w, w_state, causal=causal, learnt=learnt)
    on_device = {name: x.to(DEVICE) for name, x in inputs.items()}
    w, w_state, starts = (
        w.to(DEVICE),
        None if w_state is None else w_state.to(DEVICE),
        starts_of(lengths) if starts is None else starts,
    )
    with poisoned():
        values = run(on_device, w, w_state, causal=causal, cu_seqlens=starts.to(DEVICE), backend=backend, learnt=learnt)
    assert values.keys() - {"dprojection"} == expected.keys() - {"dprojection"}
    for name, value in values.items():
        value = value.cpu()
        if name == "log_scale":
            assert torch.equal(value == -torch.inf, expected[name] == -torch.inf)
            value, expected[name] = (x.masked_fill(x == -torch.inf, 0) for x in (value, expected[name]))
        assert_close(value, expected[name], tolerance, name)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("lengths", [LENGTHS, MANY, [197]], ids=["few", "many", "one"])
@pytest.mark.parametrize(("causal", "start", "end"), [(False,) * 3, (True, False, True), (True,) * 3])
def test_each_document_is_as_if_it_were_alone(causal, start, end, lengths, backend):
    inputs = make(lengths, 2, 8, 12, 5, state=start)
    check(lengths, inputs, 1e-12, state=end, causal=causal, backend=backend)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_in_single_precision_with_int64(causal, scale):
    inputs = make(LENGTHS, 2, 16, 20, 8, scale=scale, dtype=torch.float32)
    check(LENGTHS, inputs, 1e-5, state=False, causal=causal, starts=starts_of(LENGTHS, torch.int64))


# The gradient of a single query and key is zero, or in single precision what rounding leaves.
SHORT = [17, 2, 0, 33, 80, 0]


@pytest.mark.parametrize(("causal", "start", "end"), [(False,) * 3, (True, False, True), (True,) * 3])
def test_in_triton(causal, start, end, monkeypatch):
    fused = import_module("seqzoo.kernels.favor_attention.fused")
    monkeypatch.setattr(fused, "SEGMENT", 64)
    inputs = make(SHORT, 2, 8, 10, 5, state=start, dtype=torch.float32)
    check(SHORT, inputs, 5e-6, state=end, causal=causal, backend="fused", learnt=False)


def test_in_triton_one_by_one(monkeypatch):
    fused = import_module("seqzoo.kernels.favor_attention.fused")
    monkeypatch.setattr(fused, "SAFE_RISE", 2.0)
    monkeypatch.setattr(fused, "SEGMENT", 64)
    inputs = make([70, 5], 1, 8, 10, 5, dtype=torch.float32)
    check([70, 5], inputs, 5e-6, state=True, causal=True, backend="fused", learnt=False)


@pytest.mark.parametrize("backend", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks_from_one_document_into_others(causal, backend):
    inputs = make(SHORT, 1, 4, 8, 3, dtype=torch.float32)
    w, _ = weights(SHORT, inputs, state=False)
    options = {"causal": causal, "cu_seqlens": starts_of(SHORT), "backend": backend, "learnt": False}
    clean = run(inputs, w, None, **options)
    start, end = options["cu_seqlens"][3:5].tolist()
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in "qkv":
        dirty[name][:, start:end] = float("nan")
    values = run(dirty, w, None, **options)
    for name in ("o", "dq", "dk", "dv"):
        for part in (slice(0, start), slice(end, None)):
            assert torch.equal(values[name][:, part], clean[name][:, part]), name


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole(causal):
    inputs = make(LENGTHS, 2, 8, 12, 5)
    options = {"causal": causal, "output_final_state": causal}
    q, k, v, projection = inputs.values()
    torch.compiler.reset()
    compiled = torch.compile(favor_attention, fullgraph=True, backend="aot_eager")
    for starts in (starts_of(LENGTHS), starts_of(LENGTHS[::-1])):
        values = compiled(q, k, v, projection, cu_seqlens=starts, **options)
        expected = favor_attention(q, k, v, projection, cu_seqlens=starts, **options)
        for value, other in (
            [(values[0], expected[0]), (values[1].sums, expected[1].sums)] if causal else [(values, expected)]
        ):
            assert_close(value, other, 1e-12)


@pytest.mark.parametrize(("H", "G"), [(4, 2), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_read_their_key_and_value_head(causal, H, G):
    inputs = make([40], H, 6, 8, 4)
    w, _ = weights([40], inputs, state=False)
    of_groups = inputs | {name: inputs[name][:, :, :G] for name in "kv"}
    copied = inputs | {name: inputs[name][:, :, [h // (H // G) for h in range(H)]] for name in "kv"}
    values, expected = run(of_groups, w, None, causal=causal), run(copied, w, None, causal=causal)
    for name in ("dk", "dv"):
        expected[name] = expected[name].unflatten(2, (G, H // G)).sum(3)
    for name, value in values.items():
        assert_close(value, expected[name], 1e-13, name)


def test_errors():
    inputs = make(LENGTHS, 2, 4, 8, 6)
    q, k, v, projection = inputs.values()
    starts = starts_of(LENGTHS)
    with pytest.raises(ValueError, match="favor_attention: got cu_seqlens and lengths"):
        favor_attention(q, k, v, projection, cu_seqlens=starts, lengths=torch.tensor([3]))
    state = FavorState.empty(1, 2, 8, 6, device=None, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"of documents N rows, here \[7, 2, 8, 7\] and \[7, 2, 8\], got \[1, 2, 8, 7\]"
    ):
        favor_attention(q, k, v, projection, causal=True, cu_seqlens=starts, initial_state=state)
    with pytest.raises(ValueError, match="2 key/value heads do not divide 3 query heads"):
        favor_attention(torch.cat([q, q[:, :, :1]], 2), k, v, projection)
    with pytest.raises(ValueError, match=r"k and v with G heads where G divides H, got .* \[1, 197, 1, 6\]"):
        favor_attention(q, k, v[:, :, :1], projection)
