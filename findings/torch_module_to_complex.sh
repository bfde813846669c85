#!/usr/bin/env bash
# torch 2.13.0 and lightning-fabric 2.6.6: Module.to(torch.bfloat16) makes complex parameters real; Module.bfloat16() leaves them.
#
# Expected: `.to(torch.bfloat16)` is `.bfloat16()`, and `.to(torch.float64)` is `.double()`; a complex parameter stays complex,
# in the precision asked for where there is one.
# Seen: `.to` with a real dtype takes the real parts of complex parameters and buffers, and the rest is gone; all that is
# said is PyTorch's warning about casting, once in a process. `.bfloat16()`, `.half()` and `.double()` leave them in
# complex64, the last one too, so that a model "in double precision" is not. Fabric's precision "bf16-true" and "16-true"
# call `.to`, "64-true" calls `.double()`.
# Output: "to(bfloat16): bfloat16, bfloat16()  complex64, to(float64): float64, double(): complex64", "Fabric bf16-true:
# bfloat16, 16-true: float16, 64-true: complex64", "after to(float64) outputs are off by 0.71, after double() by 1e-07".
# Why a user minds: an LRU or S4 with complex matrices goes on training with half of its parameters cut off and no phases, and
# which of two spellings of one call was used decides that; a reference in double precision agrees to single precision only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning-fabric==2.6.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> messages <<'PYTHON' || { cat messages; exit 1; }
import torch
from lightning_fabric import Fabric


class Mixer(torch.nn.Module):
    """A sum of inputs, weighed by powers of poles on a circle, in and out by complex matrices."""

    def __init__(self):
        super().__init__()
        self.log_radius = torch.nn.Parameter(torch.full((8,), -0.1))
        self.phase = torch.nn.Parameter(torch.rand(8))
        self.B = torch.nn.Parameter(torch.randn(8, 4, dtype=torch.complex64))
        self.C = torch.nn.Parameter(torch.randn(4, 8, dtype=torch.complex64))

    def forward(self, x):
        pole = torch.exp(torch.complex(self.log_radius, self.phase))
        powers = pole ** torch.arange(x.shape[0] - 1, -1, -1)[:, None]
        state = (powers * (x.to(self.B.dtype) @ self.B.mT)).sum(0)
        return (self.C.to(state.dtype) @ state).real


def fresh():
    torch.manual_seed(0)
    return Mixer()


def dtype(model):
    return str(model.B.dtype).removeprefix("torch.")


CASTS = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "bfloat16()": lambda model: model.bfloat16(),
    "to(float64)": lambda model: model.to(torch.float64),
    "double()": lambda model: model.double(),
}
seen = {name: dtype(cast(fresh())) for name, cast in CASTS.items()}
print(", ".join(f"{name}: {kind}" for name, kind in seen.items()))


def in_fabric(precision):
    return dtype(Fabric(accelerator="cpu", devices=1, precision=precision).setup_module(fresh()))


fabric = {precision: in_fabric(precision) for precision in ("bf16-true", "16-true", "64-true")}
print("Fabric " + ", ".join(f"{precision}: {kind}" for precision, kind in fabric.items()))
torch.manual_seed(1)
x = torch.randn(12, 4)
with torch.no_grad():
    right = fresh()(x).double()
    off = {name: ((CASTS[name](fresh())(x.double()) - right).norm() / right.norm()).item() for name in ("to(float64)", "double()")}
print(f"after to(float64) outputs are off by {off['to(float64)']:.2g}, after double() by {off['double()']:.0e}")
assert seen == {"to(bfloat16)": "bfloat16", "bfloat16()": "complex64", "to(float64)": "float64", "double()": "complex64"}, seen
assert fabric == {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "complex64"}, fabric
assert off["to(float64)"] > 0.1 and off["double()"] < 1e-4, off
PYTHON
