"""mLSTM beside the layer of xlstm and the chunks of transformers, in double precision."""

from __future__ import annotations

import math
from functools import partial
from importlib.metadata import version

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.blocks.mlstm import MLSTM, Memory, mlstm
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 150, 32, 4
MATRICES = ("q_proj", "k_proj", "v_proj")


def layers(eps: float):
    """The original's layer, which adds `eps` to divisors, and the block."""
    layer = pytest.importorskip("xlstm.blocks.mlstm.layer")
    backends = pytest.importorskip("xlstm.blocks.mlstm.backends")
    original = layer.mLSTMLayer(layer.mLSTMLayerConfig(embedding_dim=D, num_heads=H, context_length=T)).double()
    original.mlstm_cell.backend_fn = partial(backends.parallel_stabilized_simple, eps=eps)
    original.mlstm_cell.backend_fn_step = partial(backends.recurrent_step_stabilized_simple, eps=eps)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    block = build_block("mlstm", D, causal=True, num_heads=H).double()
    block.load_state_dict({name: x.detach() for name, x in by_our_names(original, lambda x: x).items()})
    with torch.no_grad():
        block.norm_weight += 1  # theirs is what is added to 1
    return original, block


def by_our_names(original, of) -> dict[str, Tensor]:
    """`of` the original's parameters, by the names of the block's."""
    cell = original.mlstm_cell
    igates, fgates = (of(gate.weight).chunk(3, 1) for gate in (cell.igate, cell.fgate))
    return {
        "in_proj.weight": of(original.proj_up.weight),
        "conv.weight": of(original.conv1d.conv.weight)[:, 0],
        "conv.bias": of(original.conv1d.conv.bias),
        **{f"{name}.weight": of(getattr(original, name).weight).mT for name in MATRICES},
        **{f"gate_proj.{n}.weight": torch.cat(pair) for n, pair in enumerate(zip(igates, fgates, strict=True))},
        "gate_bias.bias": torch.cat([of(cell.igate.bias), of(cell.fgate.bias)]),
        "norm_weight": of(cell.outnorm.weight),
        "skip": of(original.learnable_skip),
        "out_proj.weight": of(original.proj_down.weight),
    }


def test_layer_of_xlstm(record_parity):
    torch.manual_seed(0)
    original, block = layers(eps=0.0)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    expected, y = original(x), block(z)
    w = torch.randn_like(y)
    expected.backward(w)
    y.backward(w)
    pairs = {"y": (y, expected), "dx": (z.grad, x.grad)}
    gradients = by_our_names(original, lambda x: x.grad)
    assert gradients.keys() == dict(block.named_parameters()).keys()
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in block.named_parameters()}
    for name, pair in pairs.items():
        assert_close(*pair, 1e-12, name)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("mlstm", "mLSTMLayer of xlstm, its divisors' 1e-6 left out", version("xlstm"), error)


def test_steps_of_xlstm(record_parity):
    torch.manual_seed(0)
    original, block = layers(eps=0.0)
    x, state, theirs, errors = torch.randn(B, 40, D, dtype=torch.float64), None, {}, []
    with torch.no_grad():
        for step in x.split(1, 1):
            expected, theirs = original.step(step, **theirs)
            y, state = block.extend(step, state)
            assert_close(y, expected, 1e-12)
            errors.append(relative_error(y, expected)[0])
    record_parity("mlstm", "mLSTMLayer.step of xlstm, its divisors' 1e-6 left out", version("xlstm"), max(errors))


@torch.no_grad()
def test_what_xlstm_adds_to_divisors_is_seen():
    """Added after a scaling that depends on gates: more than rounding, and left out here."""
    torch.manual_seed(0)
    original, block = layers(eps=1e-6)
    x = torch.randn(B, T, D, dtype=torch.float64)
    whole, _ = relative_error(block(x), original(x))
    assert 1e-11 < whole < 1e-3


@pytest.fixture
def of_transformers(monkeypatch):
    """transformers' own xLSTM. Where xlstm is installed it takes that, and fails without its kernels."""
    utilities = pytest.importorskip("transformers.utils")
    monkeypatch.setattr(utilities, "is_xlstm_available", lambda: False)
    from transformers.models.xlstm import modeling_xlstm

    if not hasattr(modeling_xlstm, "mlstm_chunkwise_native_autograd"):
        pytest.skip("was imported before, with xlstm in its place")
    return modeling_xlstm


@pytest.mark.parametrize("size", [1.0, 20.0])
def test_chunks_of_transformers(size, of_transformers, record_parity):
    """Values twice as wide as keys, as in the 7B model, and from a state."""
    torch.manual_seed(0)
    q, k = (torch.randn(B, 128, H, 6, dtype=torch.float64) for _ in range(2))
    v = torch.randn(B, 128, H, 12, dtype=torch.float64)
    i, f = size * torch.randn(B, 128, H, dtype=torch.float64), 3 * torch.randn(B, 128, H, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, i, f)]
    memory, m = torch.randn(B, H, 6, 13, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    expected, (*parts, theirs_m) = of_transformers.mlstm_chunkwise_native_autograd(
        *(x.transpose(1, 2).contiguous() for x in inputs),
        memory[..., :-1],
        memory[..., -1],
        m[..., None],
        return_last_states=True,
        eps=0.0,
    )
    root = math.sqrt(6)  # of the keys' width, by which they divide queries and we keys
    h, after = mlstm(*inputs, before=Memory(memory / root, m))
    w = torch.randn_like(h)
    pairs = [(h, expected.transpose(1, 2))]
    pairs += zip(*(torch.autograd.grad(y, inputs, w, retain_graph=True) for y in pairs[0]), strict=True)
    theirs = torch.cat([parts[0], parts[1][..., None]], -1)
    pairs.append((after.memory * root * (after.largest - theirs_m[..., 0]).exp()[..., None, None], theirs))
    for actual, target in pairs:
        assert_close(actual, target, 1e-11)
    error = max(relative_error(*pair)[0] for pair in pairs)
    original = "mlstm_chunkwise_native_autograd of transformers, its divisors' 1e-6 left out"
    record_parity("mlstm", original, version("transformers"), error)


def test_the_block_has_no_parameter_that_the_original_lacks():
    assert isinstance(build_block("mlstm", D), MLSTM)
    count = sum(parameter.numel() for parameter in build_block("mlstm", 64, causal=True).parameters())
    layer = pytest.importorskip("xlstm.blocks.mlstm.layer")
    original = layer.mLSTMLayer(layer.mLSTMLayerConfig(embedding_dim=64, num_heads=4, context_length=1))
    assert count == sum(parameter.numel() for parameter in original.parameters())
