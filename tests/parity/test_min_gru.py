"""minGRU and minLSTM beside those of minGRU-pytorch, which scan logarithms."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from agreement import assert_close

from seqzoo import build_block
from seqzoo.kernels.agreement import relative_error

B, T, D = 2, 70, 12


def pair(cell: str, expand: float):
    """The original and the block, with the same random weights, in double precision."""
    name = f"min{cell.upper()}"
    package = pytest.importorskip(f"minGRU_pytorch.{name}")
    original = getattr(package, name)(D, expansion_factor=expand).double()
    block = build_block("min_gru", D, causal=True, cell=cell, expand=expand).double()
    weight = original.to_hidden_and_gate.weight if cell == "gru" else original.to_hidden_and_f_i_gate.weight
    torch.nn.init.normal_(weight)
    hidden, *gates = weight.detach().chunk(3 if cell == "lstm" else 2)
    weights = {"in_proj.weight": hidden, "gate_proj.weight": torch.cat(gates[::-1])}  # there f is first, here i
    if expand != 1:
        weights["out_proj.weight"] = original.to_out.weight.detach()
    block.load_state_dict(weights)
    return original, block


@pytest.mark.parametrize("expand", [1.0, 1.5])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_layers_of_mingru_pytorch(cell, expand, record_parity):
    original, block = pair(cell, expand)
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((block, original), inputs, strict=True)]
    for y in outputs:
        (y * w).sum().backward()
    hidden, *gates = next(p for name, p in original.named_parameters() if "hidden" in name).grad.chunk(block.gates + 1)
    pairs = {
        "y": outputs,
        "dx": [leaf.grad for leaf in inputs],
        "dW_h": [block.in_proj.weight.grad, hidden],
        "dW_z": [block.gate_proj.weight.grad, torch.cat(gates[::-1])],
    }
    for what, (actual, expected) in pairs.items():
        assert_close(actual, expected, 1e-11, what)
    error = max(relative_error(*two)[0] for two in pairs.values())
    record_parity("min_gru", f"min{cell.upper()} of minGRU-pytorch", version("minGRU-pytorch"), error)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_with_a_state(cell):
    """Its LSTM sends the state through g once more; ours goes on as if nothing had been cut."""
    original, block = pair(cell, 1.0)
    x = torch.randn(B, T, D, dtype=torch.float64)
    whole = block(x)
    _, state = block.extend(x[:, :30], None)
    ours, _ = block.extend(x[:, 30:], state)
    assert_close(ours, whole[:, 30:], 1e-13)
    theirs = original(x[:, 30:], state.hidden[:, None])
    if cell == "gru":
        assert_close(theirs, ours, 1e-11)
    else:
        assert relative_error(theirs, ours)[0] > 1e-3
