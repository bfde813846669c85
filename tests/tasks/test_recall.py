import pytest
import torch

from seqzoo.spec import IGNORED
from seqzoo.tasks.recall import associative_recall, induction_heads, selective_copying


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_selective_copying_asks_for_the_data_in_order():
    tokens, targets = selective_copying(50, length=40, num_tokens=6, num_symbols=5, generator=generator())
    assert tokens.shape == targets.shape == (50, 40)
    assert tokens.dtype == targets.dtype == torch.int64
    for row, answers in zip(tokens, targets, strict=True):
        read, markers = row[:34], row[34:]
        assert (markers == 6).all()
        assert (answers[:34] == IGNORED).all()
        assert answers[34:].tolist() == read[read != 5].tolist()
        assert read.max() == 5


def test_selective_copying_puts_data_anywhere():
    """Every position before the markers holds data equally often, and every symbol occurs equally often."""
    tokens, targets = selective_copying(20_000, length=40, num_tokens=6, num_symbols=5, generator=generator())
    share = (tokens[:, :34] < 5).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 6 / 34), atol=4 * (6 / 34 / 20_000) ** 0.5, rtol=0)
    frequency = targets[:, 34:].flatten().bincount() / (20_000 * 6)
    torch.testing.assert_close(frequency, torch.full((5,), 0.2), atol=4 * (0.16 / 120_000) ** 0.5, rtol=0)


def test_associative_recall_asks_for_what_was_paired():
    tokens, targets = associative_recall(
        50, length=40, num_pairs=4, num_queries=6, num_symbols=9, generator=generator()
    )
    assert tokens.shape == targets.shape == (50, 40)
    assert tokens.dtype == targets.dtype == torch.int64
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        value_of = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(value_of) == 4
        assert all(key < 9 <= value < 18 for key, value in value_of.items())
        assert answers[:8] == [IGNORED] * 8
        assert answers[8:] == [value_of.get(token, IGNORED) for token in row[8:]]
        assert sum(token != 18 for token in row[8:]) == 6


def test_associative_recall_asks_anywhere_for_any_pair():
    n, left = 20_000, 32
    tokens, targets = associative_recall(n, length=40, num_pairs=4, num_queries=6, num_symbols=9, generator=generator())
    share = (targets[:, 8:] != IGNORED).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 6 / left), atol=4 * (6 / left / n) ** 0.5, rtol=0)
    queries = tokens[:, 8:][targets[:, 8:] != IGNORED].view(n, 6)
    share = (queries[..., None] == tokens[:, None, 0:8:2]).double().mean((0, 1))  # of each pair
    torch.testing.assert_close(share, torch.full_like(share, 1 / 4), atol=4 * (1 / 4 / (6 * n)) ** 0.5, rtol=0)


def test_induction_heads_ask_for_what_followed_the_trigger():
    tokens, targets = induction_heads(200, length=12, num_symbols=4, generator=generator())
    assert tokens.shape == targets.shape == (200, 12)
    assert tokens.dtype == targets.dtype == torch.int64
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        first, second = (place for place, token in enumerate(row) if token == 4)
        assert second == 11
        assert max(row[:first] + row[first + 1 : second]) < 4
        assert answers == [IGNORED] * 11 + [row[first + 1]]


def test_induction_heads_put_the_trigger_anywhere():
    n = 20_000
    tokens, targets = induction_heads(n, length=12, num_symbols=4, generator=generator())
    share = (tokens[:, :-1] == 4).double().mean(0)
    assert share[-1] == 0
    torch.testing.assert_close(share[:-1], torch.full((10,), 0.1).double(), atol=4 * (0.09 / n) ** 0.5, rtol=0)
    frequency = targets[:, -1].bincount() / n
    torch.testing.assert_close(frequency, torch.full((4,), 0.25), atol=4 * (0.1875 / n) ** 0.5, rtol=0)


@pytest.mark.parametrize("task", [selective_copying, associative_recall, induction_heads])
def test_a_seed_gives_the_same_batches(task):
    stream, again, other = generator(1), generator(1), generator(2)
    first, second = (task(8, length=128, generator=stream) for _ in range(2))
    for batch in (first, second):
        for tensor, same in zip(batch, task(8, length=128, generator=again), strict=True):
            assert torch.equal(tensor, same)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], task(8, length=128, generator=other)[0])


def test_errors_say_what_is_valid():
    with pytest.raises(ValueError, match=r"num_tokens=21 in length=40; valid: 1 to 20"):
        selective_copying(1, length=40, num_tokens=21, generator=generator())
    with pytest.raises(ValueError, match=r"num_queries=64 .* valid: 1 to 24"):
        associative_recall(1, length=40, generator=generator())
    with pytest.raises(ValueError, match=r"num_pairs=8 .* valid: 1 to 6"):
        associative_recall(1, length=128, num_symbols=6, generator=generator())
    with pytest.raises(ValueError, match=r"length=2; valid: 3 and more"):
        induction_heads(1, length=2, generator=generator())
    for task in (selective_copying, induction_heads):
        with pytest.raises(ValueError, match=r"num_symbols=0; valid: 1 and more"):
            task(1, length=128, num_symbols=0, generator=generator())
