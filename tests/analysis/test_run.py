import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import toy_task

import seqzoo.analysis.__main__ as command
from seqzoo.analysis import analyse_run
from seqzoo.analysis.figure import save_figure
from seqzoo.config import ConfigError
from seqzoo.runs import load
from seqzoo.training.checkpoint import load_weights


@pytest.fixture
def pretrained(runs, tmp_path):
    return shutil.copytree(runs[0], tmp_path / "run")


def test_load_gives_each_stage(runs):
    folder, scratch = map(Path, runs)
    states = {stage: load(folder, stage).state_dict() for stage in ("initial", "pretrain", "finetune")}
    name = "backbone.layers.0.branch.qkv_proj.weight"
    assert torch.equal(states["pretrain"][name], load_weights(folder / "pretrain" / "best.safetensors")[name])
    assert torch.equal(states["finetune"][name], load_weights(folder / "finetune" / "best.safetensors")[name])
    assert torch.equal(states["initial"][name], load(scratch, "initial").state_dict()[name])
    assert len({state[name].sum().item() for state in states.values()}) == 3
    with pytest.raises(ConfigError, match=r"stage=pretrain: .* was trained from scratch; valid: initial, finetune"):
        load(scratch, "pretrain")
    with pytest.raises(ConfigError, match="stage=best: valid: initial, pretrain, finetune"):
        load(folder, "best")


def test_stages_see_the_same_examples(runs, task):
    found = analyse_run(runs[0], n=3, task=task)
    assert list(found.stages) == ["initial", "pretrain", "finetune"]
    assert (found.model, found.task, found.seed, found.causal) == ("transformer", "toy", 0, False)
    assert len(found.examples) == len(found.lengths) == 3
    entropies = [layers[0].entropy for layers in found.stages.values()]
    assert len(set(map(tuple, entropies))) == 3
    assert list(analyse_run(runs[1], n=3, task=task).stages) == ["initial", "finetune"]
    record = found.to_json()
    assert record["schema"] == 1
    assert "picture" not in record["stages"]["pretrain"][0]
    assert record["stages"]["pretrain"][0]["entropy"] == pytest.approx(entropies[1], rel=1e-5)


@pytest.mark.parametrize("n", [0, 1000])
def test_a_number_of_examples_that_there_are_not(n, runs, task):
    with pytest.raises(ConfigError, match=f"n={n}: valid: 1 to 24"):
        analyse_run(runs[0], n=n, task=task)


def test_a_task_of_the_users_own_is_to_be_given(runs, task):
    with pytest.raises(ConfigError, match="pass it as task="):
        analyse_run(runs[0])
    other = replace(toy_task(), spec=replace(task.spec, num_classes=3))
    with pytest.raises(ConfigError, match="was trained on another task"):
        analyse_run(runs[0], task=other)


def test_an_unfinished_run(pretrained, task):
    (pretrained / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"unfinished: it has no result\.json; python train\.py resume="):
        analyse_run(pretrained, task=task)


def test_sequences_too_long_for_a_matrix(runs, task, monkeypatch):
    monkeypatch.setattr("seqzoo.analysis.run.LONGEST", 4)
    with pytest.raises(ConfigError, match="valid: tasks of up to 4"):
        analyse_run(runs[0], n=2, task=task)


@pytest.mark.parametrize("which", [0, 1])
def test_command(which, runs, task, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(runs[which], tmp_path / "run")
    monkeypatch.setattr(command, "analyse_run", lambda *a, data_dir, cache_dir, **k: analyse_run(*a, **k, task=task))
    assert command.main([str(folder), "-n", "2"]) == 0
    record = json.loads((folder / "mixing.json").read_text(), parse_constant=pytest.fail)
    stages = ["initial", "pretrain", "finetune"] if which == 0 else ["initial", "finetune"]
    assert list(record["stages"]) == stages
    assert (folder / "mixing.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(stages)]] == stages
    assert lines[-1].endswith("mixing.json, mixing.png")


def test_command_says_what_it_cannot_do(pretrained, tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 1
    assert "cannot be analysed" in capsys.readouterr().err
    (pretrained / "pretrain" / "best.safetensors").unlink()
    assert command.main([str(pretrained)]) == 1
    assert not (pretrained / "mixing.json").exists()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "nowhere")])
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixing.json", "mixing.png"])
def test_the_command_follows_no_link(pretrained, task, victim, monkeypatch, name):
    monkeypatch.setattr(command, "analyse_run", lambda *a, data_dir, cache_dir, **k: analyse_run(*a, **k, task=task))
    (pretrained / name).symlink_to(victim)
    (pretrained / f"{name}.tmp").symlink_to(victim)
    assert command.main([str(pretrained), "-n", "1"]) == 0
    assert not (pretrained / name).is_symlink()


def test_names_that_a_run_gives_are_text_in_the_picture(runs, task, tmp_path):
    found = analyse_run(runs[0], n=1, task=task)
    save_figure(replace(found, model="\x1b[31m $\\frac$", task="a\nb"), tmp_path / "mixing.png")
