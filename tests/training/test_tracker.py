from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from seqzoo.training import TrainingError
from seqzoo.training.loggers import wandb_mode
from seqzoo.training.tracker import Tracker


def test_a_failing_wandb_is_a_warning(tmp_path, monkeypatch):
    import wandb

    def fail(**options):
        raise OSError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match="no route to host"):
        tracker = Tracker(tmp_path, {"wandb": {"mode": "offline"}}, group="")
    tracker.log("finetune", 1, 10, {"train/loss": 0.5})
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
    for named, meant in {"offline": "offline", "dryrun": "offline", "run": "online", "off": "offline"}.items():
        monkeypatch.setenv("WANDB_MODE", named)
        assert wandb_mode(None) == meant, named


class Client:
    """Weights & Biases without network, as far as a tracker needs it: a folder a process, and what is logged."""

    def __init__(self):
        self.logged = []

    def init(self, *, dir, id, **options):
        number = len(list(dir.glob("wandb/*"))) + 1
        self.id, self.dir = id, str(dir / "wandb" / f"offline-run-{number}-{id}" / "files")
        Path(self.dir).mkdir(parents=True)
        return self

    def Settings(self, **options):
        return None

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        self.logged.append(values)


def tracked(folder, monkeypatch, mode="offline"):
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return Tracker(folder, {"wandb": {"mode": mode}}, group=""), client


def steps_of(lines, stage="pretrain"):
    return [line[f"{stage}/step"] for line in lines if f"{stage}/step" in line]


def test_the_newest_offline_folder_has_every_line_and_the_others_are_set_aside(tmp_path, monkeypatch):
    tracker, client = tracked(tmp_path, monkeypatch)
    tracker.rewind("pretrain", 0, 0)
    for step in (1, 2, 3):
        tracker.log("pretrain", step, 10 * step, {"train/loss": 1 / step})
    tracker, client = tracked(tmp_path, monkeypatch)
    assert client.logged == []
    tracker.rewind("pretrain", 2, 0)
    assert steps_of(client.logged) == [1, 2]
    tracker.log("pretrain", 3, 30, {"train/loss": 0.3})
    tracker.rewind("finetune", 0, 0)
    tracker.log("finetune", 1, 10, {"train/loss": 0.7})
    assert steps_of(client.logged) == [1, 2, 3]
    assert steps_of(client.logged, "finetune") == [1]
    assert client.logged[0] == {"pretrain/step": 1, "pretrain/tokens": 10, "pretrain/train/loss": 1.0}
    left = sorted(path.relative_to(tmp_path / "wandb").parts[:-1] for path in tmp_path.glob("wandb/**/files"))
    assert left == [("earlier", f"offline-run-1-{client.id}"), (f"offline-run-2-{client.id}",)]


def test_a_server_is_sent_nothing_twice(tmp_path, monkeypatch):
    tracker, client = tracked(tmp_path, monkeypatch, "online")
    tracker.log("pretrain", 1, 10, {"train/loss": 1.0})
    tracker, client = tracked(tmp_path, monkeypatch, "online")
    tracker.rewind("pretrain", 1, 0)
    assert client.logged == []


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_validation_that_no_checkpoint_knows_of_is_forgotten(tmp_path):
    tracker = Tracker(tmp_path, {"logger": "none"}, group="")
    tracker.log("finetune", 4, 40, {"val/loss": 0.5})
    tracker.log("finetune", 8, 80, {"train/loss": 0.4})
    tracker.log("finetune", 8, 80, {"val/loss": 0.3})
    tracker.rewind("finetune", 8, 4)
    assert [list(line)[-1] for line in metrics(tmp_path)] == ["val/loss", "train/loss"]


def test_lines_that_cannot_be_read_are_left_out_and_that_is_said(tmp_path, capsys):
    tracker = Tracker(tmp_path, {"logger": "none"}, group="")
    for step in (1, 2):
        tracker.log("finetune", step, 10, {"train/loss": 0.5})
    first, second = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"\xff\xfe\n" + b"[" * 100_000 + b'\n{"stage": "finetune"}\n{"stage": "x", "step": 1, "tokens": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(first + damaged + second + second[:9])
    tracker.rewind("finetune", 2, 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == first + second
    assert f"{tmp_path / 'metrics.jsonl'}: 4 lines cannot be read and are left out" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    tracker.rewind("finetune", 2, 2, expected=True)
    assert "has lost its lines: the curve of finetune begins after step 2" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["deleted", "moved", "another"])
def test_a_folder_that_went_is_not_made_anew(tmp_path, how):
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(folder, {"logger": "none"}, group="")
    shutil.rmtree(folder) if how == "deleted" else folder.rename(tmp_path / "other")
    if how == "another":
        folder.mkdir()
    for action in (lambda: tracker.log("finetune", 1, 1, {}), lambda: tracker.rewind("finetune", 1, 1)):
        with pytest.raises(TrainingError, match="run was deleted or moved while it was trained"):
            action()
    assert folder.exists() == (how == "another")
    assert not (folder / "metrics.jsonl").exists()
