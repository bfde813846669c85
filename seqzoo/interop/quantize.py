"""Softmax attention of a stock model made attention over quantised keys, in time linear in their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..blocks.masks import check_padding
from ..blocks.modes import evaluating
from ..blocks.quantizers import SAMPLE, kmeans
from ..kernels import nearest_code, vq_attention
from ..kernels.common import query_heads
from .attention import Layer, layer, softmax_of
from .seen import seen_mask

RECORDING = "seqzoo_recording"
CODEBOOK, BLOCK_LEN = "seqzoo_codebook", "seqzoo_block_len"  # of an attention layer


@dataclass(frozen=True)
class Quantized:
    """What `quantize_keys` did: mean losses of its batches, and for each layer what it made and how far that is off."""

    loss_before: float
    loss_after: float
    errors: dict[str, float]  # |k - code| / |k|, of the keys that the codebooks were made of
    codebooks: dict[str, Tensor]  # [G, S, D], of G heads of keys

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        return (
            f"{len(self.errors)} layers: loss {self.loss_before:.4f} before, {self.loss_after:.4f} after; keys are off "
            f"by up to {self.errors[worst]:.0%} ({worst})"
        )


def quantize_keys(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    codebook_size: int = 256,
    block_len: int = 64,
    seed: int = 0,
) -> Quantized:
    """Gives each attention layer a codebook for its keys, and sets `attn_implementation="seqzoo_vq"`.

    Codebooks are made by k-means from keys of the batches, rotated as the model rotates them. From then on, keys that
    are further back than the block before a query's own stand for all that share their code (Transformer-VQ, Lingle
    2024); all keys are codes, near ones too, so that outputs do not depend on `block_len`. Nothing is trained here:
    going on training, with codebooks as they are, is the next step.

    Args:
        model: with causal attention.
        batches: arguments of the model by name. Without `labels`, its loss is that of the next of `input_ids`.
        codebook_size: codes for each head of keys, S.
        block_len: positions in a block, L.
        seed: of k-means.

    Raises:
        ValueError: there is no batch, fewer keys than codes, or attention that is not causal.
    """
    batches, before = list(batches), model.config._attn_implementation
    if not batches:
        raise ValueError("quantize_keys: no batch; valid: one or more, of text as the model will meet")
    keys: dict[nn.Module, list[Tensor]] = {}
    each = -(-SAMPLE // len(batches))

    def recording(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        x = layer(RECORDING, module, query, key, value, mask, **options)
        if not x.seen.causal:
            raise ValueError(f"quantize_keys: {type(module).__name__} is not causal; valid: models that generate")
        found = x.k.flatten(0, 1) if x.seen.counts is None else x.k[x.seen.counts]  # [n, G, D]
        n = min(each, len(found))
        chosen = torch.arange(n, device=found.device) * len(found) // max(n, 1)
        keys.setdefault(module, []).append(found[chosen].float())
        return softmax_of(x), None

    AttentionInterface.register(RECORDING, recording)
    AttentionMaskInterface.register(RECORDING, seen_mask)
    with evaluating(model):
        try:
            model.set_attn_implementation(RECORDING)
            loss_before = _loss(model, batches)
            names = {module: name for name, module in model.named_modules()}
            codebooks, errors = {}, {}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                for module, parts in keys.items():
                    points = torch.cat(parts).transpose(0, 1)  # [G, n, D]
                    if points.shape[1] < codebook_size:
                        raise ValueError(
                            f"quantize_keys: {points.shape[1]} keys for codebook_size={codebook_size}; valid: more or "
                            "longer batches, or fewer codes"
                        )
                    made = kmeans(points, codebook_size)
                    codes = nearest_code(points.transpose(0, 1)[None], made)[0].transpose(0, 1)  # [G, n]
                    off = points - made.take_along_dim(codes[..., None], 1)
                    codebooks[names[module]] = made
                    errors[names[module]] = float(off.norm() / points.norm())
            set_codebooks(model, codebooks, block_len=block_len)
            return Quantized(loss_before, _loss(model, batches), errors, codebooks)
        except BaseException:
            model.set_attn_implementation(before)
            raise


def set_codebooks(model: PreTrainedModel, codebooks: Mapping[str, Tensor], *, block_len: int = 64) -> None:
    """Gives layers codebooks that `quantize_keys` made, by their names, and sets `attn_implementation="seqzoo_vq"`.

    They are buffers, so that they move and are saved with the model; a model that is loaded is given them anew.

    Raises:
        ValueError: the model has no layer of a name.
    """
    layers = dict(model.named_modules())
    for name, codebook in codebooks.items():
        if name not in layers:
            raise ValueError(
                f"set_codebooks: no layer {name!r} in {type(model).__name__}; valid: names of the model that they were "
                "made of"
            )
        device = next(layers[name].parameters()).device
        layers[name].register_buffer(CODEBOOK, codebook.to(device))
        setattr(layers[name], BLOCK_LEN, block_len)
    model.set_attn_implementation("seqzoo_vq")


def quantized(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """Softmax attention over the codes nearest to keys, with the codebook that `quantize_keys` made."""
    x = layer("seqzoo_vq", module, query, key, value, attention_mask, **options)
    codebook = getattr(module, CODEBOOK, None)
    if codebook is None:
        raise ValueError(
            f"{type(module).__name__} has no codebook; valid: seqzoo.hf.quantize_keys(model, batches), or "
            "set_codebooks with those that it made"
        )
    if x.window() is not None or not x.seen.causal:
        raise ValueError("attn_implementation='seqzoo_vq': valid: causal attention without a sliding window")
    return _over_codes(x, codebook, getattr(module, BLOCK_LEN)), None


def _over_codes(x: Layer, codebook: Tensor, block_len: int) -> Tensor:
    """[B, T, H, Dv]."""
    (B, T, H, D), S, seen = x.q.shape, x.k.shape[1], x.seen
    codebook = codebook.to(x.q.device).repeat_interleave(H // len(codebook), 0)
    fixed: dict[str, Any] = {"block_len": block_len, "causal": True}

    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        k, v = query_heads(k, H), query_heads(v, H)
        return vq_attention(q * x.scale, k, v, codebook.to(k.dtype), **fixed, **options)

    if seen.starts is not None:
        return run(*x.rows, cu_seqlens=seen.starts).reshape(B, T, H, -1)
    if x.state is not None:
        counts = seen.new_steps(T)
        padding = None if counts is None else check_padding(x.name, None, counts, B, T)
        q, k, v = x.q, x.k, x.v
        if padding is not None:
            q, k, v = (padding.moved_behind(each) for each in (q, k, v))
        lengths = None if padding is None else padding.lengths
        y, x.state.state = run(q, k, v, initial_state=x.state.state, output_final_state=True, lengths=lengths)
        return y if padding is None else padding.moved_back(y)
    here = seen.places(T, x.q.device)
    q = x.q if T == S else x.q.new_zeros(B, S, H, D).index_copy(1, here, x.q)
    padding, k, v, lengths = seen.padding(x.name), x.k, x.v, None
    if padding is not None:
        q, k, v = (padding.moved_behind(each) for each in (q, k, v))
        lengths = padding.lengths
    y = run(q, k, v, lengths=lengths)
    y = y if padding is None else padding.moved_back(y)
    return y if T == S else y[:, here]


@torch.no_grad()
def _loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float:
    losses = []
    for batch in batches:
        given = dict(batch)
        if "labels" not in given:
            mask = given.get("attention_mask")
            ids = given["input_ids"]
            given["labels"] = ids if mask is None else ids.masked_fill(mask == 0, -100)
        losses.append(model(**given).loss.item())
    return sum(losses) / len(losses)
