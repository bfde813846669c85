import json

import pytest
from tiny_runs import tiny_config, toy_task

from seqzoo.config import SearchConfig
from seqzoo.runs import run
from seqzoo.runs import search as search_module
from seqzoo.runs.folder import pretraining_key
from seqzoo.training import TrainingError


@pytest.fixture(scope="module")
def task():
    return toy_task()


def test_the_best_rate_on_validation_is_taken(task, tmp_path):
    search = SearchConfig(rates=[1e-6, 1e-2], share=0.5)
    result = run(tiny_config(tmp_path, lr="search", search=search, pretrain=True), task=task)
    for stage, metric, best in (("pretrain", "loss", min), ("finetune", "accuracy", max)):
        trials = {}
        for path in (tmp_path / result["folder"]).glob(f"{stage}/search/*/summary.json"):
            summary = json.loads(path.read_text())
            trials[summary["lr"]] = summary[metric]
            assert summary["seconds"] > 0
        assert set(trials) == {1e-6, 1e-2}
        assert trials[result["lr"][stage]] == best(trials.values())
    assert result["lr"]["finetune"] == 1e-2
    assert result["tokens_seen"]["finetune"] < 2600, "trials are not counted as training"


def test_finished_trials_are_kept_and_failures_are_out(task, tmp_path, monkeypatch):
    calls = []

    class FailingStage(search_module.Stage):
        def run(self):
            calls.append(self.config.lr)
            if self.config.lr > 1e-3:
                raise TrainingError("not finite")
            return super().run()

    monkeypatch.setattr(search_module, "Stage", FailingStage)
    result = run(tiny_config(tmp_path, lr="search"), task=task)
    assert calls == SearchConfig().rates
    assert result["lr"]["finetune"] <= 1e-3
    (tmp_path / result["folder"] / "result.json").unlink()
    assert run(tiny_config(tmp_path, lr="search"), task=task)["lr"] == result["lr"]
    assert calls == SearchConfig().rates


def test_a_trial_that_cannot_be_gone_on_with_is_no_rate_that_fails(task, tmp_path, monkeypatch):
    class Damaged(search_module.Stage):
        def __init__(self, *arguments, **options):
            raise TrainingError("last.safetensors is damaged")

    monkeypatch.setattr(search_module, "Stage", Damaged)
    with pytest.raises(TrainingError, match=r"last\.safetensors is damaged"):
        run(tiny_config(tmp_path, lr="search"), task=task)
    assert not [*tmp_path.glob("*/finetune/search/*/summary.json")]


def test_pretrainings_of_widths_that_a_head_shifts_are_two(tmp_path):
    for size, shared in ((None, True), ("params:14k", False)):
        keys = {pretraining_key(tiny_config(tmp_path, size=size, model={"head": head})) for head in ("linear", "mlp")}
        assert (len(keys) == 1) == shared


def test_a_size_is_reached_and_stored(task, tmp_path):
    result = run(tiny_config(tmp_path, size="params:20k"), task=task)
    assert abs(result["params"] - 20_000) < 4_000
    assert result["flops_per_token"] > 0
