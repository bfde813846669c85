from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.tasks import DataError, Task, TaskConfig, build_task, lra_retrieval

ROWS = {
    "train": ["1.0\ta\tb\tfirst\tsecond", "0.0\ta\tc\tfirst\tthird", "1.0\tc\tb\tthird\tsecond"],
    "val": ['0.0\td\te\t"an open quote\tsecond', '1.0\ta\te\t""\tb"'],
    "test": ["1.0\tf\tg\tb'\\\\n \\xe2'\t\u2028é"],
}


def config(**changes) -> TaskConfig:
    settings = {"name": "lra_retrieval", "max_length": 4000, "mask_ratio": 0.15, "min_frequency": 1}
    return TaskConfig(**(settings | changes))


@pytest.fixture
def released(tmp_path, monkeypatch) -> Path:
    """The release's folder with the few rows above."""
    monkeypatch.setattr(lra_retrieval, "ROWS", {split: len(rows) for split, rows in ROWS.items()})
    folder = tmp_path / "data" / "lra_release" / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for split, filename in lra_retrieval.FILES.items():
        (folder / filename).write_bytes("".join(f"{row}\n" for row in ROWS[split]).encode())
    return folder


def build(tmp_path: Path, **changes) -> Task:
    return build_task(config(**changes), data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def decode(task: Task, split: str, i: int) -> list[str]:
    batch = getattr(task, split).batch(torch.tensor([i]))
    pairs = zip(batch.inputs[0], batch.lengths[0], strict=True)
    return ["".join(task.symbols[token] for token in tokens[:length]) for tokens, length in pairs]


def test_pairs_in_their_order(released, tmp_path):
    task = build(tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [3, 2, 1]
    assert [decode(task, "train", i) for i in range(3)] == [
        ["first<eos>", "second<eos>"],
        ["first<eos>", "third<eos>"],
        ["third<eos>", "second<eos>"],
    ]
    assert task.train.labels.tolist() == [1, 0, 1]
    assert task.val.labels.tolist() == [0, 1]
    assert (task.spec.num_inputs, task.spec.num_classes, task.spec.mask_id, task.spec.pad_id) == (2, 2, 0, 1)
    assert task.note == ""


def test_the_vocabulary_counts_each_training_text_once(released, tmp_path):
    assert "".join(build(tmp_path).symbols[4:]) == "dirstcefhno"  # of first, second and third; not of other splits
    assert "".join(build(tmp_path, min_frequency=2).symbols[4:]) == "dirst"


def test_quotes_and_escapes_are_characters(released, tmp_path):
    rows = [row.encode() for rows in ROWS.values() for row in rows]
    path = released / lra_retrieval.FILES["train"]
    path.write_bytes(b"\n".join([*rows[:1], rows[3], rows[5]]))
    task = build(tmp_path)
    assert decode(task, "val", 0) == ['"an open quote<eos>', "second<eos>"]
    assert decode(task, "train", 1) == ['"an open quote<eos>', "second<eos>"]
    assert decode(task, "test", 0) == ["b'\\\\n \\xe2'<eos>", "\u2028é<eos>"]


def test_long_texts_are_cut(released, tmp_path):
    task = build(tmp_path, max_length=4)
    assert decode(task, "train", 0) == ["fir<eos>", "sec<eos>"]
    assert task.note == "texts cut to 4 characters"
    assert "n" not in task.symbols


def test_built_once(released, tmp_path):
    first = build(tmp_path)
    second = build_task(config(), data_dir=None, cache_dir=tmp_path / "cache")
    assert torch.equal(first.train.values, second.train.values)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"1.0\ta\tb\tfirst", "row 2: 4 columns; expected 5"),
        (b"1.0\ta\tb\tfirst\tsec\tond", "row 2: 6 columns; expected 5"),
        (b"", "row 2: 1 columns; expected 5"),
        (b"2.0\ta\tb\tfirst\tsecond", r"row 2: the label is '2.0'; valid: 0.0, 1.0"),
        (b"1.0\ta\tb\tfirst\tse\xffcond", r"row 2: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_damaged_rows_are_named(released, tmp_path, row, message):
    path = released / lra_retrieval.FILES["train"]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], row, *lines[2:]]))
    with pytest.raises(DataError, match=rf"new_aan_pairs.train.tsv, {message}"):
        build(tmp_path)


def test_a_file_that_was_cut_short(released, tmp_path):
    path = released / lra_retrieval.FILES["test"]
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"new_aan_pairs.test.tsv holds 0 rows, expected 1"):
        build(tmp_path)


def test_a_missing_file_and_a_missing_release(released, tmp_path):
    (released / lra_retrieval.FILES["val"]).unlink()
    with pytest.raises(DataError, match=r"new_aan_pairs.eval.tsv is missing"):
        build(tmp_path)
    with pytest.raises(DataError, match=r"no tsv_data of the Long Range Arena release"):
        build_task(config(), data_dir=tmp_path / "nowhere", cache_dir=tmp_path / "cache")


words = st.text(st.characters(exclude_characters="\t\n", exclude_categories=["Cs"]))


@given(st.lists(st.tuples(st.sampled_from(["0.0", "1.0"]), words, words)))
def test_any_text_is_read_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "pairs.tsv"
    path.write_bytes("".join(f"{label}\tx\ty\t{a}\t{b}\n" for label, a, b in rows).encode())
    texts: dict[str, int] = {}
    pairs, labels = lra_retrieval._read(path, len(rows), 5, texts)
    written = list(texts)
    assert [(written[i], written[j]) for i, j in pairs] == [(a[:5], b[:5]) for _, a, b in rows]
    assert labels.tolist() == [int(label == "1.0") for label, _, _ in rows]


@given(st.lists(st.sampled_from([b"1.0", b"\t", b"\n", b"\r", b"\xff", b'"', b"x"])).map(b"".join))
def test_anything_else_is_an_error_that_names_the_row(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "pairs.tsv"
    path.write_bytes(content)
    rows = content.removesuffix(b"\n").split(b"\n") if content else []
    fault = None
    try:
        pairs, _ = lra_retrieval._read(path, len(rows), 10, {})
    except DataError as error:
        fault = str(error)
    assert len(pairs) == len(rows) if fault is None else f"{path}, row " in fault
