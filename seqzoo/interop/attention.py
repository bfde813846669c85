"""Attention functions for transformers: what a stock model's layer gives, in seqzoo's operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..blocks.linear_attention import elu_plus_one
from ..blocks.masks import Padding, check_padding
from ..blocks.performer import default_features, orthogonal_gaussian
from ..kernels import FavorState, attention, favor_attention, linear_attention
from ..kernels.common import accumulation_dtype, query_heads
from .seen import Seen, check_packed
from .state_cache import StateLayer, layer_of

REFUSED = {  # what some models give to their attention, and no operation here has
    "softcap": "a cap on scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias by position",
    "indices": "chosen keys",
    "block_indices": "chosen keys",
    "cache": "a paged cache",
    "output_attentions": "weights to return",
}
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")


class Layer(NamedTuple):
    """What a layer of transformers gives to its attention, checked, [B, T, H, D] and [B, S, G, D]."""

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    seen: Seen
    scale: float
    state: StateLayer | None  # which remembers what came before, in place of the keys

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v with all sequences in one row, as documents lie."""
        q, k, v = (x.flatten(0, 1)[None] for x in (self.q, self.k, self.v))
        return q, k, v

    def window(self) -> tuple[int, int] | None:
        """How far queries see, where that hides anything."""
        reach, S = self.seen.reach, self.k.shape[1]
        return None if reach is None or min(reach[0], S if self.seen.causal else reach[1]) >= S - 1 else reach


def layer(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> Layer:
    """Checks what transformers gives to an attention function; queries and keys are rotated already.

    Raises:
        ValueError: something is asked for that would otherwise be left out in silence.
    """
    what = f"attn_implementation={name!r} in {type(module).__name__}"
    if dropout:
        raise ValueError(
            f"{what}: dropout={dropout} of attention weights, which no operation of seqzoo has; valid: 0, which the "
            "configuration calls attention_dropout or attention_probs_dropout_prob"
        )
    for option, meaning in REFUSED.items():
        if others.get(option) is not None and others[option] is not False:
            raise ValueError(
                f"{what}: {meaning} ({option}), which no operation of seqzoo has; valid: attn_implementation='eager'"
            )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    T, S = q.shape[1], k.shape[1]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and T not in (1, S):
            raise ValueError(f"{what}: {T} causal queries of {S} keys, and no mask that says where they stand")
        reach = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
        attention_mask = Seen(bool(causal), reach, position=S - T if causal else 0)
    if not isinstance(attention_mask, Seen):
        given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f"{what}: a mask of one's own, {given}; valid: attention_mask [batch, time], 1 where a step counts and 0 "
            "where it is padding, or attn_implementation='sdpa'"
        )
    if attention_mask.starts is None and any(others.get(option) is not None for option in DOCUMENTS):
        raise ValueError(
            f"{what}: {DOCUMENTS[0]} without positions that begin anew; valid: position_ids that do, and no "
            "attention_mask"
        )
    check_packed(what, others.get("position_ids"), attention_mask, T)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return Layer(name, module, q, k, v, attention_mask, scale, layer_of(key))


def softmax(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Softmax attention: what "sdpa" and "eager" compute. Padding gives zeros where it is queried, in causal layers."""
    x = layer("seqzoo_softmax", module, query, key, value, attention_mask, **options)
    if x.state is not None:
        raise ValueError(
            "attn_implementation='seqzoo_softmax' needs all keys, which a StateCache does not keep; valid: the stock "
            "cache, or seqzoo_linear or seqzoo_favor"
        )
    return softmax_of(x), None


def softmax_of(x: Layer) -> Tensor:
    """[B, T, H, Dv]."""
    q, k, v, seen = x.q, x.k, x.v, x.seen
    (B, T), S, window = q.shape[:2], k.shape[1], x.window()
    options: dict[str, Any] = {"causal": seen.causal, "scale": x.scale, "window": window}
    if seen.starts is not None:
        return attention(*x.rows, cu_seqlens=seen.starts, **options).reshape(*q.shape[:3], -1)
    padding = seen.padding(x.name)
    lengths = None
    if padding is not None:
        k, v, lengths = padding.moved_behind(k), padding.moved_behind(v), padding.lengths
    if not seen.causal and window is None:  # perhaps of another sequence: all queries count
        asked = torch.full((B,), T, device=q.device)
        return attention(q, k, v, lengths=lengths, query_lengths=asked, **options)
    front = None if padding is None else padding.front
    if T == S and isinstance(seen.position, int) and seen.position == 0:
        queries = padding
        place = None
    else:
        place = torch.as_tensor(seen.position, device=q.device).expand(B)
        place = place if front is None else place - front
        queries = None if front is None else Padding(place, (-place).clamp(min=0))
        place = place.clamp(min=0)
    q = q if queries is None else queries.moved_behind(q)
    y = attention(q, k, v, lengths=lengths, position=place, **options)
    return y if queries is None else queries.moved_back(y)


class Memory(Protocol):
    """Attention whose keys and values can be summed up, with its feature maps."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, state: Any, **options: Any) -> Any:
        """Attention as `linear_attention` has it."""

    def of(self, k: Tensor, v: Tensor, counts: Tensor | None) -> Any:
        """The state after those keys that `counts` [B, S] says."""

    def read(self, q: Tensor, state: Any) -> Tensor:
        """What queries [B, T, H, D] get from a state."""


class Linear(NamedTuple):
    """elu + 1 of queries and keys (Katharopoulos et al. 2020); no scale, as in the block `linear_attention`."""

    H: int

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None, **options: Any) -> Any:
        q, k = elu_plus_one(q), elu_plus_one(k)
        return linear_attention(q, k, v, normalize=True, initial_state=state, **options)

    def of(self, k: Tensor, v: Tensor, counts: Tensor | None) -> Tensor:
        k = elu_plus_one(query_heads(k, self.H).to(accumulation_dtype(k.dtype)))
        if counts is not None:
            k = torch.where(counts[:, :, None, None], k, 0)
        return torch.einsum("bshd,bshe->bhde", k, _with_ones(query_heads(v, self.H).to(k.dtype), counts))

    def read(self, q: Tensor, state: Tensor) -> Tensor:
        return _divided(torch.einsum("bthd,bhde->bthe", elu_plus_one(q.to(state.dtype)), state)).to(q.dtype)


class Favor(NamedTuple):
    """Positive random features (Choromanski et al. 2021), as in the block `performer`."""

    H: int
    projection: Tensor  # [H, M, D]
    scale: float

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, state: FavorState | None, **options: Any) -> Any:
        q, k = q * self.scale, k * self.scale
        return favor_attention(q, k, v, self.projection, initial_state=state, **options)

    def of(self, k: Tensor, v: Tensor, counts: Tensor | None) -> FavorState:
        k = query_heads(k, self.H).to(accumulation_dtype(k.dtype)) * self.scale
        features = torch.einsum("bshd,hmd->bshm", k, self.projection.to(k.dtype))
        features = features - k.square().sum(-1, keepdim=True) / 2
        if counts is not None:
            features = features.masked_fill(~counts[:, :, None, None], -torch.inf)
        highest = features.detach().amax(1)  # [B, H, M]
        weights = (features - highest.masked_fill(highest == -torch.inf, 0)[:, None]).exp()
        values = _with_ones(query_heads(v, self.H).to(k.dtype), counts)
        return FavorState(torch.einsum("bshm,bshe->bhme", weights, values), highest)

    def read(self, q: Tensor, state: FavorState) -> Tensor:
        wide = state.sums.dtype
        features = torch.einsum("bthd,hmd->bthm", q.to(wide) * self.scale, self.projection.to(wide))
        features = features + state.log_scale[:, None]
        highest = features.detach().amax(-1, keepdim=True)
        weights = (features - highest.masked_fill(highest == -torch.inf, 0)).exp()
        return _divided(torch.einsum("bthm,bhme->bthe", weights, state.sums)).to(q.dtype)


def _with_ones(v: Tensor, counts: Tensor | None) -> Tensor:
    """Values that count, and a column that sums up weights."""
    v = v if counts is None else torch.where(counts[:, :, None, None], v, 0)
    return nn.functional.pad(v, (0, 1), value=1.0)


def _divided(y: Tensor) -> Tensor:
    """By the sum of weights in the last column; zeros where there are no keys."""
    total = y[..., -1:]
    return y[..., :-1] / torch.where(total == 0, 1, total)


def linear(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Linear attention with elu + 1, of queries and keys that the model has rotated: weights stay positive."""
    x = layer("seqzoo_linear", module, query, key, value, attention_mask, **options)
    return through(x, Linear(x.q.shape[2])), None


def favor(num_features: int | None, seed: int) -> Callable[..., Any]:
    """The Performer's attention, with features that `seed` and the number of the layer draw.

    Args:
        num_features: for each head; None: D ln D, as in the block `performer`.
    """

    def favor(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        x = layer("seqzoo_favor", module, query, key, value, attention_mask, **options)
        H, D = x.q.shape[2:]
        drawn = features(seed, getattr(module, "layer_idx", None) or 0, H, num_features or default_features(D), D)
        if x.scale <= 0:
            raise ValueError(f"attn_implementation='seqzoo_favor': a scale of {x.scale}; valid: above 0")
        return through(x, Favor(H, drawn.to(x.q.device), x.scale**0.5)), None

    return favor


@torch.library.custom_op("seqzoo::features", mutates_args=())
def features(seed: int, layer: int, H: int, M: int, D: int) -> Tensor:
    """`orthogonal_gaussian`, the same in every process; the state of torch's generator stays as it is."""
    return _drawn(seed, layer, H, M, D).clone()


@features.register_fake
def _(seed: int, layer: int, H: int, M: int, D: int) -> Tensor:
    return torch.empty(H, M, D, dtype=torch.float32, device="cpu")


@cache
def _drawn(seed: int, layer: int, H: int, M: int, D: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + layer)
        return orthogonal_gaussian(H, M, D)


def through(x: Layer, memory: Memory) -> Tensor:
    """Attention in sums: [B, T, H, Dv].

    Raises:
        ValueError: a window hides keys, which a sum cannot take back.
    """
    q, k, v, seen = x.q, x.k, x.v, x.seen
    (B, T), S = q.shape[:2], k.shape[1]
    if seen.reach is not None and (x.state is not None or x.window() is not None):
        raise ValueError(
            f"attn_implementation={x.name!r}: a sliding window of {seen.reach[0] + seen.causal} over {S} keys, which "
            "sums over keys cannot forget; valid: sliding_window=None in the configuration, or seqzoo_softmax"
        )
    if seen.starts is not None:
        y = memory.run(*x.rows, state=None, causal=seen.causal, cu_seqlens=seen.starts)
        return y.reshape(B, T, *y.shape[2:])
    if not seen.causal:
        if x.state is not None:
            raise ValueError(f"attn_implementation={x.name!r}: a StateCache in a layer that is not causal; valid: None")
        if seen.counts is None and T == S:
            return memory.run(q, k, v, state=None, causal=False)
        return memory.read(q, memory.of(k, v, seen.counts))  # queries may be of another sequence: all count
    state = None
    if x.state is not None:
        state = x.state.state
    elif not (isinstance(seen.position, int) and seen.position == 0):
        before = (torch.arange(S, device=k.device) < seen.position).expand(B, S)
        state = memory.of(k, v, before if seen.counts is None else before & seen.counts)
    if x.state is None and T < S:
        here = seen.places(T, k.device)
        k, v = k[:, here], v[:, here]
    counts = seen.new_steps(T)
    padding = None if counts is None else check_padding(x.name, None, counts, B, T)
    lengths = None
    if padding is not None:
        (q, k, v), lengths = (padding.moved_behind(each) for each in (q, k, v)), padding.lengths
    keep = x.state is not None
    y = memory.run(q, k, v, state=state, causal=True, lengths=lengths, output_final_state=keep)
    if x.state is not None:
        y, x.state.state = y
    return y if padding is None else padding.moved_back(y)
