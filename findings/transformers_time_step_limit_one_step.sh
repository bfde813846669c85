#!/usr/bin/env bash
# transformers 5.23.0: Mamba-2's limits of the time step hold for sequences, not for single steps: NemotronH, and Mamba2 if set.
#
# Expected: a model that reads token by token computes what it computes for all at once, to rounding.
# Seen: the chunked form clamps softplus(dt) to `time_step_limit`, in NemotronH to at least `time_step_min` = 0.001 by default,
# the one-step form does not. Where a step falls outside, generated logits part from those of a forward pass over the same
# tokens; the prompt's last, still chunked, agrees. Mamba2's default limits, 0 and infinity, hide it.
# Output: "NemotronH: 2e-07 then 0.002", "Mamba2 limited to 0.01 and 0.1: 2e-07 then 0.1", "Mamba2: 2e-07 then 5e-07".
# Why a user minds: what was trained, and what is evaluated with perplexity, is not quite what generates, and no setting of
# precision closes the gap.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2> messages <<'PYTHON' || { cat messages; exit 1; }
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, NemotronHConfig, NemotronHForCausalLM

SIZES = dict(vocab_size=50, hidden_size=64, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, layers_block_type=["mamba", "attention"])
STATES = dict(num_hidden_layers=2, state_size=8, head_dim=16, num_heads=8, n_groups=1, chunk_size=8)
OPTIONS = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0)
NEW = 6


def outcome(made):
    """How far logits of the first and of later generated tokens are from a forward pass over all of them."""
    torch.manual_seed(0)
    model, prompt = made().eval(), torch.randint(3, 50, (1, 21))
    with torch.no_grad():
        generated = model.generate(prompt, max_new_tokens=NEW, **OPTIONS)
        found, expected = torch.stack(generated.logits, 1), model(generated.sequences).logits[:, -NEW - 1 : -1]
    off = ((found - expected).abs().amax(-1) / expected.abs().max())[0]
    return off[0].item(), off[1:].max().item()


found = {
    "NemotronH": outcome(lambda: NemotronHForCausalLM(NemotronHConfig(**SIZES, **ATTENTION))),
    "Mamba2 limited to 0.01 and 0.1": outcome(
        lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **STATES, time_step_limit=(0.01, 0.1)))
    ),
    "Mamba2": outcome(lambda: Mamba2ForCausalLM(Mamba2Config(**SIZES, **STATES))),
}
for name, (first, later) in found.items():
    print(f"{name}: {first:.1g} then {later:.1g}")
assert all(first < 1e-5 for first, _ in found.values()), found
assert found["NemotronH"][1] > 5e-4 and found["Mamba2 limited to 0.01 and 0.1"][1] > 5e-4, found
assert found["Mamba2"][1] < 1e-5, found
PYTHON
