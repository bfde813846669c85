"""Mamba beside the layers of transformers and of mambapy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_close
from torch import Tensor

from seqzoo import build_block
from seqzoo.kernels.agreement import relative_error

B, T, D, N = 2, 70, 20, 6


@pytest.fixture
def in_double(monkeypatch):
    """The originals cast to single precision inside; with this, to double."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def of_transformers() -> tuple[Any, str]:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=D, state_size=N, num_hidden_layers=1)
    return MambaMixer(config, layer_idx=0), transformers.__version__


def of_mambapy() -> tuple[Any, str]:
    from importlib.metadata import version

    mamba = pytest.importorskip("mambapy.mamba")
    return mamba.MambaBlock(mamba.MambaConfig(d_model=D, n_layers=1, d_state=N)), version("mambapy")


def copied(original: Any, gradients: bool = False) -> dict[str, Tensor]:
    """Weights of an original, or their gradients, by the names of the block."""
    names = {
        "in_proj.weight": original.in_proj.weight,
        "conv.weight": original.conv1d.weight,
        "conv.bias": original.conv1d.bias,
        "x_proj.weight": original.x_proj.weight,
        "dt_proj.weight": original.dt_proj.weight,
        "dynamics.dt_bias": original.dt_proj.bias,
        "dynamics.A_log": original.A_log,
        "skip": original.D,
        "out_proj.weight": original.out_proj.weight,
    }
    values = {name: x.grad if gradients else x.detach() for name, x in names.items()}
    return values | {"conv.weight": values["conv.weight"][:, 0]}


@pytest.mark.parametrize(
    ("make", "name"),
    [(of_transformers, "MambaMixer of transformers, PyTorch path"), (of_mambapy, "MambaBlock of mambapy")],
)
def test_layers(make, name, in_double, record_parity):
    original, version = make()
    original = original.double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    block = build_block("mamba", D, causal=True, state_dim=N).double()
    block.load_state_dict(copied(original))
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((block, original), inputs, strict=True)]
    for y in outputs:
        (y * w).sum().backward()
    theirs = copied(original, gradients=True)
    pairs = {"y": outputs, "dx": [leaf.grad for leaf in inputs]}
    pairs |= {name: [parameter.grad, theirs[name]] for name, parameter in block.named_parameters()}
    for what, (actual, expected) in pairs.items():
        assert_close(actual, expected, 1e-12, what)
    record_parity("mamba", name, version, max(relative_error(*pair)[0] for pair in pairs.values()))


def test_starts_as_in_transformers():
    original, _ = of_transformers()
    block = build_block("mamba", D, state_dim=N)
    own = copied(original)
    assert_close(block.dynamics.A_log, own["dynamics.A_log"], 1e-6)
    for name in ("dynamics.dt_bias", "dt_proj.weight"):
        value, expected = block.get_parameter(name), own[name]
        assert_close(value.amin(), expected.amin(), 0.3, name)
        assert_close(value.amax(), expected.amax(), 0.3, name)
    assert torch.equal(block.skip, own["skip"])
