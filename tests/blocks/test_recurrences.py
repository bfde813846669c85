"""LRU and S4D: their equations, one step at a time; what sets them, and files of before."""

from __future__ import annotations

import math

import pytest
import torch
from agreement import assert_close
from torch import Tensor, nn

from seqzoo import build_block
from seqzoo.blocks import upgraded
from seqzoo.blocks.lru import LRU
from seqzoo.blocks.over_parts import power
from seqzoo.blocks.s4d import CHUNK, S4D

B, D = 2, 6


def states(x: Tensor, a: Tensor) -> Tensor:
    """h_t = a h_{t-1} + x_t along the second dimension."""
    h, outputs = torch.zeros_like(x[:, 0]), []
    for x_t in x.unbind(1):
        h = a * h + x_t
        outputs.append(h)
    return torch.stack(outputs, 1)


def test_a_power_of_many_steps_is_right_to_rounding():
    a = torch.polar(torch.rand(64).mul(1e-4).neg().exp(), 3 * torch.rand(64))
    for n in (1, 4096, 2**16):
        assert_close(power(a, n), a.to(torch.complex128) ** n, 1e-7)


def lru_equations(block: LRU, x: Tensor) -> Tensor:
    lam = torch.exp(torch.complex(-block.dynamics.nu_log.exp(), block.dynamics.theta_log.exp()))
    u = torch.view_as_complex(block.in_proj(x).unflatten(-1, (-1, 2))) * block.dynamics.gamma_log.exp()
    y = block.out_proj(torch.view_as_real(states(u, lam)).flatten(2))
    if not block.causal:
        y = y + block.out_proj_reverse(torch.view_as_real(states(u.flip(1), lam).flip(1)).flatten(2))
    return block.gate(y + block.skip * x)


def s4d_equations(block: S4D, x: Tensor) -> Tensor:
    A = torch.complex(-block.dynamics.log_neg_real.exp(), block.dynamics.imag)  # [D, P]
    decay = (A * block.dynamics.log_dt.exp()[:, None]).exp()
    C = torch.view_as_complex(block.C) * (decay - 1) / A
    h = states(x[..., None].to(A.dtype), decay)  # [B, T, D, P]
    y = 2 * (C[0] * h).sum(-1).real
    if not block.causal:
        later = states(x.flip(1)[..., None].to(A.dtype), decay).flip(1)[:, 1:]  # from the next step on
        y = y + 2 * torch.cat([(C[1] * later).sum(-1).real, torch.zeros_like(y[:, :1])], 1)
    return block.gate(y + block.skip * x)


@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "equations"), [("lru", lru_equations), ("s4d", s4d_equations)])
def test_follows_its_equations(name, equations, causal, T):
    torch.manual_seed(0)
    block = build_block(name, D, causal=causal).double()
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(B, T, D, dtype=torch.float64)
    named = dict(block.named_parameters())
    value, target = block(x), equations(block, x)
    assert_close(value, target, 1e-12, "y")
    for gradient, expected, label in zip(
        torch.autograd.grad(value, [x, *named.values()], w),
        torch.autograd.grad(target, [x, *named.values()], w),
        ["x", *named],
        strict=True,
    ):
        assert_close(gradient, expected, 1e-11, label)


def earlier_lru(causal: bool) -> dict[str, Tensor]:
    """What was saved when λ and γ were the block's own parameters, and one layer read both directions."""
    radius_squared = 0.9**2 + torch.rand(D) * (0.999**2 - 0.9**2)
    rate = -radius_squared.log() / 2
    theta_log = (2 * math.pi * torch.rand(D)).clamp(min=1e-8).log()
    in_proj = nn.Linear(D, 2 * D, bias=False)
    out_proj = nn.Linear((1 if causal else 2) * 2 * D, D, bias=False)
    skip, gate = torch.randn(D), nn.Linear(D, 2 * D)
    nn.init.normal_(in_proj.weight, std=1 / math.sqrt(2 * D))
    nn.init.normal_(out_proj.weight, std=1 / math.sqrt(D))
    return {
        "nu_log": rate.log(),
        "theta_log": theta_log,
        "gamma_log": torch.expm1(-2 * rate).neg().log() / 2,
        "skip": skip,
        "in_proj.weight": in_proj.weight.detach(),
        "out_proj.weight": out_proj.weight.detach(),
        "gate.2.weight": gate.weight.detach(),
        "gate.2.bias": gate.bias.detach(),
    }


def earlier_s4d(causal: bool) -> dict[str, Tensor]:
    P = 32
    log_dt = math.log(1e-3) + torch.rand(D) * (math.log(1e-1) - math.log(1e-3))
    C = torch.randn(1 if causal else 2, D, P, 2) * math.sqrt(0.5)
    skip, gate = torch.randn(D), nn.Linear(D, 2 * D)
    return {
        "log_dt": log_dt,
        "log_neg_real": torch.full((D, P), math.log(0.5)),
        "imag": math.pi * torch.arange(P).repeat(D, 1),
        "C": C,
        "skip": skip,
        "gate.2.weight": gate.weight.detach(),
        "gate.2.bias": gate.bias.detach(),
    }


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "earlier"), [("lru", earlier_lru), ("s4d", earlier_s4d)])
def test_files_and_seeds_of_before_give_the_same_block(name, earlier, causal):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Identity(), build_block(name, D, causal=causal))
    torch.manual_seed(7)
    file = {f"1.{key}": value for key, value in earlier(causal).items()}
    own = model.state_dict()
    assert upgraded(model, file).keys() == own.keys()
    torch.manual_seed(8)
    other = nn.Sequential(nn.Identity(), build_block(name, D, causal=causal))
    other.load_state_dict(file)
    for key, value in other.state_dict().items():
        assert torch.equal(value, own[key]), key
    if name == "lru":
        both = torch.cat([layer.weight for layer in (other[1].out_proj, other[1].out_proj_reverse) if layer], 1)
        assert torch.equal(both, file["1.out_proj.weight"])
    other.load_state_dict(own)  # of today


def test_s4d_starts_as_published():
    """The poles of one step, exp(A Δ): of every channel d and pair n."""
    n, d, state_dim = torch.arange(4), torch.arange(D)[:, None], 8

    def started(init, **options):
        dynamics = build_block("s4d", D, state_dim=state_dim, init=init, **options).dynamics.double()
        A, step = dynamics(torch.float64)
        return dynamics.log_dt.exp()[:, None], A, step.exp()

    step, A, poles = started("lin")
    assert_close(A, torch.complex(torch.full((D, 4), -0.5).double(), math.pi * n.double().expand(D, 4)), 1e-6)
    step, A, poles = started("ft")
    assert_close(A, torch.complex(torch.full((D, 4), -0.5).double(), 3 * math.pi * n.double().expand(D, 4)), 1e-6)
    assert_close(started("ft", frequency_scale=5.0)[1].imag, 5 / 3 * A.imag, 1e-6)
    step, A, poles = started("dfout")
    offset = 2 * math.pi * d.double() / (state_dim * D)
    assert_close(poles, torch.exp(-step / 2) * torch.exp(1j * (2 * math.pi * n / state_dim + offset)), 1e-6)
    angles = poles.angle().flatten().sort().values  # a grid of the half circle, none twice
    assert_close(angles, math.pi * torch.arange(4 * D).double() / (4 * D), 1e-5)
    with pytest.raises(ValueError, match="S4D: init='legs'; valid: lin, ft, dfout"):
        build_block("s4d", D, init="legs")


def test_low_rank_changes_of_before_load():
    """Of the one layer that read both directions: A has its inputs, B is of both."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj", "out_proj_reverse"])
    block = peft.inject_adapter_in_model(config, build_block("lru", D))
    wide, A, B = torch.randn(D, 4 * D), torch.randn(2, 4 * D), torch.randn(D, 2)
    file = {name: value for name, value in block.state_dict().items() if "out_proj_reverse" not in name}
    parts = {"base_layer": wide, "lora_A.default": A, "lora_B.default": B}
    file |= {f"out_proj.{part}.weight": value for part, value in parts.items()}
    block.load_state_dict(file)
    layers = (block.out_proj, block.out_proj_reverse)
    effective = torch.cat([layer.base_layer.weight + layer.get_delta_weight("default") for layer in layers], 1)
    torch.testing.assert_close(effective, wide + block.out_proj.scaling["default"] * B @ A)
