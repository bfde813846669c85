#!/usr/bin/env bash
# rotary-embedding-torch 0.9.1: queries in bfloat16 are rotated by rounded positions: beyond 256 neighbours are one.
#
# Expected: queries in bfloat16 are rotated as in single precision, to bfloat16's rounding (0.003), at any position: the
# module makes its angles outside autocast.
# Seen: positions take the queries' dtype before they meet the frequencies. In bfloat16 257 is 256, and beyond 1,024 eight
# positions are one, so that queries are off by 0.2 and more of their length, although frequencies are in single precision.
# A model that is cast as a whole rounds its frequencies, too. Queries that are made float32 first are right.
# Output: "position 10: 0.0024, 257: 0.2, 2047: 0.2", "cast as a whole 2047: 0.3", "queries in float32 2047: 0".
# Why a user minds: under autocast a projection's queries are in bfloat16: training reads distances of neighbours as 0, worse
# the longer the sequence, without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 rotary-embedding-torch==0.9.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from rotary_embedding_torch import RotaryEmbedding

torch.manual_seed(0)
x = torch.randn(1, 1, 2048, 32)
projection = torch.nn.Linear(32, 32)


def off(rotary, single=False):
    """How far each position's query is off, of its length."""
    with torch.autocast("cpu", torch.bfloat16):
        queries = projection(x)
        assert queries.dtype == torch.bfloat16
        rotated = rotary.rotate_queries_or_keys(queries.float() if single else queries).float()
    right = RotaryEmbedding(32).rotate_queries_or_keys(queries.float())
    return ((rotated - right).norm(dim=-1) / right.norm(dim=-1))[0, 0]


seen, cast, single = off(RotaryEmbedding(32)), off(RotaryEmbedding(32).bfloat16()), off(RotaryEmbedding(32), single=True)
print(f"position 10: {seen[10]:.2g}, 257: {seen[257]:.2g}, 2047: {seen[2047]:.2g}")
print(f"cast as a whole 2047: {cast[2047]:.2g}\nqueries in float32 2047: {single[2047]:.2g}")
assert seen[10] < 0.02 and seen[257] > 0.1 and seen[2047] > 0.1 and cast[2047] > 0.1
assert single.max() < 1e-6
PYTHON
