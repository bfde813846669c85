from __future__ import annotations

import copy
import itertools
import json
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from often import others_slow
from tiny_runs import tiny_config

from seqzoo.config import ConfigError, LadderConfig, LoraConfig, SearchConfig
from seqzoo.models import build_model
from seqzoo.runs import evaluate_run, load, run
from seqzoo.training import TrainingError
from seqzoo.training.checkpoint import load_weights
from seqzoo.training.loop import Stage
from seqzoo.training.optimizer import build_optimizer
from seqzoo.training.tuning import tune

LITTLE = ("head", "lora", "ladder")
SMALL = {"lora": LoraConfig(rank=2, alpha=4), "ladder": LadderConfig(reduction=4)}
BLOCKS = {
    "softmax_attention": {"num_heads": 2},
    "linear_attention": {"num_heads": 2},
    "performer": {"num_heads": 2, "redraw_every": 1},
    "vq_attention": {"codebook_size": 8, "block_len": 4},
    "gau": {"key_dim": 8, "chunk_len": 4},
    "lru": {},
    "s4d": {"state_dim": 4},
    "conv": {},
    "mamba2": {"num_heads": 2, "state_dim": 4},
    "mlstm": {"num_heads": 2},
    "rg_lru": {},
}


def config(runs_dir, tuning, block="softmax_attention", **changes):
    model = {"block": {"name": block, **BLOCKS[block]}}
    return tiny_config(runs_dir, tuning=tuning, model=model, **deepcopy(SMALL), **changes)


TUNINGS = ("full", *LITTLE)
OFTEN = {(block, TUNINGS[n % 4]) for n, block in enumerate(BLOCKS)}


@pytest.mark.parametrize(("block", "tuning"), others_slow(itertools.product(BLOCKS, TUNINGS), OFTEN))
def test_what_moves(task, tmp_path, block, tuning):
    """A few steps move what they should, from where pretraining left it, and leave alone what is frozen."""
    settings = config(tmp_path, tuning, block, pretrain=True, pretraining={"tokens": 400}, finetuning={"tokens": 400})
    pretrained = build_model(settings.model, task.spec, head="classify", causal=False).eval()
    tuned = tune(copy.deepcopy(pretrained), settings).eval()
    batch = task.test.batch(torch.arange(6))
    with torch.no_grad():
        before = pretrained(batch.inputs, batch.lengths)
        if tuning != "ladder":
            torch.testing.assert_close(tuned(batch.inputs, batch.lengths), before)

    result = run(settings, task=task)
    folder = Path(result["folder"])
    given, kept = (load_weights(folder / stage / "best.safetensors") for stage in ("pretrain", "finetune"))
    moved = {
        name
        for name, tensor in given.items()
        if name.startswith("backbone.") and not torch.equal(kept[name if name in kept else base(name)], tensor)
    }
    state = ("quantizer.", "projection", "_extra_state")  # beside the gradient: codebooks, random features
    if tuning in ("head", "ladder"):
        assert moved == set()
    elif tuning == "lora":
        assert all(any(part in name for part in state) for name in moved)
        assert bool(moved) == (block in ("performer", "vq_attention")), "they follow the keys"
        assert all(tensor.any() for name, tensor in kept.items() if "lora_B" in name), (
            "every projection has a part in it"
        )
    else:
        assert {name for name in given if "proj" in name and name.endswith("weight")} <= moved
    params = sum(parameter.numel() for parameter in pretrained.parameters())
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert (result["params"], result["trained_params"], result["tuning"]) == (params, trained, tuning)
    model = load(folder)
    assert params == sum(parameter.numel() for parameter in model.parameters()) or tuning in ("lora", "ladder")
    assert (trained < params) == (tuning != "full")
    assert (result["mfu"]["finetune"] is None) == (tuning != "full"), "what is frozen takes less than three passes"
    assert result["mfu"]["pretrain"] > 0


def base(name: str) -> str:
    """Where a projection's weight lies once it has a low-rank change."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer.{parameter}"


@pytest.mark.parametrize("tuning", others_slow(LITTLE, ["lora"]))
def test_an_interrupted_run_continues_alike(task, tmp_path, monkeypatch, tuning):
    settings = config(tmp_path / "cut", tuning, "lru", pretrain=True)
    whole = run(replace(settings, runs_dir=str(tmp_path / "whole")), task=task)
    step = Stage.take_step

    def fail_late(stage):
        if stage.name == "finetune" and stage.state.step == stage.total_steps - 3:
            stage.save()
            raise TrainingError("out of luck")
        return step(stage)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "take_step", fail_late)
        with pytest.raises(TrainingError):
            run(settings, task=task)
    result = run(settings, task=task)
    assert result["test"] == whole["test"]
    kept, expected = (load_weights(Path(r["folder"]) / "finetune" / "best.safetensors") for r in (result, whole))
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
    assert evaluate_run(result["folder"], task=task)["accuracy"] == result["test"]["accuracy"]


def test_a_recurrence_is_tuned_at_every_projection(task, tmp_path):
    settings = config(tmp_path, "lora", "lru")
    model = tune(build_model(settings.model, task.spec, head="classify", causal=False), settings).eval()
    batch = task.test.batch(torch.arange(4))
    before = model(batch.inputs, batch.lengths)
    for name in ("in_proj", "out_proj", "out_proj_reverse"):
        projection = getattr(model.backbone.layers[0].branch, name)
        torch.nn.init.normal_(projection.lora_B["default"].weight)
        after = model(batch.inputs, batch.lengths)
        assert not torch.allclose(after, before)
        projection.merge()
        torch.testing.assert_close(model(batch.inputs, batch.lengths), after)
        before = after


@pytest.mark.parametrize(
    ("block", "tuning"),
    others_slow(itertools.product(["lru", "vq_attention"], LITTLE), [("lru", "lora"), ("vq_attention", "ladder")]),
)
def test_what_is_tuned_is_compiled_as_a_whole(task, tmp_path, tuning, block):
    settings = config(tmp_path, tuning, block)
    model = tune(build_model(settings.model, task.spec, head="classify", causal=False), settings).eval()
    batch = task.test.batch(torch.arange(4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch.inputs, batch.lengths), model(batch.inputs, batch.lengths))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_b_learns_faster_than_a_and_neither_is_a_matrix_to_muon(task, tmp_path, optimizer):
    settings = config(tmp_path, "lora", finetuning={"optimizer": optimizer})
    settings.lora.lr_ratio = 4
    model = tune(build_model(settings.model, task.spec, head="classify", causal=False), settings)
    groups = build_optimizer(model, settings.finetuning).param_groups
    assert {group["name"] for group in groups} == {"plain", "decayed", "rate x 4"}
    rates = {
        name: group["lr"]
        for group in groups
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    for name, rate in rates.items():
        assert rate == pytest.approx(settings.finetuning.lr * (4 if "lora_B" in name else 1)), name
    assert {name.split(".")[0] for name in rates} == {"backbone", "head"}
    adapted = {name.rpartition(".lora_")[0].rpartition("layers.")[2] for name in rates if "lora_B" in name}
    assert adapted == {"0.branch.qkv_proj", "0.branch.out_proj", "1.branch.0", "1.branch.2"}


def test_a_search_tries_rates_of_what_is_tuned(task, tmp_path):
    result = run(config(tmp_path, "lora", lr="search", search=SearchConfig(rates=[1e-4, 1e-2])), task=task)
    assert result["lr"]["finetune"] in (1e-4, 1e-2)


def test_tuning_a_random_backbone_is_said(task, tmp_path, capsys):
    result = run(config(tmp_path, "head"), task=task)
    said = capsys.readouterr().err
    assert "tuning=head moves 34 parameters" in said
    assert "without pretraining: the backbone stays a random one" in said
    assert result["trained_params"] == 34


def test_what_cannot_be_tuned_fails_before_anything_is_trained(task, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "run", lambda stage: pytest.fail("trained"))
    settings = config(tmp_path, "ladder", pretrain=True)
    settings.ladder.reduction = 17
    with pytest.raises(ConfigError, match=r"tuning=ladder: ladder.reduction=17: valid: 1 to d_model, 16"):
        run(settings, task=task)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "seqzoo.training.lora", raising=False)
    with pytest.raises(ConfigError, match=r"tuning=lora: .*; pip install 'peft>=0.21', or tuning=full, head or ladder"):
        run(config(tmp_path, "lora", pretrain=True), task=task)


def test_little_tuning_reuses_the_pretraining_of_a_full_run(task, tmp_path):
    full = run(config(tmp_path, "full", pretrain=True), task=task)
    head = run(config(tmp_path, "head", pretrain=full["folder"]), task=task)
    assert head["pretrain_run"] == Path(full["folder"]).name
    assert head["folder"] != full["folder"]
    written = json.loads((Path(head["folder"]) / "result.json").read_text())
    assert written["trained_params"] < written["params"] == full["params"]
