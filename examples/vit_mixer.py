"""A vision transformer of timm whose attention is replaced: by the same in seqzoo, then by a block that is linear.

    python examples/vit_mixer.py
    python examples/vit_mixer.py --block gla

About half a minute on two CPU cores, with pictures of stripes that either rise or fall, under noise.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import seqzoo


def stripes(n: int) -> tuple[Tensor, Tensor]:
    """n pictures of 32 x 32 in three colours, and whether their stripes rise."""
    rises = torch.randint(2, (n,))
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    along = x + torch.where(rises == 1, 1, -1)[:, None, None] * y
    waves = torch.sin(along / torch.empty(n, 1, 1).uniform_(1.5, 3) + torch.empty(n, 1, 1).uniform_(0, 6.3))
    return waves[:, None] + torch.randn(n, 3, 32, 32), rises


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", default="lru", help="a block of seqzoo")
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 2}
    model = timm.models.VisionTransformer(**sizes).eval()
    pictures, _ = stripes(8)
    before = model(pictures)
    same = {"num_heads": 4, "rotary": False, "bias": True}
    print(
        *seqzoo.replace(model, timm.layers.Attention, lambda old: seqzoo.build_block("softmax_attention", 48, **same)),
        sep="\n",
    )
    print(f"the same to {(model(pictures) - before).abs().max():.0e}")

    seqzoo.replace(model, seqzoo.blocks.SoftmaxAttention, lambda old: seqzoo.build_block(arguments.block, 48))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    seqzoo.attach(model, optimizer)
    for step in range(arguments.steps):
        pictures, rises = stripes(32)
        loss = F.cross_entropy(model(pictures), rises)
        (loss + seqzoo.auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    pictures, rises = stripes(500)
    with torch.no_grad():
        right = (model.eval()(pictures).argmax(1) == rises).float().mean()
    print(f"{arguments.block} tells rising from falling stripes in {right:.0%} of pictures")


if __name__ == "__main__":
    main()
