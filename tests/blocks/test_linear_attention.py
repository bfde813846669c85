"""Feature maps of linear attention."""

from __future__ import annotations

import pytest
import torch

from seqzoo.blocks.linear_attention import elu_plus_one


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_elu_plus_one_has_its_digits_where_it_is_small(dtype, tolerance):
    x = torch.tensor([-9.5, -6.0, -1e-3, 0.0, 0.5, 7.0], dtype=dtype, requires_grad=True)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    y = elu_plus_one(x)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.double(), exact.clamp(max=1), rtol=tolerance, atol=0)
