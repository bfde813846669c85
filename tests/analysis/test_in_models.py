"""The matrices of blocks in anybody's model, and what a block costs."""

import pytest
import torch
from agreement import assert_close
from torch import nn

import seqzoo
from seqzoo import build_block
from seqzoo.analysis import flops, mixing_matrices, mixing_matrix
from seqzoo.blocks import AsSelfAttention


class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.dropout = nn.Dropout(0.5)
        self.layers = nn.ModuleList(
            [build_block(name, 16, causal=True) for name in ("softmax_attention", "lru", "gla")]
        )

    def forward(self, ids, *, lengths=None):
        x = self.embedding(ids)
        for layer in (*self.layers, self.layers[0]):  # the first is tied
            x = x + self.dropout(layer(x, lengths=lengths))
        return x.mean(1)


def test_every_block_is_found_with_what_it_was_given():
    model, ids, lengths = Mine(), torch.randint(0, 10, (2, 7)), torch.tensor([7, 4])
    found = mixing_matrices(model, ids, lengths=lengths)
    assert [*found] == ["layers.0", "layers.1", "layers.2", "layers.0#2"]
    assert [list(each.shape) for each in found.values()] == [[2, 4, 7, 7], [2, 1, 7, 7], [2, 4, 7, 7], [2, 4, 7, 7]]
    assert all(module.training for module in model.modules())
    x = model.embedding(ids)
    model.eval()
    for n, layer in enumerate(model.layers):
        assert torch.equal(found[f"layers.{n}"], mixing_matrix(layer, x, lengths))
        x = x + layer(x, lengths=lengths)
    assert torch.equal(found["layers.0#2"], mixing_matrix(model.layers[0], x, lengths))
    assert torch.equal(mixing_matrices(layer, x)[""], mixing_matrix(layer, x))


@pytest.mark.parametrize("name", ["softmax_attention", "lru"])
def test_padding_on_either_side_stays_where_it_is(name):
    block = build_block(name, 16).double()
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True).double()
    layer.self_attn = AsSelfAttention(block)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    hidden = torch.tensor([[False] * 6, [True, True, False, False, False, True]])
    (weights,) = mixing_matrices(layer, x, src_key_padding_mask=hidden).values()
    y = layer.norm1(x)
    if name == "softmax_attention":
        alone = mixing_matrix(block, y[1:, 2:5])
        assert_close(weights[1:, :, 2:5, 2:5], alone, 1e-12)
    assert (weights[1][:, hidden[1]] == 0).all()
    assert (weights[1][:, :, hidden[1]] == 0).all()
    assert (weights[1, :, 2:5, 2:5] != 0).all()


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ValueError, match="Linear has no block inside; valid: a module with a seqzoo"):
        mixing_matrices(nn.Linear(2, 2), torch.ones(1, 2))
    block = build_block("gla", 16)
    with pytest.raises(ValueError, match="GLA was given cu_seqlens; valid: padded sequences from their beginning"):
        mixing_matrices(block, torch.randn(1, 5, 16), cu_seqlens=torch.tensor([0, 2, 5]))


def test_a_loss_may_be_on_the_matrix():
    block, x = build_block("softmax_attention", 16), torch.randn(1, 5, 16)
    assert not mixing_matrix(block, x).requires_grad
    mixing_matrix(block, x, grad=True).square().sum().backward()
    assert block.qkv_proj.weight.grad.any()


def test_operations_of_a_block():
    T, d = 32, 16
    assert flops(build_block("softmax_attention", d), T) == 2 * T * 4 * d * d + 2 * 2 * T * T * d
    assert flops(build_block("min_gru", d), T) == 2 * T * 2 * d * d
    assert seqzoo.flops is flops
    for dtype in (torch.bfloat16, torch.float64):
        block = build_block("mlstm", d)
        assert flops(block.to(dtype), T) == flops(build_block("mlstm", d), T)
    block = build_block("lru", d, causal=True).train()
    flops(block, T)
    assert block.training
    assert block.out_proj.weight.device.type == "cpu"
    with pytest.raises(ValueError, match="flops: T=0; valid: 1 step and more"):
        flops(block, 0)
