from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from seqzoo.tasks import TASKS, DataError, MissingData, __main__, from_arrays
from seqzoo.tasks.__main__ import main

SMALL = ["recipe=tiny", "task.num_train=300", "task.num_val=40", "task.num_test=50"]


@pytest.fixture
def tasks(monkeypatch):
    """Beside ListOps, one task in memory, of pictures, and two that cannot be had; no other."""
    pictures = np.random.default_rng(0).integers(0, 256, (40, 9), dtype=np.uint8)

    def image(config, **folders):
        task = from_arrays("pictures", kind="pixels", inputs=pictures, labels=[0, 1] * 20)
        return replace(task, spec=replace(task.spec, name="lra_image"))

    def text(config, **folders):
        raise MissingData("no reviews anywhere; put them there")

    listops = TASKS["lra_listops"]
    monkeypatch.setattr("seqzoo.tasks.TASKS", {"lra_image": image, "lra_listops": listops, "lra_text": text})
    monkeypatch.setattr(__main__, "TASKS", ["lra_image", "lra_listops", "lra_text"])


def run(tmp_path, *arguments: str) -> int:
    return main([*arguments, "--cache-dir", str(tmp_path / "cache")])


def test_prepare_prints_what_there_is(tmp_path, tasks, capsys):
    assert run(tmp_path, "prepare", "lra_listops", *SMALL) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split()[:2] == ["lra_listops", "generated"]
    (entry,) = (tmp_path / "cache").glob("lra_listops-*")
    for cell in (" 300 ", " 40 ", " 50 ", ", mean ", " 10 ", str(entry)):
        assert cell in row


def test_prepare_all_lists_what_is_missing(tmp_path, tasks, capsys):
    assert run(tmp_path, "prepare", "all") == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["lra_image", "lra_listops"]
    assert "made on the fly" in printed.out
    assert printed.err.endswith("seqzoo.tasks: lra_text is left out: no reviews anywhere; put them there\n")


def test_prepare_fails_of_what_is_asked_for_or_damaged(tmp_path, tasks, capsys, monkeypatch):
    assert run(tmp_path, "prepare", "lra_text", "lra_image") == 1
    printed = capsys.readouterr()
    assert printed.err == "seqzoo.tasks: no reviews anywhere; put them there\n"
    assert "lra_image" in printed.out

    def damaged(config, **folders):
        raise DataError("row 3 is damaged")

    monkeypatch.setattr("seqzoo.tasks.TASKS", {"lra_image": damaged})
    monkeypatch.setattr(__main__, "TASKS", ["lra_image"])
    assert run(tmp_path, "prepare", "all") == 1
    assert "row 3 is damaged" in capsys.readouterr().err


def test_verify(tmp_path, tasks, capsys):
    assert run(tmp_path, "verify", "lra_listops", "lra_image", *SMALL[:1]) == 0
    assert "as they were written" in capsys.readouterr().out
    (entry,) = (tmp_path / "cache").glob("lra_listops-*")
    path = entry / "test_labels.npy"
    stat = path.stat()
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(tmp_path, "verify", "lra_listops", *SMALL[:1]) == 1
    assert f"{entry} is damaged: test_labels.npy has changed since it was written.\nDelete" in capsys.readouterr().err


def test_show(tmp_path, tasks, capsys):
    assert run(tmp_path, "show", "lra_listops", "-n", "3", "--split", "test", *SMALL) == 0
    printed = capsys.readouterr().out
    assert printed.count("example ") == 3
    assert "<eos>" in printed
    assert run(tmp_path, "show", "lra_image", "--out", str(tmp_path / "sheet.png")) == 0
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "lra_imag"], "no task 'lra_imag' (did you mean 'lra_image'?); valid: "),
        (["prepare", "lra_listops", "task.num_tran=3"], "did you mean 'task.num_train'?"),
        (["prepare", "lra_listops", "task.num_val=0"], "task=lra_listops: "),
        (
            ["prepare", "lra_listops", "task.max_args=1000000000"],
            "max_args=1000000000: valid: 1 or more and up",
        ),
        (["prepare", "lra_listops", "task.num_train=1,2"], "num_train"),
        (["prepare", "lra_listops", "seed=é"], "seed=é"),
        (["prepare", "recipe=tiny"], "name a task, or all"),
        (["show", "all"], "show takes one task"),
        (["show", "lra_image", "lra_text"], "show takes one task"),
        (["show", "lra_listops", "--out", "a.png", *SMALL], "is text, which is printed"),
        (["show", "lra_image", "--out", "/nowhere/a.png"], "--out /nowhere/a.png: "),
        (["show", "lra_image", "--out", "a.pmg"], "--out a.pmg: "),
        (["show", "lra_image", "-n", "0"], "valid: 1 and more"),
        (["verify", "lra_image", "-n", "3"], "belong to show"),
        (["forget", "lra_image"], "invalid choice"),
    ],
)
def test_misuse(tmp_path, tasks, capsys, arguments, message):
    try:
        status = run(tmp_path, *arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_ctrl_c(tmp_path, tasks, capsys, monkeypatch):
    def stop(config, **folders):
        raise KeyboardInterrupt

    monkeypatch.setattr("seqzoo.tasks.TASKS", {"lra_image": stop})
    assert run(tmp_path, "prepare", "lra_image") == 130
    assert capsys.readouterr().err == "seqzoo.tasks: stopped; the same command goes on\n"


def test_the_command():
    done = subprocess.run([sys.executable, "-m", "seqzoo.tasks", "--help"], capture_output=True, text=True, check=True)
    assert "prepare" in done.stdout
    assert "lra_listops" in done.stdout
