from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo import __version__
from seqzoo.tasks import DataError
from seqzoo.tasks.store import cache
from seqzoo.tasks.store.cache import Stored, cached, check, manifest_of, origin


def entry_of(cache_dir: Path) -> Path:
    (entry,) = cache_dir.glob("toy-*")
    return entry


class Builder:
    """Builds one small array and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, work: Path) -> Stored:
        self.calls += 1
        return Stored({"x": np.arange(1000)}, {"symbols": ["a", "é"]}, "generated")


def test_builds_once_and_maps_the_files(tmp_path):
    build = Builder()
    for _ in range(2):
        stored = cached(tmp_path / "new", "toy", {"length": 3}, build)
        assert isinstance(stored.arrays["x"], np.memmap)
        assert stored.arrays["x"].tolist() == list(range(1000))
        assert stored.facts == {"symbols": ["a", "é"]}
    assert build.calls == 1


def test_the_manifest_says_what_and_whence(tmp_path):
    labels = {"train_labels": np.zeros(7, np.int64), "test_labels": np.zeros(3, np.int64)}
    cached(tmp_path, "toy", {"length": 3, "seed": 5}, lambda work: Stored(labels, {"symbols": ["a"]}, "generated"))
    manifest = manifest_of(entry_of(tmp_path))
    assert manifest["request"] == {"format": 3, "name": "toy", "length": 3, "seed": 5}
    assert (manifest["source"], manifest["version"]) == ("generated", __version__)
    assert manifest["examples"] == {"train": 7, "test": 3}
    assert manifest["facts"] == {"symbols": ["a"]}
    assert manifest["files"]["train_labels.npy"] == {
        "bytes": 128 + 7 * 8,
        "sha256": hashlib.sha256((entry_of(tmp_path) / "train_labels.npy").read_bytes()).hexdigest(),
        "dtype": "int64",
        "shape": [7],
    }


def test_the_origin_is_the_source_and_what_it_takes(tmp_path):
    cached(tmp_path, "toy", {}, Builder())
    assert origin(entry_of(tmp_path)) == ("generated", (entry_of(tmp_path) / "x.npy").stat().st_size)
    assert origin(None) == ("made on the fly", 0)


def test_another_request_is_another_entry(tmp_path):
    build = Builder()
    cached(tmp_path, "toy", {"length": 3}, build)
    cached(tmp_path, "toy", {"length": 4}, build)
    assert build.calls == 2
    assert len(list(tmp_path.glob("toy-*"))) == 2


def test_writing_to_an_array_leaves_the_file_alone(tmp_path):
    cached(tmp_path, "toy", {}, Builder()).arrays["x"][0] = 77
    assert cached(tmp_path, "toy", {}, Builder()).arrays["x"][0] == 0


def flip_a_byte(entry: Path) -> None:
    data = bytearray((entry / "x.npy").read_bytes())
    data[-1] ^= 1
    (entry / "x.npy").write_bytes(data)


def change_manifest(entry: Path, **changes) -> None:
    path = entry / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_short(entry: Path) -> None:
    (entry / "x.npy").write_bytes((entry / "x.npy").read_bytes()[:-8])


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        cut_short,
        lambda entry: (entry / "x.npy").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("{"),
        lambda entry: change_manifest(entry, source="elsewhere"),
        lambda entry: change_manifest(entry, files={}),
    ],
    ids=["flipped", "cut", "no file", "no manifest", "half a manifest", "another source", "no files"],
)
def test_damage_is_said_and_repaired(tmp_path, caplog, damage):
    build = Builder()
    cached(tmp_path, "toy", {}, build)
    damage(entry_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        stored = cached(tmp_path, "toy", {}, build)
    assert stored.arrays["x"].tolist() == list(range(1000))
    assert build.calls == 2
    assert [record.message.count("is damaged and will be built again") for record in caplog.records] == [1]


def test_a_failed_build_leaves_no_entry(tmp_path):
    def fail(work: Path) -> Stored:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached(tmp_path, "toy", {}, fail)
    assert list(tmp_path.glob("toy-*")) == []
    assert cached(tmp_path, "toy", {}, Builder()).arrays["x"][5] == 5


def test_a_build_that_was_stopped_finds_its_work_again(tmp_path):
    def stopped(work: Path) -> Stored:
        work.mkdir()
        (work / "half").write_text("done")
        raise KeyboardInterrupt

    def resumed(work: Path) -> Stored:
        assert (work / "half").read_text() == "done"
        return Builder()(work)

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "toy", {}, stopped)
    assert cached(tmp_path, "toy", {}, resumed).arrays["x"][5] == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".work", ".partial"))] == []


def test_what_a_killed_process_left_is_not_taken(tmp_path):
    build = Builder()
    cached(tmp_path, "toy", {}, build)
    entry = entry_of(tmp_path)
    entry.rename(tmp_path / f".{entry.name}.partial")
    (tmp_path / f".{entry.name}.partial" / "manifest.json").unlink()
    assert cached(tmp_path, "toy", {}, build).arrays["x"][5] == 5
    assert build.calls == 2


ASK = """
import sys, time
from pathlib import Path
import numpy as np
from seqzoo.tasks.store.cache import Stored, cached

folder, me = Path(sys.argv[1]), sys.argv[2]

def build(work):
    print("built")
    time.sleep(0.5)
    return Stored({"x": np.arange(10)}, {}, "generated")

(folder / me).touch()
while len(list(folder.glob("process-*"))) < 2:
    time.sleep(0.01)
print(cached(folder / "cache", "toy", {}, build).arrays["x"].sum())
"""


def test_processes_that_ask_at_once_build_once(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", ASK, tmp_path, f"process-{i}"], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    assert outputs == [["45"], ["built", "45"]]


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that are hashed from here on, by name."""
    names: list[str] = []
    sha256 = cache._sha256
    monkeypatch.setattr(cache, "_sha256", lambda path: names.append(path.name) or sha256(path))
    return names


def test_what_has_not_been_written_since_is_not_hashed(tmp_path, hashed):
    for _ in range(3):
        cached(tmp_path, "toy", {}, Builder())
    assert hashed == ["x.npy"]  # when it was made
    assert check(entry_of(tmp_path)) == manifest_of(entry_of(tmp_path))
    assert hashed == ["x.npy"] * 2


def test_a_copy_without_dates_is_hashed_once(tmp_path, hashed):
    build = Builder()
    cached(tmp_path / "a", "toy", {}, build)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    hashed.clear()
    for _ in range(3):
        assert cached(tmp_path / "b", "toy", {}, build).arrays["x"][5] == 5
    assert (hashed, build.calls) == (["x.npy"], 1)


def test_damage_under_the_old_date_is_found_by_checking(tmp_path):
    cached(tmp_path, "toy", {}, Builder())
    entry = entry_of(tmp_path)
    before = (entry / "x.npy").stat()
    flip_a_byte(entry)
    os.utime(entry / "x.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"toy-\w+ is damaged: x\.npy has changed since it was written\.\nDelete"):
        check(entry)


def test_checking_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"toy-0 is damaged: manifest\.json: .*No such file"):
        check(tmp_path / "toy-0")


@pytest.fixture
def read_only(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    def switch() -> None:
        for owner, name in ((cache, "lock"), (Path, "mkdir"), (os, "utime")):
            monkeypatch.setattr(owner, name, refuse)

    return switch


def test_a_read_only_folder_serves_what_it_holds(tmp_path, read_only):
    build = Builder()
    cached(tmp_path / "a", "toy", {}, build)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    read_only()
    for folder in ("a", "b"):
        assert cached(tmp_path / folder, "toy", {}, build).arrays["x"][5] == 5
    assert build.calls == 1
    with pytest.raises(DataError, match=r"a cannot be written: .*Read-only.*\nMake room, or set cache_dir=<path>"):
        cached(tmp_path / "a", "toy", {"length": 3}, build)
    assert build.calls == 1


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/cache cannot be written: .*Not a directory.* MB are free there"):
        cached(tmp_path / "file" / "cache", "toy", {}, Builder())


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 kB: writing fails half-way, as on a full disk. Also where a test's outcome is written,
    so not to be left on for longer than a call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_no_room_leaves_nothing_behind(tmp_path):
    (tmp_path / "other").write_text("kept")
    message = r"0\.8 MB are to be written, and [\d.,]+ MB are free there\.\nMake room"
    with pytest.raises(DataError, match=message), small_files():
        cached(tmp_path, "toy", {}, lambda work: Stored({"x": np.arange(100_000)}, {}, "generated"))
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["other"]


def test_no_room_while_building(tmp_path):
    def full(work: Path) -> Stored:
        raise OSError(errno.ENOSPC, "No space left on device", "half")

    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device: 'half'"):
        cached(tmp_path, "toy", {}, full)


def test_another_error_while_building_is_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        cached(tmp_path, "toy", {}, lambda work: Stored({"x": np.load(work / "nothing.npy")}, {}, ""))


def mapped(work: Path, values: np.ndarray) -> np.memmap:
    work.mkdir(exist_ok=True)
    array = np.lib.format.open_memmap(work / "made.npy", mode="w+", dtype=values.dtype, shape=values.shape)
    array[:] = values
    return array


def test_a_file_made_in_the_work_folder_is_taken_over(tmp_path):
    inodes = []

    def build(work: Path) -> Stored:
        array = mapped(work, np.arange(6).reshape(2, 3))
        inodes.append((work / "made.npy").stat().st_ino)
        return Stored({"x": array}, {}, "generated")

    assert cached(tmp_path, "toy", {}, build).arrays["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    entry = entry_of(tmp_path)
    assert inodes == [(entry / "x.npy").stat().st_ino]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".work")] == []


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:1], lambda x: x[::-1], lambda x: x.T, lambda x: x.reshape(-1), lambda x: x.view(np.uint64)],
    ids=["part", "reversed", "transposed", "reshaped", "another type"],
)
def test_a_view_of_such_a_file_is_copied(tmp_path, view):
    values = np.arange(9).reshape(3, 3)
    stored = cached(tmp_path, "toy", {}, lambda work: Stored({"x": view(mapped(work, values))}, {}, "generated"))
    assert np.array_equal(stored.arrays["x"], view(values))
    assert stored.arrays["x"].dtype == view(values).dtype


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["files", "sha256", "request"]) | st.text(), inner),
)


@settings(max_examples=30, deadline=None)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_manifest_is_the_one_written_or_damaged(manifest):
    with tempfile.TemporaryDirectory() as folder:
        build = Builder()
        cached(Path(folder), "toy", {}, build)
        (entry_of(Path(folder)) / "manifest.json").write_bytes(manifest)
        assert cached(Path(folder), "toy", {}, build).arrays["x"][5] == 5
        assert build.calls == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 128 + 999), st.integers(1, 255))
def test_any_changed_byte_is_seen(position, change):
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            stored = cached(Path(folder), "toy", {}, lambda work: Stored({"x": np.zeros(1000, np.uint8)}, {}, ""))
            assert not stored.arrays["x"].any()
            path = entry_of(Path(folder)) / "x.npy"
            data = bytearray(path.read_bytes())
            data[position] ^= change
            path.write_bytes(data)


@pytest.mark.parametrize("name", [".{}.lock", ".{}.work", ".{}.partial", "{}"])
@pytest.mark.parametrize("to", ["file", "folder"])
def test_no_link_in_a_cache_is_followed(tmp_path, victim, name, to):
    folder = tmp_path / "cache"
    cached(folder, "toy", {}, Builder())
    entry = entry_of(folder)
    shutil.rmtree(entry)
    (folder / name.format(entry.name)).unlink(missing_ok=True)
    (folder / name.format(entry.name)).symlink_to(victim if to == "file" else victim.parent)
    with pytest.raises(DataError, match="cannot be written"):
        cached(folder, "toy", {}, lambda work: Stored({"x": mapped(work, np.zeros(3))}, {}, ""))


def test_no_link_in_the_work_of_a_build_is_followed(tmp_path, victim):
    folder = tmp_path / "cache"
    cached(folder, "toy", {}, Builder())
    entry = entry_of(folder)
    shutil.rmtree(entry)
    work = folder / f".{entry.name}.work"
    work.mkdir()
    (work / "made.npy").symlink_to(victim)
    with pytest.raises(DataError, match=r"made\.npy is a symbolic link"):
        cached(folder, "toy", {}, lambda work: Stored({"x": mapped(work, np.zeros(3))}, {}, ""))


def test_a_file_elsewhere_keeps_its_date(tmp_path, victim):
    """Links in an entry lead where they lead: they are read."""
    cached(tmp_path / "cache", "toy", {}, Builder())
    array = entry_of(tmp_path / "cache") / "x.npy"
    moved = array.rename(tmp_path / "x.npy")
    os.utime(moved, (1, 1))
    array.symlink_to(moved)
    assert cached(tmp_path / "cache", "toy", {}, Builder()).arrays["x"][5] == 5
    assert moved.stat().st_mtime == 1


def test_a_cache_may_be_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "there")
    cached(tmp_path / "cache", "toy", {}, Builder())
    assert entry_of(tmp_path / "there").is_dir()


def test_another_cache_is_read_and_not_written(tmp_path):
    build = Builder()
    cached(tmp_path / "theirs", "toy", {}, build)
    array = entry_of(tmp_path / "theirs") / "x.npy"
    os.utime(array, (1, 1))
    with cache.reading(tmp_path / "theirs"):
        assert cached(tmp_path / "own", "toy", {}, build).arrays["x"][5] == 5
        assert not (tmp_path / "own").exists()
        array.write_bytes(b"damaged")
        assert cached(tmp_path / "own", "toy", {}, build).arrays["x"][5] == 5
    assert array.read_bytes() == b"damaged"
    assert entry_of(tmp_path / "own").is_dir()
    assert build.calls == 2


def test_a_manifest_names_no_file_elsewhere(tmp_path):
    build = Builder()
    cached(tmp_path / "cache", "toy", {}, build)
    path = entry_of(tmp_path / "cache") / "manifest.json"
    manifest = json.loads(path.read_text())
    shutil.copy(path.with_name("x.npy"), tmp_path / "x.npy")
    manifest["files"] = {"../../x.npy": manifest["files"]["x.npy"]}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(cache._canonical(manifest)).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="names files elsewhere"):
        manifest_of(path.parent)
    assert cached(tmp_path / "cache", "toy", {}, build).arrays["x"][5] == 5
    assert build.calls == 2
