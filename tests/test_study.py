import json
import shutil
from itertools import pairwise

import pytest

from seqzoo.files import write_json, write_text
from seqzoo.study import (
    LARGEST_LINE,
    exists,
    is_packed,
    is_study,
    pack,
    packed_run,
    read,
    read_metrics,
    read_study,
    unpack,
)

CONFIG = "recipe: tiny\nlr: 1.0e-05\nname: 'true'\nlist:\n- null\n- é\n"
RECORDS = ("config.yaml", "task.json", "result.json", "pretrain/summary.json")


def metrics(points=200, validations=10, reports=()):
    """Lines as two stages leave them: floats that nothing rounds, and a validation now and then."""
    lines = []
    for stage in ("pretrain", "finetune"):
        for step in range(1, points + 1):
            place = {"stage": stage, "step": step, "tokens": 1024 * step}
            lines.append({**place, "train/loss": 2 / (step + 0.7), "train/tokens_per_second": 12345.678 + step})
            if step % (points // validations) == 0:
                lines.append({**place, "val/loss": 1 / (step + 0.3), **{name: 1 / (step + 0.1) for name in reports}})
    return lines


@pytest.fixture
def write_run(tmp_path):
    def write(name, lines=None, **result):
        folder = tmp_path / "runs" / name
        write_text(folder / "config.yaml", CONFIG)
        write_json(folder / "task.json", {"name": "toy", "mean": [0.5]})
        write_json(folder / "result.json", {"schema": 1, "test": {"accuracy": 1 / 3}, **result})
        write_json(folder / "pretrain" / "summary.json", {"val": {"loss": 0.1 + 0.2}})
        lines = metrics() if lines is None else lines
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


def validations(run):
    return [line for line in read_metrics(run) if "val/loss" in line]


def test_a_run_is_read_from_its_line_as_from_its_folder(write_run, tmp_path):
    folders, study = [write_run("b"), write_run("a", seed=1)], tmp_path / "study.jsonl"
    assert pack(folders, study) == (2, [])
    assert list(read_study(study).runs) == ["a", "b"]
    for folder in folders:
        line = study / folder.name
        assert is_packed(line)
        assert not is_packed(folder)
        for name in RECORDS:
            assert exists(line / name)
            assert read(line / name) == read(folder / name)
        assert not exists(line / "mixing.json")
        with pytest.raises(FileNotFoundError):
            read(line / "mixing.json")
        assert validations(line) == validations(folder)
        assert [line["step"] for line in read_metrics(line, "val/loss")] == [*range(20, 201, 20)] * 2
    read(study / "a" / "task.json").clear()
    assert read(study / "a" / "task.json")


def test_there_and_back_changes_nothing(write_run, tmp_path):
    folders, study = [write_run("a"), write_run("b", seed=2)], tmp_path / "study.jsonl"
    pack(folders, study)
    packed = study.read_bytes()
    back = tmp_path / "back"
    assert [*unpack(study, back)] == [(back / "a", None), (back / "b", None)]
    assert sorted(path.name for path in back.iterdir()) == ["a", "b"]
    for folder in folders:
        for name in RECORDS:
            assert (back / folder.name / name).read_bytes() == (folder / name).read_bytes()
        assert validations(back / folder.name) == validations(folder)
        assert [*read_metrics(back / folder.name)] == [*read_metrics(study / folder.name)]
    for sources in (folders, [back / "a", back / "b"], [study / "a"]):
        assert pack(sources, study) == (2, [])
        assert study.read_bytes() == packed
    other = tmp_path / "other.jsonl"
    pack([back / "b", back / "a"], other)
    assert other.read_bytes() == packed


def test_training_is_thinned_and_rounded(write_run, tmp_path):
    folder, study = write_run("a"), tmp_path / "study.jsonl"
    pack([folder], study)
    kept = [line for line in read_metrics(study / "a") if line["stage"] == "finetune" and "train/loss" in line]
    steps = [line["step"] for line in kept]
    assert len(steps) == 60
    assert (steps[0], steps[-1]) == (1, 200)
    assert {after - before for before, after in pairwise(steps)} == {3, 4}
    assert all(line["train/loss"] == float(f"{2 / (line['step'] + 0.7):.4g}") for line in kept)
    assert all(line["tokens"] == 1024 * line["step"] for line in kept)
    places = [("pretrain", "finetune").index(line["stage"]) * 1000 + line["step"] for line in read_metrics(study / "a")]
    assert places == sorted(places)


def test_a_long_line_has_less_of_training_and_all_of_validation(write_run, tmp_path):
    reports = [f"backbone.layers.{layer}/codes" for layer in range(9)]
    some = write_run("some", metrics(reports=reports))
    many = write_run("many", metrics(validations=100, reports=reports))
    study = tmp_path / "study.jsonl"
    pack([some, many], study)
    lengths = {json.loads(line)["run"]: len(line) for line in study.read_bytes().splitlines(keepends=True)}
    assert lengths["some"] <= LARGEST_LINE < lengths["many"]
    for folder in (some, many):
        assert validations(study / folder.name) == validations(folder)
    counts = [sum("train/loss" in line for line in read_metrics(study / name)) for name in ("some", "many")]
    assert 4 < counts[0] < 120
    assert counts[1] == 4


def test_a_later_line_wins_and_others_stay(write_run, tmp_path):
    study = tmp_path / "study.jsonl"
    pack([write_run("a"), write_run("b")], study)
    before = study.read_bytes().splitlines()
    pack([write_run("b", seed=7)], study)
    after = study.read_bytes().splitlines()
    assert (len(after), after[0]) == (2, before[0])
    assert read(study / "b" / "result.json")["seed"] == 7
    study.write_bytes(b"\n".join([after[1], before[1]]))
    assert "seed" not in read(study / "b" / "result.json")


def test_only_finished_runs_are_packed(write_run, tmp_path):
    unfinished, damaged, study = write_run("a"), write_run("b"), tmp_path / "study.jsonl"
    (unfinished / "result.json").unlink()
    (damaged / "config.yaml").write_text("seed: ${oc.env:HOME}\n")
    lines, left_out = pack([unfinished, damaged], study)
    assert (lines, [run for run, _ in left_out]) == (0, [unfinished, damaged])
    assert "no result.json" in left_out[0][1]
    assert "config.yaml cannot be read: line 1" in left_out[1][1]
    assert not study.exists()


def test_no_folder_is_overwritten(write_run, tmp_path, victim):
    study = tmp_path / "study.jsonl"
    folder = write_run("a")
    pack([folder, write_run("b")], study)
    shutil.rmtree(tmp_path / "runs" / "b")
    (tmp_path / "runs" / "b").symlink_to(victim.parent)
    (folder / "result.json").write_text("mine")
    found = [*unpack(study, tmp_path / "runs")]
    assert [reason for _, reason in found] == ["it is there already"] * 2
    assert (folder / "result.json").read_text() == "mine"


def test_pictures_lie_beside_the_study(write_run, tmp_path):
    folder, study = write_run("a"), tmp_path / "results" / "study.jsonl"
    (folder / "mixing.png").write_bytes(b"picture")
    layer = {"block": "GAU", "mean_distance": [3.5], "window_share": [0.25], "distance_profile": [0.5, 0.5]}
    write_json(folder / "mixing.json", {"schema": 1, "window": 16, "stages": {"initial": [layer]}})
    pack([folder], study)
    assert (tmp_path / "results" / "mixing" / "a.png").read_bytes() == b"picture"
    assert read(study / "a" / "mixing.json") == {
        "schema": 1,
        "window": 16,
        "stages": {"initial": [{"mean_distance": [3.5], "window_share": [0.25]}]},
    }
    before = study.read_bytes()
    list(unpack(study, tmp_path / "back"))
    assert (tmp_path / "back" / "a" / "mixing.png").read_bytes() == b"picture"
    pack([tmp_path / "back" / "a"], study)
    assert study.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "line 2: Expecting property name"),
        (b"[" * 100_000, "line 2: it is nested too deeply"),
        (b"\xff", "line 2: 'utf-8' codec can't decode"),
        (b"[1]", "line 2: it has no name of a run"),
        (b'{"run": "../x", "config": {}, "result": {}}', "line 2: it has no name of a run"),
        (b'{"run": "x", "config": {}}', "line 2: it has no result.json"),
        (b'{"run": "x", "config": [], "result": {}}', "line 2: its config.yaml is list, not keys and values"),
        (b'{"run": "' + b"x" * (1 << 20) + b'"}', "line 2: it is larger than 1,048,576 bytes"),
    ],
)
def test_a_line_that_cannot_be_read_is_left_out_and_not_lost(write_run, tmp_path, line, reason):
    study = tmp_path / "study.jsonl"
    pack([write_run("a")], study)
    study.write_bytes(study.read_bytes() + line + b"\n")
    found = read_study(study)
    assert list(found.runs) == ["a"]
    (fault,) = found.faults
    assert fault.startswith(reason)
    before = study.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        pack([tmp_path / "runs" / "a"], study)
    assert study.read_bytes() == before


@pytest.mark.parametrize(
    "columns", [None, [], {}, {"keys": 1, "kinds": 2, "rows": 3}, {"keys": [], "kinds": [], "rows": [[0]]}]
)
def test_damaged_metrics_are_none(tmp_path, columns):
    study = tmp_path / "study.jsonl"
    study.write_text(json.dumps({"run": "x", "config": {}, "result": {}, "metrics": columns}))
    assert [*read_metrics(study / "x")] == []
    assert [*read_metrics(study / "y")] == []


@pytest.mark.parametrize("config", [{"a": "${oc.env:HOME}"}, {"${a}": 1}, {"a": [["${b}"]]}])
def test_a_configuration_is_plain_values(tmp_path, config):
    study = tmp_path / "study.jsonl"
    study.write_text(json.dumps({"run": "x", "config": config, "result": {}}))
    with pytest.raises(ValueError, match="would be computed"):
        read(study / "x" / "config.yaml")
    ((_, reason),) = unpack(study, tmp_path / "runs")
    assert "would be computed" in reason
    assert not list((tmp_path / "runs").glob("*"))


def test_studies_are_known_from_other_files(write_run, tmp_path):
    study = tmp_path / "study.jsonl"
    pack([write_run("a")], study)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "folder.jsonl").mkdir()
    assert [is_study(path) for path in sorted(tmp_path.glob("*.jsonl"))] == [False, False, True]
    assert packed_run(tmp_path, "a") == study / "a"
    assert packed_run(tmp_path, "b") is None
    assert packed_run(tmp_path / "nowhere", "a") is None
