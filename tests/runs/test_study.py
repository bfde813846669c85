"""Runs that are lines of a study: finished, and without weights."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from seqzoo.analysis import analyse_run
from seqzoo.analysis.__main__ import main as analyse
from seqzoo.config import ConfigError
from seqzoo.report.cli import main as evaluate
from seqzoo.runs import evaluate_run, load, run
from seqzoo.runs.cell import Cell
from seqzoo.runs.folder import check_task, read_config, read_spec
from seqzoo.study import pack


@pytest.fixture(scope="module")
def packed(task, tmp_path_factory):
    """A configuration, its result and its line, the only thing in `runs_dir`."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), pretrain=True)
    result = run(config, task=task)
    folder, study = Path(result["folder"]), Path(config.runs_dir) / "study.jsonl"
    there = read_config(folder), read_spec(folder)
    assert pack([folder], study) == (1, [])
    shutil.rmtree(folder)
    return config, result, study / folder.name, there


def test_a_run_in_a_study_is_finished(packed, task, capsys):
    config, result, line, _ = packed
    assert run(config, task=task) == {**result, "folder": str(line)}
    assert f"{line} is finished; another runs_dir runs it again" in capsys.readouterr().err
    assert [path.name for path in Path(config.runs_dir).iterdir()] == ["study.jsonl"]
    assert Cell((), config, line.parent.parent / line.name, None).finished
    assert not Cell((), config, line.parent.parent / "other", None).finished


def test_its_records_are_those_of_its_folder(packed, task):
    _, _, line, there = packed
    assert (read_config(line), read_spec(line)) == there
    check_task(line, task)


def test_what_needs_weights_says_that_there_are_none(packed, task, tmp_path, capsys):
    _, _, line, _ = packed
    for use in (load, evaluate_run, analyse_run):
        with pytest.raises(ConfigError, match="a line of a study has no weights; valid: the folder of a run"):
            use(line)
    with pytest.raises(ConfigError, match=r"pretrain=.*study.jsonl/.*: a line of a study has no weights"):
        run(tiny_config(tmp_path / "runs", pretrain=str(line)), task=task)
    assert evaluate([f"checkpoint={line}"]) == 1
    assert analyse([str(line)]) == 1
    assert capsys.readouterr().err.count("a line of a study has no weights") == 2
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        read_config(line.parent / "other")
