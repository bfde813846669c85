#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon with nesterov=False shrinks its momentum in place where parameters are bfloat16.
#
# Expected: the orthogonalisation of an update works on a copy, and the momentum goes on as an average of gradients,
# which is what happens in float32.
# Seen: the copy is `grad.bfloat16()`, which is the buffer itself where that is bfloat16 already, and what follows
# divides it by its own norm in place. After every step the buffer has norm 1, whatever the gradients were: after one
# gradient of norm 48 it has 1.0, where float32 has 2.4.
# Why a user minds: nothing fails; the momentum forgets nearly everything where gradients are larger than 1, and hardly
# takes anything in where they are smaller. Who trains bfloat16 weights without Nesterov's step has another optimiser.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def momentum_after_one_step(dtype, nesterov):
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = torch.optim.Muon([weight], nesterov=nesterov)
    weight.grad = torch.full_like(weight, 0.75)
    optimizer.step()
    return optimizer.state[weight]["momentum_buffer"].float().norm().item()


norms = {
    (str(dtype), nesterov): momentum_after_one_step(dtype, nesterov)
    for dtype in (torch.float32, torch.bfloat16)
    for nesterov in (True, False)
}
for (dtype, nesterov), norm in norms.items():
    print(f"{dtype}, nesterov={nesterov}: norm of the momentum {norm:.3f}, expected 2.4")
for (dtype, nesterov), norm in norms.items():
    shrunk = dtype == "torch.bfloat16" and not nesterov
    assert abs(norm - (1.0 if shrunk else 2.4)) < 0.02, (dtype, nesterov, norm)
PYTHON
