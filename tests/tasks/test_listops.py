from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_configs import small_listops

from seqzoo.tasks import DataError, build_task, lra_listops, origin_of
from seqzoo.tasks.listops.grammar import EOS, SYMBOLS, evaluate


def test_the_task(tmp_path):
    task = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [300, 40, 50]
    assert (task.spec.vocab_size, task.spec.num_classes, task.spec.mask_id, task.spec.pad_id) == (19, 10, 0, 1)
    assert task.train.values.dtype == torch.uint8
    assert task.note == "max_depth 5, min_length 20, length_bound 200, num_train 300, num_val 40, num_test 50"
    seen = set()
    for split in (task.train, task.val, task.test):
        batch = split.batch(torch.arange(len(split)))
        for row, length, label in zip(batch.inputs.numpy(), batch.lengths, batch.labels, strict=True):
            assert row[length - 1] == EOS
            assert evaluate(row[: length - 1]) == label
            seen.add(bytes(row.astype(np.uint8)[:length]))
    assert len(seen) == 390


def test_the_same_task_from_the_cache_and_from_other_workers(tmp_path):
    values = [
        build_task(small_listops(workers=workers), data_dir=None, cache_dir=tmp_path / cache).train.values
        for workers, cache in ((1, "a"), (2, "a"), (2, "b"))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert len(list((tmp_path / "a").glob("lra_listops-*"))) == 1
    other_seed = build_task(small_listops(generator_seed=1), data_dir=None, cache_dir=tmp_path / "a")
    assert not torch.equal(values[0][:1000], other_seed.train.values[:1000])


def test_cut_expressions_are_noted(tmp_path):
    task = build_task(small_listops(max_length=64), data_dir=None, cache_dir=tmp_path)
    assert "expressions cut to 64 symbols" in task.note
    assert task.train.lengths.max() == 64
    assert (task.train.values[task.train.offsets[1:] - 1] == EOS).all()


@pytest.mark.parametrize(("change", "message"), [({"num_val": 0}, "num_val=0"), ({"workers": 0}, "workers=0")])
def test_settings_out_of_range(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_task(small_listops(**change), data_dir=None, cache_dir=tmp_path)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Files in the released layout, with four rows a split, and the configuration that asks for them."""
    small = {"num_train": 4, "num_val": 4, "num_test": 4}
    monkeypatch.setattr(lra_listops, "PUBLISHED", lra_listops.PUBLISHED | small)
    folder = tmp_path / "data" / "lra_release" / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for i, name in enumerate(("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")):
        rows = [f"( ( ( [MAX {i} ) {n} ) ] )\t{max(i, n)}" for n in range(4)]
        (folder / name).write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    config = small_listops(**{k: v for k, v in lra_listops.PUBLISHED.items() if k != "name"}, max_length=2048)
    return folder, config, tmp_path


def test_released_files_are_read(released):
    _, config, tmp_path = released
    task = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert task.note == "", "the benchmark's own"
    batch = task.val.batch(torch.arange(4))
    assert [SYMBOLS[token] for token in batch.inputs[2, :5]] == ["[MAX", "1", "2", "]", "<eos>"]
    assert batch.lengths.tolist() == [5] * 4
    assert batch.labels.tolist() == [1, 1, 2, 3]


def test_released_files_are_not_taken_for_another_grammar(released):
    _, config, tmp_path = released
    config.min_length, config.length_bound = 20, 200
    task = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert task.note == "min_length 20, length_bound 200"
    assert task.train.lengths.min() > 20
    config = small_listops(generator_seed=1, num_train=4, num_val=4, num_test=4)
    task = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert "generator_seed 1" in task.note


def test_changed_files_are_read_anew(released):
    folder, config, tmp_path = released
    before = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    path = folder / "basic_test.tsv"
    path.write_text(path.read_text().replace("[MAX", "[MIN"))
    os.utime(path, ns=(1, 1))
    after = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert before.test.values[0] != after.test.values[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("Source", "Sauce"), r"basic_train\.tsv: the header is b'Sauce\\tTarget'"),
        (lambda text: text.replace("\t2", " 2"), r"basic_train\.tsv, row 4: expected an expression, a tab and a digit"),
        (
            lambda text: text.replace("\t2", "\t12"),
            r"basic_train\.tsv, row 4: expected an expression, a tab and a digit",
        ),
        (lambda text: text.replace("[MAX 0 ) 1", "[MÄX 0 ) 1"), r"basic_train\.tsv, row 3: 'ascii' codec can't decode"),
        (lambda text: text.replace("[MAX 0 ) 1", "[MUX 0 ) 1"), r"basic_train\.tsv, row 3: '\[MUX' is no symbol"),
        (lambda text: text[: text.rindex("(")].rsplit("\n", 1)[0], r"basic_train\.tsv holds 3 rows, expected 4"),
    ],
    ids=["header", "label", "two digits", "no ASCII", "symbol", "cut"],
)
def test_damaged_rows_are_named(released, damage, message):
    folder, config, tmp_path = released
    path = folder / "basic_train.tsv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_missing_file_is_named(released):
    folder, config, tmp_path = released
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"basic_val\.tsv is missing\.\nPut it there; without the folder, rows are gen"):
        build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


@settings(max_examples=200, deadline=None)
@given(
    st.binary() | st.lists(st.sampled_from([*SYMBOLS, "(", ")", "\t", "\n", "\r", "é"])).map(" ".join).map(str.encode)
)
def test_any_rows_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "basic_train.tsv")
        path.write_bytes(b"Source\tTarget\n" + content)
        with suppress(DataError):
            expressions, labels = lra_listops._read(path, 1)
            assert (len(expressions), len(labels)) == (1, 1)
            assert 0 <= labels[0] <= 9


def test_released_rows_are_told_from_generated_ones(released):
    folder, config, tmp_path = released
    places = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    found = origin_of(config, **places)
    assert found["origin"].keys() == {"basic_train.tsv", "basic_val.tsv", "basic_test.tsv"}
    shutil.copytree(folder, tmp_path / "copy" / "listops-1000")
    assert origin_of(config, data_dir=tmp_path / "copy", cache_dir=tmp_path / "cache") == found, "moved, not changed"
    with (folder / "basic_val.tsv").open("a") as file:
        file.write("[MAX 1 2 ]\t2\n")
    assert origin_of(config, **places) != found
    config.num_train = 3
    assert origin_of(config, **places) == {}, "so many are generated"
