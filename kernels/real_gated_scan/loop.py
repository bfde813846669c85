"""RG-LRU's scan on a CPU: one compiled loop forward and one backward, each of which makes the decays.

Work is cut into items as that of the diagonal scan is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..diagonal_scan.loop import LONG_ROW, in_parallel
from ..exponentials import exp, exp_and_less_one
from ..loops import CACHE_LINE, array, compiled, prefetch, put, rows, sequences
from .plain import STEEPEST

LEAST_ROOT = 0.5 / STEEPEST  # by which a slope is divided


def scan(
    v: Tensor,  # [B, T, D]
    recurrence_gate: Tensor,  # [B, T, D]
    input_gate: Tensor,  # [B, T, D]
    rate: Tensor,  # [D]
    initial_state: Tensor | None,  # [R, D], of R sequences
    begins: Tensor | None,  # [R]
    reverse: bool,
    lengths: Tensor | None,  # [B]
    starts: Tensor | None,  # [R + 1], of documents
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final state [R, D]."""
    of = sequences("real_gated_scan", v, lengths, starts)
    h = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = v.new_zeros(len(of.lengths), v.shape[2])
    if initial_state is not None:
        state.copy_(initial_state)
    given = rows(v), rows(recurrence_gate), rows(input_gate), array(rate), _begins(begins, state)
    in_parallel(_scan_items, v.shape[2], of, *given, *of, reverse, h.flatten(0, 1).numpy(), state.numpy())
    return h, state


def scan_backward(
    dh: Tensor,
    d_state: Tensor,
    h: Tensor,
    v: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    rate: Tensor,
    initial_state: Tensor | None,
    begins: Tensor | None,
    reverse: bool,
    lengths: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of v, rate and the initial state, from those of h and of the final state; those of the gates
    take the gates' places, which must be contiguous."""
    of = sequences("real_gated_scan", v, lengths, starts)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    d_rate = torch.zeros_like(d_state, memory_format=torch.contiguous_format)  # of each sequence
    d_initial = d_state.clone(memory_format=torch.contiguous_format)
    initial = torch.zeros_like(d_initial) if initial_state is None else initial_state
    given = rows(dh), rows(h), rows(v), array(rate), array(initial), _begins(begins, d_state)
    gates = (gate.view(-1, v.shape[2]).numpy() for gate in (recurrence_gate, input_gate))
    made = dv.flatten(0, 1).numpy(), d_rate.numpy(), d_initial.numpy()
    in_parallel(_backward_items, v.shape[2], of, *given, *of, reverse, LEAST_ROOT, *gates, *made)
    return dv, d_rate.sum(0), d_initial


def _begins(begins: Tensor | None, state: Tensor) -> np.ndarray:
    return np.ones(len(state), bool) if begins is None else array(begins)


# What a step has lies in local arrays, as in the diagonal scan, and each loop looks at few others.


@compiled(fastmath={"contract"}, error_model="numpy")
def _scan_items(start, stop, block, v, gate, opening, rate, begins, starts, lengths, reverse, h, state):
    D, one = v.shape[1], rate.dtype.type(1)
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        s, its_rate = state[b, channels].copy(), rate[channels].copy()
        a, root = np.empty_like(s), np.empty_like(s)
        ahead = s.nbytes if s.nbytes >= LONG_ROW else 0
        t, step = (begin + n - 1, -1) if reverse else (begin, 1)
        for i in range(n):
            for byte in range(0, ahead, CACHE_LINE):
                prefetch(v[t + step, channels], byte)
                prefetch(gate[t + step, channels], byte)
                prefetch(opening[t + step, channels], byte)
                prefetch(h[t + step, channels], byte)
            v_t, gate_t, opening_t, h_t = v[t, channels], gate[t, channels], opening[t, channels], h[t, channels]
            for d in range(s.shape[0]):
                share = one / (one + exp(-gate_t[d]))
                a_d, below = exp_and_less_one(-its_rate[d] * share)
                a[d], root[d] = a_d, np.sqrt(-below * (one + a_d))
            if i == 0 and begins[b]:
                a[:], root[:] = 0, 1
            for d in range(s.shape[0]):
                root[d] *= one / (one + exp(-opening_t[d]))
            for d in range(s.shape[0]):
                s[d] = a[d] * s[d] + root[d] * v_t[d]
                h_t[d] = s[d]
            t += step
        put(s, state[b, channels])
        h[begin + n : end, channels] = 0


@compiled(fastmath={"contract"}, error_model="numpy")
def _backward_items(
    start, stop, block, dh, h, v, rate, initial, begins, starts, lengths, reverse, least_root,
    gate, opening, dv, d_rate, d_state,
):  # fmt: skip
    D, one, least = h.shape[1], rate.dtype.type(1), rate.dtype.type(least_root)
    blocks = -(-D // block)
    for item in range(start, stop):
        b, low = item // blocks, item % blocks * block
        channels = slice(low, min(low + block, D))
        begin, end, n = starts[b], starts[b + 1], lengths[b]
        for x in (dv, gate, opening):
            x[begin + n : end, channels] = 0
        p, its_rate = d_state[b, channels].copy(), rate[channels].copy()
        of_rate, share, a, root, of_log = np.zeros_like(p), p.copy(), p.copy(), p.copy(), p.copy()
        input_share, inputs = p.copy(), p.copy()
        ahead = p.nbytes if p.nbytes >= LONG_ROW else 0
        t, step = (begin, 1) if reverse else (begin + n - 1, -1)
        for i in range(n):
            for byte in range(0, ahead, CACHE_LINE):
                prefetch(dh[t + step, channels], byte)
                prefetch(h[t + 2 * step, channels], byte)
                prefetch(v[t + step, channels], byte)
                prefetch(gate[t + step, channels], byte)
                prefetch(opening[t + step, channels], byte)
                prefetch(dv[t + step, channels], byte)
            last = i == n - 1  # the first step that the scan took
            before = initial[b, channels] if last else h[t + step, channels]
            dh_t, v_t, dv_t = dh[t, channels], v[t, channels], dv[t, channels]
            gate_t, opening_t = gate[t, channels], opening[t, channels]
            for d in range(p.shape[0]):
                p[d] += dh_t[d]
            for d in range(p.shape[0]):
                share[d] = one / (one + exp(-gate_t[d]))
                a[d], below = exp_and_less_one(-its_rate[d] * share[d])
                root[d] = np.sqrt(-below * (one + a[d]))
            if last and begins[b]:
                a[:], root[:] = 0, 1
            for d in range(p.shape[0]):
                input_share[d] = one / (one + exp(-opening_t[d]))
                inputs[d] = input_share[d] * v_t[d]
            for d in range(p.shape[0]):
                of_log[d] = a[d] * p[d] * (before[d] - inputs[d] * a[d] / max(root[d], least))
            for d in range(p.shape[0]):
                dv_t[d] = p[d] * root[d] * input_share[d]
            for d in range(p.shape[0]):
                opening_t[d] = p[d] * root[d] * inputs[d] * (one - input_share[d])
            for d in range(p.shape[0]):
                of_share = -of_log[d] * share[d]
                of_rate[d] += of_share
                gate_t[d] = of_share * its_rate[d] * (one - share[d])
            for d in range(p.shape[0]):
                p[d] *= a[d]
            t += step
        put(of_rate, d_rate[b, channels])
        put(p, d_state[b, channels])
