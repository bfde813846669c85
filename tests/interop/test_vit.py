"""Blocks in vision transformers of timm."""

import pytest
import torch

import seqzoo
from seqzoo import BLOCKS, build_block, replace


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))  # of a torchvision for other devices


def vit(timm, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**{**sizes, **options})


PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_its_weights_fit(timm):
    model = vit(timm, qkv_bias=True).eval()
    before = model(PICTURES)
    options = {"num_heads": 2, "rotary": False, "bias": True}
    changed = replace(model, timm.layers.Attention, lambda old: build_block("softmax_attention", 16, **options))
    assert [each.name for each in changed] == ["blocks.0.attn", "blocks.1.attn"]
    assert changed[0].copied == ("proj.bias", "proj.weight", "qkv.bias", "qkv.weight")
    assert changed[0].left == ()
    torch.testing.assert_close(model(PICTURES), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax_attention", "lru"])
def test_a_class_for_its_attention(timm, name):
    model = vit(timm, attn_layer=seqzoo.timm_attention(name), qkv_bias=True)
    block = model.blocks[0].attn.block
    assert isinstance(block, BLOCKS[name])
    if name == "softmax_attention":
        assert (block.num_heads, block.rotary, block.qkv_proj.bias is None) == (2, False, False)
    model(PICTURES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_its_weights_begin_as_the_block_does(timm):
    """timm draws them anew: with a standard deviation of 0.02, and biases of zero."""
    model = vit(timm, attn_layer=seqzoo.timm_attention("mamba"))
    drawn, alone = model.blocks[0].attn.block.state_dict(), build_block("mamba", 16).state_dict()
    for key, value in alone.items():
        if value.numel() > 64:
            assert drawn[key].std() == pytest.approx(value.std().item(), rel=0.5), key


def test_refusals(timm):
    with pytest.raises(ValueError, match="no block 'lrv'"):
        seqzoo.timm_attention("lrv")
    with pytest.raises(ValueError, match="qk_norm=True: no block has it"):
        vit(timm, attn_layer=seqzoo.timm_attention("lru"), qk_norm=True)
    with pytest.raises(ValueError, match="attn_head_dim=16: no block has it"):
        seqzoo.timm_attention("lru")(32, num_heads=4, attn_head_dim=16, dim_out=32)
    eva = timm.models.Eva(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, use_rot_pos_emb=True)
    with pytest.raises(ValueError, match="EvaAttention is called with rope, which no block takes"):
        replace(eva, timm.models.eva.EvaAttention, lambda old: build_block("lru", 16))
