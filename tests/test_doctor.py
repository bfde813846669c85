"""The doctor: what it finds, what it makes of it, and that nothing takes it down."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seqzoo import kernels
from seqzoo.doctor import __main__ as doctor
from seqzoo.doctor import examination, machine, operations
from seqzoo.doctor.finding import BAD, OK, UNKNOWN, Finding, status

CPU = torch.device("cpu")
PLAN = ["attention chunked float32", "delta_rule chunked float32", "diagonal_scan chunked complex64"]
RIGHT = [Finding(OK, name, "") for name in PLAN]


def answering(monkeypatch, lines, ended=""):
    """The examination prints these lines and ends so."""
    monkeypatch.setattr(doctor, "_ask", lambda module, options, until: (lines, ended))


def examined(found, device="cpu"):
    return [{"device": device, "operations": PLAN}, *map(list, found)]


@pytest.mark.parametrize(
    ("lines", "ended", "expected", "said"),
    [
        (examined(RIGHT), "", 0, "3 of 3 right"),
        (examined([*RIGHT[:2], Finding(BAD, PLAN[2], "v 3e-01 from its definition")]), "", 1, "v 3e-01"),
        (examined(RIGHT[:2]), "late", 2, f"no time for {PLAN[2]}"),
        (examined(RIGHT[:1]), "status -11", 1, f"{PLAN[1]} died: status -11"),
        ([], "No module named 'torch'", 1, "cannot be loaded: No module named 'torch'"),
    ],
)
def test_the_status_says_whether_the_machine_is_healthy(lines, ended, expected, said, tmp_path, monkeypatch, capsys):
    answering(monkeypatch, lines, ended)
    monkeypatch.setattr(machine, "LEAST_FREE", 0)
    assert doctor.main([f"--runs-dir={tmp_path}", f"--cache-dir={tmp_path}"]) == expected
    assert said in " ".join(capsys.readouterr().out.split())


def test_all_of_it_is_one_screen_without_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t")
    answering(monkeypatch, examined([*RIGHT, Finding(OK, "wandb", "online")]))
    doctor.main([f"--runs-dir={tmp_path}", f"--cache-dir={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
    assert "s3cr3t" not in "".join(lines)


def test_unknown_is_neither_healthy_nor_not():
    unknown, wrong, right = Finding(UNKNOWN, "", ""), Finding(BAD, "", ""), Finding(OK, "", "")
    assert [status(found) for found in ([right], [right, unknown], [unknown, wrong])] == [0, 2, 1]


def test_a_folder_that_cannot_be_written_is_bad(tmp_path):
    (tmp_path / "file").write_text("")
    findings = list(machine.room({"runs": tmp_path / "file" / "runs", "cache": tmp_path / "not" / "yet"}))
    assert findings[0].state == BAD
    assert f"{tmp_path / 'file' / 'runs'} cannot be written" in findings[0].said
    assert findings[1].said.startswith(f"{tmp_path / 'not' / 'yet'}: ")


def test_every_operation_is_looked_at():
    names = {operation.name for operation in operations.OPERATIONS}
    assert names == {path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py")}


@pytest.mark.parametrize("check", list(operations.checks(CPU)), ids=str)
def test_right_operations_are_far_from_the_bounds(check):
    assert operations.worst(check, CPU)[1] < operations.BOUNDS[check.dtype] / 10


def test_a_wrong_gradient_is_found(monkeypatch):
    (check,) = (check for check in operations.checks(CPU) if check.operation.name == "attention")

    def wrong(x, form):
        value = kernels.attention(x["q"], x["k"], x["v"], causal=True, backend=form)
        return value if form == "reference" else value.detach() + 0.99 * (value - value.detach())

    spoilt = check._replace(operation=check.operation._replace(call=wrong))
    name, error = operations.worst(spoilt, CPU)
    assert name != "output"
    assert error == pytest.approx(0.01, rel=0.01)


def test_a_process_that_ends_or_lasts_takes_nothing_down(monkeypatch):
    real = subprocess.Popen
    programs = {"dies": "import os; print('[1]', flush=True); os.abort()", "lasts": "import time; time.sleep(60)"}
    monkeypatch.setattr(
        doctor.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", programs[which]], **options)
    )
    which = "dies"
    assert doctor._ask("", [], time.monotonic() + 60) == ([[1]], "status -6")
    which = "lasts"
    assert doctor._ask("", [], time.monotonic() + 0.2) == ([], "late")


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "WANDB_MODE": "offline"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "seqzoo.doctor", f"--runs-dir={tmp_path}", f"--data-dir={tmp_path}"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert time.monotonic() - start < 60
    assert done.returncode in (0, 2), done.stdout + done.stderr  # 2: this machine is too busy to tell
    assert "offline" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_archives_and_folders_of_data_are_found(tmp_path):
    (tmp_path / "listops-1000").mkdir()
    for name in ("aclImdb_v1.tar.gz", "lra_release.gz"):
        (tmp_path / name).touch()
    said = examination.data(tmp_path, tmp_path / "cache").said
    assert f"in {tmp_path}: aclImdb_v1.tar.gz, lra_release.gz, listops-1000; prepared: none" in said
