#!/usr/bin/env bash
# torch 2.13.0: torch.utils.flop_counter counts no attention on a CPU, channels² for a depthwise gradient, complex as real.
#
# Expected: what an operation takes is counted alike on every device, 2 for a multiplication and an addition: attention as its
# two products; the gradients of a convolution twice its forward pass; a product of complex numbers as four real ones.
# Seen: scaled_dot_product_attention on a CPU counts 0, forward and backward, where "meta" and the MATH backend count it (a
# causal one in full). A depthwise convolution counts right forward; its weights' gradient counts as if every channel met
# every other: 34 times too much in all at 32 channels. Complex matrix products count as real ones; a matrix times a vector
# and an LSTM count 0.
# Output: "attention: cpu 0, math 4194304, meta 4194304", "depthwise, forward and backward: 1793024 for 158208",
# "complex product: 65536 for 262144", "matrix times vector: 0 for 4096", "LSTM: 0 for 409600".
# Why a user minds: models are compared at equal operations: counted where they train, Transformers come out free and short
# convolutions dear, and a training budget in FLOP is off by factors without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def attend(device):
    q = torch.zeros(1, 4, 128, 16, device=device)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


cpu, meta = count(lambda: attend("cpu")), count(lambda: attend("meta"))
with sdpa_kernel(SDPBackend.MATH):
    math = count(lambda: attend("cpu"))

x, kernel = torch.zeros(2, 32, 100, requires_grad=True), torch.zeros(32, 1, 4, requires_grad=True)
depthwise = count(lambda: F.conv1d(x, kernel, groups=32, padding=3).sum().backward())
z, w = torch.zeros(64, 32, dtype=torch.complex64), torch.zeros(32, 16, dtype=torch.complex64)
products = count(lambda: z @ w)
vector = count(lambda: z.real @ z.real[0])
lstm = torch.nn.LSTM(16, 16)
recurrent = count(lambda: lstm(torch.zeros(50, 2, 16)))

print(f"attention: cpu {cpu}, math {math}, meta {meta}")
print(f"depthwise, forward and backward: {depthwise} for {3 * 2 * 2 * 32 * 103 * 4}")
print(f"complex product: {products} for {4 * 2 * 64 * 32 * 16}")
print(f"matrix times vector: {vector} for {2 * 64 * 32}")
print(f"LSTM: {recurrent} for {2 * 50 * 2 * 8 * 16 * 16}")
assert cpu == 0 and math == meta == 2 * 2 * 4 * 128 * 128 * 16
assert depthwise > 10 * 3 * 2 * 2 * 32 * 103 * 4
assert products == 2 * 64 * 32 * 16 and vector == recurrent == 0
PYTHON
