"""Processes that do tasks, and may die of them: an illegal access ends whatever a process has on a GPU.

The one that asks has nothing there, and goes on with another process.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

TRIES = 3  # more of a task that there was no memory for
CONTEXT = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA


class Task(NamedTuple):
    function: str  # "module:name"
    arguments: dict[str, Any]


class Died(Exception):
    """The process is gone, or had to be ended; says how."""


class Failed(Exception):
    """The task raised, and the process can go on."""


def serve(connection: Connection, noise: str) -> None:
    """Does one task after the other until nobody asks any more. What it prints goes to the file `noise`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with open(noise, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer = _answer(task)
        for _ in range(TRIES):
            if answer[0] != "failed" or not answer[1].startswith("OutOfMemoryError"):
                break
            time.sleep(2)  # other processes have the memory, and give it back
            answer = _answer(task)
        connection.send(answer)
        if answer[0] == "died":
            os._exit(1)


def _answer(task: Task) -> tuple[str, Any]:
    module, _, name = task.function.partition(":")
    answer: tuple[str, Any]
    try:
        answer = ("done", getattr(importlib.import_module(module), name)(**task.arguments))
    except Exception as error:
        answer = ("failed", f"{type(error).__name__}: {error}"[:400])
    fault = _fault()  # outside of the handler, whose error holds on to tensors
    return answer if fault is None else ("died", fault if answer[0] == "done" else answer[1])


def _fault() -> str | None:
    """What the GPU has to say of the task, late as it says it. Memory not in use goes back, for the other processes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    with suppress(RuntimeError):  # after a capture that failed, it cannot
        torch.cuda.empty_cache()
    return None


class Worker:
    """A process, another one after each that died. As a context, it is ended in the end."""

    def __init__(self) -> None:
        self.process: Any = None
        self.closed = False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ask(self, task: Task, seconds: float) -> Any:
        """
        Raises:
            Died: of this task, or it took longer than `seconds`.
            Failed: the task raised.
        """
        process = self.process or self._start()
        try:
            self.connection.send(task)
            if not self.connection.poll(max(seconds, 0.0)):
                self.end()
                raise Died(f"hung: nothing after {seconds:.0f} s")
            kind, answer = self.connection.recv()
        except (EOFError, OSError):
            raise Died(self._post_mortem(process)) from None
        if kind == "died":
            self.end()
            raise Died(answer)
        if kind == "failed":
            raise Failed(answer)
        return answer

    def end(self) -> None:
        """Ends the process; the next task gets another one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.join(10)  # one that the driver holds is left to it
            self.connection.close()
            Path(self.noise).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the process, and there will be no other."""
        self.closed = True
        self.end()

    def _start(self) -> Any:
        descriptor, self.noise = tempfile.mkstemp(prefix="seqzoo-gpu-")
        os.close(descriptor)
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, self.noise), daemon=True)
        self.process.start()
        theirs.close()
        return self.process

    def _post_mortem(self, process: Any) -> str:
        process.join(5)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit {code}"
        noise = Path(self.noise)
        lines = noise.read_text(errors="replace").strip().splitlines() if noise.exists() else []
        self.end()
        return f"{how}: {lines[-1][:300]}" if lines else how


class Outcome(NamedTuple):
    status: str  # "done", "failed", "died", or "not reached" before the deadline
    answer: Any  # of the task, or what was said in its place


OVER = Outcome("not reached", "the time of this phase was over")


def ask(worker: Worker, task: Task, seconds: float, deadline: float) -> Outcome:
    """The outcome of `task`, given up at `deadline` of `time.monotonic()`, or as the worker is closed."""
    left = deadline - time.monotonic()
    if left <= 0 or worker.closed:
        return OVER
    try:
        return Outcome("done", worker.ask(task, min(seconds, left)))
    except Failed as error:
        return Outcome("failed", str(error))
    except Died as error:
        return OVER if time.monotonic() >= deadline or worker.closed else Outcome("died", str(error))


def ask_all(
    workers: Sequence[Worker],
    shards: Sequence[Sequence[Task]],
    seconds: float,
    deadline: float,
    note: Callable[[Task, Outcome], None],
) -> None:
    """All tasks of all shards, each shard by one worker, those in front first.

    Args:
        workers: each goes on with its shard behind the task that it died of, in a new process.
        seconds: for one task.
        deadline: of `time.monotonic()`, for all of them.
        note: called with each outcome, from several threads.
    """
    waiting: queue.SimpleQueue[Sequence[Task]] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)

    def work(worker: Worker) -> None:
        while True:
            try:
                shard = waiting.get_nowait()
            except queue.Empty:
                return
            for task in shard:
                note(task, ask(worker, task, seconds, deadline))

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
