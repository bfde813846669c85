"""What blocks learn beside the gradient of their outputs, and the functions through which training reaches it."""

from __future__ import annotations

import logging
import sys
import weakref
from functools import cache, partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..kernels.derivatives import transformed

PATIENCE = 256  # passes without an `after_step`, before that is said
# What a module knows of passes and of a loop, which no copy or file of it does.
FRESH = {"_auxiliary": None, "_spent": False, "_passes": 0, "_optimizer": None, "_hook": None}


class Learning(nn.Module):
    """A module that may have a loss of its own, and may gather from passes what it applies once a step is taken."""

    _auxiliary: Unread | None
    _spent: bool  # whether a gradient has come by since the last of the unread losses
    _passes: int  # that wait for `after_step`
    _optimizer: weakref.ref[Optimizer] | None  # with whose steps `after_step` comes
    _hook: RemovableHandle | None  # by which it does

    def __init__(self) -> None:
        super().__init__()
        self.__dict__ |= FRESH

    def after_step(self) -> None:
        """What is done once an optimiser step is taken. Losses that nobody read are dropped."""
        self._auxiliary, self._passes = None, 0

    def recording(self) -> bool:
        """Whether this forward pass is one to learn from: training, with gradients, not a recomputation in backward.

        Raises:
            RuntimeError: in a transform of functions, from which nothing may be kept; or reentrant checkpointing
                recomputes in backward what it ran without gradients before.
        """
        if not (self.training and torch.is_grad_enabled()):
            return False
        if transformed():
            raise RuntimeError(
                f"{type(self).__name__} learns from passes in training, which torch.func and forward mode allow no "
                "block to keep anything of; valid: eval() of this block first, whose codebook then stays as it is"
            )
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return True
        if not _recomputes_recorded():
            raise RuntimeError(
                f"{type(self).__name__} learns from passes with gradients, which reentrant checkpointing takes from "
                "them; valid: checkpoint(..., use_reentrant=False)"
            )
        return False

    def add_loss(self, loss: Tensor, values: Tensor) -> None:
        """Adds to what `auxiliary_loss` will give.

        Args:
            loss: scalar, of a pass that is `recording`.
            values: what outputs and loss are both computed from. Once a gradient has come by, a loss that is still
                unread is dropped at the next pass. (Compiled code cannot tell: there it waits for `after_step`.)
        """
        if not values.requires_grad:
            return
        if not torch.compiler.is_compiling():
            if self._auxiliary is not None and self._spent:
                self._auxiliary = None
                _warn_once(
                    f"{type(self).__name__} has a loss of its own that nobody reads: add seqzoo.auxiliary_loss(model) "
                    "to the training loss before each backward()"
                )
            self._spent = False
            values.register_hook(partial(_spend, weakref.ref(self)))
        self._auxiliary = Unread(loss, self._auxiliary)

    def count_pass(self) -> None:
        """Counts a pass that waits for `after_step`, and says once if it seems that none will come."""
        if torch.compiler.is_compiling():
            return
        self._passes += 1
        if self._passes == PATIENCE:
            _warn_once(
                f"{type(self).__name__} saw {PATIENCE} training passes and no after_step, so that its codebook or "
                "features do not move: call seqzoo.after_step(model) after each optimizer.step(), or once "
                "seqzoo.attach(model, optimizer)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | FRESH


class Unread:
    """A loss, and those before it: a chain, as compiled code can lengthen one without looking at its length."""

    def __init__(self, loss: Tensor, before: Unread | None) -> None:
        self.loss, self.before = loss, before


def auxiliary_loss(module: nn.Module) -> Tensor:
    """The sum of the losses that blocks inside `module` have of their own, over all passes since the last call.

    A scalar, zero if there are none. Reading clears them, so that no loss is counted twice. `after_step` drops those
    that nobody read, and so does the first pass after a backward.
    """
    total = torch.zeros(())
    for block in module.modules():
        if isinstance(block, Learning):
            unread, block._auxiliary = block._auxiliary, None
            while unread is not None:
                total = unread.loss + total  # the first is on the CPU; as a scalar it is not copied
                unread = unread.before
    return total


def after_step(module: nn.Module) -> None:
    """Lets every block inside `module` apply what it gathered since the last optimiser step (codebooks, features).

    A block none of whose parameters is trained stays as it is. Call it after each `optimizer.step()`; under
    torch.distributed on every rank. A block that is attached to an optimiser takes no notice: see `attach`.
    """
    for block in module.modules():
        if isinstance(block, Learning) and _attached_to(block) is None:
            _step(block)


def attach(module: nn.Module, optimizer: Optimizer) -> None:
    """From now on `after_step` comes to the blocks inside `module` by itself, with each step that `optimizer` takes.

    For loops that are somebody else's. A step that a GradScaler skips is none, and `after_step` may be called too
    without counting twice. Attached again, blocks follow the latest optimiser; copies are not attached.

    Args:
        module: a model, or part of one.
        optimizer: of its parameters; where there are several, the one that steps last. May be wrapped by Lightning or
            Accelerate.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    for block in module.modules():
        if isinstance(block, Learning) and _attached_to(block) is not optimizer:
            if block._hook is not None:
                block._hook.remove()
            block._optimizer = weakref.ref(optimizer)
            block._hook = optimizer.register_step_post_hook(partial(_follow, block))


def _follow(block: Learning, optimizer: Optimizer, *_: Any) -> None:
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimiser is told by the scaler, and skips by itself
    if skipped is None or not skipped.item():
        _step(block)


def _attached_to(block: Learning) -> Optimizer | None:
    return None if block._optimizer is None else block._optimizer()


def _step(block: Learning) -> None:
    if any(parameter.requires_grad for parameter in block.parameters()):
        block.after_step()
    else:
        Learning.after_step(block)


def _spend(block: weakref.ref[Learning], _: Tensor) -> None:
    learner = block()
    if learner is not None and not torch.is_grad_enabled():  # with a graph it is a penalty's, and more is to come
        learner._spent = True


def _recomputes_recorded() -> bool:
    """Whether it is checkpointing without reentrance that runs this in backward: its first pass had gradients."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "recompute_fn":
        frame = frame.f_back
    return frame is not None


@cache
def _warn_once(sentence: str) -> None:
    logging.getLogger(__name__).warning(sentence)
