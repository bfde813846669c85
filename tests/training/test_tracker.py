from __future__ import annotations

import json

import pytest
from torch import nn

from seqzoo.training.loggers import wandb_mode
from seqzoo.training.tracker import Tracker


def test_a_failing_wandb_is_a_warning(tmp_path, monkeypatch):
    import wandb

    def fail(**options):
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match="no route to host"):
        tracker = Tracker(tmp_path, {"wandb": {"mode": "offline"}}, group="")
    tracker.log("finetune", 1, 10, {"train/loss": 0.5}, nn.Identity())
    tracker.finish({})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "stage": "finetune",
        "step": 1,
        "tokens": 10,
        "train/loss": 0.5,
    }


def test_wandb_is_online_only_with_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode(None) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_mode(None) == "online"
    assert wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(None) == "offline"
