#!/usr/bin/env bash
# transformers 5.23.0: Mamba, Falcon-Mamba and Jamba forget what they read when a second part has more than one token.
#
# Expected: with the cache of the first 9 tokens the other 12 give the logits that they have in the whole, as with a cache of
# attention, and as in Mamba-2 here; and one more token behind a prompt that is padded in front gives those without padding.
# Seen: several tokens at once start from an empty state and an empty convolution, without an error. One token at a time is
# right, but in Mamba and Falcon-Mamba not with the mask of a padded prompt: it is multiplied with one step as if that were
# all of them.
# Output, off by so much of the largest logit: "Mamba: two parts 0.19, padded 1.5", "FalconMamba: two parts 0.16, padded 1.4",
# "Jamba: two parts 0.2, padded 1.2e-06", "Mamba2: two parts 3.1e-07, padded 4.9e-07".
# Why a user minds: a long prompt read in pieces, a shared prefix kept as a cache and checked drafts of several tokens all
# score as if the beginning had not been there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> messages <<'PYTHON' || { cat messages; exit 1; }
import torch
import transformers

SIZES = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, initializer_range=0.2, pad_token_id=0)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, attn_layer_period=2)
MODELS = {
    "Mamba": dict(state_size=8),
    "FalconMamba": dict(state_size=8),
    "Jamba": dict(mamba_d_state=8, num_experts=1, attn_layer_offset=1, use_mamba_kernels=False, **ATTENTION),
    "Mamba2": dict(state_size=8, head_dim=16, num_heads=8, n_groups=1, chunk_size=8),
}


def off(found, expected):
    return (found - expected).abs().max().item() / expected.abs().max().item()


def outcome(name, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tokens = torch.randint(3, 50, (1, 21))
    kept = "past_key_values" if name == "Jamba" else "cache_params"
    with torch.no_grad():
        whole = model(tokens).logits
        cache = model(tokens[:, :9], use_cache=True)[kept]
        two_parts = off(model(tokens[:, 9:], **{kept: cache}).logits, whole[:, 9:])
        padded = torch.cat([tokens[:, :11], tokens], 1)
        mask = (torch.arange(32) >= 11)[None].long()
        cache = model(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True)[kept]
        last = off(model(padded[:, -1:], attention_mask=mask, **{kept: cache}).logits, whole[:, -1:])
    return two_parts, last


found = {name: outcome(name, options) for name, options in MODELS.items()}
for name, (two_parts, padded) in found.items():
    print(f"{name}: two parts {two_parts:.2g}, padded {padded:.2g}")
assert all(found[name][0] > 0.01 for name in ("Mamba", "FalconMamba", "Jamba")), found
assert all(found[name][1] > 0.1 for name in ("Mamba", "FalconMamba")), found
assert max(found["Mamba2"]) < 1e-5 and found["Jamba"][1] < 1e-5, found
PYTHON
