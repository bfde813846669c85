"""A report of studies is that of the run folders they were packed from."""

import csv
import io
import json
import shutil

import pytest

from seqzoo.report import load_results
from seqzoo.report.cli import main
from seqzoo.study import read_study

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (300).to_bytes(4, "big") + (100).to_bytes(4, "big")


def lines(accuracy):
    """Two stages of 100 lines of training, each with two validations."""
    found = []
    for stage in ("pretrain", "finetune"):
        for step in range(1, 101):
            place = {"stage": stage, "step": step, "tokens": 50 * step}
            found.append({**place, "train/loss": 1 / (step + accuracy)})
            if step % 50 == 0:
                found.append({**place, "val/loss": 1 / (step + accuracy), "val/accuracy": accuracy * step / 123})
    return found


@pytest.fixture
def runs(write_run):
    """A folder of runs with seeds, both stages, a shared pretraining, mixing, and one that is unfinished."""
    for seed in (0, 1):
        for number, model in enumerate(("transformer", "lru")):
            accuracy = 0.5 + 0.1 * number + 0.013 * seed
            write_run(model=model, seed=seed, accuracy=accuracy, budgets=(0, 5000), metrics=lines(accuracy))
            folder = write_run(
                model=model, seed=seed, accuracy=accuracy + 0.1, budgets=(5000, 5000), metrics=lines(accuracy)
            )
            layer = {"mean_distance": [accuracy], "window_share": [0.5], "distance_profile": [1.0]}
            stages = {stage: [layer] for stage in ("initial", "pretrain", "finetune")}
            (folder / "mixing.json").write_text(json.dumps({"schema": 1, "window": 16, "stages": stages}))
            (folder / "mixing.png").write_bytes(PNG)
            write_run(
                model=model,
                seed=seed,
                accuracy=accuracy,
                budgets=(5000, 7000),
                pretrain_run=folder.name,
                metrics=[line for line in lines(accuracy) if line["stage"] == "finetune"],
            )
    return folder.parent


def sheets(out, place):
    """The tables and the figures' data of a report, with runs at `place` named alike, and its pictures."""
    found = {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    found.pop("report.html")
    return {name: content.replace(place.encode(), b"") for name, content in found.items()}


def test_tables_and_figures_are_the_same(runs, tmp_path, capsys):
    study = tmp_path / "results" / "study.jsonl"
    assert main(["pack", str(runs), "--into", str(study)]) == 0
    found = []
    for given, name in ((runs, "runs/"), (study, "results/study.jsonl/"), (study.parent, "results/study.jsonl/")):
        out = tmp_path / "out"
        assert main([str(given), "--out", str(out), "--report", str(out / "report.html")]) == 0
        found.append((sheets(out, f"../{name}"), (out / "report.html").read_text().count("What each position of")))
        shutil.rmtree(out)
    assert found[0] == found[1] == found[2]
    assert {"figure.png", "table.md", "table.csv", "main.csv", "distances.csv", "pretraining.png"} <= {*found[0][0]}
    assert found[0][1] == 4
    points = csv.DictReader(io.StringIO(found[0][0]["learning_curves.csv"].decode()))
    assert sum(point["figure"].startswith("Learning curves") for point in points) == 12 * 2


def test_there_and_back(runs, tmp_path, capsys):
    study, back = tmp_path / "study.jsonl", tmp_path / "back"
    assert main(["pack", str(runs), "--into", str(study)]) == 0
    before = study.read_bytes()
    assert main(["unpack", str(study), "--into", str(back)]) == 0
    assert f"{back}: 12 run folders written" in capsys.readouterr().out
    assert main(["unpack", str(study), "--into", str(back)]) == 0
    assert capsys.readouterr().err.count("is there already") == 12
    assert main(["pack", str(back), "--into", str(study)]) == 0
    assert study.read_bytes() == before


def test_one_run_of_a_study(runs, tmp_path):
    study = tmp_path / "study.jsonl"
    main(["pack", str(runs), "--into", str(study)])
    assert main([str(study / "run-00")]) == 0
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == ["figure.png", "table.csv", "table.md"]
    results, left_out = load_results([tmp_path])  # the folders too, but no figures of the study
    assert (len(results), left_out) == (12, [])
    assert {result.folder.parent for result in results} == {runs}, "a folder has more than a line"


def test_a_run_that_changed_is_packed_anew(runs, tmp_path):
    study = runs / "runs.jsonl"  # found among the runs, and after them
    main(["pack", str(runs), "--into", str(study)])
    path = runs / "run-00" / "result.json"
    path.write_text(path.read_text().replace('"n_test": 400', '"n_test": 401'))
    assert main(["pack", str(runs), "--into", str(study)]) == 0
    assert read_study(study).runs["run-00"]["result"]["n_test"] == 401


def test_of_two_runs_with_one_name_the_second_is_left_out(runs, tmp_path, capsys):
    other = tmp_path / "other" / "run-00"
    shutil.copytree(runs / "run-01", other)
    study = tmp_path / "study.jsonl"
    assert main(["pack", str(runs), str(other.parent), "--into", str(study)]) == 0
    said = capsys.readouterr()
    assert f"left out: {other}: a run of that name is {runs / 'run-00'}; valid: names that differ" in said.err
    assert "12 runs, 12 of them from what was given" in said.out


def test_damage_is_named_and_costs_no_other_run(runs, tmp_path, capsys):
    study = tmp_path / "study.jsonl"
    main(["pack", str(runs), "--into", str(study)])
    study.write_bytes(study.read_bytes()[:-100] + b"\n[\x1b\n")
    out = tmp_path / "out"
    assert main([str(study), "--out", str(out), "--report", str(out / "report.html")]) == 0
    printed = capsys.readouterr().out
    assert f"{study}: line 12: " in printed
    assert f"{study}: line 13: " in printed
    assert "\x1b" not in printed
    assert main(["pack", str(runs), "--into", str(study)]) == 1
    assert "valid: a study whose lines can all be read" in capsys.readouterr().err
    assert main(["unpack", str(study), "--into", str(tmp_path / "back")]) == 0
    assert len([*(tmp_path / "back").iterdir()]) == 11


def test_what_cannot_be_packed_is_named(runs, tmp_path, capsys):
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "config.yaml").write_text("seed: 0\n")
    assert main(["pack", str(runs), "--into", str(tmp_path / "study.jsonl")]) == 0
    assert f"left out: {runs / 'unfinished'}: no result.json" in capsys.readouterr().err
    assert main(["pack", str(runs / "unfinished"), "--into", str(tmp_path / "other.jsonl")]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["pack", "nowhere", "--into", "x.jsonl"],
        ["pack", ".", "--into", "x.txt"],
        ["pack", "."],
        ["unpack", "nowhere.jsonl", "--into", "."],
        ["unpack", ".", "--into", "."],
    ],
)
def test_unusable_arguments(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert list(tmp_path.iterdir()) == []
