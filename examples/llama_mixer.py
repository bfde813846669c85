"""A Llama of transformers whose attention is a block of seqzoo: it learns bytes of a text, and goes on writing it.

    python examples/llama_mixer.py
    python examples/llama_mixer.py --block mamba2 --steps 500 --text book.txt

About a minute on two CPU cores. `generate` keeps the block's state in place of keys and values, which does not grow.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import seqzoo

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--block", default="lru", help="a causal block of seqzoo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--text", type=Path, nargs="*", default=sorted((ROOT / "docs").glob("*.md")))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in arguments.text)), dtype=torch.uint8).long()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=10, eos_token_id=None, pad_token_id=0, **sizes))
    changed = seqzoo.replace(model, LlamaAttention, lambda old: seqzoo.build_block(arguments.block, 64, causal=True))
    print(*changed, sep="\n")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    seqzoo.attach(model, optimizer)  # for blocks that learn beside the gradient
    for step in range(arguments.steps):
        begins = torch.randint(len(text) - LENGTH, (8,))
        batch = text[begins[:, None] + torch.arange(LENGTH)]
        loss = model(batch, labels=batch, use_cache=False).loss
        (loss + seqzoo.auxiliary_loss(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == arguments.steps - 1:
            print(f"step {step}: {loss.item() / 0.6931:.2f} bits a byte")

    model.eval()
    prompt = text[:LENGTH][None]
    for n in (100, 200):
        begun = time.perf_counter()
        y = model.generate(prompt, max_new_tokens=n, do_sample=True, top_k=10, return_dict_in_generate=True)
        state = sum(part.nbytes for layer in y.past_key_values.layers for part in layer.state)
        seconds = time.perf_counter() - begun
        print(f"{n} bytes more: {seconds / n * 1000:.1f} ms each, a state of {state:,} bytes")
    print(bytes(y.sequences[0, LENGTH:].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
