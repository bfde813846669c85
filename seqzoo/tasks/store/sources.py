"""Where published data comes from: a folder or an archive the user has, or a download that is checked first."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...failures import Said

log = logging.getLogger(__name__)


class DataError(Said, RuntimeError):
    """Data that is missing, incomplete or damaged; the message says where, and what to do."""


class MissingData(DataError):
    """Data that is nowhere: nothing is wrong with what there is."""


@dataclass(frozen=True)
class Archive:
    """A published tar archive that unpacks to one folder."""

    url: str
    md5: str
    folder: str

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def provide(archive: Archive, data_dir: Path | None, download_dir: Path) -> Path:
    """The unpacked folder of `archive`: from `data_dir`, else from an earlier download, else downloaded.

    `data_dir` is only read; archives are downloaded and unpacked in `download_dir`.

    Raises:
        DataError: it is nowhere and cannot be downloaded, or the archive is damaged.
    """
    places = [download_dir] if data_dir is None else [data_dir, download_dir]
    for place in places:
        if (place / archive.folder).is_dir():
            return place / archive.folder
    for place in places:
        if (place / archive.filename).is_file():
            return _unpack(archive, place / archive.filename, download_dir)
    return _unpack(archive, _download(archive, places), download_dir)


def given_folder(folder: str, data_dir: Path | None, advice: str) -> Path:
    """`folder` under `data_dir`, of data that are not downloaded.

    Raises:
        MissingData: it is not there; `advice` says what to put there.
    """
    if data_dir is None:
        raise MissingData(f"no {folder}: data_dir is not set.\n{advice}")
    if not (data_dir / folder).is_dir():
        raise MissingData(f"no {folder} in {data_dir.resolve()}.\n{advice}")
    return data_dir / folder


def sha256_of(path: Path) -> str:
    """Of a file's contents: asked for several times by one run, hashed once for its size and date."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, dated: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unwritable(folder: Path, error: OSError, *, needed: int | None = None) -> DataError:
    """What to say when `error` came of writing `needed` bytes under `folder`, a part of the cache."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    size = "" if needed is None else f"{needed / 1e6:,.1f} MB are to be written, and "
    return DataError(
        f"{folder} cannot be written: {error}; {size}{shutil.disk_usage(existing).free / 1e6:,.1f} MB are free there.\n"
        f"Make room, or set cache_dir=<path> to a folder that can be written. What was there is untouched."
    )


def check_md5(path: Path, expected: str) -> None:
    """Raises DataError unless the file has the MD5 sum its publisher gives."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is truncated or damaged: its MD5 sum is {found}, that of the published file {expected}.\n"
            "Delete it and fetch it again."
        )


def _unpack(archive: Archive, path: Path, download_dir: Path) -> Path:
    check_md5(path, archive.md5)
    log.info("unpacking %s", path)
    folder = download_dir / archive.folder
    try:
        download_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=download_dir) as partial:
            with tarfile.open(path) as tar:
                tar.extractall(partial, filter="data")
            unpacked = Path(partial, archive.folder)
            if not unpacked.is_dir():
                raise DataError(f"{path} holds no folder {archive.folder}")
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except tarfile.TarError as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    except OSError as error:
        raise unwritable(download_dir, error) from error
    return folder


def _download(archive: Archive, looked_in: list[Path]) -> Path:
    import pooch

    try:
        return Path(
            pooch.retrieve(archive.url, known_hash=f"md5:{archive.md5}", fname=archive.filename, path=looked_in[-1])
        )
    except (OSError, ValueError) as error:  # no network or no such page; another checksum
        places = ", ".join(str(place.resolve()) for place in looked_in)
        kind = MissingData if isinstance(error, OSError) else DataError
        raise kind(
            f"no {archive.folder} (looked in {places}), and {archive.url} could not be downloaded: {error}\n"
            "Any one of these will do:\n"
            "  - run again with network access: it is downloaded and checked by itself\n"
            f"  - put {archive.filename}, or the folder {archive.folder} that it unpacks to, into data_dir\n"
            "  - set data_dir=<path> to the folder where one of them is"
        ) from error
