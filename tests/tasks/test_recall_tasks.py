import pytest
import torch

from seqzoo.spec import IGNORED
from seqzoo.tasks import Task, TaskConfig, build_task
from seqzoo.tasks.recall import associative_recall

OPTIONS = {
    "associative_recall": {"num_pairs": 3, "num_queries": 5, "num_symbols": 9},
    "selective_copying": {"num_tokens": 6, "num_symbols": 5},
    "induction_heads": {"num_symbols": 7},
}


def config(name: str, **changes) -> TaskConfig:
    counts = {"num_train": 1500, "num_val": 40, "num_test": 60, "generator_seed": 3}
    return TaskConfig(**{"name": name, "max_length": 32, "mask_ratio": 0.15, **OPTIONS[name], **counts, **changes})


def build(name: str, tmp_path, **changes) -> Task:
    return build_task(config(name, **changes), data_dir=None, cache_dir=tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_splits_are_streams_of_their_own(name, tmp_path):
    task = build(name, tmp_path)
    splits = (task.train, task.val, task.test)
    assert [len(split) for split in splits] == [1500, 40, 60]
    rows = [{tuple(row) for row in split.values.view(-1, 32).tolist()} for split in splits]
    assert [len(split) for split in rows] == [1500, 40, 60], "no sequence twice"
    assert not rows[0] & rows[1] | rows[0] & rows[2] | rows[1] & rows[2]
    assert list(tmp_path.iterdir()) == [], "nothing is stored"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_seed_decides_and_a_smaller_split_begins_a_larger_one(name, tmp_path):
    task, again, other = build(name, tmp_path), build(name, tmp_path), build(name, tmp_path, generator_seed=4)
    assert task.spec == again.spec == other.spec
    for split in ("train", "val", "test"):
        mine, same, different = (getattr(each, split) for each in (task, again, other))
        assert torch.equal(mine.values, same.values)
        assert torch.equal(mine.targets, same.targets)
        assert not torch.equal(mine.values, different.values)
    fewer = build(name, tmp_path, num_train=1100)
    assert torch.equal(fewer.train.values, task.train.values[: 1100 * 32])
    assert torch.equal(fewer.train.targets, task.train.targets[: 1100 * 32])
    assert torch.equal(fewer.test.values, task.test.values)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_asked_can_be_answered(name, tmp_path):
    task = build(name, tmp_path)
    spec = task.spec
    assert (spec.kind, spec.answer, spec.max_length, spec.num_inputs) == ("tokens", "positions", 32, 1)
    assert len(task.symbols) == spec.vocab_size == spec.num_classes
    assert (task.symbols[spec.mask_id], task.symbols[spec.pad_id]) == ("<mask>", "<pad>")
    batch = task.test.batch(torch.arange(60))
    assert batch.inputs.shape == batch.targets.shape == (60, 32)
    assert batch.inputs.max() < spec.mask_id
    asked = batch.targets != IGNORED
    assert 0 <= batch.targets[asked].min() <= batch.targets[asked].max() < spec.mask_id
    per_sequence = {"associative_recall": 5, "selective_copying": 6, "induction_heads": 1}[name]
    assert (asked.sum(1) == per_sequence).all()
    for row, answers in zip(batch.inputs, batch.targets, strict=True):
        read = row[answers == IGNORED].tolist()
        assert {answer for answer in answers.tolist() if answer != IGNORED} <= set(read)
    assert task.majority == pytest.approx(1 / OPTIONS[name]["num_symbols"], abs=0.15)


def test_symbols_name_the_ids(tmp_path):
    assert build("selective_copying", tmp_path, num_symbols=2).symbols == ("0", "1", ".", "?", "<mask>", "<pad>")
    symbols = build("associative_recall", tmp_path, num_pairs=1, num_symbols=2).symbols
    assert symbols == ("k0", "k1", "v0", "v1", ".", "<mask>", "<pad>")
    assert build("induction_heads", tmp_path, num_symbols=2).symbols == ("0", "1", "?", "<mask>", "<pad>")


def test_many_ids_take_wider_integers(tmp_path):
    task = build("associative_recall", tmp_path, num_symbols=500)
    assert (task.train.values.dtype, task.train.targets.dtype) == (torch.int16, torch.int16)
    assert build("induction_heads", tmp_path).train.values.dtype == torch.uint8
    drawn = associative_recall(
        1024,
        length=32,
        num_pairs=3,
        num_queries=5,
        num_symbols=20_000,
        generator=torch.Generator().manual_seed(0),
    )
    wide = build("associative_recall", tmp_path, num_symbols=20_000)
    assert wide.train.values.dtype == torch.int32
    assert wide.train.values.max() == drawn[0].max() == 40_000


def test_the_note_tells_the_difficulty(tmp_path):
    assert build("associative_recall", tmp_path).note == (
        "length 32, num_pairs 3, num_queries 5, num_symbols 9, num_train 1,500, generator_seed 3, "
        "num_val 40, num_test 60"
    )
    assert "seed" not in build("associative_recall", tmp_path, generator_seed=0).note


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("induction_heads", {"num_val": 0}, "num_val=0: valid: 1 or more"),
        ("induction_heads", {"generator_seed": -1}, "generator_seed=-1: valid: 0 or more"),
        ("induction_heads", {"num_symbols": 0}, "num_symbols=0: valid: 1 or more"),
        ("induction_heads", {"max_length": 2}, "length=2; valid: 3 and more"),
        ("selective_copying", {"num_tokens": 17}, "num_tokens=17 in length=32; valid: 1 to 16"),
        ("associative_recall", {"num_pairs": 10}, "num_pairs=10 with num_symbols=9; valid: 1 to 9"),
        ("associative_recall", {"num_queries": 27}, "num_queries=27 .* valid: 1 to 26"),
        ("selective_copying", {"num_pairs": 2}, "has no use for num_pairs"),
    ],
)
def test_errors_say_what_is_valid(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(name, tmp_path, **change)
