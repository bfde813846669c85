#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon moves float32 parameters by rounding, where their gradient has no part at all.
#
# Expected: an update has the singular vectors of the momentum, to about single precision; a direction that the gradient
# does not have stays where it is.
# Seen: the iteration is in bfloat16 on every device, for parameters of any type. What rounds off in it grows by 3.4 a
# step, like every small singular value, so that after five steps a gradient of rank 1 (64 x 64) has become an update
# with 18 singular values above 0.1, and 69 % of its square lies outside the gradient's one direction; of rank 2 still
# 40 %. The same iteration in float32 leaves less than a millionth there. float64 parameters fare alike.
# A CPU without instructions for bfloat16 (AVX2 alone) takes long for it, too: 5 to 9 ms a step for one matrix of
# 64 x 64, 2.4 s for 512 x 512, where float32 takes 0.3 and 60 to 100 ms.
# Why a user minds: gradients of low rank are usual: few tokens in a batch, inputs behind a norm that takes their mean
# away, a head of few classes. There the weights wander, at the full rate, and nothing shows it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import time

import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # torch.optim.Muon's defaults


def by_pytorch(gradient):
    weight = torch.nn.Parameter(torch.zeros_like(gradient))
    weight.grad = gradient.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    return weight.detach()


def as_it_is(gradient):
    x, (a, b, c) = gradient / gradient.norm(), COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def beyond(update, rank):
    values = torch.linalg.svdvals(update.double())
    return (values[rank:].square().sum() / values.square().sum()).item(), int((values > 0.1).sum())


torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for rank, least in ((1, 0.5), (2, 0.25)):
        gradient = (torch.randn(64, rank) @ torch.randn(rank, 64)).to(dtype)
        (share, count), (own_share, _) = (beyond(form(gradient), rank) for form in (by_pytorch, as_it_is))
        print(f"{dtype}, rank {rank}: {100 * share:.0f} % beyond it, {count} singular values above 0.1; "
              f"the same iteration in {dtype}: {100 * own_share:.1e} %")
        assert share > least and own_share < 1e-6, (dtype, rank, share, own_share)

for n in (64, 512):
    gradient, seconds = torch.randn(n, n), []
    for form in (by_pytorch, as_it_is):
        form(gradient)
        start = time.process_time()
        form(gradient)
        seconds.append(time.process_time() - start)
    print(f"{n} x {n}: {1000 * seconds[0]:.1f} ms of PyTorch's step, {1000 * seconds[1]:.1f} ms in float32")
PYTHON
