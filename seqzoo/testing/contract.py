"""The checks, but for those of states. Each takes what builds the block, `build(dtype=torch.float64, train=False)`, the
same one for the same arguments."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import after_step, auxiliary_loss
from .agreement import assert_close, expect
from .cases import Build, inputs_of, parameter_gradients
from .states import streams

FRONT, COUNT, WHOLE = (0, 3, 8, 0, 2), (12, 9, 4, 5, 7), 12  # nothing is padded; in front; in front; behind; both
COUNTS = torch.tensor([[front <= t < front + n for t in range(WHOLE)] for front, n in zip(FRONT, COUNT, strict=True)])
DOCUMENTS = (5, 0, 37, 1, 64, 90, 2)  # lengths


def shape_and_dtype(build: Build, T: int = 31) -> None:
    for dtype in (torch.float64, torch.float32):
        block = build(dtype=dtype)
        y = block(inputs_of(block, 3, T, dtype))
        expect(y.shape == (3, T, block.d_model), f"outputs are {list(y.shape)}, of inputs {[3, T, block.d_model]}")
        expect(y.dtype == dtype, f"outputs are {y.dtype}, of inputs {dtype}")
        expect(y.isfinite().all(), f"outputs of {T} steps in {dtype} are not finite")


def reach(build: Build) -> None:
    """The Jacobian over time: nothing from the future if causal, something from everywhere else within reach."""
    T, block = 29, build()
    x = inputs_of(block, 64, T).requires_grad_()  # so many, because relu features of a pair are often all zero
    y = block(x)
    rows = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].abs().amax((0, 2)) for t in range(T)]
    seen = torch.stack(rows)  # [T, T], the largest derivative of output t by input s
    distance = torch.arange(T)[:, None] - torch.arange(T)
    within = distance.abs() <= (T if block.reach is None else block.reach)
    if block.causal:
        within &= distance >= 0
    later = f"reach={block.reach} and causal={block.causal}"
    expect((seen[~within] == 0).all(), f"an output depends on an input that {later} hide from it")
    expect((seen[within] > 0).all(), f"an output does not depend on an input that {later} let it see")


def one_linear_operation(build: Build) -> None:
    """What `seqzoo.analysis` needs: the call that moves values, once, given other values."""
    block = build()
    x, lengths = inputs_of(block, 3, 21), torch.tensor([21, 1, 12])
    outputs = []

    def first(y: Any) -> Tensor:
        return y[0] if isinstance(y, tuple) else y

    def observe(operation: Callable[..., Any], values: Tensor, *gates: Tensor) -> None:
        others = torch.randn_like(values)
        both = first(operation(2 * values + others, *gates))
        outputs.append((both, 2 * first(operation(values, *gates)) + first(operation(others, *gates))))

    with block.observed(observe):
        block(x, lengths=lengths)
    block(x, lengths=lengths)
    expect(len(outputs) == 1, f"over_time is called {len(outputs)} times, not once")
    ((actual, expected),) = outputs
    for b, n in enumerate(lengths.tolist()):
        assert_close(actual[b, :n], expected[b, :n], 1e-12, "over_time is not linear")


def padding_has_no_effect(build: Build) -> None:
    block, lengths = build(), torch.tensor([1, 17, 40])
    x = inputs_of(block, 3, 40)
    for b, n in enumerate(lengths.tolist()):
        x[b, n:] = math.nan
    x.requires_grad_()
    y = block(x, lengths=lengths)
    padded = parameter_gradients(block, y)
    (dx,) = torch.autograd.grad(block(x, lengths=lengths).sum(), x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    alone = torch.zeros((), dtype=y.dtype)
    for b, n in enumerate(lengths.tolist()):
        one = block(x.detach()[b : b + 1, :n])
        assert_close(y[b : b + 1, :n], one, 1e-10, f"a padded sequence of {n}, beside itself alone")
        expect((y[b, n:] == 0).all(), "outputs past a length are not zero")
        expect((dx[b, n:] == 0).all(), "inputs past a length have a gradient")
        alone = alone + (one * weight[b : b + 1, :n]).sum()
    expected = torch.autograd.grad(alone, [p for p in block.parameters() if p.requires_grad], allow_unused=True)
    for a, e in zip(padded, expected, strict=True):
        if e is not None:
            assert_close(torch.zeros_like(e) if a is None else a, e, 1e-9, "gradient of a parameter, with padding")


def padding_on_either_side(build: Build, name: str = "attention_mask", mask: Tensor | None = None) -> None:
    block = build()
    x = inputs_of(block, len(FRONT), WHOLE).masked_fill(~COUNTS[..., None], math.nan).requires_grad_()
    padding: Any = {name: COUNTS.long() if mask is None else mask}
    y = block(x, **padding)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for b, (front, n) in enumerate(zip(FRONT, COUNT, strict=True)):
        here = slice(front, front + n)
        one = x.detach()[b : b + 1, here].requires_grad_()
        expected = block(one)
        assert_close(y[b : b + 1, here], expected, 1e-10, f"{n} steps behind {front} of padding")
        assert_close(dx[b : b + 1, here], torch.autograd.grad(expected.sum(), one)[0], 1e-9, "gradient of an input")
    expect((y[~COUNTS] == 0).all(), "outputs of padding are not zero")
    expect((dx[~COUNTS] == 0).all(), "padding has a gradient")


def inputs_are_left_as_they_were(build: Build) -> None:
    """Without gradients, where PyTorch does not see it, too."""
    block, T = build(), 12
    given = inputs_of(block, 2, T)
    x = given.clone()
    ways: list[Callable[[], Any]] = [
        lambda: block(x),
        lambda: block(x, lengths=torch.tensor([5, T])),
        lambda: block(x, attention_mask=(torch.arange(T) >= torch.tensor([[4], [0]])).long()),
    ]
    if block._packs:
        ways.append(lambda: block(x[:1], cu_seqlens=torch.tensor([0, 5, T])))
    if block.causal and streams(block):
        ways.append(lambda: block.extend(x, None))
    for way in ways:
        with torch.no_grad():
            way()
        expect(torch.equal(x, given), "the inputs are others after a call")


def rows_know_nothing_of_each_other(build: Build) -> None:
    block = build()
    x = inputs_of(block, 3, 37).requires_grad_()
    y = block(x)
    for b in range(3):
        row = x.detach()[b : b + 1].requires_grad_()
        alone = block(row)
        assert_close(y[b : b + 1], alone, 1e-10, "a row, beside itself alone")
        (dx,) = torch.autograd.grad(y[b].square().sum(), x, retain_graph=True)
        assert_close(dx[b : b + 1], torch.autograd.grad(alone.square().sum(), row)[0], 1e-9, "gradient of a row")
        others = dx[[other for other in range(3) if other != b]]
        expect((others == 0).all(), "a row has a gradient by another")


def gradients_are_the_functions(build: Build, d_model: int | None = None, *, fast: bool = False) -> None:
    """Against differences of every input, or, if `fast`, along one direction in which all change."""
    block = build() if d_model is None else build(d_model=d_model)
    x = inputs_of(block, 2, 5).requires_grad_()
    lengths = torch.tensor([5, 3])
    torch.autograd.gradcheck(lambda x: block(x, lengths=lengths), (x,), fast_mode=fast)
    named = dict(block.named_parameters())

    def f(*values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(named, values, strict=True)), (x.detach(),))

    few = next(iter(named), None)
    values = [p.detach().requires_grad_(key == few or p.dim() == 1) for key, p in named.items()]
    if values:
        torch.autograd.gradcheck(f, tuple(values), fast_mode=fast)


def autocast(build: Build, tolerance: float = 0.05) -> None:
    block = build(dtype=torch.float32)
    x = inputs_of(block, 2, 40, torch.float32)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        gradients = parameter_gradients(block, y.float())
    assert_close(y.float(), expected, tolerance, "outputs under autocast")
    expect(all(g.isfinite().all() for g in gradients if g is not None), "gradients under autocast are not finite")


def every_layer_is_called(build: Build) -> None:
    """Hooks, low-rank changes and quantisation act on calls."""
    block = build()
    layers = {key for key, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    called: set[str] = set()
    for key in layers:
        block.get_submodule(key).register_forward_hook(lambda *_, key=key: called.add(key))
    block(inputs_of(block, 2, 20))
    expect(called == layers, f"layers are read and not called: {', '.join(sorted(layers - called))}")


def what_is_loaded_is_all_there_is(build: Build, how: str = "to_empty") -> None:
    """Nothing that no file holds is left unwritten, in a block that is made on the meta device ("to_empty" or
    "assign")."""
    block = build(dtype=torch.float32, train=True)
    x = inputs_of(block, 2, 20, torch.float32)
    with torch.device("meta"):
        other = type(block)(**block.options)
    if how == "to_empty":
        other = other.to_empty(device="cpu")
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(math.nan)
    other.load_state_dict(copy.deepcopy(block.state_dict()), assign=how == "assign")
    results = []
    for each in (block, other):
        torch.manual_seed(3)
        y = each(x)
        (y.square().mean() + auxiliary_loss(each)).backward()
        after_step(each)
        results.append((y, *each.state_dict().values(), *(p.grad for p in each.parameters() if p.grad is not None)))
    same = len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
    expect(same, "made on the meta device and loaded, it computes something else")


def empty_batches(build: Build) -> None:
    block = build(dtype=torch.float32, train=True)
    shape = (0, 20, block.d_model)
    for lengths in (None, torch.zeros(0, dtype=torch.int32)):
        x = torch.zeros(shape, requires_grad=True)
        y = block(x, lengths=lengths)
        (y.sum() + auxiliary_loss(block)).backward()
        after_step(block)
        expect(x.grad is not None and y.shape == x.grad.shape == shape, f"an empty batch gives {list(y.shape)}")
        expect(all((p.grad == 0).all() for p in block.parameters() if p.grad is not None), "it has a gradient")
        if block.causal and streams(block):
            y, state = block.extend(x, None, lengths=lengths)
            y, state = block.extend(x, state, lengths=lengths)
            expect((y.shape, state.position.shape) == (shape, (0,)), f"extended by nothing, it gives {list(y.shape)}")
    expect(all(value.isfinite().all() for value in block.state_dict().values()), "an empty batch broke its state")


def sequences_of_no_steps(build: Build) -> None:
    block = build(dtype=torch.float32, train=True)
    before = block.state_dict().keys()
    y = block(torch.full((2, 20, block.d_model), math.nan), lengths=torch.zeros(2, dtype=torch.int64))
    loss = auxiliary_loss(block)
    if y.requires_grad:
        (y.sum() + loss).backward()
    after_step(block)
    expect((y == 0).all() and loss == 0, "sequences of no steps have outputs, or a loss")
    expect(all((p.grad == 0).all() for p in block.parameters() if p.grad is not None), "they have a gradient")
    expect(all(value.isfinite().all() for value in block.state_dict().values()), "they broke its state")
    expect(before == block.state_dict().keys(), "they changed what it is made of")


def lengths_of_any_integers(build: Build, dtype: torch.dtype = torch.int32) -> None:
    block, lengths = build(), torch.tensor([10, 4, 2])
    x = inputs_of(block, 3, 10)
    expected = block(x, lengths=lengths)
    expect(torch.equal(block(x, lengths=lengths.to(dtype)), expected), f"lengths in {dtype} give something else")
    if block.causal and streams(block):
        y, state = block.extend(x, None, lengths=lengths.to(dtype))
        assert_close(y, expected, 1e-12, f"extend with lengths in {dtype}")
        expect(state.position.dtype == torch.int64, f"position is {state.position.dtype}, not int64")


def saves_and_loads(build: Build) -> None:
    block = build(dtype=torch.float32)
    other = type(block)(**block.options).eval()
    other.load_state_dict(copy.deepcopy(block.state_dict()))
    x = inputs_of(block, 2, 20, torch.float32)
    expect(torch.equal(block(x), other(x)), "with its state dict, another one computes something else")
    kind = type(block)
    named = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind  # not of a function
    again = pickle.loads(pickle.dumps(block)) if named else copy.deepcopy(block)  # noqa: S301  its own bytes
    expect(torch.equal(block(x), again(x)), "a copy computes something else")


def two_runs_are_equal_to_the_bit(build: Build) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            block = build(dtype=torch.float32, train=True)
            torch.manual_seed(3)
            y = block(inputs_of(block, 2, 70, torch.float32), lengths=torch.tensor([70, 41]))
            results.append((y, *parameter_gradients(block, y)))
        for a, b in zip(*results, strict=True):
            expect((a is None and b is None) or torch.equal(a, b), "two runs differ")
    finally:
        torch.use_deterministic_algorithms(False)


def after_step_leaves_evaluation_alone(build: Build) -> None:
    """Forward passes in evaluation, without gradients or recomputed in backward gather nothing."""
    from torch.utils.checkpoint import checkpoint

    once, twice = (build(dtype=torch.float32, train=True) for _ in range(2))
    x = inputs_of(once, 2, 20, torch.float32).requires_grad_()
    torch.manual_seed(4)
    once(x).sum().backward()
    torch.manual_seed(4)
    checkpoint(twice, x, use_reentrant=False).sum().backward()
    with torch.no_grad():
        twice(x)
    twice.eval()(x)
    for block in (once, twice):
        torch.manual_seed(5)
        after_step(block)
    for (key, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        expect(torch.equal(a, b), f"{key} moved by passes that are none of training's")


def each_document_is_as_if_alone(build: Build, dtype: torch.dtype = torch.int32) -> None:
    block = build()
    starts = torch.tensor([0, *DOCUMENTS]).cumsum(0)
    x = inputs_of(block, 1, int(starts[-1])).requires_grad_()
    y = block(x, cu_seqlens=starts.to(dtype))
    pieces = [x[:, start:end] for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    expected = torch.cat([block(piece) for piece in pieces if piece.shape[1]], 1)
    assert_close(y, expected, 1e-10, "documents in one row, beside each alone")
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    actual, right = (torch.autograd.grad((z * weight).sum(), leaves, allow_unused=True) for z in (y, expected))
    for a, e in zip(actual, right, strict=True):
        if e is not None:
            assert_close(a, e, 1e-9, "gradient, of documents in one row")


def options_build_the_same(build: Build) -> None:
    block = build()
    other = type(block)(**block.options)
    expect(other.options == block.options, f"built with its options {block.options}, it has {other.options}")
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (block, other)]
    expect(shapes[0] == shapes[1], f"built with its options {block.options}, it is another")


CHECKS: tuple[Callable[[Build], None], ...] = (
    shape_and_dtype,
    options_build_the_same,
    reach,
    one_linear_operation,
    padding_has_no_effect,
    padding_on_either_side,
    inputs_are_left_as_they_were,
    rows_know_nothing_of_each_other,
    gradients_are_the_functions,
    autocast,
    every_layer_is_called,
    what_is_loaded_is_all_there_is,
    empty_batches,
    sequences_of_no_steps,
    lengths_of_any_integers,
    saves_and_loads,
    two_runs_are_equal_to_the_bit,
    after_step_leaves_evaluation_alone,
)
PACKED: tuple[Callable[[Build], None], ...] = (each_document_is_as_if_alone,)
