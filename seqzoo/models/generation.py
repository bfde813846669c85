"""Sequences that a causal model goes on with, symbol by symbol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Extend = Callable[..., tuple[Tensor, Any]]


class Sampling(NamedTuple):
    """How the next symbol is taken from scores. See `SequenceModel.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    never: tuple[int, ...] = ()

    def check(self, symbols: int) -> Sampling:
        """Raises ValueError for what is out of its range, of scores of `symbols` different ones."""
        number = isinstance(self.temperature, int | float) and 0 <= self.temperature < float("inf")
        if isinstance(self.temperature, bool) or not number:
            raise ValueError(f"temperature={self.temperature!r}; valid: 0, for the likeliest symbol, or more")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise ValueError(f"top_k={self.top_k!r}; valid: 1 or more, or None")
        if self.top_p is not None and not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}; valid: above 0, up to 1, or None")
        if not {*self.never} < {*range(symbols)}:
            raise ValueError(f"never={list(self.never)}; valid: some ids of 0 to {symbols - 1}, not all")
        return self

    def draw(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """A symbol for each row of scores [B, V], from a number in [0, 1) for each, [B]: int64 [B].

        In double precision, so that what else is in a batch does not turn a draw.
        """
        if self.never:
            scores = scores.index_fill(-1, torch.tensor(self.never, device=scores.device), -torch.inf)
        if self.temperature == 0:
            return scores.argmax(-1)
        ranked, order = (scores.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ranked, order = ranked[:, : self.top_k], order[:, : self.top_k]
        share = ranked.softmax(-1)
        if self.top_p is not None:
            ahead = share.cumsum(-1) - share
            share = share.where(ahead < self.top_p, 0)
        reached = share.cumsum(-1)
        number = (reached <= uniform[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
        return order.gather(-1, number.clamp(max=order.shape[-1] - 1))[:, 0]


def generated(
    extend: Extend,
    state: Any,
    prompts: Sequence[Tensor],
    max_new: int,
    sampling: Sampling,
    stop: frozenset[int],
    seeds: Sequence[int],
) -> Iterator[list[int | None]]:
    """Symbol after symbol that follow B prompts: at each step one for each of them, None where a stop has been.

    Args:
        extend: of a model; with `last=True`, scores of each sequence's last step alone, [B, 1, V].
        state: of B sequences of which nothing has been seen.
        prompts: int64 [T] each, of 1 or more.
        max_new: how many steps at most.
        sampling, stop: see `SequenceModel.generate`.
        seeds: one for each prompt.
    """
    device = prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    inputs = pad_sequence(list(prompts), batch_first=True)
    uniform = [np.random.default_rng(seed) for seed in seeds]
    going = list(range(len(prompts)))  # what is not stopped, of which there are states
    scores, state = extend(inputs, state, lengths=lengths, last=True)
    for step in range(1, max_new + 1):
        numbers = torch.tensor([uniform[row].random() for row in going], dtype=torch.float64, device=device)
        drawn = sampling.draw(scores[:, 0], numbers)
        symbols = dict(zip(going, drawn.tolist(), strict=True))
        yield [symbols.get(row) for row in range(len(prompts))]
        left = [n for n, row in enumerate(going) if symbols[row] not in stop]
        if not left or step == max_new:
            return
        if len(left) < len(going):
            going = [going[n] for n in left]
            drawn, state = drawn[left], state.select(left)
        scores, state = extend(drawn[:, None], state)


def as_prompts(prompts: Any, lengths: Tensor | None, device: torch.device, most: int) -> list[Tensor]:
    """Prompts as int64 [T] each: of a tensor [B, T], with `lengths`, or of as many sequences of ids.

    Raises:
        ValueError: they are something else, one is empty, or an id is not below `most`.
    """
    if isinstance(prompts, Tensor) and prompts.dim() == 2:
        ends = [prompts.shape[1]] * len(prompts) if lengths is None else torch.as_tensor(lengths).tolist()
        if len(ends) != len(prompts) or not all(0 <= end <= prompts.shape[1] for end in ends):
            raise ValueError(
                f"generate: lengths={ends}; valid: one for each of {len(prompts)} prompts, up to {prompts.shape[1]}"
            )
        prompts = [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]
    elif lengths is not None or isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(
            "generate: prompts are int64 [B, T], with lengths [B] if they differ, or a list of sequences of ids, "
            f"got {type(prompts).__name__}{'' if lengths is None else ' and lengths'}"
        )
    if not len(prompts):
        raise ValueError("generate: no prompts; valid: 1 or more")
    found = []
    for number, prompt in enumerate(prompts):
        ids = torch.as_tensor(prompt, device=device)
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(
                f"generate: prompt {number} is {ids.dtype} {list(ids.shape)}; valid: 1 id or more, integers [T]"
            )
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= most:
            raise ValueError(f"generate: prompt {number} has an id {low if low < 0 else high}; valid: 0 to {most - 1}")
        found.append(ids.long())
    return found


def as_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """A seed for each row: those given, or `seed`, `seed` + 1 and so on; from PyTorch's own generator where None.

    Raises:
        ValueError: there are others than one for each.
    """
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    seeds = list(range(seed, seed + rows)) if isinstance(seed, int) else list(seed)
    if len(seeds) != rows or not all(isinstance(each, int) and each >= 0 for each in seeds):
        raise ValueError(f"generate: seed={seed!r}; valid: an integer of 0 or more, or one for each of {rows} prompts")
    return seeds
