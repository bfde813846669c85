#!/usr/bin/env bash
# transformers 5.23.0: packed sequences see each other as soon as there is a cache, which is the default, or a mask of ones.
#
# Expected: where position_ids begin anew in a row, a decoder keeps the sequences apart, as it does with use_cache=False and
# without an attention_mask; an attention_mask of ones, which says that nothing is padded, changes nothing.
# Seen: with the default use_cache=True, in training mode too, and with a mask of ones, the second sequence of a row attends
# to the first: logits are off by as much as they are large. Neither sdpa nor eager says a word.
# Why a user minds: packed training leaks between documents unless use_cache=False is given and the mask that every
# tokenizer returns is taken out; losses look plausible, and a little better.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
first, second = torch.randint(1, 97, (2, 1, 6))
row, places = torch.cat([first, second], 1), torch.arange(6).repeat(2)[None]


@torch.no_grad()
def leak(model, **options):
    """By how much the second sequence of the row is not what it is alone, of its size."""
    alone = model(second).logits
    packed = model(row, position_ids=places, **options).logits[:, 6:]
    return float((packed - alone).abs().max() / alone.abs().max())


for implementation in ("sdpa", "eager"):
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    model.set_attn_implementation(implementation)
    found = {
        "use_cache=False": leak(model, use_cache=False),
        "as it comes": leak(model),
        "use_cache=False and a mask of ones": leak(model, use_cache=False, attention_mask=torch.ones_like(row)),
    }
    print(implementation, {case: f"{size:.0e}" for case, size in found.items()})
    assert found["use_cache=False"] < 1e-5, found
    assert found["as it comes"] > 0.1, found
    assert found["use_cache=False and a mask of ones"] > 0.1, found
PYTHON
