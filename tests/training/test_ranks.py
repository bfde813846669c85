"""What several ranks share: the steps of sequences, and the model."""

from __future__ import annotations

import pytest
import torch
from parts_cases import CASES, SHAPES
from ranks import on_ranks
from shard_cases import everything

from seqzoo.blocks import BLOCKS, Part, build_block

EACH_KIND = [  # the first options of each, in both directions
    case
    for name in ("linear_attention", "lru", "s4d", "retnet", "mamba2", "gated_delta_net")
    for case in [case for case in CASES if case[0] == name][:2]
]
SHARING = ("conv", "delta_net", "gated_delta_net", "kda", "linear_attention", "lru", "mamba2", "retnet", "s4d", "s5")


def state_bytes(name: str, d: int, B: int) -> tuple[int, int]:
    """Of a memory, and of an edge of the convolution a step wide."""
    block = build_block(name, d, causal=True)
    memory, *others = block.initial_state(B)
    inputs = others[0] if len(others) == 2 else None
    return memory.nbytes, 0 if inputs is None else inputs[:, :1].nbytes


def expected_bytes(name: str, causal: bool, rank: int, ranks: int, *, d: int = 16, B: int = 2) -> int:
    """Forward to the next rank and, of gradients, back to the one before; in both directions as much the other way."""
    memory, edge = state_bytes(name, d, B)
    following, before = rank < ranks - 1, rank > 0
    if causal:
        return (following + before) * (
            memory + (build_block(name, d, causal=True).conv.width - 1 if edge else 0) * edge
        )
    width = build_block(name, d).conv.width // 2 if edge else 0
    return 2 * (following + before) * (memory + width * edge)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(everything, 2, folder, EACH_KIND, SHAPES[1:2], folder)


def check(found, ranks):
    for rank, errors in enumerate(found):
        # Losses, and all of what is in shards, are in single precision.
        for what, bound in (("blocks", 1e-10), ("models", 1e-6), ("shards", 1e-5)):
            for case, error in errors[what].items():
                assert error < bound, (rank, case)
        for (name, causal, T), sent in errors["bytes"].items():
            assert sent == expected_bytes(name, causal, rank, ranks), (rank, name, causal, T)


def test_two_ranks_compute_what_one_does(two):
    """Of parts of the time values and gradients, of blocks and of models, and what they send does not grow with the
    steps. Of shards weights, moments, checkpoints and what goes on from them, and what blocks extend to."""
    check(two, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_ranks_compute_what_one_does(ranks, tmp_path):
    check(on_ranks(everything, ranks, tmp_path, CASES, SHAPES, tmp_path), ranks)


def test_a_block_without_a_recurrence_refuses(one_rank):
    part = Part(8)
    for name in BLOCKS:
        block, x = build_block(name, 16), torch.zeros(1, 8, 16)
        if name in SHARING:
            block.require_parts()
            continue
        with pytest.raises(
            ValueError, match=r"cannot be given parts of the time.* valid: whole sequences on each rank"
        ):
            block(x, part=part)


def test_a_part_is_of_padded_sequences_and_of_its_own_steps(one_rank):
    block, x = build_block("lru", 16), torch.zeros(1, 8, 16)
    with pytest.raises(ValueError, match="a mask or cu_seqlens; valid with it: lengths"):
        block(x, part=Part(8), cu_seqlens=torch.tensor([0, 3, 8]))
    with pytest.raises(ValueError, match=r"x has 8 steps; valid: part.own\(x\) of all 9"):
        block(x, part=Part(9))
    with pytest.raises(ValueError, match="0 steps for 1 ranks"):
        Part(0)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
