"""Self-pretraining teaches every model more than how frequent each symbol is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from often import in_turns
from torch import Tensor

from seqzoo.config import available, compose
from seqzoo.runs import run
from seqzoo.tasks import Split

# Of the unigram entropy, for masked symbols. Most of ListOps are uniform digits: who knows the symbols on both sides
# saves 8 % of it, of text half.
SHARES = {"lra_listops": 0.95, "lra_text": 0.9}
# Divided by the sum of their weights, and with positions added to the input, these find a neighbour slowly.
SHARES_OF_LINEAR = {"lra_listops": 0.95, "lra_text": 0.95}


def entropy(counts: Tensor) -> float:
    """Nats, of events counted."""
    return torch.special.entr(counts / counts.sum()).sum().item()


def unigram_entropy(split: Split) -> float:
    """Nats a symbol: the loss of the best constant answer."""
    return entropy(split.values.long().bincount().double())


def bigram_entropy(split: Split) -> float:
    """Nats a symbol given the one before it: the least loss without mixing over time."""
    ids = split.values.long()
    inside = torch.ones(len(ids), dtype=torch.bool)
    inside[split.offsets[:-1]] = False  # the first of a sequence follows nothing
    before, after = ids[:-1][inside[1:]], ids[1:][inside[1:]]
    pairs = (before * split.spec.vocab_size + after).bincount().double()
    return entropy(pairs) - entropy(before.bincount().double())


@pytest.mark.slow
@pytest.mark.parametrize(("model", "objective", "name"), in_turns(available("model"), ("masked", "causal"), SHARES))
def test_learns_more_than_frequencies(model, objective, name, short_task, tmp_path):
    task = short_task(name)
    batch_size, steps = 32, 400
    config = compose(
        [
            *(f"model={model}", f"task={name}", "recipe=tiny", "pretrain=true", f"objective={objective}"),
            *(f"pretraining.tokens={int(steps * batch_size * task.train.mean_length)}", "pretraining.lr=5e-3"),
            *(f"pretraining.batch_size={batch_size}", "finetuning.tokens=1", "n_val=250", "n_test=10"),
            *(f"runs_dir={tmp_path}", "wandb.mode=disabled", "device=cpu"),
        ]
    )
    folder = Path(run(config, task=task)["folder"])
    loss = json.loads((folder / "pretrain" / "summary.json").read_text())["val"]["loss"]
    if objective == "causal":
        assert loss < bigram_entropy(task.train)
    else:
        shares = SHARES_OF_LINEAR if model in ("linear_transformer", "performer") else SHARES
        assert loss < shares[name] * unigram_entropy(task.train)
