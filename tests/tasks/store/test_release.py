from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.tasks import DataError
from seqzoo.tasks.store import release
from seqzoo.tasks.store.release import CHUNK, not_released, released_folder

INNER = "lra_release/lra_release"
LARGE = os.urandom(CHUNK) + b"the end"
PICTURES = {f"imgs/{k}/sample_{i}.png": f"picture {k} {i}".encode() for k in range(2) for i in range(3)}
MEMBERS: dict[str, bytes] = {
    "lra_release/pathfinder128/curv_contour_length_14/imgs/0/sample_0.png": b"stale",
    "lra_release/listops-1000/basic_train.tsv": b"stale",
    f"{INNER}/listops-1000/basic_train.tsv": b"train",
    f"{INNER}/tsv_data/new_aan_pairs.train.tsv": LARGE,
    **{f"{INNER}/pathfinder128/curv_contour_length_14/{name}": data for name, data in PICTURES.items()},
    f"{INNER}/pathfinder128/curv_contour_length_9/imgs/0/sample_0.png": b"easier",
    f"{INNER}/listops-1000/basic_val.tsv": b"val",
}


def regular(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


RELEASE = [
    special("lra_release", tarfile.DIRTYPE),
    special(f"{INNER}/tsv_data", tarfile.DIRTYPE),
    *(regular(name, data) for name, data in MEMBERS.items()),
]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder `data` with the archive, beside which `cache` is to be."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lra_release.gz").write_bytes(gzip.compress(tar_bytes(RELEASE), 1))
    return tmp_path


def find(folder: str, place: Path) -> Path | None:
    return released_folder(folder, place / "data", place / "cache")


def test_a_folder_is_unpacked_and_no_other(place, capfd):
    folder = find("pathfinder128/curv_contour_length_14", place)
    assert folder == place / "cache" / "downloads" / "lra_release" / "pathfinder128" / "curv_contour_length_14"
    assert files_of(folder) == PICTURES
    assert [path.name for path in folder.parents[1].iterdir() if path.is_dir()] == ["pathfinder128"]
    assert [path.name for path in folder.parent.iterdir()] == ["curv_contour_length_14"]
    assert [path.name for path in (place / "data").iterdir()] == ["lra_release.gz"]
    listing = "".join(f"{hashlib.sha256(PICTURES[name]).hexdigest()}  {name}\n" for name in sorted(PICTURES))
    size = sum(map(len, PICTURES.values()))
    assert (
        f"lra_release.gz, pathfinder128/curv_contour_length_14: 6 files, {size} bytes, "
        f"sha256 {hashlib.sha256(listing.encode()).hexdigest()}\n"
    ) in capfd.readouterr().err


def test_members_apart_and_large_ones(place):
    assert files_of(find("listops-1000", place)) == {"basic_train.tsv": b"train", "basic_val.tsv": b"val"}
    assert files_of(find("tsv_data", place)) == {"new_aan_pairs.train.tsv": LARGE}


def test_what_was_unpacked_needs_no_archive(place):
    folder = find("listops-1000", place)
    (place / "data" / "lra_release.gz").write_bytes(b"")
    assert find("listops-1000", place) == folder


def test_folders_come_before_the_archive(place):
    for inside in (f"{INNER}/tsv_data", "tsv_data"):
        (place / "data" / inside).mkdir(parents=True)
        assert find("tsv_data", place) == place / "data" / inside
    assert not (place / "cache").exists()


@pytest.mark.parametrize("folder", ["listops-1000", "pathfinder128/curv_contour_length_14"])
@pytest.mark.parametrize("data_dir", [".", "lra_release", INNER])
def test_the_stale_folders_of_an_unpacked_archive_are_not_read(tmp_path, folder, data_dir):
    for root in ("lra_release", INNER):
        (tmp_path / root / folder).mkdir(parents=True)
    assert released_folder(folder, tmp_path / data_dir, tmp_path / "cache").resolve() == tmp_path / INNER / folder


def test_the_archive_under_a_longer_name_and_with_dots(place):
    (place / "data" / "lra_release.gz").unlink()
    dotted = [regular(f"./{INNER}/tsv_data/a.tsv", b"a")]
    (place / "data" / "lra_release.tar.gz").write_bytes(gzip.compress(tar_bytes(dotted)))
    assert files_of(find("tsv_data", place)) == {"a.tsv": b"a"}


def test_nothing_anywhere(tmp_path):
    assert released_folder("tsv_data", None, tmp_path) is None
    assert released_folder("tsv_data", tmp_path, tmp_path) is None
    message = str(not_released("tsv_data", tmp_path))
    for way in (
        "long-range-arena/lra_release.gz, 8 GB",
        f"its folder {INNER}/tsv_data",
        "set data_dir=",
        str(tmp_path),
    ):
        assert way in message


def test_a_folder_that_is_not_in_it_is_looked_for_once(place, monkeypatch):
    assert find("pathfinder256/curv_contour_length_14", place) is None
    assert find("pathfinder128/curv_contour_length_1", place) is None
    contents = json.loads((place / "cache/downloads/lra_release/contents.json").read_text())
    assert contents["files"]["pathfinder128/curv_contour_length_14/imgs/1"] == 3
    opened = []
    decompressed = release._Decompressed
    monkeypatch.setattr(
        release, "_Decompressed", lambda fileobj: opened.append(fileobj) or decompressed(fileobj=fileobj)
    )
    assert find("pathfinder256/curv_contour_length_14", place) is None
    assert opened == []
    assert find("pathfinder128/curv_contour_length_9", place) is not None
    os.utime(place / "data" / "lra_release.gz", (1, 1))  # another archive
    opened.clear()
    assert find("pathfinder256/curv_contour_length_14", place) is None
    assert len(opened) == 1


def test_the_archive_is_read_in_one_pass(place, monkeypatch):
    def rewind(self):
        raise AssertionError("read from the start again")

    monkeypatch.setattr(gzip._GzipReader, "_rewind", rewind)
    assert files_of(find("tsv_data", place)) == {"new_aan_pairs.train.tsv": LARGE}


def test_two_that_ask_at_once_unpack_once(place, monkeypatch, caplog):
    opened = []
    decompressed = release._Decompressed

    def open_slowly(fileobj):
        opened.append(fileobj)
        time.sleep(0.3)
        return decompressed(fileobj=fileobj)

    monkeypatch.setattr(release, "_Decompressed", open_slowly)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda folder: find(folder, place), ["tsv_data"] * 2))
    assert folders[0] == folders[1]
    assert files_of(folders[0]) == {"new_aan_pairs.train.tsv": LARGE}
    assert len(opened) == 1
    assert "waiting for another process" in caplog.text


def partial_of(place: Path) -> Path:
    return place / "cache/downloads/lra_release/.pathfinder128-curv_contour_length_14.partial"


def test_unpacking_that_was_stopped_goes_on(place):
    partial = partial_of(place)
    for name, data in list(PICTURES.items())[:4]:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(data)
    kept, cut, *_ = (partial / name for name in PICTURES)
    cut.write_bytes(b"pic")
    (partial / "imgs/0/of_another_archive.png").write_bytes(b"x")
    before = kept.stat().st_mtime_ns
    folder = find("pathfinder128/curv_contour_length_14", place)
    assert files_of(folder) == PICTURES
    assert (folder / next(iter(PICTURES))).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4000], "end-of-stream marker"),
        (lambda data: data[:-8] + bytes(4) + data[-4:], "CRC check failed"),
        (lambda data: data[:-20] + bytes([data[-20] ^ 255]) + data[-19:], ""),
        (lambda data: b"no archive" + data, "Not a gzipped file"),
        (lambda data: b"", "empty file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-20480].rstrip(b"\0")), ""),
        (
            lambda data: gzip.compress(
                gzip.decompress(data).replace(b"/curv_contour_length_9", b"/CURV_CONTOUR_LENGTH_9")
            ),
            "unreadable",
        ),
    ],
    ids=["cut", "checksum", "a byte", "no gzip", "empty", "no end", "header"],
)
def test_damaged_archives(place, damage, message):
    archive = place / "data" / "lra_release.gz"
    archive.write_bytes(damage(archive.read_bytes()))
    for _ in range(2):
        with pytest.raises(DataError, match=rf"lra_release\.gz is truncated or damaged: .*{message}"):
            find("pathfinder128/curv_contour_length_14", place)
        assert not (place / "cache/downloads/lra_release/pathfinder128").exists()
    archive.write_bytes(gzip.compress(tar_bytes(RELEASE)))
    assert files_of(find("pathfinder128/curv_contour_length_14", place)) == PICTURES


@pytest.mark.parametrize(
    "member",
    [
        regular(f"{INNER}/tsv_data/../../../../evil", b"x"),
        regular(f"{INNER}/tsv_data/a/../evil", b"x"),
        special(f"{INNER}/tsv_data/link", tarfile.SYMTYPE, "/etc"),
        special(f"{INNER}/tsv_data/link", tarfile.LNKTYPE, f"{INNER}/tsv_data/new_aan_pairs.train.tsv"),
        special(f"{INNER}/tsv_data/pipe", tarfile.FIFOTYPE),
        special(f"{INNER}/tsv_data/device", tarfile.CHRTYPE),
    ],
    ids=["up", "inner up", "symbolic link", "hard link", "pipe", "device"],
)
def test_hostile_members(place, member):
    (place / "data" / "lra_release.gz").write_bytes(gzip.compress(tar_bytes([*RELEASE, member]), 1))
    with pytest.raises(DataError, match="is no plain file in tsv_data; nothing is unpacked"):
        find("tsv_data", place)
    assert not list(place.rglob("evil"))
    assert not (place / "cache/downloads/lra_release/tsv_data").exists()
    assert find("listops-1000", place) is not None  # what is elsewhere does no harm here


@pytest.mark.parametrize(
    "name", [f"/{INNER}/tsv_data/evil", "./tsv_data/evil", "./lra_release/tsv_data/evil", "tsv_data/evil"]
)
def test_names_elsewhere_are_not_read(place, name):
    (place / "data" / "lra_release.gz").write_bytes(gzip.compress(tar_bytes([*RELEASE, regular(name, b"x")]), 1))
    assert list(files_of(find("tsv_data", place))) == ["new_aan_pairs.train.tsv"]


def test_an_archive_that_cannot_be_read(place, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(place), "open", refuse)
    monkeypatch.setattr(release, "lock", lambda path: nullcontext())
    with pytest.raises(DataError, match=r"lra_release\.gz cannot be read: Permission denied"):
        find("tsv_data", place)


def test_a_file_that_is_a_folder_too(place):
    clash = [regular(f"{INNER}/tsv_data/a", b"x"), regular(f"{INNER}/tsv_data/a/b", b"y")]
    (place / "data" / "lra_release.gz").write_bytes(gzip.compress(tar_bytes(clash)))
    with pytest.raises(DataError, match="cannot be written"):
        find("tsv_data", place)


def test_a_cache_that_cannot_be_written(place):
    (place / "cache").touch()
    with pytest.raises(DataError, match=r"lra_release cannot be written: .*\nMake room, or set cache_dir="):
        find("tsv_data", place)


SMALL = tar_bytes([regular(f"{INNER}/tsv_data/a.tsv", b"a" * 600), regular(f"{INNER}/tsv_data/b.tsv", b"b")])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4 * 512 + 1536), st.binary(min_size=1, max_size=40)), min_size=1, max_size=3))
def test_any_headers_are_read_or_refused(changes):
    """Nothing but a DataError, and nothing outside the folder, whatever a header says."""
    data = bytearray(SMALL)
    for position, change in changes:
        data[position : position + len(change)] = change
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "data").mkdir()
        (place / "data" / "lra_release.gz").write_bytes(gzip.compress(bytes(data), 1))
        try:
            find("tsv_data", place)
        except DataError:
            assert not (place / "cache/downloads/lra_release/tsv_data").exists()
        assert {path.name for path in place.iterdir()} <= {"data", "cache"}


def header(name: bytes, size: bytes, kind: bytes, magic: bytes) -> bytes:
    """A tar header with a right checksum, whatever its fields hold."""
    fields = name.ljust(100, b"\0")[:100] + bytes(24) + size.ljust(12, b"\0")[:12] + bytes(12)
    block = (fields + b" " * 8 + kind + bytes(100) + magic.ljust(8, b"\0")).ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@pytest.mark.parametrize("kind", [b"g", b"x", b"L"])
@pytest.mark.parametrize("power", [62, 80])
def test_an_impossible_size(kind, power, place):
    block = header(b"x", b"\x80" + (2**power).to_bytes(11, "big"), kind, b"ustar\x0000")
    (place / "data" / "lra_release.gz").write_bytes(gzip.compress(block + SMALL))
    with pytest.raises(DataError, match="damaged: a header gives its size as "):
        find("tsv_data", place)


@settings(max_examples=150, deadline=None)
@given(
    name=st.binary(max_size=100) | st.sampled_from([f"{INNER}/tsv_data/x".encode(), b"././@LongLink"]),
    size=st.binary(max_size=12) | st.integers(0, 2000).map(lambda n: b"%011o" % n),
    kind=st.sampled_from([bytes([k]) for k in b"0123456gxLKSVDN\0\xff"]),
    magic=st.sampled_from([b"ustar\x0000", b"ustar  \0", b""]),
    content=st.binary(max_size=600) | st.from_regex(rb"\A[0-9]{1,3} (path|size|GNU\.sparse\.\w+)=.{0,20}\n\Z"),
)
def test_any_extended_headers_are_read_or_refused(name, size, kind, magic, content):
    block = header(name, size, kind, magic) + content.ljust(1024, b"\0")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "data").mkdir()
        (place / "data" / "lra_release.gz").write_bytes(gzip.compress(block + SMALL, 1))
        try:
            find("tsv_data", place)
        except DataError:
            assert not (place / "cache/downloads/lra_release/tsv_data").exists()
        assert {path.name for path in place.iterdir()} <= {"data", "cache"}


@pytest.mark.parametrize(
    "name", ["", ".lock", ".listops-1000.partial", ".listops-1000.partial/basic_val.tsv", "listops-1000"]
)
def test_no_link_in_the_cache_is_followed(place, victim, name):
    unpacked = place / "cache" / "downloads" / "lra_release"
    link = unpacked / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if "." in name.split("/")[-1] else victim.parent / "none")
    with pytest.raises(DataError, match=f"{link.name} is a symbolic link"):
        find("listops-1000", place)
    link.unlink()
    assert files_of(find("listops-1000", place)) == {"basic_train.tsv": b"train", "basic_val.tsv": b"val"}


def test_a_list_of_what_the_archive_holds_is_replaced(place, victim):
    unpacked = place / "cache" / "downloads" / "lra_release"
    unpacked.mkdir(parents=True)
    (unpacked / "contents.json").symlink_to(victim)
    assert find("listops-1000", place) is not None
    assert not (unpacked / "contents.json").is_symlink()
