from __future__ import annotations

import numpy as np
import pytest
from task_configs import small_listops

from seqzoo.tasks import TaskConfig, build_task, from_arrays, samples
from seqzoo.tasks.listops.grammar import SYMBOLS
from seqzoo.tasks.samples import _picture, as_text, decode, pick, save_sheet, sequences


def test_decode():
    assert decode(np.array([14, 5, 4, 18, 3]), SYMBOLS) == "[MIN 1 0 ] <eos>"
    assert decode(np.array([3, 4, 2, 5, 1, 3]), ("<mask>", "<eos>", "<unk>", "é", "\n", "[")) == "é\\n<unk>[<eos>é"
    assert decode(np.array([3, 10, 2]), ()) == "3 10 2"


def test_an_example_as_text(tmp_path):
    task = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    first, second = as_text(task, task.val, 0).splitlines()
    assert first == f"example 0, label {int(task.val.labels[0])}"
    assert second == f"  {int(task.val.lengths[0])} positions: {decode(sequences(task.val, 0)[0], SYMBOLS)}"


def test_a_long_example_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "LONGEST", 30)
    task = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    line = as_text(task, task.val, 0).splitlines()[1]
    assert line.endswith(f": {decode(sequences(task.val, 0)[0], SYMBOLS)[:30]} ...")


def test_both_sequences_of_a_pair():
    task = from_arrays(
        "pairs", kind="tokens", inputs=[[[1, 2], [3]], [[4], [5, 0]]] * 5, labels=[0, 1] * 5, num_inputs=2
    )
    lines = as_text(task, task.train, 0).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  2 positions", "  1 positions"]


def test_answers_at_positions(tmp_path):
    options = {"max_length": 8, "num_symbols": 4, "num_train": 3, "num_val": 3, "num_test": 3, "generator_seed": 0}
    task = build_task(TaskConfig(name="induction_heads", mask_ratio=0.1, **options), data_dir=None, cache_dir=tmp_path)
    first, _, answers = as_text(task, task.val, 1).splitlines()
    assert first == "example 1"
    assert answers == f"  1 answers: 7:{task.symbols[int(task.val.targets[15])]}"


def test_pick_is_the_same_each_time_and_no_more_than_there_are(tmp_path):
    task = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    assert pick(task.val, 5) == pick(task.val, 40)[:5]
    assert sorted(pick(task.val, 100)) == list(range(40))


@pytest.mark.parametrize(
    ("shape", "num_inputs"),
    [((9,), 1), ((9, 3), 1), ((9, 2), 1), ((10,), 1), ((2, 9), 2), ((2, 9, 3), 2), ((2, 10), 2)],
    ids=["grey", "colour", "two channels", "curve", "two pictures", "two in colour", "two curves"],
)
def test_a_sheet(tmp_path, shape, num_inputs):
    inputs = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    pictures = {"kind": "pixels", "inputs": list(inputs), "labels": [0, 1] * 10}
    task = from_arrays("pictures", **pictures, num_inputs=num_inputs)
    save_sheet(task, "train", pick(task.train, 5), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_brightest_is_one():
    colour = np.full((4, 3), 15, np.uint8)
    assert (_picture([colour], 2, 15) == np.ones((2, 2, 3))).all()
    assert (_picture([colour[:, :2], 0 * colour[:, :2]], 2, 15) == [[1, 1, 1, 1, 0, 0, 0, 0]] * 2).all()


def test_a_sheet_replaces_a_link(tmp_path, victim):
    task = from_arrays("pictures", kind="pixels", inputs=[np.zeros(9, np.uint8)] * 20, labels=[0, 1] * 10)
    for name in ("sheet.png", "sheet.pdf.tmp"):
        (tmp_path / name).symlink_to(victim)
    save_sheet(task, "train", [0], tmp_path / "sheet.png")
    save_sheet(task, "train", [0], tmp_path / "sheet.pdf")
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "sheet.pdf").read_bytes()[:4] == b"%PDF"


def test_what_stands_in_data_is_shown_as_text():
    assert decode(np.array([0, 1]), ("\x1b[31m", "\u202e")) == "\\x1b[31m \\u202e"
