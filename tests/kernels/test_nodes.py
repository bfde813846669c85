"""Operations as one node: values, gradients and mapped dimensions are those of the form that it runs."""

import pytest
import torch
from agreement import assert_close
from operation_cases import CASES, leaves, outputs

from seqzoo.kernels import linear_attention, nodes

ONE_EACH = (
    "diagonal_scan complex True False",
    "linear_attention state True",
    "linear_attention decay 4 both ways",
    "delta_rule state",
    "favor_attention state",
    "vq_attention True 4",
    "gated_attention state",
)
often = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_EACH else pytest.mark.slow)
        for name in CASES
        if not name.startswith("attention") and name.split()[-1] != "both"
    ],
)


@often
def test_a_node_is_what_it_runs(name, monkeypatch):
    case = CASES[name]
    inputs = leaves(case)
    expected = outputs(case, inputs, "chunked")
    ways = [torch.randn_like(y) for y in expected]
    gradients = torch.autograd.grad(expected, inputs, ways)
    monkeypatch.setattr(nodes, "exporting", lambda: True)
    found = outputs(case, inputs, "chunked")
    for pair in zip(found, expected, strict=True):
        assert_close(*pair, 1e-14)
    for pair in zip(torch.autograd.grad(found, inputs, ways), gradients, strict=True):
        assert_close(*pair, 1e-13)


@often
def test_a_mapped_dimension_is_folded(name):
    """Of the first input, of the last, which may be shared by the batch, and of all."""
    case = CASES[name]
    several = [torch.stack([x, x / 2]) for x in case.inputs]
    last = len(several) - 1
    for mapped in ({0}, {last}, set(range(last + 1))):
        dims = tuple(0 if i in mapped else None for i in range(len(several)))
        given = [y if i in mapped else x for i, (x, y) in enumerate(zip(case.inputs, several, strict=True))]
        found = torch.vmap(lambda *x: outputs(case, list(x), "chunked"), dims)(*given)
        for i in range(2):
            expected = outputs(case, [y[i] if d == 0 else y for y, d in zip(given, dims, strict=True)], "chunked")
            for y, other in zip(found, expected, strict=True):
                assert_close(y[i], other, 1e-12)


def test_nothing_of_a_mapped_dimension_is_folded_too():
    q, v = torch.zeros(2, 3, 5, 2, 4), torch.zeros(2, 3, 5, 2, 0)
    assert torch.vmap(lambda q, v: linear_attention(q, q, v, causal=True))(q, v).shape == v.shape
