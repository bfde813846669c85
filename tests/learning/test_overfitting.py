"""Every model, in both directions, can learn 32 real examples by heart."""

from __future__ import annotations

import pytest
from often import in_turns

from seqzoo.config import available, compose
from seqzoo.runs import run
from seqzoo.tasks import Task, from_arrays, stratified

N = 32


def few(task: Task) -> Task:
    """32 training examples as every split; pictures as every other pixel of every other line, 256 in all."""
    split = task.train.subset(stratified(task.train.labels, N, seed=0))
    if task.spec.kind == "tokens":
        return Task(spec=task.spec, train=split, val=split, test=split)
    small = split.values.view(N, 32, 32)[:, ::2, ::2].flatten(1).numpy()
    examples = (list(small), split.labels.tolist())
    return from_arrays(
        task.spec.name, kind="pixels", inputs=examples[0], labels=examples[1], val=examples, test=examples
    )


DIRECTIONS, TASKS = ("causal", "bidirectional"), ("lra_listops", "lra_text", "lra_image")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "direction", "name"), in_turns(available("model"), DIRECTIONS, TASKS))
def test_learns_32_examples_by_heart(model, direction, name, short_task, tmp_path):
    causal = direction == "causal"
    task = few(short_task(name))
    config = compose(
        [
            *(f"model={model}", f"task={name}", "recipe=tiny", "model.d_model=32", f"causal={causal}"),
            *("model.pooling=mean", f"finetuning.tokens={150 * int(task.train.lengths.sum())}"),
            *(f"finetuning.batch_size={N}", "finetuning.lr=5e-3", "finetuning.weight_decay=0"),
            *(f"runs_dir={tmp_path}", "wandb.mode=disabled", "device=cpu"),
        ]
    )
    assert run(config, task=task)["test"]["accuracy"] == 1.0
