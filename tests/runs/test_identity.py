"""A run goes on with the data it was trained on, is tested on them and hands pretraining on to them, or is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from task_configs import small_listops
from tiny_runs import tiny_config, toy_task

from seqzoo.analysis import analyse_run
from seqzoo.config import Config, ConfigError
from seqzoo.messages import say_once
from seqzoo.report import read_result
from seqzoo.runs import evaluate_run, run
from seqzoo.runs.folder import pretraining_key, read_config, run_name
from seqzoo.study import read, read_study
from seqzoo.tasks import TaskConfig, lra_listops
from seqzoo.tasks.listops.grammar import tokenise
from seqzoo.training import TrainingError
from seqzoo.training.loop import Stage

RESULTS = Path(__file__).parents[2] / "results"
COUNTS = {"num_train": 40, "num_val": 10, "num_test": 20}
OTHER_DATA = r"was trained on other data: .+ \(sha256 \w{16}\); given: .+ \(sha256 \w{16}\)\. Give it its own"


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_measured_results_keep_their_names(every):
    runs = [file / name for file in sorted(RESULTS.glob("*.jsonl")) for name in read_study(file).runs]
    assert len(runs) > 100
    for measured in runs[::every]:
        (cell, key), (told, now) = (name.rsplit("-", 1) for name in (measured.name, run_name(read_config(measured))))
        pytorchs = "muon" in read_result(measured).optimizer.split(" after ")
        joint = read(measured / "result.json").get("joint") or {}
        tied = joint.get("whole", 0) > 0 and "draws" not in joint
        assert (told, now == key) == (cell, not (pytorchs or tied)), "what nothing computes now has another name"


def publish(folder: Path, answer: int) -> str:
    """Rows in the benchmark's layout, all with the same answer; returns the folder that holds theirs."""
    (folder / "listops-1000").mkdir(parents=True)
    for name, count in zip(("train", "val", "test"), COUNTS.values(), strict=True):
        rows = [f"[MAX {i % answer} {answer} ]\t{answer}" for i in range(count)]
        (folder / "listops-1000" / f"basic_{name}.tsv").write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    return str(folder)


@pytest.fixture
def listops(tmp_path, monkeypatch) -> Config:
    """ListOps, with a benchmark of a few rows, and a generator that needs no compiling."""

    def generate(grammar, counts, seed, workers):
        return {split: ([tokenise("[MAX 1 2 ]")] * count, np.full(count, 2)) for split, count in counts.items()}

    monkeypatch.setattr(lra_listops, "_generate", generate)
    grammar = {"max_depth": 3, "max_args": 3, "min_length": 4, "length_bound": 20}
    monkeypatch.setattr(lra_listops, "PUBLISHED", {**grammar, **COUNTS})
    task = small_listops(**grammar, **COUNTS, max_length=32)
    config = tiny_config(tmp_path / "runs", finetuning={"tokens": 800, "lr": 0.03}, pretraining={"tokens": 300})
    return replace(config, task=task, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def stopped(monkeypatch):
    """Makes fine-tuning end before it has begun, while it is called."""

    def stopping(config: Config, **options) -> Path:
        def stop(stage):
            raise TrainingError("out of luck")

        with monkeypatch.context() as patched:
            patched.setattr(Stage, "run", stop)
            with pytest.raises(TrainingError, match="out of luck"):
                run(config, **options)
        (folder,) = Path(config.runs_dir).iterdir()
        return folder

    return stopping


def forget_data(folder: Path) -> None:
    """Makes a run folder one of an earlier version."""
    path = folder / "task.json"
    kept = json.loads(path.read_text())
    del kept["data"]
    path.write_text(json.dumps(kept))


def test_other_data_are_another_run_and_another_pretraining(listops, tmp_path):
    published = replace(listops, data_dir=publish(tmp_path / "lra", 7))
    moved = replace(listops, data_dir=str(shutil.copytree(tmp_path / "lra", tmp_path / "elsewhere")))
    default = replace(listops, data_dir=str(tmp_path))
    for identity in (run_name, lambda config: pretraining_key(replace(config, pretrain=True))):
        assert identity(listops) == identity(default) != identity(published) == identity(moved)

    generated, read = run(listops), run(published)
    assert generated["folder"] != read["folder"]
    assert (generated["task_note"], read["task_note"]) == ("generated", "")
    assert read["test"]["accuracy"] == 1
    assert run(listops) == generated


def test_a_relative_data_dir_is_the_same_from_everywhere(listops, tmp_path, monkeypatch, capsys):
    (tmp_path / "project").mkdir()
    publish(tmp_path / "project" / "lra", 7)
    monkeypatch.chdir(tmp_path / "project")
    result = run(replace(listops, data_dir="lra"))
    assert read_config(Path(result["folder"])).data_dir == str(tmp_path / "project" / "lra")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert evaluate_run(result["folder"])["accuracy"] == result["test"]["accuracy"] == 1
    assert not capsys.readouterr().err


def test_a_relative_text_is_the_same_from_everywhere(stopped, tmp_path, monkeypatch):
    for folder, words in (("here", "one two three "), ("there", "eins zwei drei ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(words * 40)
    text = {"val_fraction": 0.1, "test_fraction": 0.1, "min_frequency": 1, "text": "text.txt"}
    config = tiny_config(tmp_path / "runs", causal=True, finetuning={"tokens": 300})
    config = replace(config, task=TaskConfig(name="char_lm", max_length=16, mask_ratio=0.15, **text))
    config = replace(config, cache_dir=str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    folder = stopped(config)
    monkeypatch.chdir(tmp_path / "there")
    result = run(replace(config, resume=str(folder)))
    assert result["folder"] == str(folder)
    assert read_config(folder).data_dir == str(tmp_path / "here")


def test_a_run_does_not_go_on_with_other_data(listops, stopped, tmp_path):
    data_dir = Path(publish(tmp_path / "lra", 7))
    config = replace(listops, data_dir=str(data_dir))
    folder = stopped(config)
    before = (folder / "task.json").read_text()
    data_dir.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=rf"lra_listops\S+ {OTHER_DATA}"):
        run(replace(config, resume=str(folder)))
    publish(data_dir, 6)  # as many bytes
    for again in (config, replace(config, resume=str(folder))):
        with pytest.raises(ConfigError, match=OTHER_DATA):
            run(again)
    assert (folder / "task.json").read_text() == before
    shutil.rmtree(data_dir)
    (tmp_path / "away").rename(data_dir)
    assert run(replace(config, resume=str(folder)))["test"]["accuracy"] == 1


def test_a_run_is_not_tested_on_other_data(listops, tmp_path, capsys):
    result = run(replace(listops, data_dir=publish(tmp_path / "lra", 7)))
    folder = Path(result["folder"])
    other = publish(tmp_path / "other", 6)
    with pytest.raises(ConfigError, match=OTHER_DATA):
        evaluate_run(folder, data_dir=other)
    with pytest.raises(ConfigError, match=OTHER_DATA):
        analyse_run(folder, data_dir=other)
    capsys.readouterr()
    say_once.cache_clear()
    forget_data(folder)
    accuracies = [evaluate_run(folder, data_dir=other)["accuracy"] for _ in range(2)]
    said = capsys.readouterr().err
    assert said.count(f"{folder} does not say which data it was trained on") == 1
    assert max(accuracies) < 1
    assert "the accuracy is 0.0000 here and 1.0000 in its result.json. Rounding explains 0.0500" in said


def test_pretraining_on_other_data_is_not_taken(listops, tmp_path):
    data_dir = Path(publish(tmp_path / "lra", 7))
    config = replace(listops, data_dir=str(data_dir), pretrain=True)
    pretrained = run(config)["folder"]
    shutil.rmtree(data_dir)
    publish(data_dir, 6)
    shared = replace(config, finetuning=replace(config.finetuning, lr=0.01))
    assert pretraining_key(shared) == pretraining_key(config)
    reused = replace(config, pretrain=pretrained, runs_dir=str(tmp_path / "others"))
    for taking in (shared, reused):
        with pytest.raises(ConfigError, match=rf"{re.escape(pretrained)} {OTHER_DATA}"):
            run(taking)


def test_a_run_of_before_goes_on(stopped, task, tmp_path, capsys):
    config = tiny_config(tmp_path, finetuning={"tokens": 300})
    folder = stopped(config, task=task)
    forget_data(folder)
    capsys.readouterr()
    run(config, task=task)
    assert f"{folder} does not say which data it was trained on" in capsys.readouterr().err
    assert "data" in json.loads((folder / "task.json").read_text()), "from now on it does"


def test_a_run_on_a_task_of_ones_own_goes_on_with_that(stopped, task, tmp_path):
    folder = stopped(tiny_config(tmp_path, finetuning={"tokens": 300}), task=task)
    resume = tiny_config(tmp_path, resume=str(folder))
    with pytest.raises(ConfigError, match="the user's own task 'toy': pass it as task="):
        run(resume)
    with pytest.raises(ConfigError, match=r"other data: arrays in memory \(sha256 .* given: arrays in memory"):
        run(resume, task=replace(task, train=toy_task(seed=1).train))
    assert run(resume, task=task)["folder"] == str(folder)


def test_pretrainings_in_folders_of_the_same_name_are_two(task, tmp_path):
    config = tiny_config(tmp_path / "runs", finetuning={"tokens": 300}, pretraining={"tokens": 300}, pretrain=True)
    folders = []
    for number in (1, 2):
        folders.append(tmp_path / str(number) / "mine")
        folders[-1].parent.mkdir()
        shutil.move(run(replace(config, seed=number), task=task)["folder"], folders[-1])
    names = {run_name(replace(config, pretrain=str(folder)), task) for folder in folders}
    assert len(names) == 2
    shutil.move(folders[0].parent, tmp_path / "elsewhere")
    moved = replace(config, pretrain=str(tmp_path / "elsewhere" / "mine"))
    assert run_name(moved, task) in names, "where the folder lies computes nothing"
