from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import write_wav

from seqzoo.tasks import DataError, TaskConfig, build_task, speech_commands
from seqzoo.tasks.speech_commands import WORDS


def config(**changes) -> TaskConfig:
    return TaskConfig(**({"name": "speech_commands", "max_length": 16_000, "mask_ratio": 0.25} | changes))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three recordings a word in the official layout, the k-th word's of k + 10 samples, all k; one a split."""
    folder = tmp_path / "speech_commands_v0.02"
    for k, word in enumerate(WORDS):
        for speaker in "abc":
            write_wav(folder / word / f"{speaker}_nohash_0.wav", np.full(k + 10, k, np.int16), rate=16_000)
    write_wav(folder / "_background_noise_" / "pink_noise.wav", np.zeros(20_000, np.int16), rate=16_000)
    for filename, speaker in (("validation_list.txt", "b"), ("testing_list.txt", "c")):
        (folder / filename).write_text("".join(f"{word}/{speaker}_nohash_0.wav\n" for word in reversed(WORDS)))
    monkeypatch.setattr(speech_commands, "NUM_RECORDINGS", 105)
    return folder


def build(tmp_path: Path, **changes):
    return build_task(config(**changes), data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_the_task(folder, tmp_path):
    task = build(tmp_path)
    assert len(WORDS) == len(set(WORDS)) == task.spec.num_classes == 35
    for split in (task.train, task.val, task.test):
        assert split.labels.tolist() == list(range(35))
        assert split.lengths.tolist() == list(range(10, 45))
        batch = split.batch(torch.tensor([34, 3]))
        assert batch.inputs.dtype == torch.int16
        assert batch.inputs[0, :44].unique().tolist() == [34]
        assert batch.inputs[1, :13].unique().tolist() == [3]
        assert batch.inputs[1, 13:].unique().tolist() == [0]
    assert (task.spec.kind, task.spec.vocab_size, task.note) == ("pixels", 65_536, "")


def test_shorter_sequences_are_noted(folder, tmp_path):
    task = build(tmp_path, max_length=20)
    assert task.train.lengths.max() == 20
    assert task.note == "recordings cut to 20 samples"


def test_an_incomplete_folder(folder, tmp_path):
    (folder / "zero" / "a_nohash_0.wav").unlink()
    with pytest.raises(DataError, match=r"holds 104 recordings of the 35 words, expected 105\.\nDelete it\. Unpack"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"zero/d_nohash_0.wav", "row 2: there is no recording 'zero/d_nohash_0.wav'"),
        (b"../../zero.wav", r"row 2: there is no recording '\.\./\.\./zero\.wav'"),
        (b"", "row 2: there is no recording ''"),
        (b"\xff", r"row 2: there is no recording '\\\\xff'"),
        (b"zero/c_nohash_0.wav", "row 2: 'zero/c_nohash_0.wav' is listed twice"),
        (b"zero/b_nohash_0.wav", "row 2: 'zero/b_nohash_0.wav' is listed twice"),
    ],
)
def test_damaged_lists_are_named(folder, tmp_path, row, message):
    path = folder / "testing_list.txt"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], row, *lines[2:]]))
    with pytest.raises(DataError, match=f"testing_list.txt, {message}"):
        build(tmp_path)


def test_missing_and_empty_lists(folder, tmp_path):
    (folder / "testing_list.txt").write_text("")
    with pytest.raises(DataError, match="leaves no recording for the test split"):
        build(tmp_path)
    (folder / "testing_list.txt").unlink()
    with pytest.raises(DataError, match=r"testing_list\.txt is missing"):
        build(tmp_path)


def test_a_damaged_recording(folder, tmp_path):
    path = folder / "bed" / "b_nohash_0.wav"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"bed/b_nohash_0\.wav is cut short"):
        build(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(DataError, match=r"no speech_commands_v0\.02 in .*\nUnpack .*tar\.gz, 2\.4 GB"):
        build(tmp_path)
