"""What stays in single precision when a model is cast: exactly, on any way there is to cast it."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch import nn
from torchrun import torchrun

from seqzoo import build_block
from seqzoo.blocks import Wide

HALF = (torch.bfloat16, torch.float16)


class Decay(Wide):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.rand(5))
        self.register_buffer("mean", torch.rand(5))
        self.register_buffer("count", torch.arange(5))


def model():
    return nn.Sequential(nn.Linear(5, 5), Decay())


@pytest.mark.parametrize("dtype", HALF)
def test_casts_to_half_leave_it_as_it_is(dtype):
    net = model()
    before = {name: value.clone() for name, value in net[1].state_dict().items()}
    net[1].rate.grad = torch.rand(5)
    gradient = net[1].rate.grad.clone()
    rate = net[1].rate
    for cast in (lambda: net.to(dtype), net.half, net.bfloat16, lambda: net.type(dtype), lambda: net.to("cpu", dtype)):
        cast()
        assert net[0].weight.dtype in HALF
        assert all(torch.equal(value, before[name]) for name, value in net[1].state_dict().items())
        assert all(value.dtype == before[name].dtype for name, value in net[1].state_dict().items())
        assert torch.equal(net[1].rate.grad, gradient)
        assert net[1].rate is rate, "an optimiser has it"


def test_other_casts_and_moves_act():
    net = model().double()
    assert net[1].rate.dtype == net[1].mean.dtype == torch.float64
    assert net.half()[1].rate.dtype == torch.float64
    assert net.float()[1].rate.dtype == torch.float32
    assert net[1].count.dtype == torch.int64
    net.to("meta", torch.bfloat16)
    assert (net[1].rate.device.type, net[1].rate.dtype) == ("meta", torch.float32)
    assert net.to_empty(device="cpu")[1].rate.device.type == "cpu"


@pytest.mark.parametrize("swap", [False, True])
def test_whichever_way_modules_convert(swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        net = model()
        rate, value = net[1].rate, net[1].rate.detach().clone()
        net.bfloat16()
        assert net[1].rate is rate
        assert torch.equal(rate, value)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("assign", [False, True])
def test_files_in_half_are_widened(assign):
    net, half = model(), {name: value.to(torch.bfloat16) for name, value in model().state_dict().items()}
    net.load_state_dict(half, assign=assign)
    assert net[1].rate.dtype == net[1].mean.dtype == torch.float32
    assert torch.equal(net[1].rate, half["1.rate"].float())
    assert half["1.rate"].dtype == torch.bfloat16, "the caller's"


DRAWN_FIRST = ("lru", "s4d", "mamba", "rg_lru", "s5")  # in others projections are, of another number of bits


@pytest.mark.parametrize("name", [*DRAWN_FIRST, "vq_attention", "mamba2", "mamba3", "gla", "mlstm"])
def test_a_default_dtype_of_half_leaves_it_wide(name):
    torch.manual_seed(0)
    expected = [part.state_dict() for part in build_block(name, 8).modules() if isinstance(part, Wide)]
    assert expected
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        block = build_block(name, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    for part, values in zip((part for part in block.modules() if isinstance(part, Wide)), expected, strict=True):
        for key, value in part.state_dict().items():
            assert value.dtype == values[key].dtype
            if name in DRAWN_FIRST:
                assert torch.equal(value, values[key])


SCRIPT = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from seqzoo import after_step, auxiliary_loss, build_block
from seqzoo.blocks import Wide

torch.distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for name in ("lru", "s4d", "vq_attention"):
    for policy in (None, MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        torch.manual_seed(0)
        block = build_block(name, 32).eval()
        x = torch.randn(2, 300, 32)
        with torch.no_grad():
            expected = block(x)
        if policy is None:
            block.to(torch.bfloat16)
        for part in block.modules():
            if isinstance(part, Wide):
                fully_shard(part, mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
        optimizer = torch.optim.AdamW(block.parameters(), 1e-3)
        y = block(x.to(torch.bfloat16))
        error = (y.float() - expected).norm() / expected.norm()
        assert error < (0.02 if name != "vq_attention" else 0.1), (name, policy, error)  # some codes are others
        block.train()
        for _ in range(2):
            loss = block(x.to(torch.bfloat16)).float().square().mean() + auxiliary_loss(block)
            loss.backward()
            for key, parameter in block.named_parameters():
                assert parameter.grad.to_local().isfinite().all(), key
                assert not key.startswith("dynamics.") or parameter.grad.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad()
            after_step(block)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_fsdp_shards_it_as_a_group_of_its_own(tmp_path):
    subprocess.run(**torchrun(SCRIPT, tmp_path), check=True, timeout=300)
