from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config, toy_task
from wandb_log import read_run

from seqzoo.config import ConfigError, LadderConfig, LoraConfig, WandbConfig, compose
from seqzoo.runs import evaluate_run, load, run
from seqzoo.runs.cell import Cell
from seqzoo.runs.folder import read_config, run_name
from seqzoo.tasks import nested
from seqzoo.training import TrainingError
from seqzoo.training.loop import Stage


@pytest.fixture(scope="module")
def pretrained(task, tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("runs"), pretrain=True, n_test=10, n_val=12)
    return config, run(config, task=task)


def test_the_result_holds_what_a_comparison_needs(pretrained, task):
    config, result = pretrained
    folder = Path(result["folder"])
    assert folder.parent == Path(config.runs_dir)
    assert folder.name.startswith("toy-transformer-tiny-masked-s0-")
    written = json.loads((folder / "result.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "folder"}
    assert {key: written[key] for key in ("schema", "model", "task", "causal", "objective", "pretrain")} == {
        "schema": 1,
        "model": "transformer",
        "task": "toy",
        "causal": False,
        "objective": "masked",
        "pretrain": True,
    }
    assert written["pretrain_run"] is None
    assert (written["recipe"], written["seed"], written["n_test"]) == ("tiny", 0, 10)
    assert written["precision"] == "fp32"
    assert written["cpu_share"].keys() == {"pretrain", "finetune"}
    assert (written["train_fraction"], written["tuning"], written["init"]) == (1.0, "full", "structured")
    assert written["trained_params"] == written["params"]
    assert written["majority"] == 0.5
    assert written["token_budget"] == {"pretrain": 2400, "finetune": 2400}
    for tokens in written["tokens_seen"].values():
        assert 2400 <= tokens < 2400 * 1.2
    assert written["seconds"]["total"] == written["seconds"]["pretrain"] + written["seconds"]["finetune"] > 0
    assert all(0 < written["mfu"][stage] < 1 for stage in ("pretrain", "finetune"))
    assert written["params"] == sum(parameter.numel() for parameter in load(folder).parameters())
    assert set(written["test"]) == {"accuracy", "loss"}
    assert written["versions"]["torch"] == torch.__version__
    pretraining = json.loads((folder / "pretrain" / "summary.json").read_text())
    assert pretraining["hardware"] == written["hardware"] != ""
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+dirty)?", written["commit"])


def test_metrics_cover_both_stages(pretrained):
    _, result = pretrained
    entries = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
    for stage in ("pretrain", "finetune"):
        steps = [entry["step"] for entry in entries if entry["stage"] == stage and "train/loss" in entry]
        assert steps == list(range(1, steps[-1] + 1))
        assert sum("val/loss" in entry for entry in entries if entry["stage"] == stage) == 3
        last = [entry for entry in entries if entry["stage"] == stage][-1]
        assert last["tokens"] == result["tokens_seen"][stage]


def test_a_finished_run_is_not_repeated(pretrained, task, monkeypatch):
    config, result = pretrained
    monkeypatch.setattr("seqzoo.training.loop.Stage.run", lambda self: pytest.fail("trained again"))
    assert run(config, task=task) == result
    assert run(replace(config, resume=result["folder"]), task=task) == result


def test_load_and_evaluate_agree_with_the_result(pretrained, task):
    _, result = pretrained
    evaluated = evaluate_run(result["folder"], task=task)
    assert evaluated == {
        "model": "transformer",
        "task": "toy",
        **result["test"],
        "n_test": 10,
        "folder": result["folder"],
    }
    model = load(result["folder"])
    assert not model.training
    batch = task.test.batch(torch.arange(len(task.test)))
    with torch.no_grad():
        first, second = (model(batch.inputs, batch.lengths) for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(ConfigError, match="own task 'toy'"):
        evaluate_run(result["folder"])


def test_what_a_gpu_trained_is_loaded_and_tested_where_there_is_none(pretrained, task, tmp_path, monkeypatch):
    _, result = pretrained
    folder = shutil.copytree(result["folder"], tmp_path / Path(result["folder"]).name)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("device: cpu", "device: cuda"))
    assert read_config(folder).device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not load(folder).training
    assert evaluate_run(folder, task=task)["accuracy"] == result["test"]["accuracy"]


def test_fine_tuning_begins_with_the_pretrained_backbone(pretrained, task, tmp_path, monkeypatch, capsys):
    config, result = pretrained
    seen = {}

    class Stopped(Exception):
        pass

    def stop(stage):
        seen.update(name=stage.name, weights={name: t.clone() for name, t in stage.model.state_dict().items()})
        raise Stopped

    monkeypatch.setattr("seqzoo.training.loop.Stage.run", stop)
    with pytest.raises(Stopped):
        run(replace(config, runs_dir=str(tmp_path), pretrain=result["folder"]), task=task)
    from seqzoo.training.checkpoint import load_weights

    assert seen["name"] == "finetune"
    for name, tensor in load_weights(Path(result["folder"]) / "pretrain" / "best.safetensors").items():
        if name.startswith("backbone."):
            assert torch.equal(seen["weights"][name], tensor), name
    assert "backbone tensors loaded; dropped: head." in capsys.readouterr().err


def test_pretraining_is_reused(pretrained, task, tmp_path):
    config, result = pretrained
    reused = run(replace(config, runs_dir=str(tmp_path), pretrain=result["folder"]), task=task)
    assert reused["pretrain_run"] == Path(result["folder"]).name
    assert reused["tokens_seen"] == result["tokens_seen"]
    assert reused["test"] == result["test"]
    assert reused["mfu"]["pretrain"] is None, "measured in another run"
    assert not (Path(reused["folder"]) / "pretrain").exists()


def test_the_optimiser_of_a_reused_pretraining_is_that_it_had(pretrained, task, tmp_path):
    config, result = pretrained
    muon = replace(config.finetuning, optimizer="muon")
    options = {"runs_dir": str(tmp_path), "pretrain": result["folder"], "pretraining": muon}
    assert run(replace(config, **options), task=task)["optimizer"] == "adamw"
    assert run(replace(config, **options, finetuning=muon), task=task)["optimizer"] == "muon 2 after adamw"


def test_the_precision_of_a_reused_pretraining_is_that_it_had(pretrained, task, tmp_path):
    config, result = pretrained
    options = {"runs_dir": str(tmp_path), "pretrain": result["folder"]}
    assert run(replace(config, **options, precision="bf16"), task=task)["precision"] == "bf16 after fp32"


def test_the_hardware_of_a_reused_pretraining_is_that_it_had(pretrained, task, tmp_path):
    config, result = pretrained
    source = shutil.copytree(result["folder"], tmp_path / Path(result["folder"]).name)
    summary = source / "pretrain" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"hardware": "1 H200"}))
    tuned = run(replace(config, runs_dir=str(tmp_path), pretrain=str(source)), task=task)
    assert tuned["hardware"] == f"{result['hardware']} after 1 H200"


def test_a_damaged_result_is_none(pretrained, task, tmp_path):
    config, result = pretrained
    folder = shutil.copytree(result["folder"], tmp_path / Path(result["folder"]).name)
    (folder / "result.json").write_text("")
    assert not Cell((), config, folder, None).finished
    with pytest.raises(ConfigError, match=r"result\.json is damaged: .*; delete it, and the same command"):
        run(replace(config, runs_dir=str(tmp_path)), task=task)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"objective": "causal"}, "objective is masked there and causal here"),
        ({"causal": True}, "causal is False there and True here"),
        ({"model": {"d_model": 32}}, "model.d_model is 16 there and 32 here"),
        ({"model": {"init": "random"}}, "model.init is structured there and random here"),
        ({"train_fraction": 0.5}, "train_fraction is None there and 0.5 here"),
    ],
)
def test_pretraining_of_another_kind_is_refused(pretrained, task, tmp_path, changes, key):
    _, result = pretrained
    with pytest.raises(ConfigError, match=key):
        run(tiny_config(tmp_path, pretrain=result["folder"], **changes), task=task)


def test_pretraining_needs_a_run_that_has_some(task, tmp_path):
    scratch = run(tiny_config(tmp_path), task=task)
    assert scratch["token_budget"] == {"pretrain": 0, "finetune": 2400}
    with pytest.raises(ConfigError, match="no finished pretraining"):
        run(tiny_config(tmp_path, pretrain=scratch["folder"]), task=task)
    with pytest.raises(ConfigError, match="not a run folder"):
        run(tiny_config(tmp_path, pretrain=str(tmp_path)), task=task)


def test_an_unfinished_run_continues_with_its_second_stage(task, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "cut", pretrain=True)
    expected = run(replace(config, runs_dir=str(tmp_path / "whole")), task=task)
    train = Stage.run

    def fail_in_fine_tuning(stage):
        if stage.name == "finetune":
            raise TrainingError("out of luck")
        return train(stage)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "run", fail_in_fine_tuning)
        with pytest.raises(TrainingError):
            run(config, task=task)
    (folder,) = (tmp_path / "cut").iterdir()
    assert not (folder / "result.json").exists()
    stages = []
    monkeypatch.setattr(Stage, "run", lambda stage: (stages.append(stage.name), train(stage))[1])
    result = run(replace(config, resume=str(folder)), task=task)
    assert stages == ["finetune"]
    assert Path(result["folder"]) == folder
    assert result["test"] == expected["test"]
    assert result["tokens_seen"] == expected["tokens_seen"]


def test_the_advice_on_damaged_weights_of_a_finished_run_works(task, tmp_path):
    config = tiny_config(tmp_path)
    done = run(config, task=task)
    folder = Path(done["folder"])
    (folder / "finetune" / "best.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match=f"delete {folder}/finetune and {folder}/result.json, for the run is"):
        load(folder)
    shutil.rmtree(folder / "finetune")
    (folder / "result.json").unlink()
    assert run(replace(config, resume=str(folder)), task=task)["test"] == done["test"]


def test_names_say_what_shapes_the_result(task, tmp_path):
    config = tiny_config(tmp_path)
    name = run_name(config, task)
    for place in ({"runs_dir": "x"}, {"data_dir": "x"}, {"cache_dir": "x"}, {"device": "auto"}, {"resume": "x"}):
        assert run_name(replace(config, **place), task) == name, place
    assert run_name(replace(config, wandb=WandbConfig(project="x")), task) == name
    assert run_name(tiny_config(tmp_path, pretraining={"lr": 1.0}), task) == name, "there is no pretraining"
    for shaping in ({"seed": 1}, {"precision": "bf16"}, {"causal": True}, {"n_test": 5}, {"finetuning": {"lr": 1.0}}):
        assert run_name(tiny_config(tmp_path, **shaping), task) != name, shaping
    assert run_name(config, toy_task(seed=1)) != name
    assert run_name(config).startswith("lra_text-transformer-tiny-none-s0-")
    pretraining = tiny_config(tmp_path, pretrain=True)
    assert run_name(pretraining) != run_name(tiny_config(tmp_path, pretrain=True, pretraining={"lr": 1.0}))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("model=lru task=lra_listops recipe=tiny precision=fp32", "lra_listops-lru-tiny-none-s0-2baba7f4"),
        ("model=lru task=lra_text recipe=small pretrain=true", "lra_text-lru-small-masked-s0-00608e22"),
        (
            "model=vq_transformer task=lra_image size=params:1M "
            "pretrain=runs/lra_image-vq_transformer-paper-masked-s0-01234567",
            "lra_image-vq_transformer-paper-masked-s0-79088343",
        ),
    ],
)
def test_names_stay_as_they_were_in_version_0_1(overrides, name):
    assert run_name(compose(overrides.split())) == name


def test_names_tell_studies_apart(tmp_path):
    plain = run_name(tiny_config(tmp_path, pretrain=True))
    changes = (
        {"tuning": "head"},
        {"tuning": "lora"},
        {"tuning": "lora", "lora": LoraConfig(rank=4)},
        {"tuning": "ladder"},
        {"tuning": "ladder", "ladder": LadderConfig(reduction=4)},
        {"model": {"init": "random"}},
        {"train_fraction": 0.1},
    )
    names = [run_name(tiny_config(tmp_path, pretrain=True, **change)) for change in changes]
    assert len({plain, *names}) == 1 + len(changes)
    unused = {"lora": LoraConfig(rank=4), "ladder": LadderConfig(reduction=4)}
    assert run_name(tiny_config(tmp_path, pretrain=True, **unused)) == plain


BUDGETS = "pretraining.tokens=1000000 finetuning.tokens=2500000"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{BUDGETS} pretrain=true share=0", "pretrain=false finetuning.tokens=3500000"),
        (f"{BUDGETS} pretrain=true share=0.5", "pretrain=true pretraining.tokens=1750000 finetuning.tokens=1750000"),
        ("train_fraction=1", ""),
    ],
)
def test_the_same_run_has_one_folder_however_it_is_asked_for(one, other):
    first, second = (compose(["model=lru", "recipe=tiny", *overrides.split()]) for overrides in (one, other))
    assert run_name(first) == run_name(second)


def test_a_fraction_of_the_train_split_serves_both_stages(task, tmp_path, monkeypatch):
    seen = []
    train = Stage.run
    monkeypatch.setattr(Stage, "run", lambda stage: (seen.append((stage.train, stage.val)), train(stage))[1])
    epochs = {"epochs": 2}
    result = run(
        tiny_config(tmp_path, pretrain=True, train_fraction=0.5, pretraining=epochs, finetuning=epochs), task=task
    )
    half = task.train.subset(nested(task.train.labels, 0.5, 0))
    for given, val in seen:
        assert torch.equal(given.values, half.values)
        assert torch.equal(given.labels, half.labels)
        assert len(val) == len(task.val)
    assert len(half) == pytest.approx(len(task.train) / 2, abs=1)
    assert result["train_fraction"] == 0.5
    assert result["n_test"] == len(task.test)
    assert result["token_budget"] == dict.fromkeys(("pretrain", "finetune"), 2 * int(half.lengths.sum()))
    assert result["epochs"] == dict.fromkeys(("pretrain", "finetune"), 2)


def test_the_configuration_comes_back(pretrained):
    config, result = pretrained
    assert read_config(Path(result["folder"])) == config


def test_options_of_blocks_are_explained(task, tmp_path):
    with pytest.raises(ConfigError, match="num_head"):
        run(tiny_config(tmp_path, model={"block": {"name": "softmax_attention", "num_head": 2}}), task=task)


def test_wandb_offline_holds_the_run(task, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny_config(tmp_path, wandb_mode="offline", finetuning={"lr": 0.004})
    result = run(config, task=task)
    folder = Path(result["folder"])
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    logged_config, history, summary = read_run(log)
    assert logged_config["finetuning"]["lr"] == 0.004
    assert logged_config["model"]["d_model"] == 16
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["finetune/train/loss"] for line in history if "finetune/train/loss" in line]
    assert losses == [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert summary["test"]["accuracy"] == result["test"]["accuracy"]
