import pytest
from tiny_runs import tiny_config, toy_task

from seqzoo.report.comparison import cells_of, compare
from seqzoo.report.results import read_result
from seqzoo.report.tables import build_report, to_markdown
from seqzoo.runs import run


@pytest.fixture(scope="module")
def task():
    return toy_task()


def test_a_pretraining_that_learnt_nothing_says_so_and_is_marked(task, tmp_path, capsys):
    result = run(tiny_config(tmp_path, pretrain=True, pretraining={"lr": 1e-9}), task=task)
    assert "has learnt nothing beyond how frequent symbols are" in capsys.readouterr().err
    assert result["learnt"].keys() == {"loss", "symbols", "neighbours", "margin", "learnt"}
    assert result["learnt"]["learnt"] is False
    cells, _ = cells_of([read_result(tmp_path / result["folder"])])
    report = to_markdown(build_report(compare(cells), []))
    assert "(1) †" in report
    assert "† A pretraining learnt nothing" in report


def test_one_that_learnt_is_not(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("seqzoo.runs.learnt.MARGIN", {"toy": -10.0})
    result = run(tiny_config(tmp_path, pretrain=True), task=task)
    assert "has learnt nothing" not in capsys.readouterr().err
    assert result["learnt"]["learnt"] is True
    assert run(tiny_config(tmp_path), task=task)["learnt"] is None
