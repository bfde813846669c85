from __future__ import annotations

import time

import torch

from seqzoo.training.peak import SIZES, matmul_flops_per_second


def test_no_product_of_ours_is_faster_than_the_peak():
    device = torch.device("cpu")
    peak = matmul_flops_per_second(device, "fp32")
    n = SIZES["cpu"]
    a = torch.randn(n, n)
    start = time.perf_counter()
    a @ a
    assert 1e8 < 2 * n**3 / (time.perf_counter() - start) < 2 * peak
    assert matmul_flops_per_second(device, "fp32") == peak, "measured once"


def test_half_precision_has_a_peak_of_its_own():
    device = torch.device("cpu")
    assert matmul_flops_per_second(device, "bf16") != matmul_flops_per_second(device, "fp32")
