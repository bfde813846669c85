from __future__ import annotations

import pytest
import torch

from seqzoo.kernels.documents import Documents, check_documents

LENGTHS = [5, 0, 1, 37, 64, 0]
STARTS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
T = sum(LENGTHS)
DOCUMENTS = Documents(STARTS, T)


def test_steps_know_their_document_and_place():
    assert DOCUMENTS.N == 6
    assert DOCUMENTS.of_steps().tolist() == [n for n, length in enumerate(LENGTHS) for _ in range(length)]
    assert DOCUMENTS.positions().tolist() == [i for length in LENGTHS for i in range(length)]


def test_padded_documents_are_rows():
    x = torch.randn(1, T, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = DOCUMENTS.padded(x)
    assert rows.shape == (6, 64, 2, 3)
    for row, start, length in zip(rows, STARTS.tolist(), LENGTHS, strict=False):
        assert row[:length].equal(x[0, start : start + length])
        assert not row[length:].any()
    assert DOCUMENTS.unpadded(rows).equal(x)
    assert torch.autograd.gradcheck(lambda x: DOCUMENTS.unpadded(DOCUMENTS.padded(x).sin()), x, fast_mode=True)


@pytest.mark.parametrize("length", [1, 4, 16, 64, 200])
def test_pieces_cover_every_document_and_no_other(length: int):
    pieces = DOCUMENTS.pieces(length)
    found = list(zip(*(x.tolist() for x in (pieces.document, pieces.number, pieces.start, pieces.steps)), strict=True))
    expected = [
        (n, i, int(STARTS[n]) + i * length, min(length, size - i * length))
        for n, size in enumerate(LENGTHS)
        for i in range(-(-size // length))
    ]
    assert found[: len(expected)] == expected
    assert all((n, steps) == (6, 0) for n, _, _, steps in found[len(expected) :])
    assert pieces.before.tolist() == [sum(each[0] < n for each in expected) for n in range(7)]


@pytest.mark.parametrize("length", [1, 16, 64])
def test_what_is_laid_out_can_be_taken_up_again(length: int):
    x = torch.randn(1, T, 2, 3, dtype=torch.float64, requires_grad=True)
    pieces = DOCUMENTS.pieces(length)
    row = pieces.lay_out(x)
    by_piece = row.unflatten(1, (-1, length))
    for piece, (start, steps) in enumerate(zip(pieces.start.tolist(), pieces.steps.tolist(), strict=True)):
        assert by_piece[:, piece, :steps].equal(x[:, start : start + steps])
        assert not by_piece[:, piece, steps:].any()
    assert pieces.take_up(row).equal(x)
    assert torch.autograd.gradcheck(lambda x: pieces.take_up(pieces.lay_out(x).sin()), x, fast_mode=True)


@pytest.mark.parametrize("length", [1, 4, 16, 64])
def test_documents_may_begin_in_the_middle_of_a_piece(length: int):
    ahead = torch.tensor([0, 1, length, length - 1, 1, 0])
    pieces = DOCUMENTS.pieces(length, ahead)
    sizes = [rows + size for rows, size in zip(ahead.tolist(), LENGTHS, strict=True)]
    expected = [(n, i) for n, size in enumerate(sizes) for i in range(-(-size // length))]
    P = len(expected)
    assert list(zip(pieces.document.tolist(), pieces.number.tolist(), strict=True))[:P] == expected
    assert pieces.document[P:].eq(6).all()
    assert pieces.steps[:P].tolist() == [min(length, sizes[n] - i * length) for n, i in expected]
    assert not pieces.steps[P:].any()
    assert pieces.known.tolist() == [n for n, _ in expected] + [5] * (len(pieces.document) - P)
    x = torch.randn(1, T, 3, requires_grad=True)
    row = pieces.lay_out(x)[0]
    for n, (start, size) in enumerate(zip(STARTS.tolist(), LENGTHS, strict=False)):
        first = int(pieces.before[n]) * length
        assert row[first : first + ahead[n]].eq(0).all()
        assert row[first + ahead[n] :][:size].equal(x[0, start : start + size])
    assert pieces.take_up(row[None]).equal(x)


def test_pieces_are_documents_of_their_own():
    pieces = DOCUMENTS.pieces(16)
    documents = pieces.as_documents()
    P = int(pieces.before[-1])
    assert len(pieces.document) == documents.T
    assert documents.positions()[:P].equal(pieces.number[:P])
    assert documents.of_steps()[:P].equal(pieces.document[:P])


def test_what_cannot_be_documents_is_refused_in_words():
    good = torch.tensor([0, 3, 8], dtype=torch.int32)
    found = check_documents("op", good, None, 1, 8)
    assert found is not None
    assert found.starts.equal(good.long())
    assert check_documents("op", None, None, 4, 8) is None
    for cu_seqlens, lengths, B, message in [
        (good, torch.tensor([8]), 1, "op: got cu_seqlens and lengths; valid: cu_seqlens, for documents"),
        (good, None, 2, "a batch of 1, got 2"),
        (good.float(), None, 1, r"int32 or int64 \[N \+ 1\].* got torch.float32 \[3\]"),
        (good[None], None, 1, r"got torch.int32 \[1, 3\]"),
        ([0, 3, 8], None, 1, "got list"),
        (good[:1], None, 1, r"of 1 document or more, \[0, ..., T\], got \[0\]"),
        (torch.tensor([0, 5, 3, 8]), None, 1, r"never fall and end with T = 8, got \[0, 5, 3, 8\]"),
        (torch.tensor([0, 5]), None, 1, r"end with T = 8, got \[0, 5\]"),
        (torch.tensor([1, 8]), None, 1, r"begin with 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_documents("op", cu_seqlens, lengths, B, 8)


def test_documents_in_a_graph_are_not_looked_at():
    @torch.compile(fullgraph=True, backend="eager")
    def laid_out(x, starts):
        documents = check_documents("op", starts, None, *x.shape[:2])
        pieces = documents.pieces(16)
        return pieces.take_up(pieces.lay_out(x)) + documents.positions()[:, None]

    x = torch.randn(1, T, 3)
    assert laid_out(x, STARTS).equal(x + DOCUMENTS.positions()[:, None])
