from __future__ import annotations

import time

import torch

from seqzoo.training.peak import SIZES, matmul_flops_per_second


def test_no_product_of_ours_is_faster_than_the_peak():
    """Measured before and behind it: others may have the processor meanwhile."""
    device, n = torch.device("cpu"), SIZES["cpu"]
    measure = matmul_flops_per_second.__wrapped__
    before = measure(device, "fp32")
    a = torch.randn(n, n)
    start = time.perf_counter()
    a @ a
    seconds = time.perf_counter() - start
    assert 1e8 < 2 * n**3 / seconds < 2 * max(before, measure(device, "fp32"))


def test_a_peak_is_measured_once():
    device = torch.device("cpu")
    assert matmul_flops_per_second(device, "fp32") == matmul_flops_per_second(device, "fp32")


def test_half_precision_has_a_peak_of_its_own():
    device = torch.device("cpu")
    assert matmul_flops_per_second(device, "bf16") != matmul_flops_per_second(device, "fp32")
