"""How well hidden symbols are told from counts alone: what a pretraining has to beat to have learnt anything."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objectives import Causal, Masked
from ..tasks import Split

POSITIONS = 4_000_000  # of train that neighbours are counted on, at most
AT_A_TIME = 64  # sequences


class Counted(NamedTuple):
    """Losses in nats for each symbol that is asked for."""

    symbols: float  # the entropy of single symbols, of all of train
    neighbours: float  # of validation, told by the two nearest symbols that are shown


def counted(objective: Masked | Causal, train: Split, val: Split) -> Counted:
    """What counts on `train` tell of the symbols that `objective` asks for in `val`, both on the CPU.

    The nearest symbols are the one before and the one after, or the two before where the objective is causal. Triples
    that train does not have are told by single symbols, as often as new ones turned up beside that pair (Witten and
    Bell 1991, method C).
    """
    V = train.spec.vocab_size
    of_symbols = train.values.long().remainder(V).bincount(minlength=V).double()
    p = of_symbols / of_symbols.sum()
    pairs, symbols = _asked(objective, train)
    triples, counts = (pairs * V + symbols).unique(return_counts=True)
    found, sizes = (triples // V).unique_consecutive(return_counts=True)
    totals = torch.zeros(len(found), dtype=torch.int64)
    totals.index_add_(0, torch.arange(len(found)).repeat_interleave(sizes), counts)

    pairs, symbols = _asked(objective, val)
    seen, followers = _looked_up(found, totals, pairs), _looked_up(found, sizes, pairs).clamp(min=1)
    times = _looked_up(triples, counts, pairs * V + symbols)
    alone = p.clamp(min=0.5 / of_symbols.sum())  # what train does not have at all counts half
    likelihood = (times + followers * alone[symbols]) / (seen + followers)
    return Counted(torch.special.entr(p).sum().item(), -likelihood.log().mean().item())


def _asked(objective: Masked | Causal, split: Split) -> tuple[Tensor, Tensor]:
    """The pair of nearest symbols, as one number, and the symbol, of everything asked for: int64 [n] each."""
    spec = split.spec
    V, C = spec.vocab_size, spec.channels
    n = min(len(split), max(1, int(POSITIONS / (split.mean_length * spec.num_inputs))))
    pairs, symbols = [], []
    for number, index in enumerate(torch.arange(n).split(AT_A_TIME)):
        batch = split.batch(index)
        inputs = batch.inputs.flatten(0, 1) if spec.num_inputs == 2 else batch.inputs
        lengths = batch.lengths.flatten()
        asked = objective.asked(batch, seed=number)
        values = inputs.reshape(*asked.shape, C).long().remainder(V)
        T = asked.shape[1]
        step = torch.arange(T).expand(asked.shape)
        if isinstance(objective, Causal):  # of the next
            asked = asked[:, :-1]
            first, second, values_asked = step[:, :-1], step[:, :-1] - 1, values[:, 1:]
        else:
            shown = ~asked & (step < lengths[:, None])
            first = torch.where(shown, step, -1).cummax(1).values
            second = torch.where(shown, step, T).flip(1).cummin(1).values.flip(1)
            second, values_asked = torch.where(second == T, -1, second), values
        left, right = (_at(values, place, V)[asked] for place in (first, second))
        pairs.append(((left * (V + 1) + right) * C + torch.arange(C)).flatten())
        symbols.append(values_asked[asked].flatten())
    return torch.cat(pairs), torch.cat(symbols)


def _at(values: Tensor, place: Tensor, V: int) -> Tensor:
    """`values` [B, T, C] at `place` [B, T], V where that is -1."""
    found = values.gather(1, place.clamp(min=0)[..., None].expand(*place.shape, values.shape[-1]))
    return torch.where((place < 0)[..., None], V, found)


def _looked_up(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """The value of each of `wanted` among ascending `keys`; 0 where it is not there."""
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[at] == wanted, values[at], 0)
