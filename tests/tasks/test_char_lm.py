from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqzoo.tasks import DataError, Task, TaskConfig, build_task
from seqzoo.tasks.characters import SPECIALS

TEXT = "".join(np.random.default_rng(0).choice(list("ab\nc dé"), 1000))


def build(tmp_path, content: str | bytes | None = TEXT, *, data_dir=None, **changes) -> Task:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {"text": str(path), "val_fraction": 0.05, "test_fraction": 0.1, "min_frequency": 1, **changes}
    config = TaskConfig(**{"name": "char_lm", "max_length": 16, "mask_ratio": 0.15, **options})
    return build_task(config, data_dir=data_dir, cache_dir=tmp_path / "cache")


def asked(task: Task, split: str) -> str:
    """What the windows of a split hold, each without its first character, after the first of all."""
    values, offsets = getattr(task, split).values, getattr(task, split).offsets.tolist()
    windows = [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    ids = windows[0][:1] + [value for window in windows for value in window[1:]]
    return "".join(task.symbols[value] for value in ids)


def test_every_character_is_asked_for_once(tmp_path):
    task = build(tmp_path)
    assert asked(task, "train") == TEXT[:850]
    assert asked(task, "val") == TEXT[850:900]
    assert asked(task, "test") == TEXT[900:]
    assert (task.spec.answer, task.spec.kind, task.spec.mask_id) == ("next", "tokens", None)
    assert task.spec.vocab_size == task.spec.num_classes == len(task.symbols) == len(set(TEXT)) + len(SPECIALS)
    for split in (task.train, task.val, task.test):
        assert split.lengths[:-1].eq(16).all()
        assert 2 <= split.lengths[-1] <= 16
    assert task.note == "text.txt, windows of 16 characters, test_fraction 0.1"


@pytest.mark.parametrize("length", [16, 17, 30, 31, 32, 45, 46, 47])
def test_windows_share_a_character_whatever_is_left(length, tmp_path):
    text = TEXT[:200]
    task = build(tmp_path, text, test_fraction=length / 200)
    assert asked(task, "test") == text[-length:]
    first, *others = task.test.batch(torch.arange(len(task.test))).inputs.tolist()
    for window in others:
        assert window[0] == first[15]
        first = window


def test_the_vocabulary_is_trainings_by_frequency_then_code_point(tmp_path):
    task = build(tmp_path, "bca" * 30 + "zzy" + "aa" + "bxbxbxb", val_fraction=0.02, test_fraction=0.07)
    assert task.symbols == (*SPECIALS, "a", "b", "c", "z", "y")
    assert "3 of the test split's <unk>" in task.note
    rare = build(tmp_path, None, val_fraction=0.02, test_fraction=0.07, min_frequency=2)
    assert rare.symbols == (*SPECIALS, "a", "b", "c", "z")


def test_majority_is_the_most_frequent_character(tmp_path):
    task = build(tmp_path, "ab" * 100, test_fraction=0.055)
    assert asked(task, "test") == "bababababab"
    assert task.majority == 0.5


def test_the_text_is_taken_as_it_is(tmp_path):
    text = "\ufeffline\r\nline\n\U0001d11e\u00e9e\u0301\x00" * 20
    task = build(tmp_path, text)
    assert "".join(asked(task, split) for split in ("train", "val", "test")) == text


def test_the_content_keys_the_cache(tmp_path, monkeypatch):
    first = build(tmp_path)
    monkeypatch.setattr("seqzoo.tasks.char_lm._prepare", lambda *a, **k: pytest.fail("prepared again"))
    (tmp_path / "moved.txt").write_bytes(TEXT.encode())
    moved = build(tmp_path, None, text=str(tmp_path / "moved.txt"))
    assert torch.equal(first.train.values, moved.train.values)
    assert moved.note.startswith("moved.txt")
    monkeypatch.undo()
    changed = build(tmp_path, TEXT[::-1])
    assert not torch.equal(first.train.values, changed.train.values)


def test_a_relative_path_is_under_data_dir_or_here(tmp_path, monkeypatch):
    build(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(build(tmp_path, None, text="text.txt", data_dir=tmp_path).train)
    with pytest.raises(DataError, match=r"text\.txt is no file; .* absolute or relative to data_dir"):
        build(tmp_path, None, text="text.txt")
    monkeypatch.chdir(tmp_path)
    assert len(build(tmp_path, None, text="text.txt").train)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(DataError, match=r"task.text=<a UTF-8 file>"):
        build(tmp_path, None, text=None)
    with pytest.raises(DataError, match="is no file"):
        build(tmp_path, None, text=str(tmp_path))
    with pytest.raises(DataError, match=r"text\.txt, line 3: byte 0xe9 is not UTF-8"):
        build(tmp_path, b"one\ntwo\ncaf\xe9\n" * 20)
    with pytest.raises(DataError, match="has 0 characters, 0 for train, 0 for val, 0 for test; a split needs 2"):
        build(tmp_path, "")
    with pytest.raises(DataError, match="has 20 characters, 17 for train, 1 for val, 2 for test"):
        build(tmp_path, "a" * 20)
    with pytest.raises(DataError, match="has 3 characters, 3 for train, 0 for val, 0 for test"):
        build(tmp_path, "abc")
    assert not list((tmp_path / "cache").glob("char_lm-*")), "nothing half-built"


def test_values_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"val_fraction 0.5 and test_fraction 0.5 leave nothing to train on"):
        build(tmp_path, val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match=r"test_fraction=1\.0"):
        build(tmp_path, test_fraction=1.0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=400), st.text(max_size=400).map(str.encode)), length=st.integers(2, 40))
def test_any_bytes_are_a_text_or_an_error(tmp_path, content, length):
    try:
        task = build(tmp_path, content, max_length=length)
    except DataError:
        return
    text = content.decode()
    held_out = round(0.05 * len(text)) + round(0.1 * len(text))
    assert asked(task, "train") == text[: len(text) - held_out]
    assert all(int(split.values.max()) < task.spec.vocab_size for split in (task.train, task.val, task.test))


def test_real_text(real_data, tmp_path):
    path = real_data("lm/tinyshakespeare.txt") / "lm" / "tinyshakespeare.txt"
    task = build(tmp_path, None, text=str(path), test_fraction=0.05, max_length=256)
    text = path.read_text(encoding="utf-8")
    assert len(text) == 1_115_394
    assert task.spec.vocab_size == 65 + len(SPECIALS)
    assert asked(task, "test") == text[-55_770:]
    assert "<unk>" not in task.note
