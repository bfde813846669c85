#!/usr/bin/env bash
# torch 2.13.0: a complex parameter that a model uses only as `B.mH` or `B.conj()` cannot be trained by Adam, nor clipped.
#
# Expected: torch.optim supports complex parameters, so that x @ B.mH trains as x @ C with C = B.mH does.
# Seen: such a use leaves a gradient that is conjugated by a flag (`grad.is_conj()`), and AccumulateGrad keeps it as it comes.
# Adam and AdamW, with foreach and without, raise "view_as_real doesn't work on unresolved conjugated tensors" in step(), and
# clip_grad_norm_ "fallback doesn't currently support mutable TensorLists with conjugate inputs"; SGD with momentum trains.
# Two uses, or a second backward before the step, make the flag vanish, and everything works.
# Output: "B.mH: flag True, Adam RuntimeError, AdamW RuntimeError, SGD trained, clip_grad_norm_ RuntimeError", "x * c.conj():"
# the same, "B.mH twice: flag False, Adam trained, AdamW trained, SGD trained, clip_grad_norm_ trained".
# Why a user minds: the hermitian transpose is how one writes an inner product or the way back of a unitary; the message names
# neither the parameter nor what to do, and gradient accumulation or a term more in the loss decides whether it comes at all.
# `B.mH.resolve_conj()` does not help; `B.mT.conj_physical()`, or a hook that resolves the gradient, does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch

x = torch.randn(8, 4, dtype=torch.complex64)
FORMS = {
    "B.mH": lambda B: x @ B.mH,
    "x * c.conj()": lambda c: x * c.conj(),
    "B.mH twice": lambda B: x @ B.mH @ B.mH,
    "B.mT.conj_physical()": lambda B: x @ B.mT.conj_physical(),
    "B.mH.resolve_conj()": lambda B: x @ B.mH.resolve_conj(),
}
DONE = {
    "Adam": lambda p: torch.optim.Adam([p]).step(),
    "AdamW": lambda p: torch.optim.AdamW([p], foreach=False).step(),
    "SGD": lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9).step(),
    "clip_grad_norm_": lambda p: torch.nn.utils.clip_grad_norm_([p], 1e-3),
}


def outcome(form, done):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(*((4,) if "c" in form[:5] and "*" in form else (4, 4)), dtype=torch.complex64))
    FORMS[form](parameter).abs().square().sum().backward()
    flag = parameter.grad.is_conj()
    try:
        DONE[done](parameter)
    except RuntimeError as error:
        assert "conjugate" in str(error), error
        return flag, "RuntimeError"
    return flag, "trained"


found = {form: {done: outcome(form, done) for done in DONE} for form in FORMS}
for form, results in found.items():
    flag = results["Adam"][0]
    print(f"{form}: flag {flag}, " + ", ".join(f"{done} {result}" for done, (_, result) in results.items()))
PYTHON
