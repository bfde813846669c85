"""What every block promises, over every entry of `BLOCKS`, causal and bidirectional."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from agreement import assert_close
from block_cases import (
    CASES,
    DEFAULTS,
    OF_EACH_OPERATION,
    D,
    builder,
    defaults,
    every,
    make,
    parameter_gradients,
    sequences,
    soon,
)
from often import others_slow
from torch import nn

import seqzoo
from seqzoo import auxiliary_loss, build_block
from seqzoo.kernels import backends
from seqzoo.testing import contract, states

streaming = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if case.values[2]])
bidirectional = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if not case.values[2]])
# Straight-through gradients are not the function's: tests/kernels checks them.
differentiable = soon(DEFAULTS, [case for case in CASES if case.values[0] != "vq_attention"])


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
    contract.shape_and_dtype(builder(name, options, causal), T)


@every
def test_reach(name, options, causal):
    contract.reach(builder(name, options, causal))


@every
def test_mixes_over_time_in_one_linear_operation(name, options, causal):
    contract.one_linear_operation(builder(name, options, causal))


@every
def test_padding_has_no_effect(name, options, causal):
    contract.padding_has_no_effect(builder(name, options, causal))


@every
def test_inputs_are_left_as_they_were(name, options, causal):
    contract.inputs_are_left_as_they_were(builder(name, options, causal))


@every
def test_rows_know_nothing_of_each_other(name, options, causal):
    contract.rows_know_nothing_of_each_other(builder(name, options, causal))


@streaming
@pytest.mark.parametrize("splits", states.SPLITS)
def test_extend_equals_forward(name, options, causal, splits):
    states.extend_equals_forward(builder(name, options, causal), [splits])


@streaming
def test_extend_takes_ragged_steps(name, options, causal):
    states.extend_takes_ragged_steps(builder(name, options, causal))


@streaming
def test_extend_begins_without_a_state(name, options, causal):
    states.extend_begins_without_a_state(builder(name, options, causal))


@streaming
def test_a_state_is_a_value(name, options, causal):
    states.a_state_is_a_value(builder(name, options, causal))


@streaming
def test_a_state_of_other_sequences_is_refused(name, options, causal):
    states.a_state_of_other_sequences_is_refused(builder(name, options, causal))


@bidirectional
def test_bidirectional_has_no_state(name, options, causal):
    states.bidirectional_has_no_state(builder(name, options, causal))


@differentiable
@pytest.mark.parametrize("fast", others_slow([True, False], [True]))
def test_gradcheck(name, options, causal, fast):
    contract.gradients_are_the_functions(builder(name, options, causal), d_model=8, fast=fast)


@every
def test_backends_agree(name, options, causal, monkeypatch):
    """The block on every operation's float64 reference against itself in single precision."""
    x = sequences(2, 70)
    lengths = torch.tensor([70, 33])
    block = make(name, options, causal)
    fast = copy.deepcopy(block).float()
    actual = fast(x.float(), lengths=lengths)
    actual_gradients = parameter_gradients(fast, actual)
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    expected = block(x, lengths=lengths)
    assert_close(actual, expected, 1e-5)
    for a, e in zip(actual_gradients, parameter_gradients(block, expected), strict=True):
        if e is not None:
            assert_close(a, e, 1e-4)


@soon(OF_EACH_OPERATION, CASES)
def test_compiles_whole(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=name == "vq_attention")
    x = sequences(2, 40, dtype=torch.float32)
    lengths = torch.tensor([40, 9])
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
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


@every
def test_autocast(name, options, causal):
    contract.autocast(builder(name, options, causal), 0.05 if name != "vq_attention" else 0.3)


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
    contract.every_layer_is_called(builder(name, options, causal))


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
    contract.what_is_loaded_is_all_there_is(builder(name, options, causal), how)


@every
def test_empty_batches(name, options, causal):
    contract.empty_batches(builder(name, options, causal))


@every
def test_sequences_of_no_steps(name, options, causal):
    contract.sequences_of_no_steps(builder(name, options, causal))
    if name == "vq_attention":
        block = make(name, options, causal, dtype=torch.float32, train=True)
        before = block.quantizer.codebook.clone()
        block(torch.full((2, 20, D), math.nan), lengths=torch.zeros(2, dtype=torch.int64)).sum().backward()
        seqzoo.after_step(block)
        torch.testing.assert_close(block.quantizer.codebook, before)


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
    contract.lengths_of_any_integers(builder(name, options, causal), dtype)


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
    contract.saves_and_loads(builder(name, options, causal))


@every
def test_two_runs_are_equal_to_the_bit(name, options, causal):
    contract.two_runs_are_equal_to_the_bit(builder(name, options, causal))


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
    contract.after_step_leaves_evaluation_alone(builder(name, options, causal))


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
