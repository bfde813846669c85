"""Disks that are full and folders that go: a sentence, the old file whole, and the same result with room again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from dying import assert_equal, dying_at, in_child, what_is_left
from tiny_runs import tiny_config

from seqzoo.files import append, write_all, write_text
from seqzoo.runs import run
from seqzoo.runs.attempt import attempt
from seqzoo.training import TrainingError, loop
from seqzoo.training.checkpoint import load_weights, save_weights

SHORT = {"tokens": 480, "evaluations": 2}
SMALL = "SEQZOO_SMALL_DISK"  # names an empty folder on a file system of some 100 KiB


def limited(size: int) -> None:
    """No file may grow beyond `size` bytes: what a full disk is to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def refused(writing, place: Path, size: int = 4096) -> str:
    """What is said of an OSError that `writing` raises where files may have `size` bytes."""

    def work() -> None:
        limited(size)
        try:
            writing()
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            place.write_text(f"{error.filename}: {error.strerror}")

    assert in_child(work) == 0
    return place.read_text()


@pytest.mark.parametrize("kind", ["text", "line", "weights", "files"])
def test_what_finds_no_room_is_named_and_leaves_the_old_file(kind, tmp_path):
    import torch

    path, other = tmp_path / "folder" / "file", tmp_path / "folder" / "other"
    write_text(path, "old")
    write_text(other, "old")
    writing = {
        "text": lambda: write_text(path, "x" * 10_000),
        "line": lambda: append(path, "x" * 10_000),
        "weights": lambda: save_weights(path, {"a": torch.zeros(10_000)}),
        "files": lambda: write_all({other: b"new", path: b"x" * 10_000}),
    }[kind]
    assert refused(writing, tmp_path / "said") == f"{path}: File too large"
    assert path.read_text().startswith("old")
    assert other.read_text() == "old"
    assert sorted(path.parent.iterdir()) == [path, other]


def test_files_that_go_together_are_all_replaced(tmp_path):
    write_all({tmp_path / "a" / "one": b"1", tmp_path / "b" / "two": b"2"})
    assert (tmp_path / "a" / "one").read_text() + (tmp_path / "b" / "two").read_text() == "12"
    (tmp_path / "c").mkdir()
    with pytest.raises(IsADirectoryError):
        write_all({tmp_path / "a" / "one": b"3", tmp_path / "c": b"4"})
    assert (tmp_path / "a" / "one").read_text() == "1"


def command(folder: Path, task, monkeypatch, limit: int | None, said: Path) -> int:
    """The status of a run in `folder` where no file may be larger than `limit`; what it says goes to `said`."""
    monkeypatch.setattr("seqzoo.runs.attempt.compose", lambda _: tiny_config(folder, finetuning=SHORT))
    monkeypatch.setattr("seqzoo.runs.attempt.run", lambda config, deadline: run(config, task=task))
    monkeypatch.setattr("seqzoo.runs.attempt.printable_lines", lambda text: said.write_text(text) and text)

    def work() -> int:
        with dying_at(None):
            if limit is not None:
                limited(limit)
            return attempt([])

    return in_child(work)


# Neither config.yaml nor a checkpoint; all but a checkpoint.
@pytest.mark.parametrize("limit", [pytest.param(600, marks=pytest.mark.slow), 9000])
def test_a_run_that_finds_no_room_goes_on_with_room(limit, task, tmp_path, monkeypatch):
    said = tmp_path / "said"
    assert command(tmp_path / "cut", task, monkeypatch, limit, said) == 1
    message = said.read_text()
    assert message.endswith(": File too large; make room there, and the same command goes on")
    assert str(tmp_path / "cut") in message
    assert command(tmp_path / "cut", task, monkeypatch, None, said) == 0
    assert command(tmp_path / "whole", task, monkeypatch, None, said) == 0
    (cut,), (whole,) = (tmp_path / "cut").iterdir(), (tmp_path / "whole").iterdir()
    assert_equal(what_is_left(cut), what_is_left(whole))


@pytest.mark.slow
def test_a_full_file_system_is_said_and_goes_on_with_room(task, tmp_path, monkeypatch):
    """A real one: in memory where mounting is allowed, or where the environment variable says."""
    disk, said = tmp_path / "disk", tmp_path / "said"
    mounted = SMALL not in os.environ
    if mounted:
        disk.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting is not allowed here; {SMALL}=<a small file system> has it tried there")
    else:
        disk = Path(os.environ[SMALL])
    try:
        assert command(disk / "runs", task, monkeypatch, None, said) == 1
        assert "No space left on device; make room" in said.read_text()
        (stopped,) = (disk / "runs").iterdir()
        shutil.copytree(stopped, tmp_path / "runs" / stopped.name)
    finally:
        shutil.rmtree(disk / "runs", ignore_errors=True)
        if mounted:
            subprocess.run(["umount", disk], check=True)
    assert command(tmp_path / "runs", task, monkeypatch, None, said) == 0
    assert command(tmp_path / "whole", task, monkeypatch, None, said) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    assert_equal(what_is_left(tmp_path / "runs" / stopped.name), what_is_left(whole))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_run_whose_folder_goes_ends_in_a_sentence_and_without_a_result(stage, task, tmp_path, monkeypatch):
    validate = loop.Stage.validate

    def validate_and_delete(self):
        metrics = validate(self)
        if self.name == stage:
            shutil.rmtree(self.folder.parent)
        return metrics

    monkeypatch.setattr(loop.Stage, "validate", validate_and_delete)
    config = tiny_config(tmp_path, pretrain=True, pretraining=SHORT, finetuning=SHORT)
    with pytest.raises(TrainingError, match="was deleted or moved while it was trained"):
        run(config, task=task)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_finds_no_room_leaves_the_old_one(tmp_path):
    from seqzoo.report.cli import main

    study = Path(__file__).resolve().parents[2] / "results" / "tiny.jsonl"
    lines = study.read_text().splitlines(keepends=True)[:4]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    out, page = tmp_path / "out", tmp_path / "page.html"
    arguments = [str(tmp_path / "some.jsonl"), "--out", str(out), "--report", str(page)]

    def reported() -> int:
        limited(2000)
        return main(arguments)

    write_all({out / "table.md": b"old", out / "table.csv": b"old", out / "figure.png": b"old", page: b"old"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert in_child(reported) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_weights_have_the_mode_of_other_files(tmp_path):
    import torch

    save_weights(tmp_path / "weights", {"a": torch.zeros(2)})
    write_text(tmp_path / "text", "")
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "text").stat().st_mode
    assert load_weights(tmp_path / "weights").keys() == {"a"}


def test_a_summary_that_says_nothing_is_damage(task, tmp_path):
    config = tiny_config(tmp_path, pretrain=True, pretraining=SHORT, finetuning=SHORT)
    folder = Path(run(config, task=task)["folder"])
    (folder / "result.json").unlink()
    (folder / "pretrain" / "summary.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"summary.json is damaged: it has no tokens_seen; delete .*pretrain to"):
        run(config, task=task)
