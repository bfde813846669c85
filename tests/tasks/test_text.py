from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from seqzoo.tasks import DataError, Task, TaskConfig, build_task, lra_text, origin_of
from seqzoo.tasks.store.cache import origin


def config(**changes) -> TaskConfig:
    settings = {
        "name": "lra_text",
        "max_length": 4096,
        "mask_ratio": 0.15,
        "val_fraction": 0.1,
        "split_seed": 42,
        "min_frequency": 15,
    }
    return TaskConfig(**(settings | changes))


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> Path:
    """Ten reviews a folder in the official layout: `bad <number>` or `good <number>`, one with a rare character."""
    monkeypatch.setattr(lra_text, "REVIEWS_PER_FOLDER", 10)
    for split in ("train", "test"):
        for label, word in (("neg", "bad"), ("pos", "good")):
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{number}_{7 if label == 'pos' else 3}.txt").write_text(f"{word} {number}", encoding="utf-8")
    (tmp_path / "aclImdb" / "test" / "pos" / "9_7.txt").write_text("naïve 🎬 film", encoding="utf-8")
    publish(tmp_path, monkeypatch)
    return tmp_path


def publish(data_dir, monkeypatch):
    """From now on what lies there is what was published."""
    digests: dict[str, str] = {}
    for split in ("train", "test"):
        lra_text._read(data_dir / "aclImdb", split, 9, digests)
    monkeypatch.setattr(lra_text, "PUBLISHED", digests)
    monkeypatch.setattr(lra_text, "PUBLISHED_SIZES", lra_text._changed_sizes(data_dir, data_dir)["reviews"])


def decode(task: Task, split: str, i: int) -> str:
    batch = getattr(task, split).batch(torch.tensor([i]))
    return "".join(task.symbols[token] for token in batch.inputs[0, : batch.lengths[0]])


def test_reviews_in_order_of_class_and_number(data_dir, tmp_path):
    task = build_task(config(min_frequency=1), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert [len(split) for split in (task.train, task.val, task.test)] == [18, 2, 20]
    assert task.val.labels.tolist() == [0, 1]
    assert task.test.labels.tolist() == [0] * 10 + [1] * 10
    assert decode(task, "test", 0) == "bad 0<eos>"
    assert decode(task, "test", 10) == "good 0<eos>"
    texts = {decode(task, split, i) for split in ("train", "val") for i in range(len(getattr(task, split)))}
    assert texts == {f"{word} {number}<eos>" for word in ("bad", "good") for number in range(10)}
    assert task.majority == 0.5
    assert task.note == "min_frequency 1"


def test_vocabulary_is_what_training_sees(data_dir, tmp_path):
    task = build_task(config(min_frequency=9), data_dir=data_dir, cache_dir=tmp_path / "cache")
    # in 18 reviews: d and space 18 times, o 18 times (9 reviews), a, b, g 9 times, each digit at most twice
    assert task.symbols == ("<mask>", "<pad>", "<unk>", "<eos>", " ", "d", "o", "a", "b", "g")
    assert (task.spec.vocab_size, task.spec.mask_id, task.spec.pad_id) == (10, 0, 1)
    assert decode(task, "test", 19) == "<unk>a<unk><unk><unk> <unk> <unk><unk><unk><unk><eos>"  # characters, not bytes


def test_long_reviews_are_cut(data_dir, tmp_path):
    task = build_task(config(max_length=5, min_frequency=1), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert decode(task, "test", 0) == "bad <eos>"
    assert task.train.lengths.max() == 5
    assert task.note == "text cut to 5 characters, min_frequency 1"
    assert set(task.symbols[4:]) == set("badgo ")  # no digit is left to be seen


def test_built_once(data_dir, tmp_path, monkeypatch):
    first = build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(lra_text, "provide", None)
    second = build_task(config(mask_ratio=0.3), data_dir=None, cache_dir=tmp_path / "cache")
    assert torch.equal(first.train.values, second.train.values)
    assert first.symbols == second.symbols
    assert second.spec.mask_ratio == 0.3


def test_incomplete_folder(data_dir, tmp_path):
    (data_dir / "aclImdb" / "train" / "pos" / "4_7.txt").unlink()
    with pytest.raises(DataError, match=r"train/pos holds 9 reviews named .*, expected 10"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


def test_a_damaged_review_is_named(data_dir, tmp_path):
    (data_dir / "aclImdb" / "train" / "pos" / "4_7.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"4_7\.txt is damaged: 'utf-8' codec"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_the_published_reviews(real_data, tmp_path):
    task = build_task(config(), data_dir=real_data("aclImdb"), cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [22_500, 2_500, 25_000]
    for split in (task.train, task.val, task.test):
        assert split.labels.bincount().tolist() == [len(split) // 2] * 2
    assert 130 <= task.spec.vocab_size <= 140
    assert task.symbols[4:8] == (" ", "e", "t", "a")
    assert decode(task, "train", 0).startswith("Story of a man who has unnatural feelings for a pig.")
    assert task.test.mean_length == pytest.approx(1271, abs=1)
    assert task.test.lengths.max() == 4096


@pytest.mark.parametrize("how", ["empty", "folder", "loop"])
def test_a_review_that_is_no_text_is_refused(data_dir, tmp_path, how):
    path = data_dir / "aclImdb" / "test" / "neg" / "3_3.txt"
    path.unlink()
    {"empty": path.touch, "folder": path.mkdir, "loop": lambda: path.symlink_to(path)}[how]()
    with pytest.raises(DataError, match=r"neg/3_3\.txt is (empty|damaged)"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


def test_reviews_other_than_the_published_are_said(data_dir, tmp_path, capsys, monkeypatch):
    (data_dir / "aclImdb" / "test" / "pos" / "3_7.txt").write_text("good 4", encoding="utf-8")
    task = build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert "the reviews in test/pos are not those published" in capsys.readouterr().err
    assert origin(task.folder)[0] == "aclImdb, changed"
    assert task.note == "reviews that are not the published ones"


def test_changed_reviews_have_an_entry_and_a_name_of_their_own(data_dir, tmp_path):
    places = {"cache_dir": tmp_path / "cache"}
    published = build_task(config(), data_dir=data_dir, **places)
    own = tmp_path / "own"
    shutil.copytree(data_dir / "aclImdb", own / "aclImdb")
    (own / "aclImdb" / "train" / "pos" / "3_7.txt").write_text("better than good", encoding="utf-8")
    for _ in range(2):
        changed = build_task(config(), data_dir=own, **places)
        assert changed.folder != published.folder
        assert changed.note == "reviews that are not the published ones"
        assert build_task(config(), data_dir=data_dir, **places).folder == published.folder
    assert not origin_of(config(), data_dir=data_dir, **places)
    assert origin_of(config(), data_dir=own, **places)
