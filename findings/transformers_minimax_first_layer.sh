#!/usr/bin/env bash
# transformers 5.23.0: MiniMax generates wrongly from a padded prompt or an old cache if its first layer is linear attention.
#
# Expected: a prompt padded in front gives the logits that it gives alone, as generate's documentation asks for, and a prompt
# read in two parts those of the whole, whichever kinds of layer come first.
# Seen: the length of what was read is asked of the first layer, whose cache counts 0 when it is linear attention, as in
# MiniMax-Text-01 (seven of them, then softmax). The first token after a padded prompt is right, from the second on logits
# are off by more than half of the largest; a second part is wrong from its first token, given its positions or not. With
# softmax first (the configuration's own default), or layers of one kind, all of it is right.
# Output: "linear first, padded: 7e-07 then 1.1, two parts 1.2", "softmax first, padded: 4e-07 then 9.6e-07, two parts 7.4e-07".
# Why a user minds: a batch of prompts of different lengths and the second turn of a chat come out as fluent nonsense.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

SIZES = dict(vocab_size=50, hidden_size=64, head_dim=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(intermediate_size=128, num_local_experts=2, num_experts_per_tok=1, block_size=8, initializer_range=0.2)
NEW, PADDING = 6, 11


def off(found, expected):
    return (found - expected).abs().max().item() / expected.abs().max().item()


def outcome(layers):
    torch.manual_seed(0)
    config = MiniMaxConfig(**SIZES, **EXPERTS, layer_types=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model, prompt = MiniMaxForCausalLM(config).eval(), torch.randint(3, 50, (1, 21))
    padded = torch.cat([torch.zeros(1, PADDING, dtype=torch.long), prompt], 1)
    options = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        made = model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=NEW, **options)
        logits = torch.stack(made.logits, 1)
        expected = model(made.sequences[:, PADDING:]).logits[:, -NEW - 1 : -1]
        first, later = off(logits[:, :1], expected[:, :1]), off(logits[:, 1:], expected[:, 1:])
        cache, whole = model(prompt[:, :9], use_cache=True).past_key_values, model(prompt).logits
        positions = torch.arange(9, 21)[None]
        second = off(model(prompt[:, 9:], past_key_values=cache, position_ids=positions).logits, whole[:, 9:])
    return first, later, second


linear = outcome(["linear_attention", "full_attention"])
softmax = outcome(["full_attention", "linear_attention"])
for name, (first, later, second) in {"linear": linear, "softmax": softmax}.items():
    print(f"{name} first, padded: {first:.0e} then {later:.2g}, two parts {second:.2g}")
assert linear[0] < 1e-5 and min(linear[1:]) > 0.1
assert max(softmax) < 1e-4
PYTHON
