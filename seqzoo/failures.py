"""How commands end: every failure that is no bug is a sentence on stderr and an exit status, in one place.

What went wrong and what to do is said by whoever finds it, as a `Said`; what the operating system says is put into
words here. Everything else is a bug, and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .extras import missing
from .messages import printable_lines

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
ROOM = "make room there, and the same command goes on"
WRITABLE = "valid: a place that you may read and write"
ADVICE = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.EACCES: WRITABLE,
    errno.EPERM: WRITABLE,
    errno.EROFS: WRITABLE,
    errno.ENAMETOOLONG: "valid: a shorter name",
    errno.ENOTDIR: "valid: a folder; this is a file, or lies below one",
    errno.EEXIST: "valid: a folder; this is a file",
    errno.EISDIR: "valid: a file; this is a folder",
    errno.ELOOP: "valid: no link that leads to itself",
    errno.ENOENT: "it is not there, or no longer",
    errno.ESTALE: "it is not there any longer",
    errno.EIO: "the disk fails: copy what is there to another",
    errno.EMFILE: "`ulimit -n` says how many may be open at once",
    errno.ENOMEM: "fewer or smaller programs at once leave more memory",
}
REFUSED = "DefaultCPUAllocator"  # in the RuntimeError of PyTorch's, which has an OutOfMemoryError for GPUs
NO_MEMORY = "there is not enough memory; a smaller batch_size, or model, takes less"


class Said(Exception):
    """A failure whose message says, to whoever gave the command, what was found and what to do."""

    status = FAILED  # of the command that ends with it


class Told(NamedTuple):
    """A failure in words, and the exit status that stands for it."""

    message: str
    status: int


def told(error: BaseException) -> Told | None:
    """What to say of an error; None: it is a bug."""
    if isinstance(error, Said):
        return Told(str(error), error.status)
    if what := missing(error):
        return Told(what, MISUSED)
    if isinstance(error, OSError):
        return Told(_of_system(error), FAILED)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or REFUSED in str(error):
        return Told(NO_MEMORY, FAILED)
    if "RANK" in os.environ and ("gloo" in str(error) or type(error).__name__.startswith("Dist")):
        return Told(f"rank {os.environ['RANK']}: another rank has ended; what it says, if anything, is why", FAILED)
    return None


def ends(command: str, work: Callable[[], int], *, stopped: str = "stopped") -> int:
    """The exit status of `work`, the whole of a command; a failure is said on stderr.

    Args:
        command: its name, which the message begins with.
        stopped: what to say after Ctrl-C. An error that follows one is taken for its consequence: libraries turn the
            exception of a Ctrl-C that comes while they are imported into others.
    """
    with _interrupts() as arrived:
        try:
            status = work()
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        except KeyboardInterrupt:
            said: Told | None = Told(stopped, INTERRUPTED)
        except Exception as error:
            said = told(error) or (Told(stopped, INTERRUPTED) if arrived.is_set() else None)
            if said is None:
                raise
    assert said is not None
    print(printable_lines(f"{command}: {said.message}"), file=sys.stderr)
    return said.status


def leave_while_importing() -> None:
    """From here to `ends`, Ctrl-C ends the process at once and without a word.

    Importing takes seconds; an exception in its midst is a traceback, or is turned into another by what is imported.
    """
    alone = threading.current_thread() is threading.main_thread()
    if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: Any) -> None:
    os._exit(INTERRUPTED)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Whether a Ctrl-C has arrived, which is raised as usual too."""
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def note(number: int, frame: Any) -> None:
        arrived.set()
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _leave):
        signal.signal(signal.SIGINT, note)
    try:
        yield arrived
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _of_system(error: OSError) -> str:
    """What the operating system refused, with the place that it names."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    place = f"{' -> '.join(names)}: " if names else ""
    advice = ADVICE.get(error.errno or 0)
    return f"{place}{error.strerror or error}{f'; {advice}' if advice else ''}"
