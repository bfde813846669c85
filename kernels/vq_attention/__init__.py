"""Softmax attention over vector-quantised keys, linear in time."""

from __future__ import annotations

from typing import Any, Literal, Required, Unpack, overload

from torch import Tensor

from ..backends import Backend, Sequences, choose, fit
from ..common import check_lengths
from ..documents import check_documents
from ..nodes import or_as_one
from .chunked import vq_attention_chunked
from .codes import CHANNELS, nearest_code
from .node import vq_attention_node
from .reference import vq_attention_reference
from .state import VQState

__all__ = ["VQState", "nearest_code", "vq_attention"]


def _fused(*arguments: Any, **options: Any) -> Any:
    from .fused import vq_attention_fused  # imports Triton

    return vq_attention_fused(*arguments, **options)


FORMS = {
    "chunked": or_as_one(vq_attention_chunked, vq_attention_node),
    "reference": vq_attention_reference,
    "fused": _fused,
}


class Options(Sequences, total=False):
    block_len: Required[int]
    codes: Tensor | None
    bias: Tensor | None
    causal: bool
    initial_state: VQState | None


@overload
def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def vq_attention(
    q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, *, output_final_state: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, VQState]: ...
@overload
def vq_attention(
    q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, *, output_final_state: bool, **options: Unpack[Options]
) -> Any: ...
def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    block_len: int,
    codes: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    initial_state: VQState | None = None,
    output_final_state: bool = False,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Any:
    """softmax(q k̂ᵀ + bias) v, where k̂ is the code nearest to each key.

    Keys that share a code share their score, so that all keys further back than the previous block (causal), or than
    either neighbouring block (bidirectional), are summed up by code: the mean of their values and the logarithm of
    their number. Keys in the window of these blocks stand one by one. The result is that of quadratic attention over
    k̂, whatever the block length; time and memory are linear in T.

    Gradients: exact for q and v, through the sums too. The codebook gets none. A key gets the straight-through
    gradient (that of k̂) from the queries whose window holds it and none from the others, so dk depends on `block_len`.

    Args:
        q, k: [B, T, H, D]. There is no hidden scale: multiply q by the one you want.
        v: [B, T, H, Dv].
        codebook: [H, S, D].
        block_len: positions in a block, L.
        codes: int64 [B, T, H] from `nearest_code`, where the caller has them already.
        bias: added to the score of the key at offset j - i from its query, no further away than R ≤ block_len: [H, n]
            or, one per query, [B, T, H, n], over offsets -R..0, n = R + 1, if causal, else over -R..R, n = 2R + 1.
            Keys further away get none.
        causal: hide the keys after each query.
        initial_state: where an earlier call stopped (causal only).
        output_final_state: return the state after `lengths` (or T) positions too (causal only).
        lengths: int64 [B].
        cu_seqlens: int32 or int64 [N + 1], in place of `lengths`, with B = 1: where each of N documents begins that lie
            one behind the other in the T positions, and T. Blocks are counted from the beginning of each, none hears of
            another, and states have N rows.
        backend: "auto", "fused", "chunked" or "reference".

    Returns:
        [B, T, H, Dv] in v's dtype, and the `VQState` if asked for.

    Raises:
        ValueError: shapes that do not fit together, a bias that reaches past `block_len`, a state asked of
            bidirectional attention, cu_seqlens that do not rise from 0 to T, or an unknown backend.

    Source: Lingle, "Transformer-VQ" (ICLR 2024), section 3; the bidirectional form: Su, post 9844 (2023).
    """
    B, T, H, D = q.shape
    if k.shape != q.shape or v.shape[:3] != (B, T, H) or T < 1:
        given = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"vq_attention: q and k must be [B, T, H, D] and v [B, T, H, Dv] with T >= 1, got {given}")
    if codebook.dim() != 3 or codebook.shape[0] != H or codebook.shape[2] != D:
        raise ValueError(f"vq_attention: codebook must be [{H}, S, {D}], got {list(codebook.shape)}")
    if codes is not None and codes.shape != (B, T, H):
        raise ValueError(f"vq_attention: codes must be [{B}, {T}, {H}], got {list(codes.shape)}")
    if block_len < 1:
        raise ValueError(f"vq_attention: block_len must be 1 or more, got {block_len}")
    if bias is not None:
        widest = block_len + 1 if causal else 2 * block_len + 1
        entries = bias.shape[-1]
        if list(bias.shape[:-1]) not in ([H], [B, T, H]) or entries > widest or not (causal or entries % 2):
            raise ValueError(
                f"vq_attention: bias must be [{H}, n] or [{B}, {T}, {H}, n] with n at most {widest}"
                f"{'' if causal else ' and odd'}, got {list(bias.shape)}"
            )
    if not causal and (initial_state is not None or output_final_state):
        raise ValueError("vq_attention: only causal attention has a state; valid: causal=True")
    documents = check_documents("vq_attention", cu_seqlens, lengths, B, T)
    if documents is not None and initial_state is not None and len(initial_state.position) != documents.N:
        raise ValueError(
            f"vq_attention: initial_state must have a row for each of {documents.N} documents, "
            f"got {len(initial_state.position)}"
        )
    lengths = check_lengths("vq_attention", lengths, B, T)
    run = choose("vq_attention", backend, FORMS, fit(q, k, v, channels=CHANNELS))
    if not B:  # there are no blocks to be cut
        run = vq_attention_reference
    if codes is None:
        codes = nearest_code(k, codebook, lengths=lengths)
    y, state = run(
        q,
        k,
        v,
        codebook.detach(),
        codes,
        block_len=block_len,
        bias=bias,
        causal=causal,
        initial_state=initial_state,
        output_final_state=output_final_state,
        lengths=lengths,
        documents=documents,
    )
    return (y, state) if output_final_state else y
