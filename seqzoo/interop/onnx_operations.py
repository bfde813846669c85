"""What each operation is in ONNX: `LinearAttention` of opset 27 where it is that, a Scan over steps where it is another
recurrence, and otherwise plain products, of all pairs of steps.

Arguments are those of the nodes in exported graphs. Complex numbers come as pairs, in a last dimension of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .onnx_nodes import Nodes, Value

Operation = Callable[..., list[Value]]


def linear_attention(
    n: Nodes, q, k, v, log_decay, initial_state, lengths, starts, causal, normalize, output_final_state
) -> list[Value]:
    valid, like, G, (H, Dv) = n.valid(lengths, q), v, q.shape[2], v.shape[2:]
    q, k = (n.kept(valid, of_heads(n, x, G, H), 4) for x in n.wide(q, k))
    v, g, state = n.wide(v, log_decay, initial_state)
    v = n.kept(valid, v, 4)
    if normalize:
        v = n.Concat(v, n.filled(1.0, v, n.size(v, 0), n.size(v, 1), H, 1), axis=3)
    rank = 0 if g is None else len(log_decay.shape)
    if rank == 1:
        g = n.Expand(g, n.shape(n.size(q, 0), n.size(q, 1), H))
    if g is not None:
        g = n.kept(valid, g, max(rank, 3))
    if causal or g is not None:
        o, state = _recurrence(n, "linear" if g is None else "gated", H, q, k, v, state, g)
        if not causal:
            o = n.Add(o, _of_later(n, H, q, k, v, g, rank))
    else:
        q, k, v = (n.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
        o = n.Transpose(n.MatMul(q, n.MatMul(n.Transpose(k, perm=[0, 1, 3, 2]), v)), perm=[0, 2, 1, 3])
    if normalize:
        o = divided(n, o, Dv)
    return [n.CastLike(n.kept(valid, o, 4), like), state if output_final_state else nothing(n, o)]


def delta_rule(
    n: Nodes, q, k, v, beta, log_decay, erase, initial_state, lengths, starts, output_final_state
) -> list[Value]:
    valid, like, (H, Dv), (G, Dk) = n.valid(lengths, q), v, v.shape[2:], q.shape[2:]
    q, k = (of_heads(n, x, G, H) for x in n.wide(q, k))
    v, beta, g, r, state = n.wide(v, beta, log_decay, erase, initial_state)
    beta, v = n.kept(valid, beta, 3), n.kept(valid, v, 4)
    k = n.kept(valid, k, 4)
    if g is not None:
        g = n.kept(valid, g, len(log_decay.shape))
    if r is None:
        o, state = _recurrence(n, "delta" if g is None else "gated_delta", H, q, k, v, state, g, beta)
    else:
        state = n.filled(0.0, v, n.size(v, 0), H, Dk, Dv) if state is None else state
        if g is None:
            g = n.filled(0.0, v, n.size(v, 0), n.size(v, 1), H, 1)
        elif len(log_decay.shape) == 3:
            g = n.Unsqueeze(g, [3])

        def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
            (S,), (q, k, v, beta, g, r) = states, given
            S = n.Mul(S, n.Exp(n.Unsqueeze(g, [3])))
            missing = n.Sub(n.Mul(n.Unsqueeze(beta, [2]), v), n.Squeeze(n.MatMul(n.Unsqueeze(r, [2]), S), [2]))
            S = n.Add(S, n.Mul(n.Unsqueeze(k, [3]), n.Unsqueeze(missing, [2])))
            return [S], [n.Squeeze(n.MatMul(n.Unsqueeze(q, [2]), S), [2])]

        (state,), (o,) = n.scan(step, [state], [q, k, v, beta, g, n.kept(valid, r, 4)])
    return [n.CastLike(n.kept(valid, o, 4), like), state if output_final_state else nothing(n, o)]


def diagonal_scan(n: Nodes, x, a, initial_state, lengths, factor, starts, reverse, pairs) -> list[Value]:
    valid, rank, constant = n.valid(lengths, x), 4 if pairs else 3, len(a.shape) == 1 + pairs
    x = n.kept(valid, x, rank)
    if factor is not None:
        x = n.Mul(x, n.Unsqueeze(factor, [1]) if pairs else factor)
    if constant:
        a = n.Expand(a, n.Shape(x))
    one = n.constant([1.0, 0.0], a) if pairs else n.constant(1.0, a)
    a = a if valid is None else n.Where(n.Unsqueeze(valid, list(range(2, rank))), a, one)
    sizes = [n.size(x, 0), *(n.size(x, axis) for axis in range(2, rank))]
    state = n.filled(0.0, x, *sizes) if initial_state is None else initial_state

    def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
        (h,), (x, a) = states, given
        h = n.Add(_times(n, a, h) if pairs else n.Mul(a, h), x)
        return [h], [h]

    (state,), (h,) = n.scan(step, [state], [x, a], reverse)
    return [n.kept(valid, h, rank), state]


def selective_scan(n: Nodes, v, dt, A, write, read, initial_state, lengths, starts, reverse) -> list[Value]:
    valid, like, (D, N) = n.valid(lengths, v), v, A.shape
    v, dt, A, write, read, state = n.wide(v, dt, A, write, read, initial_state)
    v, dt = n.kept(valid, v, 3), n.kept(valid, dt, 3)
    state = n.filled(0.0, v, n.size(v, 0), D, N) if state is None else state

    def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
        (h,), (v, dt, write, read) = states, given
        v, dt = n.Unsqueeze(v, [2]), n.Unsqueeze(dt, [2])
        h = n.Add(n.Mul(n.Exp(n.Mul(dt, A)), h), n.Mul(v, n.Unsqueeze(write, [1])))
        return [h], [n.ReduceSum(n.Mul(h, n.Unsqueeze(read, [1])), [2], keepdims=0)]

    (state,), (y,) = n.scan(step, [state], [v, dt, write, read], reverse)
    return [n.CastLike(n.kept(valid, y, 3), like), state]


def favor_attention(n: Nodes, q, k, v, projection, sums, log_scale, lengths, starts, causal) -> list[Value]:
    valid, like, H, Dv, M = n.valid(lengths, q), v, v.shape[2], v.shape[3], projection.shape[1]
    q, k, v, W, sums, log_scale = n.wide(q, k, v, projection, sums, log_scale)
    q, k, v = (n.kept(valid, x, 4) for x in (q, k, v))
    v = n.Concat(v, n.filled(1.0, v, n.size(v, 0), n.size(v, 1), H, 1), axis=3)
    lowest = n.constant(LOWEST, v)
    W = n.Transpose(W, perm=[0, 2, 1])  # [H, D, M]
    by_head = [n.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k)]
    a, b = (n.Transpose(n.MatMul(x, W), perm=[0, 2, 1, 3]) for x in by_head)  # [B, T, H, M]
    half = n.Div(n.ReduceSum(n.Mul(k, k), [3], keepdims=1), n.constant(2.0, k))
    b = n.kept(valid, n.Sub(b, half), 4, float("-inf"))

    if causal:
        rows = (n.size(v, 0), H, M)
        sums = n.filled(0.0, v, *rows, Dv + 1) if sums is None else sums
        log_scale = n.filled(float("-inf"), v, *rows) if log_scale is None else log_scale

        def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
            (sums, before), (a, b, v) = states, given
            scale = n.Max(before, b)
            finite = n.Max(scale, lowest)
            old, new = (n.Unsqueeze(n.Exp(n.Sub(x, finite)), [3]) for x in (before, b))
            sums = n.Add(n.Mul(old, sums), n.Mul(new, n.Unsqueeze(v, [2])))
            weights = n.Softmax(n.Add(a, finite), axis=-1)
            return [sums, scale], [n.Squeeze(n.MatMul(n.Unsqueeze(weights, [2]), sums), [2])]

        states, (o,) = n.scan(step, [sums, log_scale], [a, b, v])
    else:
        a, b, v = (n.Transpose(x, perm=[0, 2, 1, 3]) for x in (a, b, v))
        top = n.Max(n.ReduceMax(b, [2], keepdims=1), lowest)
        sums = n.MatMul(n.Transpose(n.Exp(n.Sub(b, top)), perm=[0, 1, 3, 2]), v)  # [B, H, M, Dv + 1]
        weights = n.Softmax(n.Add(a, top), axis=-1)
        o, states = n.Transpose(n.MatMul(weights, sums), perm=[0, 2, 1, 3]), [nothing(n, v), nothing(n, v)]
    return [n.CastLike(n.kept(valid, divided(n, o, Dv), 4), like), *states]


def s4d_convolve(n: Nodes, x, step, C, before, lengths, starts) -> list[Value]:
    like, (D, P, _), ways = x, step.shape, C.shape[0]
    valid = n.valid(lengths, x)
    (x,) = n.wide(x)
    x = n.CastLike(x, step)
    size, angle = (n.Squeeze(part, [2]) for part in n.Split(step, axis=2, num_outputs=2, outputs=2))
    size = n.Exp(size)
    kept = n.Concat(*(n.Unsqueeze(n.Mul(size, turn(angle)), [2]) for turn in (n.Cos, n.Sin)), axis=2)  # [D, P, 2]
    read = n.Mul(C, n.constant([1.0, -1.0], C))  # the real part of a product is a sum of products
    decays = n.Expand(kept, n.shape(n.size(x, 0), n.size(x, 1), D, P, 2))
    if valid is not None:
        decays = n.Where(n.Unsqueeze(valid, [2, 3, 4]), decays, n.constant([1.0, 0.0], decays))
    start = n.filled(0.0, x, n.size(x, 0), D, P, 2)
    real = n.constant([1.0, 0.0], x)

    def reader(way: int) -> Value:
        return n.Gather(read, way, axis=0)

    def direction(after: bool, C: Value) -> Any:
        def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
            (h,), (x, decay) = states, given
            found = n.Add(_times(n, decay, h), n.Mul(n.Unsqueeze(x, [2, 3]), real))
            return [found], [n.ReduceSum(n.Mul(found if after else h, C), [2, 3], keepdims=0)]

        return step

    (state,), (y,) = n.scan(direction(True, reader(0)), [start if before is None else before], [x, decays])
    if ways == 2:
        _, (later,) = n.scan(direction(False, reader(1)), [start], [x, decays], reverse=True)
        y = n.Add(y, later)
    return [n.CastLike(y, like), nothing(n, x) if before is None else state]


def mlstm_largest(n: Nodes, i, log_f, start, starts) -> list[Value]:

    def step(n: Nodes, states: list[Value], given: list[Value]) -> tuple[list[Value], list[Value]]:
        (m,), (i, log_f) = states, given
        return [n.Max(i, n.Add(log_f, m))], [n.Max(i, n.Add(log_f, m)), m]

    _, found = n.scan(step, [start], [i, log_f])
    return found


def expm1(n: Nodes, x) -> list[Value]:
    """To as many digits near 0 as elsewhere, which Exp less 1 is not: 2 t / (1 - t) with t = tanh(x / 2)."""
    one = n.constant(1.0, x)
    t = n.Tanh(n.Div(n.Min(x, one), n.constant(2.0, x)))
    return [n.Where(n.Greater(x, one), n.Sub(n.Exp(x), one), n.Div(n.Add(t, t), n.Sub(one, t)))]


LOWEST = -3.0e38  # stands for the logarithm of nothing, where -inf would meet itself


def of_heads(n: Nodes, x: Value, G: int, H: int) -> Value:
    """[B, T, G, D] -> [B, T, H, D], where head h reads h // (H / G)."""
    if G == H:
        return x
    shared = n.Expand(n.Unsqueeze(x, [3]), [1, 1, 1, H // G, 1])
    return n.Reshape(shared, n.shape(n.size(x, 0), n.size(x, 1), H, n.size(x, 3)))


def _recurrence(
    n: Nodes,
    rule: str,
    H: int,
    q: Value,
    k: Value,
    v: Value,
    state: Value | None,
    g: Value | None,
    beta: Value | None = None,
) -> tuple[Value, Value]:
    """`LinearAttention`, to which heads are part of the channels: [B, T, H, D], and the state [B, H, Dk, Dv]."""
    flat = [None if x is None else n.Reshape(x, [0, 0, -1]) for x in (q, k, v, g, beta)]
    given = [*flat[:3], state, *flat[3:]]
    while given[-1] is None:
        given.pop()
    o, after = n.LinearAttention(*given, update_rule=rule, scale=1.0, q_num_heads=H, kv_num_heads=H, outputs=2)
    return n.Reshape(o, n.constant([0, 0, H, -1])), after


def _of_later(n: Nodes, H: int, q: Value, k: Value, v: Value, g: Value, rank: int) -> Value:
    """What steps hear from later ones: from the end, where a key counts from the next step on, decayed by its own."""
    decay = n.Exp(g)
    k = n.Mul(k, decay if rank == 4 else n.Unsqueeze(decay, [3]))

    def from_end(x: Value, ahead: bool = True) -> Value:
        x = n.Slice(x, [-1], [-(1 << 62)], [1], [-1])
        if not ahead:
            return x
        zeros = n.CastLike(n.ConstantOfShape(n.Shape(n.Slice(x, [0], [1], [1]))), x)
        return n.Concat(zeros, n.Slice(x, [0], [-1], [1]), axis=1)

    read, (written, values, decay) = from_end(q, ahead=False), [from_end(x) for x in (k, v, g)]
    o, _ = _recurrence(n, "gated", H, read, written, values, None, decay)
    return from_end(o, ahead=False)


def divided(n: Nodes, o: Value, D: int) -> Value:
    """[..., D + 1] by its last column, 0 where that is."""
    o, by = n.Split(o, n.constant([D, 1]), axis=3, outputs=2)
    zero = n.constant(0.0, by)
    none = n.Equal(by, zero)
    return n.Where(none, zero, n.Div(o, n.Where(none, n.constant(1.0, by), by)))


def _times(n: Nodes, a: Value, h: Value) -> Value:
    """The product of complex numbers, [..., 2]."""
    (a_re, a_im), (h_re, h_im) = (n.Split(x, axis=-1, num_outputs=2, outputs=2) for x in (a, h))
    real = n.Sub(n.Mul(a_re, h_re), n.Mul(a_im, h_im))
    return n.Concat(real, n.Add(n.Mul(a_re, h_im), n.Mul(a_im, h_re)), axis=-1)


def nothing(n: Nodes, like: Value) -> Value:
    return n.filled(0.0, like, 0)
