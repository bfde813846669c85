#!/usr/bin/env bash
# transformers 5.23.0: an attention function registered under a name of one's own is given no padding mask, in silence.
#
# Expected: the very function behind "sdpa", registered under another name, gives what "sdpa" gives; or a mask that is not
# handed on is said.
# Seen: without a mask function of the same name in AttentionMaskInterface, attention_mask arrives as None for padded
# batches too, and no warning is given: BERT attends to its padding, and a decoder to what is padded in front. With
# AttentionMaskInterface.register(name, sdpa_mask) beside it, outputs are equal.
# Why a user minds: it is right for every batch without padding, and so in most tests; logits of padded rows are off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" - 2>log <<'PYTHON'
import warnings

import torch
from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertModel, LlamaConfig, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

AttentionInterface.register("mine", sdpa_attention_forward)
sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ids, mask = torch.randint(1, 97, (2, 12)), torch.ones(2, 12, dtype=torch.long)
mask[1, :5] = 0


@torch.no_grad()
def off(kind, config):
    """By how much what counts in the padded row is not what "sdpa" gives."""
    torch.manual_seed(0)
    model = kind(config(**sizes)).eval()
    outputs = []
    for name in ("sdpa", "mine"):
        model.set_attn_implementation(name)
        outputs.append(model(ids, attention_mask=mask).last_hidden_state[1, 5:])
    return float((outputs[0] - outputs[1]).abs().max())


with warnings.catch_warnings():
    warnings.simplefilter("error")
    silent = {"Bert": off(BertModel, BertConfig), "Llama": off(LlamaModel, LlamaConfig)}
AttentionMaskInterface.register("mine", sdpa_mask)
told = {"Bert": off(BertModel, BertConfig), "Llama": off(LlamaModel, LlamaConfig)}
print("off by, without a mask function", silent, "and with one", told)
assert min(silent.values()) > 1e-3, silent
assert max(told.values()) == 0, told
PYTHON
echo "what it said meanwhile: $(cat log)"
test ! -s log
