"""Models of documents in one row, beside the same sequences in rows of a batch."""

from __future__ import annotations

import pytest
import torch
from model_cases import PAIRS, PIXELS, TOKENS, config, inputs

from seqzoo.kernels.documents import Documents
from seqzoo.models import build_model
from seqzoo.models.heads import pool, pool_documents
from seqzoo.models.ladder import LadderModel

LENGTHS = torch.tensor([20, 1, 7, 12])


def rows_and_row(spec):
    """The arguments of a call with rows of a batch, and of one with documents in a row; and which steps count."""
    x = inputs(spec)
    lengths = LENGTHS if spec.num_inputs == 1 else torch.stack([LENGTHS, LENGTHS.flip(0)], 1)
    valid = torch.arange(20) < lengths[..., None]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return (x, lengths), (x[valid][None], None, None, starts), valid.flatten(0, -2)


@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned"])
@pytest.mark.parametrize("head", ["classify", "per_position"])
def test_each_document_is_answered_as_a_row(spec, position, head):
    model = build_model(config(position=position), spec, head=head, causal=False).double()
    rows, row, valid = rows_and_row(spec)
    expected, scores = model(*rows), model(*row)
    if head == "per_position":
        expected = expected[valid][None]
    torch.testing.assert_close(scores, expected)
    for parameter, other in zip(
        *(
            torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
            for y in (expected, scores)
        ),
        strict=True,
    ):
        torch.testing.assert_close(other, parameter)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pooling_is_of_each_document(pooling, dtype):
    lengths = torch.tensor([3, 0, 1, 8])
    x = torch.randn(4, 8, 6, dtype=dtype).relu().requires_grad_()  # with maxima that are not alone
    valid = torch.arange(8) < lengths[:, None]
    documents = Documents(torch.tensor([0, 3, 3, 4, 12]), 12)
    expected, pooled = pool(x, lengths, pooling), pool_documents(x[valid][None], documents, pooling)
    torch.testing.assert_close(pooled, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, pooled)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("whole", [False, True])
def test_two_heads_read_documents(whole):
    model = build_model(config(), TOKENS, head="classify+per_position", causal=False).double()
    (x, lengths), (row, _, _, starts), valid = rows_and_row(TOKENS)
    mask = (torch.rand(x.shape) < 0.3) & valid
    answers, filled = model(x, lengths, mask, whole=whole)
    others = model(row, None, mask[valid][None], starts, whole=whole)
    torch.testing.assert_close(others[0], answers)
    torch.testing.assert_close(others[1][0], filled[valid])


def test_a_ladder_reads_documents():
    model = LadderModel(build_model(config(), TOKENS, head="classify", causal=False), reduction=4).double()
    rows, row, _ = rows_and_row(TOKENS)
    torch.testing.assert_close(model(*row), model(*rows))


def test_a_row_may_be_longer_than_absolute_positions_reach():
    model = build_model(config(position="learned"), TOKENS, head="classify", causal=False)
    x = torch.full((1, 100), 3)
    assert model(x, None, None, torch.tensor([0, 32, 64, 96, 100])).shape == (4, 3)
    with pytest.raises(ValueError, match="a sequence of 33 steps; absolute positions are valid up to 32"):
        model(x, None, None, torch.tensor([0, 32, 65, 96, 100]))
    with pytest.raises(ValueError, match="model: cu_seqlens must begin with 0, never fall and end with T = 100"):
        model(x, None, None, torch.tensor([0, 32]))
