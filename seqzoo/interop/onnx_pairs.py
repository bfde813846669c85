"""Operations that are, in ONNX, products of all pairs of steps: queries and keys, those of a state among them.

Time and memory are then quadratic in the number of steps, as they are not in `seqzoo.kernels`.
"""

from __future__ import annotations

from .onnx_nodes import Nodes, Value
from .onnx_operations import LOWEST, nothing, of_heads


def attention(n: Nodes, q, k, v, lengths, position, starts, query_starts, left, right) -> list[Value]:
    """Within a window. q is scaled."""
    like, H, G = v, q.shape[2], k.shape[2]
    q, k, v = n.wide(q, k, v)
    k, v = (of_heads(n, x, G, H) for x in (k, v))
    here, there = n.Unsqueeze(n.steps(q), [0, 2]), n.Unsqueeze(n.steps(k), [0, 1])  # [1, T, 1], [1, 1, S]
    if position is not None:
        here = n.Add(here, n.Unsqueeze(position, [1, 2]))
    distance = n.Sub(there, here)
    seen = n.GreaterOrEqual(distance, n.constant([[[-left if left >= 0 else -(1 << 40)]]]))
    if right >= 0:
        seen = n.And(seen, n.LessOrEqual(distance, right))
    end = n.Unsqueeze(n.size(k, 1) if lengths is None else lengths, [1, 2])
    seen = n.And(n.And(seen, n.Less(there, end)), n.Less(here, end))
    q, k, v = n.by_head(q, *(n.kept(n.valid(lengths, x), x, 4) for x in (k, v)))
    y = n.MatMul(_softmax(n, n.MatMul(q, n.Transpose(k, perm=[0, 1, 3, 2])), n.Unsqueeze(seen, [1])), v)
    return [n.CastLike(n.by_head(y)[0], like)]


def _softmax(n: Nodes, scores: Value, seen: Value) -> Value:
    """Of what is seen; 0 where nothing is."""
    weights = n.Softmax(n.Where(seen, scores, n.constant(LOWEST, scores)), axis=-1)
    return n.Where(seen, weights, n.constant(0.0, weights))


def vq_attention(
    n: Nodes,
    q,
    k,
    v,
    codebook,
    codes,
    bias,
    past_codes,
    past_values,
    past_counts,
    past_sums,
    position,
    lengths,
    starts,
    block_len,
    causal,
    output_final_state,
) -> list[Value]:
    """A key counts as the code nearest to it, and what a state holds by code as that code, as often as it was seen."""
    valid, like, (H, S, _), Dv = n.valid(lengths, q), v, codebook.shape, v.shape[3]
    q, v, codebook = n.wide(q, v, codebook)
    v = n.kept(valid, v, 4)
    given_codes, given = codes, v
    here = n.steps(q)  # [T]
    there = here
    counts = n.Expand(n.constant(True), n.shape(n.size(q, 0), n.size(q, 1))) if valid is None else valid  # [B, keys]
    past = position is not None
    if past:
        slots = n.constant(list(range(-block_len, 0)))
        filled = n.GreaterOrEqual(n.Unsqueeze(slots, [0]), n.Neg(n.Unsqueeze(position, [1])))
        there = n.Concat(slots, here, axis=0)
        counts = n.Concat(filled, counts, axis=1)
        codes = n.Concat(past_codes, codes, axis=1)
        v = n.Concat(n.kept(filled, n.CastLike(past_values, v), 4), v, axis=1)
    q, values = n.by_head(q, v)
    by_code = n.MatMul(q, n.Transpose(codebook, perm=[0, 2, 1]))  # [B, H, T, S]
    index = n.Unsqueeze(n.Transpose(codes, perm=[0, 2, 1]), [2])  # [B, H, 1, keys]
    scores = n.GatherElements(
        by_code, n.Expand(index, n.shape(n.size(q, 0), H, n.size(q, 2), n.size(codes, 1))), axis=3
    )
    offset = n.Sub(n.Unsqueeze(there, [0]), n.Unsqueeze(here, [1]))  # [T, keys], j - i
    if bias is not None:
        scores = n.Add(scores, _by_offset(n, bias, H, offset, causal, scores))
    seen = n.Unsqueeze(counts, [1, 2])
    if causal:
        seen = n.And(seen, n.Unsqueeze(n.LessOrEqual(offset, 0), [0, 1]))
    seen = n.Expand(seen, n.Shape(scores))
    if past:
        number = n.CastLike(n.Unsqueeze(past_counts, [2]), by_code)  # [B, H, 1, S]
        one = n.constant(1.0, number)
        some = n.Greater(number, n.constant(0.0, number))
        scores = n.Concat(scores, n.Add(by_code, n.Log(n.Max(number, one))), axis=3)
        seen = n.Concat(seen, n.Expand(some, n.Shape(by_code)), axis=3)
        means = n.Div(n.CastLike(past_sums, v), n.Transpose(n.Max(number, one), perm=[0, 1, 3, 2]))
        values = n.Concat(values, means, axis=2)
    y = n.by_head(n.MatMul(_softmax(n, scores, seen), values))[0]
    y = n.CastLike(n.kept(valid, y, 4), like)
    if not output_final_state:
        return [y, *(nothing(n, x) for x in (given_codes, v, given_codes, v, given_codes))]

    B = n.size(like, 0)
    steps = n.Expand(n.size(like, 1), B) if lengths is None else lengths
    if not past:
        past_codes = n.filled(0, given_codes, B, block_len, H)
        past_values = n.filled(0.0, v, B, block_len, H, Dv)
        past_counts, past_sums = n.filled(0, given_codes, B, H, S), n.filled(0.0, v, B, H, S, Dv)
        position = n.filled(0, given_codes, B)
    codes, v = n.Concat(past_codes, given_codes, axis=1), n.Concat(past_values, n.CastLike(given, past_values), axis=1)
    slot = n.Unsqueeze(n.steps(codes), [0])  # [1, L + T]
    oldest = n.Sub(block_len, n.Min(position, n.constant(block_len)))
    leaves = n.And(n.GreaterOrEqual(slot, n.Unsqueeze(oldest, [1])), n.Less(slot, n.Unsqueeze(steps, [1])))
    member = n.And(
        n.Equal(n.Unsqueeze(codes, [3]), n.constant(list(range(S)))), n.Unsqueeze(leaves, [2, 3])
    )  # [B, L + T, H, S]
    added = n.MatMul(n.Transpose(n.CastLike(member, v), perm=[0, 2, 3, 1]), n.by_head(v)[0])
    stays = n.Unsqueeze(n.Add(n.Unsqueeze(steps, [1]), n.constant(list(range(block_len)))), [2])  # [B, L, 1]
    return [
        y,
        n.GatherElements(codes, n.Expand(stays, n.shape(1, 1, H)), axis=1),
        n.CastLike(n.GatherElements(v, n.Expand(n.Unsqueeze(stays, [3]), n.shape(1, 1, H, Dv)), axis=1), past_values),
        n.Add(past_counts, n.ReduceSum(n.CastLike(member, past_counts), [1], keepdims=0)),
        n.Add(past_sums, n.CastLike(added, past_sums)),
        n.Add(position, steps),
    ]


def _by_offset(n: Nodes, bias: Value, H: int, offset: Value, causal: bool, scores: Value) -> Value:
    """What each key's offset from its query has of `bias`, [H, n] or [B, T, H, n]; 0 further away: as the scores."""
    shape = tuple(bias.shape or ())
    entries = shape[-1]
    reach = entries - 1 if causal else entries // 2
    bias = n.Unsqueeze(bias, [0, 2]) if len(shape) == 2 else n.by_head(bias)[0]  # [1 or B, H, 1 or T, n]
    place = n.Add(offset, reach)
    within = n.And(n.GreaterOrEqual(place, 0), n.Less(place, entries))
    place = n.Where(within, place, 0)
    shape = n.Shape(scores)
    whole = n.shape(n.size(scores, 0), H, n.size(scores, 2), entries)
    found = n.GatherElements(n.CastLike(n.Expand(bias, whole), scores), n.Expand(place, shape), axis=3)
    return n.Where(n.Expand(within, shape), found, n.constant(0.0, scores))


def gated_attention(
    n: Nodes,
    u,
    q_quad,
    k_quad,
    q_lin,
    k_lin,
    v,
    bias,
    memory,
    past_k_quad,
    past_k_lin,
    past_v,
    position,
    lengths,
    starts,
    chunk_len,
    causal,
    scale,
    output_final_state,
) -> list[Value]:
    like, C = v, chunk_len
    valid = n.valid(lengths, v)
    offsets = 0 if bias is None else bias.shape[0]
    u, q_quad, k_quad, q_lin, k_lin, v, bias = n.wide(u, q_quad, k_quad, q_lin, k_lin, v, bias)
    k_quad, k_lin, v = (n.kept(valid, x, 3) for x in (k_quad, k_lin, v))
    B = n.size(v, 0)
    counts = n.Expand(n.constant(True), n.shape(B, n.size(v, 1))) if valid is None else valid  # [B, keys]
    steps = n.Unsqueeze(n.steps(v), [0])  # [1, T]
    here = there = n.Expand(steps, n.shape(B, n.size(v, 1)))
    past = position is not None
    if past:
        here = n.Add(steps, n.Unsqueeze(position, [1]))
        held = n.Mod(position, n.constant(C))
        rows = n.constant([list(range(C))])
        counts = n.Concat(n.Less(rows, n.Unsqueeze(held, [1])), counts, axis=1)
        there = n.Concat(n.Add(rows, n.Unsqueeze(n.Sub(position, held), [1])), here, axis=1)
        k_quad, k_lin, v = (
            n.Concat(n.CastLike(old, new), new, axis=1)
            for old, new in ((past_k_quad, k_quad), (past_k_lin, k_lin), (past_v, v))
        )
    chunk_here, chunk_there = n.Div(here, C), n.Div(there, C)
    offset = n.Sub(n.Unsqueeze(there, [1]), n.Unsqueeze(here, [2]))  # [B, T, keys]
    same = n.And(n.Equal(n.Unsqueeze(chunk_there, [1]), n.Unsqueeze(chunk_here, [2])), n.Unsqueeze(counts, [1]))
    if causal:
        same = n.And(same, n.LessOrEqual(offset, 0))

    scores = n.Mul(n.MatMul(q_quad, n.Transpose(k_quad, perm=[0, 2, 1])), n.constant(float(scale), v))
    if bias is not None:
        place = n.Min(n.Max(n.Add(offset, C - 1), n.constant(0)), n.constant(offsets - 1))
        scores = n.Add(scores, n.CastLike(n.Gather(bias, place, axis=0), scores))
    zero = n.constant(0.0, v)
    root = n.Where(same, n.Relu(scores), zero)
    o = n.MatMul(n.Mul(root, root), v)
    pairs = n.MatMul(q_lin, n.Transpose(k_lin, perm=[0, 2, 1]))
    if causal:
        earlier = n.And(n.Less(n.Unsqueeze(chunk_there, [1]), n.Unsqueeze(chunk_here, [2])), n.Unsqueeze(counts, [1]))
        far = n.MatMul(n.Where(earlier, pairs, zero), v)
        if past:
            far = n.Add(far, n.MatMul(q_lin, n.CastLike(memory, q_lin)))
        terms = n.Unsqueeze(n.Max(n.Mul(chunk_here, C), n.constant(1)), [2])
    else:
        far = n.MatMul(n.Where(n.Unsqueeze(counts, [1]), pairs, zero), v)
        terms = n.Unsqueeze(n.size(v, 1) if lengths is None else n.Max(lengths, n.constant(1)), [1, 2])
    o = n.Mul(u, n.Add(o, n.Div(far, n.CastLike(terms, far))))
    o = n.CastLike(n.kept(valid, o, 3), like)
    if not output_final_state:
        return [o, *(nothing(n, x) for x in (v, v, v, v)), n.CastLike(nothing(n, v), n.constant(0))]

    end = n.Unsqueeze(n.size(like, 1) if lengths is None else lengths, [1])  # [B, 1] or [1, 1]
    end = n.Expand(end if position is None else n.Add(end, n.Unsqueeze(position, [1])), n.shape(B, 1))
    full = n.Div(end, C)
    whole = n.CastLike(n.And(n.Less(chunk_there, full), counts), v)
    added = n.MatMul(n.Transpose(n.Mul(k_lin, n.Unsqueeze(whole, [2])), perm=[0, 2, 1]), v)
    row = n.Unsqueeze(n.Add(n.constant([list(range(C))]), n.Mul(full, C)), [2])  # [B, C, 1]
    holds = n.And(n.Equal(row, n.Unsqueeze(there, [1])), n.Unsqueeze(counts, [1]))
    holds = n.CastLike(holds, v)  # [B, C, keys]
    memory = added if memory is None else n.Add(n.CastLike(memory, v), added)
    return [o, memory, *(n.MatMul(holds, x) for x in (k_quad, k_lin, v)), n.Squeeze(end, [1])]
