import pytest
from tiny_runs import one_thread, task, tiny_config

from seqzoo.runs import run

__all__ = ["one_thread", "task"]


@pytest.fixture(scope="session")
def runs(task, tmp_path_factory):
    """The folders of two finished runs: pretrained and from scratch."""
    folder = tmp_path_factory.mktemp("runs")
    budget = {"tokens": 240, "evaluations": 1}
    configs = [
        tiny_config(folder, pretrain=pretrain, pretraining=budget, finetuning=budget) for pretrain in (True, False)
    ]
    return [run(config, task=task)["folder"] for config in configs]
