"""How files are written: whole or not at all, and never through a symbolic link.

A folder of somebody else's may hold links under the names that are written in it, so that what is written would land in
any file of the user's. What a user names may be a link: `runs_dir`, `cache_dir`, `--out`, a run folder. Below that the
last part of a path is looked at when it is written, and folders when they are entered, see `inside`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from .failures import Said


class LinkError(Said, OSError):
    """A symbolic link, or something else that is no file, where this project writes a file or folder of its own."""

    def __init__(self, path: Path) -> None:
        other = path.exists() and not path.is_symlink()
        self.strerror = (
            f"{path} is {'no regular file' if other else 'a symbolic link'}: what is written there would land "
            "elsewhere; valid: a folder or file of its own, or none"
        )
        super().__init__(self.strerror)


def inside(folder: Path, name: str) -> Path:
    """What is called `name` in `folder`, a folder or a file changed in place, whether it is there or not.

    Raises:
        LinkError: it is a symbolic link.
    """
    path = folder / name
    if path.is_symlink():
        raise LinkError(path)
    return path


def without_links(folder: Path) -> Path:
    """`folder`, of which everything is the project's own, whether it is there or not.

    Raises:
        LinkError: it is a symbolic link, or there is one in it, however deep.
    """
    inside(folder.parent, folder.name)
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            inside(Path(place), name)
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file to write to; on leaving without an error it becomes `path`, in one step.

    It has reached the disk before it is renamed, so that a power failure leaves the old file or the new one. Till then
    it is `<path>.tmp`: what a process that was killed left of it goes with the next.
    """
    with _beside(path) as temporary:
        with temporary.open("xb") as file:
            yield file
            flush(file)
        os.replace(temporary, path)


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Files of which all are replaced or, where one of them cannot be written, none: they are renamed once all are
    whole. Of two paths to one place the later counts."""
    once = {os.path.abspath(path): path for path in contents}
    with ExitStack() as stack:
        temporaries = {path: stack.enter_context(_beside(path)) for path in once.values()}
        for path, temporary in temporaries.items():
            with naming(path), temporary.open("xb") as file:
                file.write(contents[path])
                flush(file)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """`replacing` for a library that opens files itself: a name to give it, in a folder `<path>.tmp` made for that.

    Whatever mode the library gives the file, it gets that of every other.
    """
    with _beside(path) as folder:
        folder.mkdir(mode=0o700)
        temporary = folder / path.name
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            flush(file)
        os.replace(temporary, path)


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """A file that is there as a whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file that is there as a whole or not at all."""
    write_bytes(path, to_json(values))


def to_json(values: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(values, indent=2) + "\n").encode()


def append(path: Path, text: str) -> None:
    """Adds `text` to a file, which is made where there is none.

    Raises:
        LinkError: `path` is a symbolic link.
    """
    with naming(path), open(path, "ab", opener=_not_a_link) as file:
        file.write(text.encode())


def lock(path: Path, busy: Callable[[], object]) -> IO[bytes]:
    """An open file that one process has at a time, until it closes it or dies. What the file holds stays.

    Args:
        path: of the file, which is made where there is none.
        busy: called where another process has it, before waiting for that; may raise instead.

    Raises:
        LinkError: `path` is a symbolic link.
    """
    import fcntl  # POSIX only, so not where the module is imported

    with ExitStack() as stack:
        file = stack.enter_context(open(path, "ab", opener=_not_a_link))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        stack.pop_all()
    return file


def flush(file: IO[Any]) -> None:
    """To the disk, or a power cut after a renaming could leave a whole-looking file of zeros."""
    file.flush()
    os.fsync(file.fileno())


def remove_left(folder: Path, *below: str) -> None:
    """Removes what killed processes left under temporary names in `folder`, and however deep in those `below` it."""
    for left in [*folder.glob("*.tmp"), *(left for name in below for left in (folder / name).rglob("*.tmp"))]:
        _remove(left)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the operating system refuses within it names `path`: of a disk that is full, it names nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """The one temporary name for `path`, under which there is nothing before and after."""
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    _remove(temporary)
    try:
        with naming(path):
            yield temporary
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:  # a folder, empty but for what a killed process left
        try:
            os.rmdir(path)
        except OSError:
            shutil.rmtree(path)


def _not_a_link(path: str, flags: int) -> int:
    try:  # a pipe would be waited for
        file = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError:
        if os.path.lexists(path) and not os.path.isdir(path) and not _is_file(os.lstat(path)):
            raise LinkError(Path(path)) from None
        raise
    if not _is_file(os.fstat(file)):
        os.close(file)
        raise LinkError(Path(path))
    return file


def _is_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)
