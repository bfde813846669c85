"""The Performer block: its features, when they are redrawn, and agreement with performer-pytorch."""

from __future__ import annotations

import subprocess
from functools import partial
from itertools import pairwise

import pytest
import torch
from agreement import assert_close
from torchrun import torchrun

import seqzoo
from seqzoo.blocks.performer import Performer, orthogonal_gaussian


def test_default_number_of_features():
    assert Performer(64, num_heads=4).projection.shape == (4, 44, 16)  # 16 ln 16 = 44.4
    assert Performer(4, num_heads=4).projection.shape == (4, 1, 1)
    assert Performer(32, num_heads=2, num_features=5).projection.shape == (2, 5, 16)


def test_on_the_meta_device_no_number_is_drawn():
    before = torch.get_rng_state()
    with torch.device("meta"):
        block = Performer(8192, num_heads=4)
    assert (block.projection.device.type, block.projection.shape) == ("meta", (4, 15615, 2048))
    assert torch.equal(torch.get_rng_state(), before)


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_rows():
    torch.manual_seed(0)
    H, M, D = 300, 20, 8
    W = orthogonal_gaussian(H, M, D)
    assert (W.shape, W.dtype) == ((H, M, D), torch.float32)
    length = W.norm(dim=-1)
    for block in (slice(0, 8), slice(8, 16), slice(16, 20)):
        directions = W[:, block] / length[:, block, None]
        assert_close(directions @ directions.mT, torch.eye(directions.shape[1]).expand(H, -1, -1), 1e-6)
    assert length.square().mean().item() == pytest.approx(D, rel=0.03)  # chi-squared with D degrees of freedom
    assert length.square().var().item() == pytest.approx(2 * D, rel=0.15)


def test_features_lean_to_no_side():
    """Each row alone is a draw from N(0, I), which QR without its signs is far from."""
    torch.manual_seed(0)
    H, M, D = 20_000, 5, 3
    W = orthogonal_gaussian(H, M, D).double()
    assert W.mean(0).abs().max() < 5 / H**0.5
    covariance = torch.einsum("hmd,hme->mde", W, W) / H
    assert (covariance - torch.eye(D)).abs().max() < 8 / H**0.5


def test_orthogonal_features_estimate_the_exponential():
    torch.manual_seed(0)
    W = orthogonal_gaussian(50_000, 4, 4).double()
    q, k = torch.tensor([0.5, -0.3, 0.2, 0.4]).double(), torch.tensor([-0.1, 0.6, 0.3, 0.2]).double()
    estimates = (W @ (q + k) - (q @ q + k @ k) / 2).exp().mean(1)  # one per draw of 4 features
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - (q @ k).exp()) < 4 * error
    assert error < 0.01


def test_is_softmax_attention_with_many_features():
    torch.manual_seed(0)
    block = Performer(8, num_heads=2, num_features=2**14).double()
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    q, k, v = block.qkv_proj(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(block(x), block.out_proj(y.transpose(1, 2).flatten(2)), 0.1)


def test_redraws_every_so_many_steps():
    torch.manual_seed(0)
    block = Performer(8, num_heads=2, redraw_every=3)
    draws = [block.projection.clone()]
    for _ in range(7):
        seqzoo.after_step(block)
        draws.append(block.projection.clone())
    assert [torch.equal(a, b) for a, b in pairwise(draws)] == [True, True, False] * 2 + [True]
    assert block.steps == 7


def test_zero_never_redraws():
    block = Performer(8, redraw_every=0)
    before = block.projection.clone()
    for _ in range(20):
        block.after_step()
    assert torch.equal(block.projection, before)


def test_passes_through_the_block_never_redraw():
    block = Performer(8, redraw_every=1)
    before = block.projection.clone()
    for train in (True, False):
        block.train(train)(torch.randn(2, 5, 8)).sum().backward()
    assert torch.equal(block.projection, before)
    assert block.steps == 0


def test_draws_follow_the_seed_and_resume_from_a_checkpoint():
    def after(block, seed, steps):
        torch.manual_seed(seed)
        for _ in range(steps):
            block.after_step()
        return block.projection.clone()

    torch.manual_seed(0)
    first, second = Performer(8, redraw_every=4), Performer(8, redraw_every=4)
    assert not torch.equal(first.projection, second.projection)
    assert torch.equal(after(first, 1, 4), after(second, 1, 4))
    assert not torch.equal(after(first, 2, 4), after(second, 1, 4))
    first.after_step()
    second.load_state_dict(first.state_dict())
    assert second.steps == 9
    assert torch.equal(after(second, 3, 2), first.projection)  # not yet at 11
    assert torch.equal(after(second, 3, 1), after(first, 3, 3))  # both at 12


SCRIPT = """
import sys
import torch
from seqzoo.blocks.performer import Performer
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(rank)
block = Performer(8, redraw_every=2)
for _ in range(2):
    block.after_step()
torch.save((block.projection, torch.rand(1)), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_draw_the_same(tmp_path):
    subprocess.run(**torchrun(SCRIPT, tmp_path, str(tmp_path)), check=True, timeout=300)
    (first, a), (second, b) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(a, b)  # while their generators stay their own


def test_errors():
    with pytest.raises(ValueError, match="num_features=0; valid: 1 or more"):
        Performer(8, num_features=0)
    with pytest.raises(ValueError, match="redraw_every=-1; valid: a number of steps, or 0"):
        Performer(8, redraw_every=-1)
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=8"):
        Performer(8, num_heads=3)


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_performer_pytorch(causal, monkeypatch):
    """Outputs and gradients to rounding, once its epsilons are 0 (of 1e-4 on features, 1e-6 on causal sums)."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch", reason="needs performer-pytorch")
    torch.manual_seed(0)
    d_model, H, T = 32, 2, 150
    ours = Performer(d_model, causal=causal, num_heads=H, bias=True).double()
    theirs = peer.SelfAttention(d_model, causal=causal, heads=H, dim_head=d_model // H, qkv_bias=True).double()
    attention = theirs.fast_attention
    assert attention.nb_features == ours.num_features
    with torch.no_grad():
        ours.projection.copy_(attention.projection_matrix)
        for part in ("weight", "bias"):
            qkv = [getattr(linear, part) for linear in (theirs.to_q, theirs.to_k, theirs.to_v)]
            getattr(ours.qkv_proj, part).copy_(torch.cat(qkv))
            getattr(ours.out_proj, part).copy_(getattr(theirs.to_out, part))
    x = torch.randn(2, T, d_model, dtype=torch.float64)
    w = torch.randn_like(x)
    with_epsilon = theirs(x)
    monkeypatch.setattr(peer, "softmax_kernel", partial(peer.softmax_kernel, eps=0.0))
    if causal:
        attention.causal_linear_fn = partial(peer.causal_linear_attention_noncuda, eps=0.0)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x_ours), theirs(x_theirs)
    assert_close(y, expected, 1e-12)
    assert (with_epsilon - expected).norm() / expected.norm() > 1e-4  # what an epsilon does
    (y * w).sum().backward()
    (expected * w).sum().backward()
    assert_close(x_ours.grad, x_theirs.grad, 1e-11)
    for part in ("weight", "bias"):
        gradient = torch.cat([getattr(linear, part).grad for linear in (theirs.to_q, theirs.to_k, theirs.to_v)])
        assert_close(getattr(ours.qkv_proj, part).grad, gradient, 1e-11, part, worst_row=1000)
        assert_close(getattr(ours.out_proj, part).grad, getattr(theirs.to_out, part).grad, 1e-11, part)
