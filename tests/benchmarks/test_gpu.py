"""The one command for a GPU, tried without one: its processes, its deadline, and what it is not to need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from on_gpu import summary
from on_gpu.log import Log, read
from on_gpu.workers import Died, Failed, Task, Worker, ask_all

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
NOT_THERE = ("hydra", "omegaconf", "wandb", "lightning", "lightning_fabric", "pooch", "submitit", "rich")
LOGS = ("checks", "bench", "sweep", "memcheck", "canary")


@pytest.fixture
def patients(tmp_path, monkeypatch):
    """Things to ask of a worker: some kill it."""
    (tmp_path / "patients.py").write_text(
        "import os, signal, time\n"
        "def well(n): return {'n': n}\n"
        "def ill(n): raise ValueError('no such n')\n"
        "def dies(n): print('segment 7 is gone', flush=True); os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def leaves(n): os._exit(n)\n"
        "def hangs(n): time.sleep(60)\n"
        "def poisons(n):\n"
        "    import sys\n"
        "    from unittest import mock\n"
        "    sys.modules['torch'] = mock.Mock(**{'cuda.synchronize.side_effect': RuntimeError('illegal access')})\n"
        "class OutOfMemoryError(RuntimeError): pass\n"
        "tries = []\n"
        "def lacks(n):\n"
        "    tries.append(n)\n"
        "    if len(tries) < n: raise OutOfMemoryError('taken by others')\n"
        "    return {'tries': len(tries)}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name, n=0: Task(f"patients:{name}", {"n": n})


def test_worker_that_dies_is_replaced_and_says_what_of(patients):
    with Worker() as worker:
        assert worker.ask(patients("well", 1), 20) == {"n": 1}
        with pytest.raises(Failed, match="ValueError: no such n"):
            worker.ask(patients("ill"), 20)
        with pytest.raises(Died, match="signal SIGSEGV: segment 7 is gone"):
            worker.ask(patients("dies"), 20)
        with pytest.raises(Died, match="exit 3"):
            worker.ask(patients("leaves", 3), 20)
        assert worker.ask(patients("well", 2), 20) == {"n": 2}
        with pytest.raises(Died, match="hung"):
            worker.ask(patients("hangs"), 0.5)
        assert worker.ask(patients("well", 3), 20) == {"n": 3}


def test_shard_goes_on_behind_the_task_that_its_worker_died_of(patients):
    shards = [[patients("well", 1), patients("dies", 2), patients("well", 3)], [patients("ill", 4)]]
    outcomes = {}
    workers = [Worker(), Worker()]
    try:
        ask_all(
            workers, shards, 20, time.monotonic() + 60, lambda task, end: outcomes.update({task.arguments["n"]: end})
        )
    finally:
        for worker in workers:
            worker.close()
    assert {n: end.status for n, end in outcomes.items()} == {1: "done", 2: "died", 3: "done", 4: "failed"}


def test_deadline_gives_up_what_is_over_and_what_is_under_way(patients):
    ends = []
    with Worker() as worker:
        start = time.monotonic()
        ask_all(
            [worker], [[patients("hangs"), patients("well")]], 60, start + 1, lambda _, end: ends.append(end.status)
        )
        assert time.monotonic() - start < 20
    assert ends == ["not reached", "not reached"]


def test_memory_that_others_have_is_waited_for(patients):
    with Worker() as worker:
        assert worker.ask(patients("lacks", 2), 20) == {"tries": 2}


def test_fault_that_comes_late_is_of_the_task_that_made_it(patients):
    with Worker() as worker:
        with pytest.raises(Died, match="illegal access"):
            worker.ask(patients("poisons"), 20)
        assert worker.ask(patients("well", 1), 20) == {"n": 1}


@pytest.fixture
def run(tmp_path):
    run = gpu.Run(tmp_path / "out", 60.0, False, time.monotonic())
    yield run
    run.end()


def test_phase_that_breaks_off_is_not_the_last(run, monkeypatch):
    begun = []

    def phase(name):
        begun.append(name)
        if name == "compile":
            raise KeyError("a fault")
        return 2

    for name in gpu.SHARES:
        monkeypatch.setattr(run, name, lambda until, name=name: phase(name))
    run()
    assert begun == list(gpu.SHARES)
    assert "KeyError" in run.record["phases"]["compile"]["fault"]
    assert run.record["phases"]["bench"]["not_reached"] == 2
    assert "compile broke off: KeyError" in summary.of(run.record, {name: [] for name in LOGS})


def test_process_whose_capture_failed_is_replaced(run, patients, monkeypatch, tmp_path):
    (tmp_path / "captures.py").write_text(
        "import os\ndef fails(n, rehearse): return {'pid': os.getpid(), **({'no_graph': 'a sync'} if n else {})}\n"
    )
    run.one_by_one("bench", "captures:fails", [{"n": n} for n in (0, 1, 0, 0)], time.monotonic() + 60)
    first, second, third, fourth = (row["pid"] for row in run.log.rows["bench"])
    assert first == second != third == fourth


@pytest.mark.parametrize(
    ("said", "exit_status", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= Error: No attachable process found.", 0, "not checked"),
        ("========= Invalid __global__ read", gpu.SANITIZER_FOUND, "above"),
    ],
)
def test_memory_was_looked_at_where_the_tool_says_so(run, tmp_path, said, exit_status, status):
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {exit_status}\n")
    tool.chmod(0o755)
    assert run.looked_over([str(tool)], {}, 20.0).answer["status"] == status


def test_tool_that_is_not_done_in_time_was_not_reached(run, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nsleep 60\n")
    tool.chmod(0o755)
    assert run.looked_over([str(tool)], {}, 0.3).status == "not reached"


def test_rows_are_on_disk_one_by_one_and_a_cut_line_is_left_out(tmp_path):
    log = Log(tmp_path / "out")
    log.begin("checks")
    log.write("checks", {"whole": float("inf"), "n": 1})
    assert read(tmp_path / "out", "checks") == [{"whole": "inf", "n": 1}]
    with (tmp_path / "out" / "checks.jsonl").open("a") as file:
        file.write('{"whole": 0.1, "n"')
    assert len(read(tmp_path / "out", "checks")) == 1
    assert read(tmp_path / "out", "bench") == []


@pytest.fixture
def bare(tmp_path):
    """An environment in which nothing is installed but what a GPU machine has."""
    (tmp_path / "bare").mkdir()
    blocked = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in NOT_THERE)
    (tmp_path / "bare" / "sitecustomize.py").write_text(blocked)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TRITON", "SEQZOO"))}
    return {**kept, "PYTHONPATH": str(tmp_path / "bare")}


def test_rooms_need_neither_the_packages_of_training_nor_a_path(bare, tmp_path):
    rooms = ", ".join(sorted(path.stem for path in (SCRIPT.parent / "on_gpu").glob("[!_]*.py")))
    program = f"import gpu; from on_gpu import {rooms}; print(card.describe()['commit'], len(checks.plan(True)))"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(SCRIPT.parent)!r}]; {program}"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_deadline_of_nothing_still_leaves_everything_there_is_to_leave(bare, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--deadline", "1", "--out", out],
        env=bare, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["run.json", "summary.md", *(f"{name}.jsonl" for name in LOGS)]
    )
    run = json.loads((out / "run.json").read_text())
    assert run["sham"]
    assert set(run["phases"]) == {"machine", "checks", "compile", "bench", "sweep", "memcheck", "canary"}
    assert done.stdout.endswith((out / "summary.md").read_text() + "\n")


def test_stopped_run_prints_what_it_has(bare, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--rehearse", "--deadline", "300", "--out", out],
        env=bare, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (out / "run.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert "**Interrupted.**" in said
    assert json.loads((out / "run.json").read_text())["interrupted"]


@pytest.mark.slow
def test_rehearsal_passes_every_check_and_reaches_every_phase(bare, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--deadline", "900", "--out", out],
        env=bare, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in LOGS:
        rows = read(out, name)
        assert rows, name
        assert all(row.get("status", "passed") == "passed" for row in rows), name
    assert all(row["launches"] for row in read(out, "checks"))
    assert all(row["sham"] for row in read(out, "bench"))
    applied = subprocess.run([sys.executable, SCRIPT, "--apply", out], env=bare, capture_output=True, text=True)
    assert applied.returncode != 0
    assert "rehearsal" in applied.stderr


def test_summary_is_short_whatever_happened():
    row = {"operation": "attention", "case": "D=16 causal", "dtype": "bfloat16", "few_warps": 0, "width": 16}
    died = [{**row, "status": "died", "said": "signal SIGSEGV: " + "x" * 300} for _ in range(500)]
    bits = {"same_bits": False, "worst": "d q", "whole": "inf", "bound": 0.01, "worst_row": "inf", "bound_row": 0.1}
    times = {"operation": "attention", "dtype": "bfloat16", "width": 64, "lra": True, "name": "fused", "both_ms": 1.0}
    bench = [{**times, "both_eager_ms": 1.0, "shape": f"B={B}", "tflops": 3.0, "gbs": 4.0} for B in range(300)]
    text = summary.of(
        {"copy_gbs": 3000.0, "product_tflops": 790.0},
        {
            "checks": [{**row, "status": "above", **bits}, *died],
            "bench": bench,
            "sweep": [],
            "memcheck": [],
            "canary": [],
        },
    )
    assert len(text) <= summary.MOST
    assert "other bits in another run" in text
    assert "died, signal SIGSEGV" in text
