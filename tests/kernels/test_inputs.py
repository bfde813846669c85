"""Fused operations, and those that are chunked only, on inputs as users have them, against their definition in double.

Where tensors lie in memory, what dtypes they have, of which of them a gradient is asked, which outputs a loss takes,
how lengths are kept, and sizes of 1: each of these occurs, and, slowly, any three of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from agreement import assert_close
from covering import Case, covering
from fused_cases import DEVICE, poisoned, wide
from layouts import KINDS, LAYOUTS, integers, lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels import (
    FavorState,
    GatedAttentionState,
    VQState,
    attention,
    common,
    delta_rule,
    diagonal_scan,
    favor_attention,
    gated_attention,
    linear_attention,
    vq_attention,
)
from seqzoo.kernels.real_gated_scan import real_gated_scan
from seqzoo.kernels.selective_scan import selective_scan

SINGLE, HALF = torch.float32, torch.float16
DTYPES = {  # of inputs, in turn, and of states
    "float32": ([SINGLE], SINGLE),
    "float16": ([HALF], SINGLE),
    "bfloat16": ([torch.bfloat16], SINGLE),
    "complex64": ([torch.complex64], torch.complex64),
    "float16 and float32": ([HALF, SINGLE], SINGLE),
    "state float16": ([SINGLE], HALF),
}
TOLERANCE = {"float32": 5e-6, "complex64": 5e-6, "bfloat16": 3e-2}  # else that of float16
REAL = [name for name in DTYPES if name != "complex64"]
SIZES = {  # B, T, H, D
    "": (2, 5, 2, 3),
    "one sequence of one head": (1, 5, 1, 3),
    "one step": (2, 1, 2, 3),
    "one channel": (2, 5, 2, 1),
}
STATE = "causal from a state"


class Size(NamedTuple):
    B: int
    T: int
    H: int
    D: int


class Operation(NamedTuple):
    """How an operation is called.

    `make` gives its inputs by name, those that take a gradient first, in float32, and `call` its outputs.
    """

    asked: tuple[str, ...]
    factors: Mapping[str, list[Any]]
    make: Callable[[Case, Size], dict[str, Tensor]]
    call: Callable[[Case, dict[str, Tensor], str], dict[str, Tensor]]
    needs: Mapping[tuple[str, Any], Mapping[str, list[Any]]] = {}
    state: tuple[str, ...] = ()  # which of the inputs have the dtype of states
    backend: str = "fused"


def lengths_of(case: Case, size: Size) -> Tensor | None:
    """None, or with 0 and T among them where there is room; "beyond", what must count as these."""
    if case["lengths"] == "none":
        return None
    B, T = size[:2]
    if case["lengths"] == "beyond":
        return torch.tensor([T + 5, -3])[:B]
    ends = {"int64": (T, 0), "strided": (0, T), "expanded": (max(1, T - 2), T), "int32": (T - 2 if T > 1 else T, T)}
    return integers(case["lengths"], ends[case["lengths"]][:B])


def has_state(case: Case) -> bool:
    return case["form"] != "both ways" and case["used"] != "o alone"


def randn(*shape: int) -> Tensor:
    """Small: where one weight is all there is, a gradient is the difference of two numbers that are nearly equal."""
    return torch.randn(*shape) / 2


def make_attention(case: Case, size: Size) -> dict[str, Tensor]:
    B, T, H, D = size
    S = T if case["form"] in ("both ways", "causal") else T + 4
    G = 1 if case["heads"] == "shared" else H
    x = {"q": randn(B, T, H, D), "k": randn(B, S, G, D), "v": randn(B, S, G, D + 2)}
    return x | ({"scale": torch.rand(B, T)} if case["scale"] == "per query" else {})


def call_attention(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    (B, T), S = x["q"].shape[:2], x["k"].shape[1]
    options: dict[str, Any] = {"causal": case["form"] in ("causal", "behind a cache")}
    options["lengths"] = lengths_of(case, Size(B, S, 1, 1))
    if case["form"] == "behind a cache":
        options["position"] = integers(case["position"], [S - T, 0][:B])
    if case["form"] == "across":
        options["query_lengths"] = integers(case["position"], [T, 0][:B])
    return {"o": attention(x["q"], x["k"], x["v"], scale=x.get("scale"), **options, backend=backend)}


def make_linear(case: Case, size: Size) -> dict[str, Tensor]:
    B, T, H, D = size
    normalize = case["normalize"]
    q, k = randn(B, T, H, D), randn(B, T, H, D)
    if normalize:
        q, k = q.exp(), k.exp()
    x = {"q": q, "k": k, "v": randn(B, T, H, D + 2)}
    decay = {"none": None, "head": -torch.rand(H) / 10, "step": -torch.rand(B, T, H) / 10}.get(case["decay"])
    if case["decay"] == "channel":
        decay = -torch.rand(B, T, H, D) / 10
    if decay is not None:
        x["log_decay"] = decay
    if case["form"] == STATE:
        x["initial_state"] = randn(B, H, D, D + 2 + normalize).abs()
    return x


def call_linear(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options = {"causal": case["form"] != "both ways", "output_final_state": has_state(case)}
    lengths = lengths_of(case, Size(*x["q"].shape))
    o = linear_attention(**x, normalize=case["normalize"], lengths=lengths, **options, backend=backend)
    return dict(zip(("o", "state"), o if has_state(case) else (o,), strict=False))


def make_delta(case: Case, size: Size) -> dict[str, Tensor]:
    B, T, H, D = size
    G = 1 if case["heads"] == "shared" else H
    x = {"q": randn(B, T, G, D), "k": randn(B, T, G, D), "v": randn(B, T, H, D + 2), "beta": torch.rand(B, T, H)}
    decay = {"none": None, "head": -torch.rand(B, T, H) / 10, "channel": -torch.rand(B, T, H, D) / 10}[case["decay"]]
    if decay is not None:
        x["log_decay"] = decay
    if case["erase"]:
        x["erase"] = randn(B, T, H, D)
    if case["form"] == STATE:
        x["initial_state"] = randn(B, H, D, D + 2)
    return x


def call_delta(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    lengths = lengths_of(case, Size(*x["v"].shape))
    o = delta_rule(**x, lengths=lengths, output_final_state=has_state(case), backend=backend)
    return dict(zip(("o", "state"), o if has_state(case) else (o,), strict=False))


def make_favor(case: Case, size: Size) -> dict[str, Tensor]:
    (B, T, H, D), M = size, 4
    x = {name: randn(B, T, H, D) / D**0.25 for name in ("q", "k")} | {"v": randn(B, T, H, D + 2)}
    if case["form"] == STATE:
        x |= {"sums": randn(B, H, M, D + 3).abs() + 0.1, "log_scale": randn(B, H, M)}
    return x | {"projection": randn(H, M, D)}


def call_favor(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options: dict[str, Any] = {"causal": case["form"] != "both ways", "output_final_state": has_state(case)}
    if case["form"] == STATE:
        options["initial_state"] = FavorState(x["sums"], x["log_scale"])
    lengths = lengths_of(case, Size(*x["q"].shape))
    o = favor_attention(x["q"], x["k"], x["v"], x["projection"], lengths=lengths, **options, backend=backend)
    return {"o": o[0], "state": o[1].sums} if has_state(case) else {"o": o}


CHUNK = 2


def make_gated(case: Case, size: Size) -> dict[str, Tensor]:
    (B, T, _, S), E = size, size.D + 2
    x = {name: randn(B, T, E if name in "uv" else S) for name in ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v")}
    if case["bias"]:
        x["bias"] = randn(CHUNK if case["form"] != "both ways" else 2 * CHUNK - 1)
    if case["form"] == STATE:
        x |= {"memory": randn(B, S, E), "held k_quad": randn(B, CHUNK, S), "held k_lin": randn(B, CHUNK, S)}
        x |= {"held v": randn(B, CHUNK, E)}
    return x


def call_gated(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    (B, T, _), causal = x["u"].shape, case["form"] != "both ways"
    options: dict[str, Any] = {"causal": causal, "output_final_state": has_state(case), "chunk_len": CHUNK}
    if case["form"] == STATE:
        held = [x[name] for name in ("memory", "held k_quad", "held k_lin", "held v")]
        options["initial_state"] = GatedAttentionState(*held, integers(case["position"], [3, 2][:B]))
    given = {name: x.get(name) for name in ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v", "bias")}
    o = gated_attention(**given, lengths=lengths_of(case, Size(B, T, 1, 1)), **options, backend=backend)
    return {"o": o[0]} | {f"state {n}": y for n, y in o[1]._asdict().items()} if has_state(case) else {"o": o}


def make_vq(case: Case, size: Size) -> dict[str, Tensor]:
    (B, T, H, D), S = size, 4
    x = {"q": randn(B, T, H, D), "k": randn(B, T, H, D), "v": randn(B, T, H, D + 2)}
    entries = CHUNK + 1 if case["form"] != "both ways" else 2 * CHUNK + 1
    if case["bias"] != "none":
        x["bias"] = randn(*((B, T, H) if case["bias"] == "by query" else (H,)), entries)
    if case["form"] == STATE:
        x |= {"sums": randn(B, H, S, D + 2), "values": randn(B, CHUNK, H, D + 2)}
    return x | {"codebook": randn(H, S, D)}


def call_vq(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    (B, T, H, _), S, causal = x["q"].shape, x["codebook"].shape[1], case["form"] != "both ways"
    options: dict[str, Any] = {"causal": causal, "output_final_state": has_state(case), "block_len": CHUNK}
    order = torch.arange(B * T * H).view(B, T, H)
    codes = order * 7 % 5 % S
    codes = {
        "int64": codes,
        "strided": torch.stack([codes, codes + 10**9], -1)[..., 0],
        "expanded": codes[:1].expand(codes.shape),
        "int32": codes.int(),
    }[case["codes"]]
    if case["form"] == STATE:
        counts = lay_out(order[:1, :1].new_ones(B, H, S) * torch.arange(1, S + 1), case["layout"])
        held = torch.arange(B * CHUNK * H).view(B, CHUNK, H) % S
        position = integers(case["position"], [5, 1][:B])
        options["initial_state"] = VQState(held, x["values"], counts, x["sums"], position)
    lengths = lengths_of(case, Size(B, T, H, 1))
    given = (x["q"], x["k"], x["v"], x["codebook"])
    y = vq_attention(*given, codes=codes, bias=x.get("bias"), lengths=lengths, **options, backend=backend)
    return {"o": y[0], "state sums": y[1].sums, "state values": y[1].values} if has_state(case) else {"o": y}


def make_scan(case: Case, size: Size) -> dict[str, Tensor]:
    (B, T, _, D), dtype = size, torch.complex64 if case["dtype"] == "complex64" else SINGLE
    x = {"x": torch.randn(B, T, D, dtype=dtype)}
    x["a"] = torch.randn(*((D,) if case["coefficients"] == "constant" else (B, T, D)), dtype=dtype).sgn() * 0.9
    if case["factor"]:
        x["factor"] = 0.1 + torch.rand(D)
    if case["state"]:
        x["initial_state"] = torch.randn(B, D, dtype=dtype)
    return x


def call_scan(case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    B, T, _ = x["x"].shape
    reverse = {"forth": False, "back": True, "both": "both"}[case["direction"]]
    lengths = lengths_of(case, Size(B, T, 1, 1))
    options = {"reverse": reverse, "output_final_state": reverse != "both", "lengths": lengths}
    h = diagonal_scan(**x, **options, backend=backend)
    return dict(zip(("o", "o back" if reverse == "both" else "state"), h, strict=True))


def make_selective(case: Case, size: Size) -> dict[str, Tensor]:
    (B, T, _, D), N = size, size.D + 2
    x = {"v": randn(B, T, D), "dt": torch.rand(B, T, D), "A": -torch.rand(D, N)}
    x |= {"write": randn(B, T, N), "read": randn(B, T, N)}
    return x | ({"initial_state": randn(B, D, N)} if case["state"] else {})


def make_gated_scan(case: Case, size: Size) -> dict[str, Tensor]:
    B, T, _, D = size
    x = {name: randn(B, T, D) for name in ("v", "recurrence_gate", "input_gate")} | {"rate": 0.1 + torch.rand(D)}
    return x | ({"initial_state": randn(B, D)} if case["state"] else {})


def call_one_way(operation: Callable[..., Any], case: Case, x: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    options = {"reverse": case["direction"] == "back", "lengths": lengths_of(case, Size(*x["v"].shape[:2], 1, 1))}
    return dict(zip(("o", "state"), operation(**x, **options, output_final_state=True, backend=backend), strict=True))


FORMS = {"form": ["causal", "both ways", STATE], "used": ["all", "o", "state", "o alone"]}
OF_FORMS = {
    ("used", "state"): {"form": ["causal", STATE]},
    ("dtype", "state float16"): {"form": [STATE]},
}
ONE_WAY = {"direction": ["forth", "back"], "state": [True, False], "used": ["all", "o", "state"], "dtype": REAL}
FROM_A_STATE = {("d initial_state", True): {"state": [True]}, ("dtype", "state float16"): {"state": [True]}}
OPERATIONS = {
    "attention": Operation(
        ("q", "k", "v"),
        {
            "form": ["causal", "both ways", "behind a cache", "across"],
            "heads": ["own", "shared"],
            "scale": ["", "per query"],
            "position": [*KINDS],
            "dtype": ["float32", "float16", "bfloat16", "float16 and float32"],
        },
        make_attention,
        call_attention,
    ),
    "delta_rule": Operation(
        ("q", "k", "v", "beta", "log_decay", "erase", "initial_state"),
        {
            "form": ["causal", STATE],
            "used": ["all", "o", "state", "o alone"],
            "heads": ["own", "shared"],
            "decay": ["none", "head", "channel"],
            "erase": [False, True],
            "dtype": REAL,
        },
        make_delta,
        call_delta,
        {
            ("dtype", "state float16"): {"form": [STATE]},
            ("d log_decay", True): {"decay": ["head", "channel"]},
            ("d erase", True): {"erase": [True]},
            ("d initial_state", True): {"form": [STATE]},
        },
        state=("initial_state",),
    ),
    "diagonal_scan": Operation(
        ("x", "a", "factor", "initial_state"),
        {
            "direction": ["forth", "back", "both"],
            "coefficients": ["constant", "per step"],
            "factor": [True, False],
            "state": [True, False],
            "used": ["all", "o", "state"],
            "layout": [*LAYOUTS, "mixed", "conjugate"],
            "dtype": ["complex64", "float32", "float16", "bfloat16", "state float16"],
        },
        make_scan,
        call_scan,
        {
            ("layout", "conjugate"): {"dtype": ["complex64"]},
            ("used", "state"): {"direction": ["forth", "back"]},
            ("state", True): {"direction": ["forth", "back"]},
            ("d factor", True): {"factor": [True]},
            ("d initial_state", True): {"state": [True], "direction": ["forth", "back"]},
            ("dtype", "state float16"): {"state": [True], "direction": ["forth", "back"]},
        },
        state=("initial_state",),
    ),
    "favor_attention": Operation(
        ("q", "k", "v", "sums"),
        {**FORMS, "dtype": REAL},
        make_favor,
        call_favor,
        {**OF_FORMS, ("d sums", True): {"form": [STATE]}},
        state=("sums", "log_scale"),
    ),
    "gated_attention": Operation(
        ("u", "q_quad", "k_quad", "q_lin", "k_lin", "v", "bias", "memory", "held k_quad", "held k_lin", "held v"),
        {**FORMS, "bias": [True, False], "position": ["int64", "strided", "expanded"], "dtype": REAL},
        make_gated,
        call_gated,
        {
            **OF_FORMS,
            ("d bias", True): {"bias": [True]},
            **{(f"d {name}", True): {"form": [STATE]} for name in ("memory", "held k_quad", "held k_lin", "held v")},
        },
        state=("memory", "held k_quad", "held k_lin", "held v"),
    ),
    "linear_attention": Operation(
        ("q", "k", "v", "log_decay", "initial_state"),
        {**FORMS, "decay": ["none", "head", "step", "channel"], "normalize": [False, True], "dtype": REAL},
        make_linear,
        call_linear,
        {
            **OF_FORMS,
            ("decay", "head"): {"form": ["causal", STATE]},
            ("decay", "step"): {"form": ["causal", STATE]},
            ("decay", "channel"): {"form": ["causal", STATE]},
            ("d log_decay", True): {"decay": ["head", "step", "channel"], "form": ["causal", STATE]},
            ("d initial_state", True): {"form": [STATE]},
        },
        state=("log_decay", "initial_state"),
    ),
    "real_gated_scan": Operation(
        ("v", "recurrence_gate", "input_gate", "rate", "initial_state"),
        ONE_WAY,
        make_gated_scan,
        partial(call_one_way, real_gated_scan),
        FROM_A_STATE,
        state=("initial_state",),
    ),
    "selective_scan": Operation(
        ("v", "dt", "A", "write", "read", "initial_state"),
        ONE_WAY,
        make_selective,
        partial(call_one_way, selective_scan),
        FROM_A_STATE,
        state=("initial_state",),
        backend="chunked",
    ),
    "vq_attention": Operation(
        ("q", "k", "v", "bias", "sums", "values"),
        {
            **FORMS,
            "bias": ["none", "by head", "by query"],
            "codes": [*KINDS],
            "position": ["int64", "strided", "expanded"],
            "dtype": REAL,
        },
        make_vq,
        call_vq,
        {
            **OF_FORMS,
            ("d bias", True): {"bias": ["by head", "by query"]},
            ("d sums", True): {"form": [STATE]},
            ("d values", True): {"form": [STATE]},
        },
        state=("sums", "values"),
    ),
}
OPERATIONS |= {
    f"{name} in a loop": OPERATIONS[name]._replace(backend="chunked") for name in ("delta_rule", "real_gated_scan")
}


def cases(name: str, strength: int) -> list[Case]:
    """Besides the combinations, a gradient is asked of each input alone, and of all others without it."""
    operation = OPERATIONS[name]
    factors = {"layout": [*LAYOUTS, "mixed"], "lengths": ["none", *KINDS], "size": [*SIZES], **operation.factors}
    factors |= {f"d {asked}": [True, False] for asked in operation.asked}
    chosen = [
        {f"d {x}": (x == one) == alone for x in operation.asked} for one in operation.asked for alone in (True, False)
    ]
    return covering(factors, strength=strength, needs=operation.needs, include=chosen)


def named(case: Case) -> str:
    words = []
    for name, value in case.items():
        if value in ("", "none", False) or name.startswith("d "):
            continue
        words.append(name if value is True else f"{name} {value}" if value in KINDS else value)
    asked = " ".join(name[2:] for name, value in case.items() if name.startswith("d ") and value)
    return ", ".join([*words, f"d {asked or 'of nothing'}"])


def given(name: str, case: Case) -> dict[str, Tensor]:
    """The inputs, in dtype and layout."""
    operation = OPERATIONS[name]
    dtypes, of_states = DTYPES[case["dtype"]]
    inputs = operation.make(case, Size(*SIZES[case["size"]]))
    for index, (key, x) in enumerate(inputs.items()):
        dtype = of_states if key in operation.state else SINGLE if key == "scale" else dtypes[index % len(dtypes)]
        x = x.to(DEVICE, dtype if x.is_complex() else dtype.to_real())
        inputs[key] = lay_out(x, case["layout"], index)
    return inputs


def weights(y: Tensor, case: Case, index: int) -> Tensor:
    """The gradient of an output: numbers that every dtype has."""
    draw = torch.randint(-3, 4, (*y.shape, 2), generator=torch.Generator().manual_seed(index)) / 2
    w = torch.view_as_complex(draw) if y.is_complex() else draw[..., 0]
    return lay_out(w.to(y), case["layout"], index)


def run(name: str, case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs, and the gradients that are asked for of what the loss takes."""
    inputs = {key: x.detach().requires_grad_(case.get(f"d {key}", False)) for key, x in inputs.items()}
    outputs = OPERATIONS[name].call(case, inputs, backend)
    used = {"all": [*outputs], "o": ["o"], "o alone": ["o"], "state": [key for key in outputs if key != "o"]}[
        case.get("used", "all")
    ]
    losses = {key: weights(outputs[key], case, index) for index, key in enumerate(used) if outputs[key].requires_grad}
    leaves = {key: x for key, x in inputs.items() if x.requires_grad}
    if not losses or not leaves:
        return outputs
    gradients = torch.autograd.grad(
        [outputs[key] for key in losses], [*leaves.values()], [*losses.values()], materialize_grads=True
    )
    assert all(gradient.dtype == x.dtype for gradient, x in zip(gradients, leaves.values(), strict=True))
    return outputs | {f"d {key}": gradient for key, gradient in zip(leaves, gradients, strict=True)}


def check(name: str, case: Case) -> None:
    torch.manual_seed(0)
    inputs = given(name, case)
    clean = {key: wide(x).cpu().resolve_conj().contiguous() for key, x in inputs.items()}
    expected = run(name, case, clean, "reference")
    with poisoned():
        actual = run(name, case, inputs, OPERATIONS[name].backend)
    assert actual["o"].dtype == inputs["x" if name == "diagonal_scan" else "v"].dtype
    for key, value in actual.items():
        right = expected.get(key, torch.zeros_like(value, device="cpu"))  # where no output in use depends on an input
        half = DTYPES[case["dtype"]][0][0] != SINGLE
        cancels = half and key == "d q" and case.get("normalize", False) and case["size"] == "one channel"  # q over q
        least = 1.0 if key in ("d log_decay", "d factor") or cancels else 0.1
        assert_near(value.cpu(), right, TOLERANCE.get(case["dtype"], 3e-3), key, least)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str, least: float) -> None:
    """Of sizes around 1. What is far below is a difference of such numbers, and no more exact than they are; those of
    decays, of factors and of queries that cancel are differences of whole sums."""
    error, size = (x.abs().square().double().mean().sqrt().item() for x in (actual.to(expected) - expected, expected))
    if size < least:
        assert error <= least * tolerance, f"{name}: error {error:.2e}"
    else:
        assert_close(actual, expected, tolerance, name, worst_row=100)


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}: {named(case)}") for name in OPERATIONS for case in cases(name, strength=1)],
)
def test_agrees_with_reference(name, case):
    check(name, case)


def forms(name: str, **values: Any) -> list[Case]:
    """One case of each form of an operation, with all gradients asked for."""
    factors = OPERATIONS[name].factors
    form = "direction" if "direction" in factors else "form"
    plain = {"layout": "contiguous", "lengths": "int64", "size": ""} | {key: of[0] for key, of in factors.items()}
    plain |= {"dtype": "float32"} | {f"d {asked}": True for asked in OPERATIONS[name].asked}
    of_form = {"both": {"state": False}}
    return [plain | {form: value} | of_form.get(value, {}) | values for value in factors[form]]


def pairs(**values: Any) -> list[Any]:
    return [pytest.param(name, x, id=f"{name}: {named(x)}") for name in OPERATIONS for x in forms(name, **values)]


@pytest.mark.parametrize(("name", "case"), pairs())
def test_lengths_beyond_the_ends_are_the_ends(name, case, monkeypatch):
    """On a GPU, where no one looks at them. What lies around the inputs is neither read nor written."""
    border, inputs, buffers = 64, given(name, case), []
    for key, x in inputs.items():
        buffers.append(x.new_full((x.numel() + 2 * border,), torch.nan))
        buffers[-1][border:-border] = x.flatten()
        inputs[key] = buffers[-1][border:-border].view(x.shape)
    backend = OPERATIONS[name].backend
    expected = run(name, case, inputs, backend)
    monkeypatch.setattr(common, "can_be_looked_at", lambda lengths: False)
    actual = run(name, case | {"lengths": "beyond"}, inputs, backend)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert all(buffer[:border].isnan().all() and buffer[-border:].isnan().all() for buffer in buffers)


class _Calls(TorchDispatchMode):
    """Of registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if operator.namespace == "seqzoo":
            self.made.append((operator, arguments, keywords))
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("name", "case"), pairs(size="one sequence of one head", layout="heads first", codes="int32"))
def test_graphs_are_told_what_comes_out(name, case):
    """Where tensors have the odd strides that dimensions of size 1 may have, and with codes in 32 bits."""
    with _Calls() as calls:
        run(name, case, given(name, case), OPERATIONS[name].backend)
    assert len(calls.made) == 2
    for operator, arguments, keywords in calls.made:
        torch.library.opcheck(operator, arguments, keywords, test_utils="test_faketensor")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_all_combinations_of_three(name):
    wrong = {}
    for case in cases(name, strength=3):
        try:
            check(name, case)
        except Exception as error:
            wrong[named(case)] = error
    assert not wrong
