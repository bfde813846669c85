"""S5 beside the layer of s5-pytorch, which keeps both states of a conjugate pair."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from agreement import assert_close

from seqzoo import build_block
from seqzoo.blocks.s5 import S5, hippo_n
from seqzoo.kernels.agreement import relative_error

B, T, D, P = 2, 70, 12, 16


def of_s5_pytorch(block: S5, monkeypatch):
    """The original with the weights of `block`: of each pair, the other one has conjugate rates, inputs and outputs."""
    s5 = pytest.importorskip("s5.s5_model")
    monkeypatch.setattr(s5, "as_complex", torch.view_as_complex)  # its own knows single precision only
    discretization = block.dynamics.discretization
    basis = torch.eye(P, dtype=torch.complex128)
    original = s5.S5SSM(
        *(torch.zeros(P, dtype=torch.complex128), basis, basis, D, P, 1e-3, 1e-1),
        discretization=discretization,
        bcInit="complex_normal",
        bidir=not block.causal,
    ).double()
    dynamics = block.dynamics
    weights = {
        "Lambda": torch.complex(-dynamics.log_neg_real.exp(), dynamics.imag),
        "B": torch.view_as_complex(block.in_proj.weight.unflatten(0, (P // 2, 2)).mT.contiguous()),  # [P / 2, D]
    }
    readers = [layer for layer in (block.out_proj, block.out_proj_reverse) if layer is not None]
    C = [torch.view_as_complex(layer.weight.unflatten(1, (P // 2, 2)).contiguous()).conj() for layer in readers]
    original.Lambda = torch.nn.Parameter(torch.cat([weights["Lambda"], weights["Lambda"].conj()]).detach())
    both = torch.cat([weights["B"], weights["B"].conj()]).detach()
    original.B = torch.nn.Parameter(torch.view_as_real(both.resolve_conj()).clone())
    original.C = torch.nn.Parameter(torch.cat([torch.cat([c, c.conj()], 1) for c in C], 1).detach())
    original.log_step = torch.nn.Parameter(dynamics.log_dt.detach().repeat(2))
    original.D = torch.nn.Parameter(block.skip.detach().clone())
    return original


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_layer_of_s5_pytorch(discretization, causal, monkeypatch, record_parity):
    options = {"state_dim": P, "discretization": discretization}
    block = build_block("s5", D, causal=causal, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    original = of_s5_pytorch(block, monkeypatch)
    x, w = (torch.randn(B, T, D, dtype=torch.float64) for _ in range(2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [block(inputs[0]), block.gate(torch.stack([original(row) for row in inputs[1]]))]
    gradients = [
        torch.autograd.grad((outputs[0] * w).sum(), [inputs[0], block.skip, block.dynamics.log_dt]),
        torch.autograd.grad((outputs[1] * w).sum(), [inputs[1], original.D, original.log_step]),
    ]
    pairs = {"y": outputs, "dx": [of[0] for of in gradients], "dD": [of[1] for of in gradients]}
    pairs["d log Δ"] = [gradients[0][2], gradients[1][2].unflatten(0, (2, -1)).sum(0)]
    for what, (actual, expected) in pairs.items():
        assert_close(actual, expected, 1e-12, what)
    error = max(relative_error(*pair)[0] for pair in pairs.values())
    record_parity("s5", f"S5SSM of s5-pytorch, {discretization}", version("s5-pytorch"), error)


@pytest.mark.parametrize("R", [2, 4, 16])
def test_starts_at_the_same_eigenvalues(R):
    init = pytest.importorskip("s5.init")
    Lambda, _, _, vectors, _ = init.make_DPLR_HiPPO(R)
    imag, basis = hippo_n(R)
    upper = torch.from_numpy(Lambda)[R // 2 :]
    assert_close(upper.imag, imag, 1e-12)
    assert_close(upper.real, torch.full_like(imag, -0.5), 1e-12)
    theirs = torch.from_numpy(vectors)[:, R // 2 :]
    assert_close((theirs.mH @ basis).abs(), torch.eye(R // 2, dtype=torch.float64), 1e-10)
