"""Blocks to hold to what every block promises, and inputs for them."""

from functools import partial

import pytest
import torch

from seqzoo import BLOCKS, build_block
from seqzoo.blocks.cache import KeyValueCache
from seqzoo.testing import parameter_gradients as parameter_gradients
from seqzoo.testing import prepared
from seqzoo.testing import sequences as sequences

VARIANTS = {  # the default options of each block, and those that take another way through it
    "softmax_attention": [
        {},
        {"num_kv_heads": 1, "entropy_length": 64, "bias": True},
        {"rotary": False, "num_kv_heads": 2},
        {"window": 7, "num_kv_heads": 2, "entropy_length": 64},
    ],
    "linear_attention": [
        {},
        {"feature_map": "relu", "num_heads": 1},
        {"feature_map": "silu", "normalize": False, "decay": True, "rotary": True},
        {"decay": True, "bias": True},
    ],
    "vq_attention": [
        {"codebook_size": 8, "block_len": 8, "num_heads": 4},
        {"codebook_size": 4, "block_len": 3, "expand": 1, "codebook_start": "kmeans", "restart": 1.0},
        {"codebook_size": 25, "block_len": 5, "quantizer": "fsq"},
    ],
    "performer": [{}, {"num_features": 7, "num_heads": 2, "bias": True}, {"num_features": 1, "num_heads": 1}],
    "gau": [
        {"chunk_len": 8, "key_dim": 6},
        {"chunk_len": 5, "key_dim": 16, "expand": 1.5, "distance_bias": False, "rotary": False, "bias": True},
        {"attention": "relu2_n2", "key_dim": 8, "bias": True},
        {"attention": "relu2_ns", "key_dim": 7, "rotary": False},
        {"attention": "softmax", "key_dim": 8},
    ],
    "lru": [{}, {"state_dim": 6, "r_min": 0.0, "r_max": 0.9, "dropout": 0.5}],
    "s4d": [{"state_dim": 4}, {"state_dim": 8, "dt_max": 1.0}, {"state_dim": 4, "init": "dfout"}],
    "conv": [{}, {"width": 61, "dropout": 0.5}, {"width": 1}],
    "retnet": [{}, {"num_heads": 2, "expand": 1.5}],
    "mamba2": [
        {"num_heads": 4, "state_dim": 8},
        {"num_heads": 4, "state_dim": 5, "num_groups": 2, "expand": 1.5, "conv_width": 3, "dt_max": 1.0},
        {"num_heads": 1, "state_dim": 1, "conv_width": 1},
    ],
    "mamba3": [
        {"num_heads": 4, "state_dim": 8},
        {"num_heads": 4, "state_dim": 7, "num_groups": 2, "expand": 1.5, "dt_max": 1.0},
    ],
    "gla": [{}, {"num_heads": 2, "gate_rank": 3, "gate_temperature": 1.0, "gate_bias": 2.0}],
    "hgrn2": [{}, {"num_heads": 2, "lower_bound": 0.5, "gate_bias": -1.0}],
    "mlstm": [{}, {"num_heads": 3, "expand": 1.5, "conv_width": 1, "projection_width": 6}],
    "min_gru": [{}, {"cell": "lstm", "expand": 1.5, "gate_bias": -1.0}],
    "rg_lru": [{}, {"state_dim": 12, "num_heads": 3, "conv_width": 2, "r_min": 0.5}],
    "s5": [{}, {"state_dim": 12, "num_blocks": 3, "discretization": "bilinear", "dt_max": 1.0, "dropout": 0.5}],
    "mamba": [{"state_dim": 4}, {"state_dim": 3, "expand": 1, "dt_rank": 2, "conv_width": 1, "dt_max": 1.0}],
    "delta_net": [{}, {"num_heads": 2, "conv_width": 1, "negative_eigenvalues": True}],
    "gated_delta_net": [
        {},
        {"num_heads": 4, "num_key_heads": 2, "expand_k": 1.0, "expand": 1.0, "conv_width": 3, "dt_max": 1.0},
        {"num_heads": 1, "conv_width": 2, "negative_eigenvalues": True},
    ],
    "kda": [{}, {"num_heads": 2, "conv_width": 2, "negative_eigenvalues": True, "dt_max": 1.0}],
    "rwkv7": [{}, {"num_heads": 1, "depth": 0.0}],
}
D = 16
CASES = [
    pytest.param(name, options, causal, id=f"{name}-{n}-{'causal' if causal else 'bidirectional'}")
    for name in BLOCKS
    for n, options in enumerate(VARIANTS.get(name, [{}]))
    for causal in (True, False)
]
DEFAULTS = [case for case in CASES if "-0-" in str(case.id)]
defaults = pytest.mark.parametrize(("name", "options", "causal"), DEFAULTS)
IN_ONE_DIRECTION = [
    case for case in CASES if str(case.id).endswith(("-1-bidirectional", "-2-causal", "-3-bidirectional", "-4-causal"))
]


def soon(first, cases):
    """Those of `cases` that are among `first` in every run, the others with -m slow."""
    chosen = {case.id for case in first}
    return pytest.mark.parametrize(
        ("name", "options", "causal"),
        [
            case if case.id in chosen else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
            for case in cases
        ],
    )


every = soon([*DEFAULTS, *IN_ONE_DIRECTION], CASES)

CAUSAL_DEFAULTS = [case for case in DEFAULTS if case.values[2]]
ONE_EACH = (
    *("softmax_attention", "linear_attention", "performer", "vq_attention", "gau"),
    *("lru", "s4d", "conv", "mamba", "kda"),
)
OF_EACH_OPERATION = [case for case in CAUSAL_DEFAULTS if case.values[0] in ONE_EACH]


def make(name, options, causal, *, d_model=D, dtype=torch.float64, train=False):
    return prepared(lambda: build_block(name, d_model, causal=causal, **options), dtype=dtype, train=train)


def assert_states_of_graphs_close(found, expected, **tolerances):
    """States that graphs returned, as tuples, and what `extend` returns; of a cache, what is filled."""
    if isinstance(expected, KeyValueCache):
        found, filled = KeyValueCache(*found), expected.position.max()
        assert torch.equal(found.written, torch.full_like(expected.written, -1)), "they are nobody's to write into"
        found, expected = (
            (state.keys[:, :filled], state.values[:, :filled], state.position) for state in (found, expected)
        )
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, **tolerances)


def builder(name, options, causal):
    """What the checks of `seqzoo.testing` take."""
    return partial(make, name, options, causal)
