import math

import numpy as np
import pytest
from tiny_runs import tiny_config, toy_task

from seqzoo.report.comparison import cells_of, compare
from seqzoo.report.results import read_result
from seqzoo.report.tables import build_report, to_markdown
from seqzoo.runs import run
from seqzoo.tasks import from_arrays


@pytest.fixture(scope="module")
def task():
    return toy_task()


def test_a_pretraining_that_learnt_nothing_says_so_and_is_marked(task, tmp_path, capsys):
    result = run(tiny_config(tmp_path, pretrain=True, pretraining={"lr": 1e-9}), task=task)
    assert "has learnt nothing beyond how frequent symbols are" in capsys.readouterr().err
    assert result["learnt"].keys() == {"loss", "symbols", "neighbours", "margin", "learnt"}
    shares = task.train.values.bincount() / len(task.train.values)
    assert result["learnt"]["symbols"] == pytest.approx(-(shares * shares.log()).nansum().item())
    assert result["learnt"]["loss"] > result["learnt"]["symbols"] - result["learnt"]["margin"]
    assert result["learnt"]["learnt"] is False
    cells, _ = cells_of([read_result(tmp_path / result["folder"])])
    report = to_markdown(build_report(compare(cells), []))
    assert "(1) †" in report
    assert "† A pretraining learnt nothing" in report


def test_one_that_learnt_is_not(tmp_path, capsys):
    inputs = [np.full(12, i % 4) for i in range(120)]
    labels = [i // 4 % 2 for i in range(120)]
    task = from_arrays("toy", kind="tokens", inputs=inputs, labels=labels, val_fraction=0.2, test_fraction=0.2)
    found = run(tiny_config(tmp_path, pretrain=True, pretraining={"tokens": 9600, "lr": 1e-2}), task=task)["learnt"]
    assert "has learnt nothing" not in capsys.readouterr().err
    assert found["learnt"] is True
    assert found["symbols"] == pytest.approx(math.log(4), abs=0.01)
    assert found["loss"] < found["symbols"] - found["margin"]
    assert found["margin"] > 0
    assert run(tiny_config(tmp_path), task=task)["learnt"] is None
