"""What attention is for: models that can read anything again solve copying and look-up, by the benchmark's own code."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from seqzoo.config import available

BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "recall.py"))


def test_the_benchmark_covers_every_model():
    assert sorted(BENCHMARK["MODELS"]) == available("model")


UNSOLVED = {  # what was measured, results/recall
    (
        "vq_transformer",
        "selective_copying",
    ): "92.9 % after all 2,500 steps, its loss having leapt at 1,300; less at the second learning rate",
    ("flash", "selective_copying"): "97.1 % after all 2,500 steps, and still rising; less at the second learning rate",
}
CASES = [
    pytest.param(*case, marks=pytest.mark.xfail(reason=UNSOLVED[case], strict=True) if case in UNSOLVED else ())
    for case in ((model, task) for model in ("transformer", "vq_transformer", "flash") for task in BENCHMARK["TASKS"])
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "task"), CASES)
def test_attention_recalls(model, task):
    rates = BENCHMARK["LEARNING_RATES"][:1]  # the best of those tried, for all of them: results/recall
    assert BENCHMARK["learn"](model, task, learning_rates=rates)["accuracy"] >= 0.98
