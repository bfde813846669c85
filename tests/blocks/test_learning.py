"""Losses of blocks' own, and what comes with an optimiser's step: read or not, called or attached, checkpointed."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from seqzoo import after_step, attach, auxiliary_loss, build_block
from seqzoo.blocks import learning


def vq(**options):
    return build_block("vq_attention", 16, codebook_size=8, block_len=8, **options)


def sequences(*shape):
    return torch.randn(*shape, 20, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_losses_of_several_passes_add_up(compiled):
    block = vq()
    call = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    passes = sequences(2, 2)
    expected = 0.0
    for x in passes:
        block(x)
        expected = expected + auxiliary_loss(block)
    (gradient,) = torch.autograd.grad(expected, block.qk_proj.weight)
    for _ in range(2):
        for x in passes:
            call(x)
        total = auxiliary_loss(block)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(torch.autograd.grad(total, block.qk_proj.weight)[0], gradient)
    assert auxiliary_loss(block) == 0


def test_a_step_drops_what_nobody_read():
    block = vq()
    block(sequences(2))
    after_step(block)
    assert auxiliary_loss(block) == 0


def test_losses_that_nobody_reads_hold_no_graph_and_are_said_once(caplog):
    block, x = vq(), sequences(2)
    unread = []
    for _ in range(30):
        y = block(x)
        unread.append(weakref.ref(block._auxiliary))
        y.sum().backward()

    gc.collect()
    assert sum(loss() is not None for loss in unread) == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "loss of its own that nobody reads: add seqzoo.auxiliary_loss(model)" in caplog.text


def test_a_compiled_block_trains_though_nobody_reads_its_loss():
    block, x = vq(), sequences(2)
    call = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        call(x).sum().backward()
    after_step(block)
    assert block._auxiliary is None


@pytest.mark.parametrize("name", ["vq_attention", "performer"])
def test_steps_that_never_come_are_said_once(name, caplog, monkeypatch):
    monkeypatch.setattr(learning, "PATIENCE", 8)
    block, x = build_block(name, 8), torch.randn(1, 3, 8)

    def train(passes):
        for _ in range(passes):
            block(x)
            auxiliary_loss(block)

    train(learning.PATIENCE - 1)
    after_step(block)
    train(learning.PATIENCE - 1)
    block.requires_grad_(False)
    after_step(block)
    train(learning.PATIENCE - 1)
    assert not caplog.records
    train(2 * learning.PATIENCE)
    (record,) = caplog.records
    assert "seqzoo.attach(model, optimizer)" in record.message


def test_nothing_is_said_of_features_that_stay(caplog, monkeypatch):
    monkeypatch.setattr(learning, "PATIENCE", 8)
    block, x = build_block("performer", 8, redraw_every=0), torch.randn(1, 3, 8)
    for _ in range(learning.PATIENCE):
        block(x)
    assert not caplog.records


@pytest.mark.parametrize("options", [{}, {"quantizer": "fsq", "exact_steps": 3}])
def test_reentrant_checkpointing_is_refused(options):
    block, x = vq(**options), sequences(2).requires_grad_()
    y = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        y.sum().backward()


@pytest.mark.parametrize("outer", [True, False])
def test_checkpoints_in_checkpoints(outer):
    """The inner one keeps gradients from the first pass on, or it is refused."""
    block, x = vq(), sequences(2).requires_grad_()
    before = block.quantizer.codebook.clone()
    y = checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=outer)
    loss = y.sum() + auxiliary_loss(block)
    if outer:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()
        return
    loss.backward()
    assert block.quantizer.new_counts.sum() == 2 * 20
    after_step(block)
    assert not torch.equal(block.quantizer.codebook, before)


def test_what_learns_nothing_may_be_checkpointed_reentrantly():
    for block in (vq(quantizer="fsq"), build_block("performer", 16), vq().eval()):
        x = sequences(2).requires_grad_()
        checkpoint(block, x, use_reentrant=True).sum().backward()
        assert x.grad.any()


class Loop:
    """Somebody else's: it knows an optimiser, a scaler perhaps, and nothing of `after_step`."""

    def __init__(self, model, scaler=None, **options):
        self.model, self.scaler = model, scaler
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, **options)

    def step(self, *, overflow=False):
        self.optimizer.zero_grad()
        loss = self.model(sequences(2)).square().mean() + auxiliary_loss(self.model)
        if overflow:
            loss = loss * float("inf")
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def performer():
    return build_block("performer", 16)


def test_attached_blocks_follow_the_optimizer():
    block = performer()
    loop = Loop(torch.nn.Sequential(torch.nn.LayerNorm(16), block))
    attach(loop.model, loop.optimizer)
    attach(block, loop.optimizer)
    for taken in (1, 2):
        loop.step()
        after_step(loop.model)
        assert block.steps == taken
    reference, other = vq(), vq()
    other.load_state_dict(reference.state_dict())
    with_hook, by_hand = Loop(reference), Loop(other)
    attach(reference, with_hook.optimizer)
    for _ in range(3):
        with_hook.step()
        by_hand.step()
        after_step(other)
    for (name, a), b in zip(reference.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(fused):
    block = performer()
    loop = Loop(block, torch.amp.GradScaler("cpu", init_scale=4.0), fused=fused)
    attach(block, loop.optimizer)
    for overflow, taken in ((False, 1), (True, 1), (False, 2)):
        loop.step(overflow=overflow)
        after_step(block)
        assert block.steps == taken


def test_the_latest_optimizer_is_followed_and_copies_are_free():
    block = performer()
    first, second = Loop(block), Loop(block)
    attach(block, first.optimizer)
    attach(block, second.optimizer)
    first.step()
    assert block.steps == 0
    second.step()
    assert block.steps == 1
    for free in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        second.step()
        assert free.steps == 1
        after_step(free)
        assert free.steps == 2
    taken = block.steps
    del first, second
    gc.collect()
    after_step(block)
    assert block.steps == taken + 1, "its optimiser is gone"


def test_attached_blocks_that_are_not_trained_stay():
    block = performer().requires_grad_(False)
    loop = Loop(torch.nn.Sequential(torch.nn.Linear(16, 16), block))
    attach(loop.model, loop.optimizer)
    loop.step()
    assert block.steps == 0


def test_wrapped_optimizers():
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    block = performer()
    loop = Loop(block)
    loop.model, loop.optimizer = fabric.setup(block, loop.optimizer)
    attach(block, loop.optimizer)
    loop.step()
    assert block.steps == 1


def test_attached_back_and_forth_counts_once():
    block = build_block("performer", 8)
    first, second = (torch.optim.SGD(block.parameters(), 0.1) for _ in range(2))
    for optimizer in (first, second, first):
        attach(block, optimizer)
    block(torch.randn(1, 4, 8)).sum().backward()
    first.step()
    assert block.steps == 1
    second.step()
    assert block.steps == 1


def test_a_gradient_penalty_keeps_the_loss_that_is_due():
    torch.manual_seed(0)
    block, x = build_block("vq_attention", 8, codebook_size=4, block_len=4), torch.randn(2, 8, 8, requires_grad=True)
    y = block(x)
    once = block._auxiliary.loss.item()
    torch.autograd.grad(y.square().sum(), x, create_graph=True)
    block(x)
    assert auxiliary_loss(block).item() == pytest.approx(2 * once)
