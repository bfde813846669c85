from __future__ import annotations

import pytest
import torch
from tiny_runs import tiny_config

from seqzoo.models import build_model
from seqzoo.training import TrainingError
from seqzoo.training.checkpoint import load_weights, save_weights
from seqzoo.training.transfer import transfer_backbone


@pytest.fixture
def models(task, tmp_path):
    config = tiny_config(tmp_path).model
    pretrained = build_model(config, task.spec, head="per_position", causal=False)
    save_weights(tmp_path / "best.safetensors", pretrained.state_dict())
    return pretrained, build_model(config, task.spec, head="classify", causal=False), tmp_path / "best.safetensors"


def test_the_backbone_moves_and_the_heads_do_not(models):
    pretrained, classifier, path = models
    head = {name: tensor.clone() for name, tensor in classifier.head.state_dict().items()}
    transfer = transfer_backbone(classifier, path)
    for name, tensor in pretrained.backbone.state_dict().items():
        assert torch.equal(classifier.backbone.state_dict()[name], tensor), name
    for name, tensor in head.items():
        assert torch.equal(classifier.head.state_dict()[name], tensor), name
    assert set(transfer.loaded) == {f"backbone.{name}" for name in pretrained.backbone.state_dict()}
    assert set(transfer.dropped) == {f"head.{name}" for name in pretrained.head.state_dict()}
    assert set(transfer.created) == {f"head.{name}" for name in head}
    assert f"{len(transfer.loaded)} backbone tensors loaded" in str(transfer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, name: weights.pop(name), "is missing"),
        (lambda weights, name: weights.update({"backbone.extra": torch.zeros(1)}), "backbone.extra is unexpected"),
        (lambda weights, name: weights.update({name: torch.zeros(1, 2)}), r"has shape \[1, 2\]"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_whole(models, change, message):
    _, classifier, path = models
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    weights = load_weights(path)
    change(weights, "backbone.norm.weight")
    save_weights(path, weights)
    with pytest.raises(TrainingError, match=message):
        transfer_backbone(classifier, path)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("block", ["lru", "s4d"])
def test_a_backbone_of_an_earlier_version_moves_too(task, tmp_path, block):
    config = tiny_config(tmp_path, model={"block": {"name": block}}).model
    pretrained, model = (build_model(config, task.spec, head="classify", causal=False) for _ in range(2))
    weights = pretrained.state_dict()
    for name in list(weights):
        if ".dynamics." in name:
            weights[name.replace(".dynamics.", ".")] = weights.pop(name)
        if name.endswith("out_proj.weight"):
            reverse = weights.pop(name.replace("out_proj", "out_proj_reverse"))
            weights[name] = torch.cat([weights[name], reverse], 1)
    save_weights(tmp_path / "best.safetensors", weights)
    transfer_backbone(model, tmp_path / "best.safetensors")
    for name, tensor in pretrained.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor), name
