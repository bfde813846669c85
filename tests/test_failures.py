"""How commands end: in a sentence and a status, but for bugs."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.config import ConfigError
from seqzoo.failures import ADVICE, Told, ends, told
from seqzoo.files import LinkError
from seqzoo.runs.folder import Busy
from seqzoo.tasks import DataError, MissingData
from seqzoo.training import TrainingError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def interruptible():
    """Even where the tests themselves run in the background of a shell, which ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def refused(number, *names):
    return OSError(number, os.strerror(number), *names)


def fail(error):
    raise error


def out_of_memory():
    """What PyTorch raises where a CPU has too little."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no such key"), 2),
        (DataError("no data"), 1),
        (MissingData("no data"), 1),
        (TrainingError("a loss is not finite"), 1),
        (Busy("in hand"), 4),
        (LinkError(Path("lock")), 1),
        (refused(errno.ENOSPC, "runs/metrics.jsonl"), 1),
        (MemoryError(), 1),
        (out_of_memory(), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_bug_ends_in_a_line_and_a_status(error, status, capsys):
    assert ends("train.py", lambda: fail(error)) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("train.py: ")
    assert len(said.err.splitlines()) == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        ends("train.py", lambda: fail(ValueError("a bug")))


def test_the_operating_system_is_quoted_with_the_place_and_what_to_do():
    for number, advice in ADVICE.items():
        assert told(refused(number, "runs/a")) == Told(f"runs/a: {os.strerror(number)}; {advice}", 1)
    assert told(refused(errno.EXDEV, "a", None, "b")) == Told(f"a -> b: {os.strerror(errno.EXDEV)}", 1)


def test_an_error_after_an_interrupt_is_its_consequence(capsys):
    def importing():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'intp'") from None

    assert ends("train.py", importing, stopped="stopped; the same command goes on") == 130
    assert capsys.readouterr().err == "train.py: stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path):
    program = (
        "import sys; from seqzoo.failures import ends\n"
        "sys.exit(ends('eval_lra.py', lambda: [print('x' * 99) for _ in range(9999)] and 0))"
    )
    command = f'{sys.executable} -c "{program}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["1"]


# What imports torch stands in for what takes seconds.
SLOW = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"


@pytest.mark.parametrize("command", ["script", "module"])
def test_an_interrupt_while_importing_is_quiet(command, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW)
    given = [ROOT / "train.py"] if command == "script" else ["-m", "seqzoo.tasks"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *given], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_import_by_others_leaves_their_interrupts_alone(tmp_path):
    (tmp_path / "other.py").write_text(
        "import signal, seqzoo\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    for given in (["other.py"], ["-m", "other"]):
        subprocess.run(
            [sys.executable, *given], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("given", [["train.py"], ["eval_lra.py"], ["-m", "seqzoo.analysis"], ["-m", "seqzoo.tasks"]])
@pytest.mark.parametrize("seconds", [0.3, 1, 2, 4])
def test_an_interrupt_in_the_first_seconds_is_a_line_at_most(given, seconds, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(str(ROOT / name) if name.endswith(".py") else name for name in given)]
    more = ["task=lra_listops", "recipe=tiny", "runs_dir=runs", "cache_dir=cache"] if "train" in given[0] else ["runs"]
    process = subprocess.Popen(
        [*command, *more], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    # A shell says 130 of what SIGINT ends, too, as it does once Python has given the signal back on its way out.
    assert process.returncode in (0, 1, 2, 130, -signal.SIGINT)
