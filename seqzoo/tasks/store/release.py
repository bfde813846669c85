"""Long Range Arena as it was released: one archive, `lra_release.gz`, of which every task reads a folder.

The archive is a compressed tar of 8 GB, 19 GB unpacked, in spite of its name. It holds some folders twice, such as
`lra_release/pathfinder128` and `lra_release/lra_release/pathfinder128`; the outer ones are stale
(google-research/long-range-arena, issue 38) and are not read.

A folder is unpacked out of it when first asked for. The archive is read as a stream to its last byte, because only
there does it say whether it is whole, and a folder gets its name once that has been read. A gzip stream can only be
read from the start: unpacking that was stopped reads it again, and writes what is not there yet. What the whole archive
holds is noted, so that a folder it lacks is not looked for twice.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from ...files import inside, without_links, write_text
from ...records import read_json
from .cache import lock, places
from .sources import DataError, MissingData, unwritable

if TYPE_CHECKING:
    from rich.console import Console

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
ARCHIVES = ("lra_release.gz", "lra_release.tar.gz")
ROOT = "lra_release/lra_release/"
UNPACKED = "downloads/lra_release"  # in the cache
CHUNK = 1 << 20
LARGEST_READ = 16 * CHUNK


def released_folder(folder: str, data_dir: Path | None, cache_dir: Path) -> Path | None:
    """Where `folder` of the release is, such as "tsv_data" or "pathfinder32/curv_contour_length_14"; None if nowhere.

    Under `data_dir`, where the archive unpacks to, be `data_dir` above that or within, or on its own; or unpacked
    earlier, or now, into `cache_dir`, of the archive in `data_dir`. Without a `data_dir` it is nowhere: what can be
    generated is. Unpacking takes minutes, shows how far it is, and ends by printing the number of files, their bytes
    and a SHA-256 of them all: that of lines `<SHA-256>  <name>`, as `sha256sum` prints them, sorted by name.

    Raises:
        DataError: the archive is truncated or damaged, a member would land outside the folder or is no plain file, or
            `cache_dir` cannot be written.
    """
    if data_dir is None:
        return None
    unpacked = cache_dir / UNPACKED
    within = data_dir / "lra_release"
    outer = (within / folder).is_dir() and not (data_dir / ROOT).is_dir()  # whose own folders are stale
    for place in (within if outer else data_dir, data_dir / ROOT, *(place / UNPACKED for place in places(cache_dir))):
        if (place / folder).is_dir():
            return place / folder
    archive = next((data_dir / name for name in ARCHIVES if (data_dir / name).is_file()), None)
    if archive is None:
        return None
    try:
        inside(inside(cache_dir, "downloads"), unpacked.name).mkdir(parents=True, exist_ok=True)
        with lock(unpacked / ".lock"):
            if not (unpacked / folder).is_dir():  # else another process was faster
                _unpack(archive, folder, unpacked)
    except OSError as error:
        raise unwritable(unpacked, error) from error
    return unpacked / folder if (unpacked / folder).is_dir() else None


def not_released(folder: str, data_dir: Path | None) -> MissingData:
    """What to say where a task has nothing but `folder` of the release to be read from, and that is nowhere."""
    return MissingData(
        f"no {folder} of the Long Range Arena release (looked in {data_dir or 'no folder: data_dir is not set'}).\n"
        "Any one of these will do:\n"
        f"  - fetch {URL}, 8 GB, and put it into data_dir as it is\n"
        f"  - put its folder {ROOT}{folder} into data_dir as {folder}\n"
        "  - set data_dir=<path> to the folder where one of them is"
    )


def _unpack(archive: Path, folder: str, unpacked: Path) -> None:
    """Make `unpacked / folder` of the archive, if it is in there."""
    contents = unpacked / "contents.json"
    stat = archive.stat()
    identity = {"bytes": stat.st_size, "dated": stat.st_mtime_ns}
    if _lacks(contents, identity, folder):
        return
    partial = without_links(unpacked / f".{folder.replace('/', '-')}.partial")
    digests: dict[str, str] = {}  # of the files in `folder`, by name
    files: Counter[str] = Counter()  # in each folder of the release
    total = 0
    with _reading(archive) as members:
        for member, content in members:
            full = member.name.removeprefix("./")
            if not full.startswith(ROOT):
                continue
            within = full.removeprefix(ROOT)
            if member.isfile():
                files[within.rpartition("/")[0]] += 1
            if within.startswith(f"{folder}/") and not member.isdir():
                name = PurePosixPath(within).relative_to(folder)
                if content is None or ".." in name.parts:
                    raise DataError(f"{archive}: {member.name} is no plain file in {folder}; nothing is unpacked")
                digests[str(name)] = _write(member.size, content, partial / name)
                total += member.size
    write_text(contents, json.dumps({"archive": identity, "files": files}, indent=1))
    if not digests:
        return
    for path in [path for path in partial.rglob("*") if path.is_file()]:
        if path.relative_to(partial).as_posix() not in digests:
            path.unlink()  # of another archive, whose unpacking was stopped
    inside(unpacked, PurePosixPath(folder).parts[0])
    (unpacked / folder).parent.mkdir(parents=True, exist_ok=True)
    partial.rename(unpacked / folder)
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    _console().print(f"{archive.name}, {folder}: {len(digests):,} files, {total:,} bytes, sha256 {digest}")


def _lacks(contents: Path, identity: dict[str, int], folder: str) -> bool:
    """Whether the archive was read to its end before and `folder` was not in it."""
    try:
        known = read_json(contents)
    except (OSError, ValueError):
        return False
    return known["archive"] == identity and not any(f"{name}/".startswith(f"{folder}/") for name in known["files"])


class _Decompressed(gzip.GzipFile):
    """A compressed stream read in pieces; tarfile would ask for a whole extended header, of any size that it gives."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > LARGEST_READ:
            raise tarfile.ReadError(f"a header gives its size as {size} bytes")
        return super().read(size)


@contextmanager
def _reading(archive: Path) -> Iterator[Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]]:
    """The members of a compressed tar in one pass, with the content of those that are plain files.

    Raises:
        DataError: the archive does not end as it should, or its checksums are not those of its bytes.
    """
    from rich.progress import Progress

    try:
        raw = archive.open("rb")
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}") from error
    with raw, Progress(console=_console(), transient=True) as progress:
        bar = progress.add_task(f"reading {archive.name}", total=archive.stat().st_size)
        try:
            with _Decompressed(fileobj=raw) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                yield _members(tar, lambda: progress.update(bar, completed=raw.tell()))
                _check_end(stream)
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise DataError(
                f"{archive} is truncated or damaged: {error}.\nDelete it and fetch it again from {URL}; nothing is "
                "unpacked."
            ) from error


def _members(tar: tarfile.TarFile, advance: Callable[[], object]) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # two million of them would fill the memory
        advance()
        yield member, tar.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None


def _check_end(stream: gzip.GzipFile) -> None:
    """Read on to where the checksum is; nothing but zeros is behind the last member, or it was not the last."""
    rest = 0
    while chunk := stream.read(CHUNK):
        rest += len(chunk)
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("a header in the middle is unreadable")
    if rest == 0:
        raise tarfile.ReadError("it has no end")


def _write(size: int, content: IO[bytes], path: Path) -> str:
    """Write a file, unless a small one is there already, and return its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if size <= CHUNK:
        whole = content.read()
        if not path.is_file() or path.read_bytes() != whole:
            path.write_bytes(whole)
        return hashlib.sha256(whole).hexdigest()
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)
