from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from seqzoo.tasks.cache import Stored, cached
from seqzoo.tasks.shards import array_file


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
    manifest = json.loads((entry_of(tmp_path / "new") / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["request"] == {"format": 2, "name": "toy", "length": 3}
    assert manifest["source"] == "generated"
    assert manifest["files"]["x.npy"]["shape"] == [1000]


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
    ],
    ids=["flipped", "cut", "no file", "no manifest", "half a manifest"],
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
from seqzoo.tasks.cache import Stored, cached
from seqzoo.tasks.shards import array_file

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


@pytest.mark.parametrize("links", [True, False])
def test_a_file_in_the_work_folder_becomes_the_entrys(tmp_path, monkeypatch, links):
    """Without a copy where the disk has links, and part of one is never taken for the whole."""
    inodes = []

    def build(work: Path) -> Stored:
        whole = array_file(work / "whole.npy", (1000,), np.int64)
        whole[:] = np.arange(1000)
        inodes.append((work / "whole.npy").stat().st_ino)
        return Stored({"whole": whole, "part": whole[:10]}, {}, "generated")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *paths: (_ for _ in ()).throw(OSError(95, "not supported")))
    stored = cached(tmp_path, "toy", {}, build)
    assert stored.arrays["whole"].tolist() == list(range(1000))
    assert stored.arrays["part"].tolist() == list(range(10))
    assert ((entry_of(tmp_path) / "whole.npy").stat().st_ino in inodes) == links
    assert not list(tmp_path.glob(".*.work"))
