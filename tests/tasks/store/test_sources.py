from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pooch
import pytest

from seqzoo.tasks import DataError, MissingData
from seqzoo.tasks.store.sources import Archive, check_md5, provide


def write_archive(path: Path, members: dict[str, bytes]) -> Archive:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return Archive(f"https://example.org/{path.name}", hashlib.md5(path.read_bytes()).hexdigest(), "toy")


@pytest.fixture
def archive(tmp_path) -> Archive:
    return write_archive(tmp_path / "data" / "toy.tar.gz", {"toy/a.txt": b"hello"})


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def retrieve(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", retrieve)


def test_a_folder_comes_first(tmp_path, archive):
    (tmp_path / "data" / "toy").mkdir()
    assert provide(archive, tmp_path / "data", tmp_path / "downloads") == tmp_path / "data" / "toy"
    assert not (tmp_path / "downloads").exists()


def test_an_archive_is_unpacked_elsewhere_and_once(tmp_path, archive):
    folder = provide(archive, tmp_path / "data", tmp_path / "downloads")
    assert folder == tmp_path / "downloads" / "toy"
    assert (folder / "a.txt").read_bytes() == b"hello"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["toy.tar.gz"]
    (tmp_path / "data" / "toy.tar.gz").unlink()
    assert provide(archive, tmp_path / "data", tmp_path / "downloads") == folder
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["toy"]


def test_a_truncated_archive(tmp_path, archive):
    path = tmp_path / "data" / "toy.tar.gz"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"toy\.tar\.gz is truncated or damaged"):
        provide(archive, tmp_path / "data", tmp_path / "downloads")


def test_an_archive_cannot_write_outside(tmp_path):
    archive = write_archive(tmp_path / "data" / "toy.tar.gz", {"../../evil.txt": b"x"})
    with pytest.raises(DataError, match="cannot be unpacked"):
        provide(archive, tmp_path / "data", tmp_path / "downloads")
    assert not list(tmp_path.rglob("evil.txt"))
    assert list((tmp_path / "downloads").iterdir()) == []


def test_an_archive_of_something_else(tmp_path):
    archive = write_archive(tmp_path / "data" / "toy.tar.gz", {"other/a.txt": b"x"})
    with pytest.raises(DataError, match="holds no folder toy"):
        provide(archive, tmp_path / "data", tmp_path / "downloads")


def test_nothing_anywhere_and_no_network(tmp_path, archive):
    with pytest.raises(MissingData) as error:
        provide(archive, tmp_path / "empty", tmp_path / "downloads")
    message = str(error.value)
    assert str(tmp_path / "empty") in message
    assert "no route to host" in message
    for way in ("network access", "put toy.tar.gz, or the folder toy", "set data_dir="):
        assert way in message


def test_a_download_of_something_else_is_not_missing(tmp_path, archive, monkeypatch):
    def retrieve(*args, **kwargs):
        raise ValueError("MD5 hash of downloaded file does not match")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match="does not match") as error:
        provide(archive, None, tmp_path / "downloads")
    assert not isinstance(error.value, MissingData)


def test_nowhere_to_unpack(tmp_path, archive):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/downloads cannot be written: .*\nMake room, or set cache_dir=<path>"):
        provide(archive, tmp_path / "data", tmp_path / "file" / "downloads")


def test_a_download_is_unpacked(tmp_path, archive, monkeypatch):
    def retrieve(url, known_hash, fname, path):
        assert (url, known_hash) == (archive.url, f"md5:{archive.md5}")
        Path(path).mkdir()
        return str((tmp_path / "data" / "toy.tar.gz").rename(Path(path, fname)))

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    folder = provide(archive, None, tmp_path / "downloads")
    assert (folder / "a.txt").read_bytes() == b"hello"


def test_check_md5(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    check_md5(path, "5d41402abc4b2a76b9719d911017c592")
    with pytest.raises(
        DataError, match=r"file is truncated or damaged: its MD5 sum is 5d41402abc4b2a76b9719d911017c592"
    ):
        check_md5(path, "0" * 32)
