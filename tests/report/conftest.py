import itertools
import json

import pytest

from seqzoo.report import cells_of, load_results


@pytest.fixture
def record():
    """A complete result.json as a dictionary; keywords replace or add top-level keys."""

    def make(**changes):
        pretrain = changes.get("pretrain", False)
        return {
            "schema": 1,
            "model": "transformer",
            "task": "lra_text",
            "causal": False,
            "objective": "masked",
            "pretrain": pretrain,
            "pretrain_run": None,
            "recipe": "short",
            "seed": 0,
            "params": 1_000_000,
            "tokens_seen": {"pretrain": 2000 if pretrain else 0, "finetune": 5000},
            "token_budget": {"pretrain": 2000 if pretrain else 0, "finetune": 5000},
            "val": {"accuracy": 0.9, "loss": 0.3},
            "test": {"accuracy": 0.6, "loss": 0.7},
            "n_test": 400,
            "majority": 0.5,
            "task_note": "",
            "seconds": {"pretrain": 1.0, "finetune": 2.0, "total": 3.0},
            "hardware": "2 CPU cores",
            "commit": "0000000",
            "versions": {"torch": "2.13.0"},
        } | changes

    return make


@pytest.fixture
def write_run(tmp_path, record):
    """Writes a run folder under tmp_path/runs and returns it; keywords as for `record`, `accuracy` on the test
    set, or `bits` per character, `budgets` of (pretraining, fine-tuning) in tokens, and lines of `metrics`."""
    numbers = itertools.count()

    def write(*, accuracy=0.6, bits=None, budgets=None, metrics=None, **changes):
        if budgets is not None:
            tokens = dict(zip(("pretrain", "finetune"), budgets, strict=True))
            changes |= {"pretrain": budgets[0] > 0, "token_budget": tokens, "tokens_seen": tokens}
        folder = tmp_path / "runs" / f"run-{next(numbers):02d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("recipe: short\n")
        test = {"accuracy": accuracy, "loss": 1.0} | ({} if bits is None else {"bits_per_character": bits})
        content = record(test=test, **changes)
        (folder / "result.json").write_text(json.dumps(content))
        if metrics is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        return folder

    return write


@pytest.fixture
def cells(tmp_path):
    """Reads every run under tmp_path/runs and returns its cells; none may be left out."""

    def read():
        results, unreadable = load_results([tmp_path / "runs"])
        found, left_out = cells_of(results)
        assert unreadable + left_out == []
        return found

    return read
