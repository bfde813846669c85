from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from seqzoo.tasks import DataError, TaskConfig, build_task, lra_pathfinder, origin_of
from seqzoo.tasks.checks import verify
from seqzoo.tasks.pathfinder import release
from seqzoo.tasks.pathfinder.release import COLUMNS, read_metadata

TRAIN, VAL, TEST = 40, 5, 5


def config(**changes) -> TaskConfig:
    settings = {
        "name": "lra_pathfinder",
        "max_length": 1024,
        "mask_ratio": 0.5,
        "difficulty": "curv_contour_length_14",
        "num_train": TRAIN,
        "num_val": VAL,
        "num_test": TEST,
        "generator_seed": 0,
        "workers": 1,
    }
    return TaskConfig(**(settings | changes))


@pytest.mark.parametrize(("name", "size"), lra_pathfinder.SIZES.items())
def test_generated(name, size, tmp_path):
    task = build_task(config(name=name, max_length=size * size), data_dir=None, cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [TRAIN, VAL, TEST]
    assert (task.spec.kind, task.spec.num_classes, task.spec.mean, task.spec.std) == ("pixels", 2, (0.5,), (0.5,))
    assert task.note == "generated, num_train 40, num_val 5, num_test 5"
    batch = task.train.batch(torch.arange(TRAIN))
    assert batch.inputs.shape == (TRAIN, size * size, 1)
    assert batch.lengths.tolist() == [size * size] * TRAIN
    assert set(batch.labels.tolist()) == {0, 1}
    images = {bytes(row) for split in (task.train, task.val, task.test) for row in split.values.view(-1, size).numpy()}
    assert len(images) > TRAIN
    assert not list(tmp_path.glob(".*.work"))


def test_smaller_images(tmp_path):
    task = build_task(config(max_length=256, difficulty="curv_baseline"), data_dir=None, cache_dir=tmp_path)
    assert task.note == "generated, images of 16 x 16, curv_baseline, num_train 40, num_val 5, num_test 5"
    assert task.train.batch(torch.arange(TRAIN)).inputs.shape == (TRAIN, 256, 1)
    assert not verify(task).faults


def test_the_same_from_the_cache_and_from_other_workers(tmp_path):
    values = [
        build_task(config(num_train=300, workers=workers), data_dir=None, cache_dir=tmp_path / cache).train.values
        for workers, cache in ((1, "a"), (2, "a"), (2, "b"))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert len(list((tmp_path / "a").glob("lra_pathfinder-*"))) == 1
    assert not torch.equal(
        values[0], build_task(config(num_train=300, generator_seed=1), data_dir=None, cache_dir=tmp_path).train.values
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 1000}, "max_length is 1000; an image has 1024 pixels, uncut"),
        ({"max_length": 400}, "an image has 1024 pixels, uncut; valid: 1024, or 576, 256 for smaller images"),
        ({"name": "lra_pathx", "max_length": 256}, "max_length is 256; an image has 16384 pixels, uncut$"),
        ({"max_length": 256}, "'curv_contour_length_14', for which 16 x 16 pixels have no room; valid: curv_baseline$"),
        ({"difficulty": "hard"}, "difficulty is 'hard'; valid: curv_baseline"),
        ({"num_val": 0}, "num_val=0: valid: 1 or more"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_settings_out_of_range(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_task(config(**change), data_dir=None, cache_dir=tmp_path)


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_where_it_was(tmp_path):
    """Killed at a moment chosen by the clock, and built again: the bytes of a build in one go."""
    script = textwrap.dedent(f"""
        from pathlib import Path
        from seqzoo.tasks import TaskConfig, build_task
        build_task(TaskConfig(**{vars(config(num_train=20_000))!r}), data_dir=None, cache_dir=Path({str(tmp_path)!r}))
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    done = None
    while process.poll() is None and (done is None or done.sum() < 3):
        time.sleep(0.05)
        files = list(tmp_path.glob(".*.work/train_done.npy"))
        done = np.load(files[0]) if files else None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done is not None
    assert not done.all()
    resumed = build_task(config(num_train=20_000), data_dir=None, cache_dir=tmp_path)
    whole = build_task(config(num_train=20_000), data_dir=None, cache_dir=tmp_path / "other")
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(resumed, split).values, getattr(whole, split).values)
        assert torch.equal(getattr(resumed, split).labels, getattr(whole, split).labels)


def png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


COLOURS_OF_16_BITS = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(bytes(32 * (1 + 32 * 6))))
    + chunk(b"IEND", b"")
)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """50 images in the released layout, two of them in a batch 10 that comes after batch 2, and their pixels."""
    monkeypatch.setattr(
        lra_pathfinder, "PUBLISHED", lra_pathfinder.PUBLISHED | {"num_train": TRAIN, "num_val": VAL, "num_test": TEST}
    )
    folder = tmp_path / "data" / "lra_release" / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32), dtype=np.uint8)
    for i in range(50):
        batch, number = (10, i - 48) if i >= 48 else (2, i)
        path = folder / "imgs" / str(batch) / f"sample_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels[i]))
        with (folder / "metadata" / f"{batch}.npy").open("a") as file:
            file.write(f"imgs/{batch} sample_{number}.png {number} {i % 2} 1.0 14 4 2 0.5 1 1\n")
    return folder, pixels, tmp_path


def load(released, **changes):
    _, _, tmp_path = released
    return build_task(config(**changes), data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_released_images_are_split_as_published(released):
    task = load(released)
    assert task.note == ""
    assert load(released, generator_seed=1).note == "generated, generator_seed 1"
    parts = torch.utils.data.random_split(range(50), [TRAIN, VAL, TEST], generator=torch.Generator().manual_seed(42))
    for split, part in zip((task.train, task.val, task.test), parts, strict=True):
        rows = list(part)
        assert (split.values.view(-1, 32, 32).numpy() == released[1][rows]).all()
        assert split.labels.tolist() == [i % 2 for i in rows]


def test_metadata_as_the_generator_writes_it(released):
    folder = released[0]
    before = read_metadata(folder)
    for path in (folder / "metadata").iterdir():
        for dtype in ("U32", "S32"):
            rows = [line.split() if isinstance(line, str) else line for line in release._table(path)]
            np.save(path, np.array(rows, dtype=dtype))
    assert read_metadata(folder) == before


def test_other_settings_are_generated(released):
    assert load(released, difficulty="curv_baseline").note == "generated, curv_baseline"
    assert load(released, num_train=8).note == "generated, num_train 8"
    smaller = load(released, difficulty="curv_baseline", max_length=256)
    assert smaller.note == "generated, images of 16 x 16, curv_baseline"


def test_changed_metadata_is_read_anew(released):
    path = released[0] / "metadata" / "2.npy"
    before = load(released)
    path.write_text(path.read_text().replace("sample_0.png 0 0", "sample_0.png 0 1"))
    os.utime(path, ns=(1, 1))
    labels = [sum(int(split.labels.sum()) for split in (t.train, t.val, t.test)) for t in (before, load(released))]
    assert labels == [25, 26]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"sample_7\.png is empty .*2\.npy, row 8"),
        (None, r"sample_7\.png is missing .*2\.npy, row 8"),
        (png(np.arange(1024, dtype=np.uint8).reshape(32, 32))[:-30], r"sample_7\.png is damaged .*2\.npy, row 8"),
        (b"GIF89a" + bytes(100), r"sample_7\.png is damaged .*2\.npy, row 8"),
        (png(np.zeros((32, 31), np.uint8)), r"sample_7\.png has 31 x 32 pixels, expected 32 x 32 .*2\.npy, row 8"),
        (png(np.full((32, 32), 4000, np.uint16)), r"sample_7\.png has 16 bits a channel, expected 8 .*2\.npy, row 8"),
        (COLOURS_OF_16_BITS, r"sample_7\.png has 16 bits a channel, expected 8 .*2\.npy, row 8"),
    ],
    ids=["empty", "missing", "cut", "format", "size", "depth", "depth of colours"],
)
def test_damaged_images_are_named(released, content, message):
    folder, pixels, _ = released
    path = folder / "imgs" / "2" / "sample_7.png"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(released)
    path.write_bytes(whole)  # as after unpacking again
    task = load(released)
    images = torch.cat([split.values for split in (task.train, task.val, task.test)]).view(-1, 32, 32).numpy()
    assert sorted(map(bytes, images)) == sorted(map(bytes, pixels))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("sample_3.png 3 1", "sample_3.png 3 2"), r"2\.npy, row 4: label '2'; valid: 0, 1"),
        (lambda text: text.replace("sample_3.png 3 1 ", "sample_3.png 3 "), r"2\.npy, row 4: 10 columns, expected 11"),
        (lambda text: text.replace("imgs/2 sample_3", "imgs/../../x sample_3"), r"2\.npy, row 4: .* is no image"),
        (lambda text: text.replace("sample_3.png 3", "sample_2.png 3"), r"row 4: imgs/2/sample_2\.png has been named"),
        (lambda text: "\n".join(text.splitlines()[:-1]), r"metadata has 49 rows, expected 50"),
    ],
    ids=["label", "columns", "path", "twice", "rows"],
)
def test_damaged_metadata_is_named(released, damage, message):
    path = released[0] / "metadata" / "2.npy"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        load(released)


def test_metadata_that_is_missing_or_misnamed(released):
    folder = released[0] / "metadata"
    (folder / "2.npy").rename(folder / "two.npy")
    with pytest.raises(DataError, match=r"two\.npy is not one of the metadata files"):
        load(released)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"metadata holds no \.npy file"):
        load(released)


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


ROW = b"imgs/0 sample_0.png 0 1 1.0 14 4 2 0.5 1 1\n"


@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=60).map(lambda tail: saved(np.array([["a"] * COLUMNS]))[:128] + tail),
        st.tuples(st.integers(0, 41), st.binary(max_size=3)).map(lambda cut: ROW[: cut[0]] + cut[1] + ROW[cut[0] :]),
    )
)
@example(saved(np.array([[{}]], dtype=object), allow_pickle=True))
@example(b"\x93NUMPY\x01\x00\x46\x00{'descr': '<U32', 'fortran_order': False, 'shape': (999999999, 11999999999)}")
@example(b"\x93NUMPY")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_metadata_is_read_or_refused(tmp_path, content):
    path = tmp_path / "metadata" / "0.npy"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    message, rows = "", []
    try:
        rows = read_metadata(tmp_path)
    except DataError as error:
        message = str(error)
    assert message == "" or str(path) in message
    assert all(row.label in (0, 1) and Path(row.image).parts[0] == "imgs" for row in rows)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_image_is_read_or_refused(tmp_path, place, noise):
    whole = png(np.arange(1024, dtype=np.uint8).reshape(32, 32))
    path = tmp_path / "image.png"
    path.write_bytes(whole[:place] + noise + whole[place + len(noise) :])
    message = ""
    try:
        pixels = release._pixels(path, 32, "row 1")
        assert (pixels == np.arange(1024, dtype=np.uint8).reshape(32, 32)).all()
    except DataError as error:
        message = str(error)
    assert message == "" or str(path) in message


def test_released_images_are_told_from_generated_ones(released):
    folder, _, tmp_path = released
    places = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    found = origin_of(config(), **places)
    assert found["origin"].keys() == {"2.npy", "10.npy"}
    with (folder / "metadata" / "10.npy").open("a") as file:
        file.write("imgs/10 sample_2.png 2 0 1.0 14 4 2 0.5 1 1\n")
    assert origin_of(config(), **places) != found
    assert origin_of(config(num_train=8), **places) == {}
    assert origin_of(config(difficulty="curv_baseline"), **places) == {}
