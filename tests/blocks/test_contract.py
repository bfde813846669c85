"""What every block promises, over every entry of `BLOCKS`, causal and bidirectional."""

import copy
import math
import pickle
import warnings
from itertools import product

import pytest
import torch
from agreement import assert_close
from block_cases import CASES, D, defaults, defaults_soon, every, make, parameter_gradients, sequences
from torch import nn

import seqzoo
from seqzoo import auxiliary_loss, build_block

OPERATIONS = (
    "attention",
    "delta_rule",
    "diagonal_scan",
    "favor_attention",
    "gated_attention",
    "linear_attention",
    "selective_scan",
    "vq_attention",
)
streaming = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if case.values[2]])
bidirectional = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if not case.values[2]])
differentiable = (
    pytest.mark.parametrize(  # straight-through gradients are not the function's: tests/kernels checks them
        ("name", "options", "causal"), [case for case in CASES if case.values[0] != "vq_attention"]
    )
)


def with_codes(block, x, codes=None):
    """The output, and the codes of the keys, which are `codes` where those are given; None if there are none."""
    if not hasattr(block, "quantizer"):
        return block(x), None
    quantize, taken = block.quantizer.forward, []

    def forward(*arguments, **options):
        result = quantize(*arguments, **options)
        taken.append(result._replace(codes=result.codes if codes is None else codes))
        return taken[0]

    block.quantizer.forward = forward
    try:
        return block(x), taken[0].codes
    finally:
        del block.quantizer.forward


@every
@pytest.mark.parametrize("T", [1, 2, 31, 64, 130])
def test_shape_and_dtype(name, options, causal, T):
    for dtype in (torch.float64, torch.float32):
        block = make(name, options, causal, dtype=dtype)
        y = block(sequences(3, T, dtype=dtype))
        assert y.shape == (3, T, D)
        assert y.dtype == dtype
        assert y.isfinite().all()


@every
def test_reach(name, options, causal):
    """The Jacobian over time: nothing from the future if causal, something from everywhere else within reach."""
    T = 29
    block = make(name, options, causal)
    x = sequences(64, T).requires_grad_()  # so many, because relu features of a pair are often all zero
    y = block(x)
    rows = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)[0].abs().amax((0, 2)) for t in range(T)]
    seen = torch.stack(rows)  # [T, T], the largest derivative of output t by input s
    distance = torch.arange(T)[:, None] - torch.arange(T)
    within = distance.abs() <= (T if block.reach is None else block.reach)
    if causal:
        within &= distance >= 0
    assert (seen[~within] == 0).all()
    assert (seen[within] > 0).all()


@every
def test_mixes_over_time_in_one_linear_operation(name, options, causal):
    """What `seqzoo.analysis` needs: the call that moves values, once, given other values."""
    block = make(name, options, causal)
    x, lengths = sequences(3, 21), torch.tensor([21, 1, 12])
    outputs = []

    def first(y):
        return y[0] if isinstance(y, tuple) else y

    def observe(operation, values, *gates):
        others = torch.randn_like(values)
        both = first(operation(2 * values + others, *gates))
        outputs.append((both, 2 * first(operation(values, *gates)) + first(operation(others, *gates))))

    with block.observed(observe):
        block(x, lengths=lengths)
    block(x, lengths=lengths)
    ((actual, expected),) = outputs
    for b, n in enumerate(lengths.tolist()):
        assert_close(actual[b, :n], expected[b, :n], 1e-12)


@every
def test_padding_has_no_effect(name, options, causal):
    block = make(name, options, causal)
    lengths = torch.tensor([1, 17, 40])
    x = sequences(3, 40)
    for b, n in enumerate(lengths.tolist()):
        x[b, n:] = math.nan
    x.requires_grad_()
    y = block(x, lengths=lengths)
    padded = parameter_gradients(block, y)
    (dx,) = torch.autograd.grad(block(x, lengths=lengths).sum(), x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    alone = 0.0
    for b, n in enumerate(lengths.tolist()):
        one = block(x.detach()[b : b + 1, :n])
        assert_close(y[b : b + 1, :n], one, 1e-10, f"sequence of {n}")
        assert (y[b, n:] == 0).all()
        assert (dx[b, n:] == 0).all()
        alone = alone + (one * weight[b : b + 1, :n]).sum()
    expected = torch.autograd.grad(alone, [p for p in block.parameters() if p.requires_grad], allow_unused=True)
    for a, e in zip(padded, expected, strict=True):
        if e is not None:
            assert_close(a, e, 1e-9, "gradient of a parameter")


@every
def test_rows_know_nothing_of_each_other(name, options, causal):
    """Alone, in a batch, and beside rows of other values: outputs and gradients of a row are the same."""
    block, x = make(name, options, causal), sequences(3, 37).requires_grad_()
    y = block(x)
    for b in range(3):
        row = x.detach()[b : b + 1].requires_grad_()
        alone = block(row)
        assert_close(y[b : b + 1], alone, 1e-10)
        (dx,) = torch.autograd.grad(y[b].square().sum(), x, retain_graph=True)
        assert_close(dx[b : b + 1], torch.autograd.grad(alone.square().sum(), row)[0], 1e-9)
        assert (dx[[other for other in range(3) if other != b]] == 0).all()


@streaming
@pytest.mark.parametrize("splits", [[1] * 23, [7, 16], [22, 1], [1, 22], [8, 8, 7], [2, 21], [1, 2, 3, 17]])
def test_extend_equals_forward(name, options, causal, splits):
    block = make(name, options, causal)
    x = sequences(2, 23)
    whole = block(x)
    state = block.initial_state(2, dtype=torch.float64)
    parts = []
    for part in x.split(splits, 1):
        y, state = block.extend(part, state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, 1e-10)
    assert state.position.tolist() == [23, 23]


@streaming
def test_extend_takes_ragged_steps(name, options, causal):
    block = make(name, options, causal)
    x = sequences(2, 30)
    whole = block(x)
    state = block.initial_state(2, dtype=torch.float64)
    position = torch.zeros(2, dtype=torch.int64)
    for lengths in ([5, 1], [9, 9], [1, 4], [10, 3]):
        steps = torch.tensor(lengths)
        piece = torch.full((2, 10, D), math.nan, dtype=torch.float64)
        for b in range(2):
            piece[b, : lengths[b]] = x[b, position[b] : position[b] + lengths[b]]
        y, state = block.extend(piece, state, lengths=steps)
        for b in range(2):
            assert_close(y[b, : lengths[b]], whole[b, position[b] : position[b] + lengths[b]], 1e-10)
            assert (y[b, lengths[b] :] == 0).all()
        position += steps
    assert state.position.tolist() == position.tolist()


@streaming
def test_extend_begins_without_a_state(name, options, causal):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        block, x = make(name, options, causal, dtype=dtype), sequences(2, 12, dtype=dtype)
        given, begun = block.initial_state(2), None
        assert all(part.dtype in (torch.int64, dtype, torch.float32) for part in given)
        for part in x.split([1, 7, 4], 1):
            y, given = block.extend(part, given)
            z, begun = block.extend(part, begun)
            assert torch.equal(y, z)
        assert all(torch.equal(a, b) for a, b in zip(given, begun, strict=True))
        if dtype == torch.float64:
            assert {part.dtype for part in given} <= {torch.int64, torch.float64}
    with torch.device("meta"):
        state = build_block(name, D, causal=causal, **options).initial_state(3)
    assert {part.device.type for part in state} == {"meta"}


@streaming
def test_a_state_of_other_sequences_is_refused(name, options, causal):
    block = make(name, options, causal)
    _, state = block.extend(sequences(2, 5), None)
    with pytest.raises(ValueError, match=f"{type(block).__name__}: a state of 2 sequences for x of 3; valid: "):
        block.extend(sequences(3, 1), state)


@bidirectional
def test_bidirectional_has_no_state(name, options, causal):
    block = make(name, options, causal)
    with pytest.raises(ValueError, match="causal=True"):
        block.extend(sequences(1, 3), None)
    with pytest.raises(ValueError, match="causal=True"):
        block.initial_state(1)


@differentiable
def test_gradcheck(name, options, causal):
    block = make(name, options, causal, d_model=8)
    x = sequences(2, 5, d_model=8).requires_grad_()
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda x: block(x, lengths=lengths), (x,))
    named = dict(block.named_parameters())

    def f(*values):
        return torch.func.functional_call(block, dict(zip(named, values, strict=True)), (x.detach(),))

    few = next(iter(named))
    values = [p.detach().requires_grad_(key == few or p.dim() == 1) for key, p in named.items()]
    assert torch.autograd.gradcheck(f, values)


@every
def test_backends_agree(name, options, causal, monkeypatch):
    """The block on every operation's float64 reference against itself in single precision."""
    import importlib

    kinds = type(make(name, options, causal)).__mro__
    modules = [importlib.import_module(kind.__module__) for kind in kinds]
    x = sequences(2, 70)
    lengths = torch.tensor([70, 33])
    block = make(name, options, causal)
    fast = copy.deepcopy(block).float()
    actual = fast(x.float(), lengths=lengths)
    actual_gradients = parameter_gradients(fast, actual)
    for module, operation in product(dict.fromkeys(modules), OPERATIONS):
        if hasattr(module, operation) and callable(original := getattr(module, operation)):
            monkeypatch.setattr(module, operation, lambda *a, f=original, **k: f(*a, **k, backend="reference"))
    expected = block(x, lengths=lengths)
    assert_close(actual, expected, 1e-5)
    for a, e in zip(actual_gradients, parameter_gradients(block, expected), strict=True):
        if e is not None:
            assert_close(a, e, 1e-4)


@defaults_soon
def test_compiles_whole(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=name == "vq_attention")
    x = sequences(2, 40, dtype=torch.float32)
    lengths = torch.tensor([40, 9])
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(x, lengths=lengths)
    expected = block(x, lengths=lengths)
    torch.testing.assert_close(y, expected)
    for a, e in zip(parameter_gradients(block, y), parameter_gradients(block, expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@defaults
def test_compiles_with_inductor(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32)
    x = sequences(2, 40, dtype=torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


@every
def test_autocast(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32)
    x = sequences(2, 40, dtype=torch.float32)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        gradients = parameter_gradients(block, y.float())
    assert_close(y.float(), expected, 0.05 if name != "vq_attention" else 0.3)
    assert all(g.isfinite().all() for g in gradients if g is not None)


def errors_in_half(name, options, causal, dtype):
    """Relative errors of outputs over 4,096 steps: of the block cast to `dtype`, and under autocast."""
    block, x = make(name, options, causal, dtype=torch.float32), sequences(1, 4096, dtype=torch.float32)
    with torch.no_grad():
        expected, codes = with_codes(block, x)
        cast, _ = with_codes(copy.deepcopy(block).to(dtype), x.to(dtype), codes)
        with torch.autocast("cpu", dtype):
            auto, _ = with_codes(block, x, codes)
    return [((y.float() - expected).norm() / expected.norm()).item() for y in (cast, auto)]


@defaults
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_over_thousands_of_steps(name, options, causal, dtype):
    assert max(errors_in_half(name, options, causal, dtype)) < 0.02


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_with_any_options(name, options, causal, dtype):
    assert max(errors_in_half(name, options, causal, dtype)) < 0.02


@every
def test_every_layer_is_called(name, options, causal):
    """Hooks, low-rank changes and quantisation act on calls."""
    block = make(name, options, causal)
    layers = {key for key, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    called = set()
    for key in layers:
        block.get_submodule(key).register_forward_hook(lambda *_, key=key: called.add(key))
    block(sequences(2, 20))
    assert called == layers


@every
def test_low_rank_changes_act_and_merge(name, options, causal):
    peft = pytest.importorskip("peft")
    block, x = make(name, options, causal), sequences(2, 20)
    before = block(x)
    layers = [key for key, layer in block.named_modules() if isinstance(layer, nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=layers), block)
    changes = [parameter for key, parameter in block.named_parameters() if "lora_" in key]
    for parameter in changes:
        nn.init.normal_(parameter, std=0.1)
    block.double().eval()
    y = block(x)
    assert ((y - before).norm() / before.norm()) > 1e-3
    assert all(gradient.any() for gradient in torch.autograd.grad(y.square().sum(), changes))
    for layer in block.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    assert_close(block(x), y, 1e-12)


@every
def test_quantises(name, options, causal):
    block, x = make(name, options, causal, dtype=torch.float32), sequences(2, 20, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(block), {nn.Linear}, dtype=torch.qint8)
    assert_close(small(x), block(x), 0.3 if name == "vq_attention" else 0.1)
    if causal:
        small.extend(x, None)


@every
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_what_was_built_on_the_meta_device_is_what_is_loaded(name, options, causal, how):
    """Nothing that no file holds is left unwritten."""
    block, x = make(name, options, causal, dtype=torch.float32, train=True), sequences(2, 20, dtype=torch.float32)
    with torch.device("meta"):
        other = build_block(name, D, causal=causal, **options)
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
        seqzoo.after_step(each)
        results.append((y, *each.state_dict().values(), *(p.grad for p in each.parameters() if p.grad is not None)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every
def test_empty_batches(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=True)
    for lengths in (None, torch.zeros(0, dtype=torch.int32)):
        x = torch.zeros(0, 20, D, requires_grad=True)
        y = block(x, lengths=lengths)
        (y.sum() + auxiliary_loss(block)).backward()
        seqzoo.after_step(block)
        assert (y.shape, x.grad.shape) == ((0, 20, D), (0, 20, D))
        assert all((p.grad == 0).all() for p in block.parameters() if p.grad is not None)
        if causal:
            y, state = block.extend(x, None, lengths=lengths)
            y, state = block.extend(x, state, lengths=lengths)
            assert (y.shape, state.position.shape) == ((0, 20, D), (0,))
    assert all(value.isfinite().all() for value in block.state_dict().values())


@every
def test_sequences_of_no_steps(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=True)
    before = copy.deepcopy(block.state_dict())
    y = block(torch.full((2, 20, D), math.nan), lengths=torch.zeros(2, dtype=torch.int64))
    loss = auxiliary_loss(block)
    (y.sum() + loss).backward()
    seqzoo.after_step(block)
    assert (y == 0).all()
    assert loss == 0
    assert all((p.grad == 0).all() for p in block.parameters() if p.grad is not None)
    if hasattr(block, "quantizer"):
        torch.testing.assert_close(block.quantizer.codebook, make(name, options, causal).quantizer.codebook.float())
    assert all(value.isfinite().all() for value in block.state_dict().values())
    assert before.keys() == block.state_dict().keys()


@defaults
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([4]), r"int64 \[3\] or narrower integers.* got torch.int64 \[1\]"),
        (torch.tensor([10.0, 4.0, 2.0]), "torch.float32"),
        ([10, 4, 2], "got list"),
        (torch.ones(3, 10, dtype=torch.bool), r"mask.*mask.sum\(1\)"),
        (torch.tensor([True, True, False]), "torch.bool"),
        (torch.tensor([10, 11, 2]), r"\[0, 10\]"),
        (torch.tensor([10, -1, 2]), r"\[0, 10\]"),
    ],
)
def test_wrong_lengths_are_named(name, options, causal, lengths, message):
    block, x = make(name, options, causal), sequences(3, 10)
    with pytest.raises(ValueError, match=f"{type(block).__name__}: lengths .*{message}"):
        block(x, lengths=lengths)
    if causal:
        with pytest.raises(ValueError, match=f"{type(block).__name__}: lengths .*{message}"):
            block.extend(x, None, lengths=lengths)


@every
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_lengths_of_any_integers(name, options, causal, dtype):
    block, x, lengths = make(name, options, causal), sequences(3, 10), torch.tensor([10, 4, 2])
    assert torch.equal(block(x, lengths=lengths.to(dtype)), block(x, lengths=lengths))
    if causal:
        y, state = block.extend(x, None, lengths=lengths.to(dtype))
        assert_close(y, block(x, lengths=lengths), 1e-12)
        assert state.position.dtype == torch.int64


@every
def test_saves_and_loads(name, options, causal, tmp_path):
    from safetensors.torch import load_file, save_file

    block = make(name, options, causal, dtype=torch.float32)
    save_file(block.state_dict(), tmp_path / "block.safetensors")
    torch.manual_seed(1)
    other = build_block(name, D, causal=causal, **options).eval()
    other.load_state_dict(load_file(tmp_path / "block.safetensors"))
    x = sequences(2, 20, dtype=torch.float32)
    assert torch.equal(block(x), other(x))
    again = pickle.loads(pickle.dumps(block))
    assert torch.equal(block(x), again(x))


@every
def test_two_runs_are_equal_to_the_bit(name, options, causal):
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            block = make(name, options, causal, dtype=torch.float32, train=True)
            torch.manual_seed(3)
            y = block(sequences(2, 70, dtype=torch.float32), lengths=torch.tensor([70, 41]))
            results.append((y, *parameter_gradients(block, y)))
        for a, b in zip(*results, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    finally:
        torch.use_deterministic_algorithms(False)


@every
def test_auxiliary_loss_is_read_once_and_not_copied(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=True)
    block(sequences(2, 20, dtype=torch.float32)).sum().backward()
    assert copy.deepcopy(block)._auxiliary is None
    assert pickle.loads(pickle.dumps(block))._auxiliary is None
    auxiliary_loss(block)
    assert auxiliary_loss(block) == 0
    block.eval()
    block(sequences(2, 20, dtype=torch.float32))
    assert auxiliary_loss(block) == 0


@every
def test_after_step_leaves_evaluation_alone(name, options, causal):
    """Forward passes in evaluation, without gradients or recomputed in backward gather nothing."""
    from torch.utils.checkpoint import checkpoint

    once, twice = (make(name, options, causal, dtype=torch.float32, train=True) for _ in range(2))
    x = sequences(2, 20, dtype=torch.float32).requires_grad_()
    torch.manual_seed(4)
    once(x).sum().backward()
    torch.manual_seed(4)
    checkpoint(twice, x, use_reentrant=False).sum().backward()
    with torch.no_grad():
        twice(x)
    twice.eval()(x)
    for block in (once, twice):
        torch.manual_seed(5)
        seqzoo.after_step(block)
    for (key, a), b in zip(once.state_dict().items(), twice.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_unknown_names_say_what_is_valid():
    with pytest.raises(ValueError, match=r"no block 'lruu' \(did you mean 'lru'\?\); valid: softmax_attention"):
        build_block("lruu", D)
    with pytest.raises(ValueError, match=r"no option of lru 'num_heads'.*valid: state_dim"):
        build_block("lru", D, num_heads=2)
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=16; valid"):
        build_block("softmax_attention", D, num_heads=3)
    with pytest.raises(ValueError, match=r"takes \[batch, time of 1 or more, 16\]"):
        build_block("lru", D)(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="normalize=False"):
        build_block("linear_attention", D, feature_map="silu")
