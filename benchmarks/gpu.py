"""The Triton kernels on a GPU: are they right, and how fast beside what people install. One command, eight minutes.

    python benchmarks/gpu.py --deadline 480 --out results/gpu    everything, imports and compilation included
    python benchmarks/gpu.py --apply results/gpu                 what "auto" goes by, and block sizes, from its rows
    python benchmarks/gpu.py --rehearse --out <folder>           all of it on a CPU, with tiny shapes and sham times

Phases in turn, each with its share of the time, which goes on to the next where it is not used: the machine; checks of
every case against float64, by a process for each core, with what is timed later compiled behind them; times; a sweep
of block sizes; memcheck; a canary of what compilers were wrong about. What a phase does not reach it says so. Rows are
on disk before the next is begun. A process that dies of a kernel is replaced, and the row says what it died of.

Into the folder: `checks.jsonl`, `bench.jsonl`, `sweep.jsonl`, `memcheck.jsonl`, `canary.jsonl`, `run.json` and
`summary.md`, which is printed too, also after Ctrl-C. Exit status 1: no GPU, or a check of what the
kernels take has not passed.

Nothing need be installed but PyTorch, Triton and NumPy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

from on_gpu import apply, summary  # noqa: E402
from on_gpu.log import Log, Row, read  # noqa: E402
from on_gpu.workers import OVER, Outcome, Task, Worker, ask, ask_all  # noqa: E402

SHARES = {
    "machine": 0.05,
    "checks": 0.34,
    "compile": 0.1,
    "bench": 0.29,
    "sweep": 0.1,
    "memcheck": 0.08,
    "canary": 0.04,
}
SECONDS = {"checks": 90.0, "compile": 90.0, "bench": 45.0, "sweep": 30.0, "memcheck": 60.0, "canary": 30.0}  # of a task
LOGS = ("checks", "bench", "sweep", "memcheck", "canary")
READY = ("chunked", "SDPA")  # what compiles nothing
PART = 8  # tasks of a shard that one process does
SANITIZER_FOUND = 86  # its exit status
# Calls of the driver that fail in the ordinary course of PyTorch and Triton are not what it is asked for; and a process
# that takes long to come to its first kernel is waited for, as without it the tool gives up and looks at nothing.
SANITIZER = ("--tool", "memcheck", "--report-api-errors", "no", "--launch-timeout", "60", "--error-exitcode")
SANITIZER_PASSED = "ERROR SUMMARY: 0 errors"


class Run:
    """The phases of one run. This process has nothing on the GPU, and imports no PyTorch."""

    def __init__(self, out: Path, deadline: float, rehearse: bool, began: float) -> None:
        self.log = Log(out)
        self.log.begin(*LOGS)
        self.began, self.total, self.rehearse = began, deadline, rehearse
        self.record: Row = {
            "command": " ".join(["python", *sys.argv]),
            "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "deadline_s": deadline,
            "phases": {},
        }
        if rehearse:
            self.record["sham"] = True
        self.children: list[subprocess.Popen[str]] = []
        self.workers = [Worker() for _ in range(os.cpu_count() or 1)]
        self.first = self.workers[0]

    def __call__(self) -> None:
        share = 0.0
        for name in SHARES:
            share += SHARES[name]
            until, started = self.began + share * self.total, time.monotonic()
            print(f"{started - self.began:6.0f} s  {name}", flush=True)
            phase: Row = {}
            try:
                if left_out := getattr(self, name)(until):
                    phase["not_reached"] = left_out
            except Exception:  # a fault of this script: the phases after it count all the same
                phase["fault"] = traceback.format_exc()
                print(phase["fault"], flush=True)
            self.record["phases"][name] = {"seconds": time.monotonic() - started, **phase}
            self.log.describe(self.record)

    def end(self) -> None:
        for child in self.children:
            kill(child)
        for worker in self.workers:
            worker.close()

    # The phases. Each returns how many of its tasks it did not reach.

    def machine(self, until: float) -> int:
        """Versions, one kernel, ceilings."""
        for function in ("on_gpu.card:describe", "on_gpu.card:first_kernel", "on_gpu.card:ceilings"):
            outcome = ask(self.first, Task(function, {}), 60.0, max(until, time.monotonic() + 60))
            self.record |= outcome.answer if outcome.status == "done" else {function: list(outcome)}
            self.log.describe(self.record)
        return 0

    def checks(self, until: float) -> int:
        shards: dict[tuple[Any, ...], list[Task]] = {}
        for row in self.plan("on_gpu.checks:plan", until):
            shard = shards.setdefault((row["operation"], row["dtype"], row["width"], row["few_warps"]), [])
            shard.append(Task("on_gpu.checks:check", row))
        # Long ones in parts, or a single process would be left with the last of them.
        parts = [shard[i : i + PART] for shard in shards.values() for i in range(0, len(shard), PART)]
        return self.all(parts, "checks", until)

    def compile(self, until: float) -> int:
        """What is timed later, by the same processes; block sizes that the sweep tries are checked on the way."""
        sweep = [Task("on_gpu.sweep:verify", row) for row in self.plan("on_gpu.sweep:plan", until)]
        rows = self.plan("on_gpu.bench:plan", until)
        bench = [Task("on_gpu.bench:warm", row) for row in rows if not row["name"].startswith(READY)]
        self.verified: dict[str, Outcome] = {}

        def note(task: Task, outcome: Outcome) -> None:
            if task in sweep:
                self.verified[json.dumps(task.arguments)] = outcome

        mixed = [[task] for pair in zip(bench, sweep, strict=False) for task in pair]
        rest = [[task] for task in (*bench[len(sweep) :], *sweep[len(bench) :])]
        missed = self.all(mixed + rest, "compile", until, note)
        for worker in self.workers[1:]:  # nothing may run beside what is timed
            worker.end()
        return missed

    def all(
        self, shards: list[list[Task]], phase: str, until: float, note: Callable[[Task, Outcome], None] | None = None
    ) -> int:
        """How many tasks were not reached."""
        missed: Counter[str] = Counter()

        def noted(task: Task, outcome: Outcome) -> None:
            missed[outcome.status] += 1
            if note is not None:
                note(task, outcome)
            else:
                self.log.write(phase, row_of(task, outcome))

        tasks = [[Task(t.function, {**t.arguments, "rehearse": self.rehearse}) for t in shard] for shard in shards]
        ask_all(self.workers, tasks, SECONDS[phase], until, lambda t, o: noted(_without(t, "rehearse"), o))
        return missed["not reached"]

    def bench(self, until: float) -> int:
        rows = self.plan("on_gpu.bench:plan", until)
        return self.one_by_one("bench", "on_gpu.bench:bench", rows, until)

    def sweep(self, until: float) -> int:
        """Times of what has passed its checks; of the rest, why not."""
        right = []
        for row in self.plan("on_gpu.sweep:plan", until):
            found = self.verified.get(json.dumps(row), Outcome("not reached", "it was not compiled"))
            if found.status == "done" and found.answer["status"] == "passed":
                right.append(row)
            else:
                self.log.write("sweep", row_of(Task("", row), found))
        return self.one_by_one("sweep", "on_gpu.sweep:measure", right, until, {"status": "passed"})

    def memcheck(self, until: float) -> int:
        """NVIDIA's tool over one call of every operation, a process each."""
        tool = sanitizer()
        if tool is None and not self.rehearse:
            self.log.write("memcheck", {"status": "not checked", "said": "compute-sanitizer is not here"})
            return 0
        rows = self.plan("on_gpu.memcheck:plan", until)
        prefix = [tool, *SANITIZER, str(SANITIZER_FOUND)] if tool else []

        waiting = iter(rows)
        missed: list[Row] = []

        def look() -> None:
            for row in waiting:
                found = self.looked_over(prefix, row, min(SECONDS["memcheck"], until - time.monotonic()))
                self.log.write("memcheck", row_of(Task("", row), found))
                if found.status == "not reached":
                    missed.append(row)

        threads = [threading.Thread(target=look, daemon=True) for _ in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(missed)

    def looked_over(self, prefix: list[str], row: Row, seconds: float) -> Outcome:
        if seconds <= 0:
            return OVER
        arguments = json.dumps({**row, "rehearse": self.rehearse})
        command = [*prefix, sys.executable, str(HERE / "gpu.py"), "--once", arguments]
        # Every tensor in an allocation of its own: inside a shared one, accesses beyond a tensor are no errors.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        self.children.append(child)
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(child)
            return OVER if seconds < SECONDS["memcheck"] else Outcome("died", f"hung: nothing after {seconds:.0f} s")
        if child.returncode == 0 and prefix and SANITIZER_PASSED not in said:
            return Outcome("done", {"status": "not checked", "said": said.strip()[-300:]})
        if child.returncode == 0:
            return Outcome("done", {"status": "passed", "said": said.strip().rpartition("\n")[2][-200:]})
        if child.returncode == SANITIZER_FOUND:
            return Outcome("done", {"status": "above", "said": said[:1000]})
        return Outcome("failed", f"exit {child.returncode}: {said[-300:]}")

    def canary(self, until: float) -> int:
        self.first.end()
        rows = self.plan("on_gpu.canary:plan", until)
        return self.one_by_one("canary", "on_gpu.canary:sing", rows, until)

    def one_by_one(self, phase: str, function: str, rows: list[Row], until: float, more: Row | None = None) -> int:
        missed = 0
        for row in rows:
            task = Task(function, {**row, "rehearse": self.rehearse})
            outcome = ask(self.first, task, SECONDS[phase], until)
            missed += outcome.status == "not reached"
            if outcome.status == "done" and "no_graph" in outcome.answer:
                self.first.end()  # PyTorch's allocator and random numbers stay as they were inside the capture
            self.log.write(phase, {**(more or {}), **row_of(_without(task, "rehearse"), outcome)})
        return missed

    def plan(self, function: str, until: float) -> list[Row]:
        """Of no rows if the time is over, or the room cannot say."""
        outcome = ask(self.first, Task(function, {"rehearse": self.rehearse}), 60.0, until)
        if outcome.status != "done":
            self.record.setdefault("no_plan", {})[function] = list(outcome)
            return []
        return outcome.answer


def sanitizer() -> str | None:
    """It comes with CUDA, whose programs are not always where programs are looked for."""
    folders = [os.environ.get("PATH", ""), *sorted(map(str, Path("/usr/local").glob("cuda*/bin")))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def kill(child: subprocess.Popen[str]) -> None:
    """It and what it has started: a tool's end is not that of the process which it looks at."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _without(task: Task, name: str) -> Task:
    return Task(task.function, {key: value for key, value in task.arguments.items() if key != name})


def row_of(task: Task, outcome: Outcome) -> Row:
    """Arguments and answer of a task, or how it ended without one."""
    if outcome.status == "done":
        return {**task.arguments, **outcome.answer}
    return {**task.arguments, "status": outcome.status, "said": outcome.answer}


def measure(out: Path, deadline: float, rehearse: bool, began: float) -> int:
    with tempfile.TemporaryDirectory(prefix="seqzoo-triton-", ignore_cleanup_errors=True) as cache:
        os.environ.update(environment(cache, rehearse))
        run = Run(out, deadline, rehearse, began)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run()
        except KeyboardInterrupt:
            run.record["interrupted"] = True
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            run.end()
            run.record["seconds"] = time.monotonic() - began
            run.log.describe(run.record)
            text = summary.of(run.record, {name: read(out, name) for name in LOGS})
            (out / "summary.md").write_text(text)
            print(text, flush=True)
    statuses = {row["status"] for row in run.log.rows["checks"]}
    return 0 if "passed" in statuses and statuses <= {"passed", "not checked"} else 1


def environment(cache: str, rehearse: bool) -> dict[str, str]:
    """Of all processes: what one has compiled serves all, a core each, the same bits of cuBLAS in every run."""
    shared = {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    if rehearse:
        shared |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return shared


def no_gpu() -> bool:
    """Asked of the driver, without PyTorch."""
    return not Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/gpu", metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--apply", type=Path, metavar="FOLDER", help="write tables from the rows of a run")
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        from on_gpu import memcheck

        memcheck.call(**options.once)
        return 0
    if options.apply is not None:
        return apply.main(options.apply)
    if no_gpu() and not options.rehearse:
        print("no GPU: the kernels are tested on a CPU by pytest, and compiled by benchmarks/compile.py")
        return 1
    return measure(options.out, options.deadline, options.rehearse, began)


if __name__ == "__main__":
    sys.exit(main())
