#!/usr/bin/env bash
# schedulefree 1.4.1: AdamWScheduleFree and RAdamScheduleFree move complex parameters in other directions than down.
#
# Expected: a complex parameter is two real ones, as torch.optim.Adam and AdamW have it, or it is refused, as Prodigy does.
# Seen: squares of gradients are summed without conjugating, so that the square root of the average of a gradient that
# points along the imaginary axis is imaginary too, and the quotient real: asked to go to i, the first step goes along
# the real axis. The same problem as two real columns, and SGDScheduleFree with complex numbers, converge.
# Output: of a distance squared of 5.25, left after 300 steps: "Adam: complex 2.8e-13, real 2.8e-13", "AdamWScheduleFree:
# complex 8, real 5.5e-05", "RAdamScheduleFree: complex 2.9, real 0.019", "SGDScheduleFree: complex 5.1e-06, real 5.1e-06";
# "first step of AdamWScheduleFree towards i: 0.05+0.00i".
# Why a user minds: LRU, S4 and S5 have complex matrices. A loss that falls because the real parameters train hides that
# these wander, and changing the optimiser looks like a result about the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 schedulefree==1.4.1
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import schedulefree
import torch

TARGET = torch.tensor([1j, -1j, 1 + 1j, -1 + 0.5j])


def outcome(optimiser, lr, real):
    """The squared distance left, and where the first step led."""
    start = torch.zeros(4, 2) if real else torch.zeros(4, dtype=torch.complex64)
    parameter = torch.nn.Parameter(start)
    steps = optimiser([parameter], lr=lr)
    if hasattr(steps, "train"):
        steps.train()

    def away():
        z = torch.view_as_complex(parameter) if real else parameter
        return (z - TARGET).abs().square().sum()

    for step in range(300):
        steps.zero_grad()
        away().backward()
        steps.step()
        if step == 0:
            first = parameter.detach()[0].clone()
    if hasattr(steps, "eval"):
        steps.eval()
    return away().item(), first


CHOSEN = {torch.optim.Adam: 0.02}
CHOSEN |= {getattr(schedulefree, f"{name}ScheduleFree"): 0.05 for name in ("AdamW", "RAdam", "SGD")}
left = {}
for optimiser, lr in CHOSEN.items():
    (of_complex, first), (of_real, _) = (outcome(optimiser, lr, real) for real in (False, True))
    left[optimiser.__name__] = of_complex, of_real
    print(f"{optimiser.__name__}: complex {of_complex:.2g}, real {of_real:.2g}")
    if optimiser.__name__ == "AdamWScheduleFree":
        print(f"first step of AdamWScheduleFree towards i: {first.real:.2f}{first.imag:+.2f}i")
        assert first.real > 0.04 and abs(first.imag) < 1e-3, first
for name, (of_complex, of_real) in left.items():
    assert of_real < 0.05, (name, of_real)
    assert of_complex > 1 if name in ("AdamWScheduleFree", "RAdamScheduleFree") else of_complex < 0.05, (name, of_complex)
PYTHON
