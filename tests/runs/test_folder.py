"""A run folder from somebody else: its links are not followed, and its files are read as data."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from seqzoo.config import ConfigError
from seqzoo.files import LinkError
from seqzoo.runs import evaluate_run, load, run
from seqzoo.runs.attempt import FAILED, attempt
from seqzoo.runs.folder import FOLDERS, read_config, read_spec, run_name
from seqzoo.tasks import TaskConfig
from seqzoo.training import TrainingError

WRITTEN = ("lock", "config.yaml", "task.json", "metrics.jsonl", "result.json")
WEIGHTS = [f"{stage}/{name}" for stage in ("pretrain", "finetune") for name in ("best.safetensors", "last.safetensors")]
TRIALS = ["finetune/search/lr-0.0001/summary.json", "finetune/search/lr-0.0001/last.safetensors"]
FILES = [*WRITTEN, *WEIGHTS, "pretrain/key", "pretrain/summary.json", *TRIALS]


@pytest.fixture(scope="module")
def stopped(task, tmp_path_factory):
    """A run with both stages and a search, as it is when only its result is missing."""
    short = {"tokens": 240, "evaluations": 1}
    config = tiny_config(tmp_path_factory.mktemp("runs"), pretrain=True, pretraining=short, finetuning=short)
    folder = Path(run(replace(config, lr="search"), task=task)["folder"])
    (folder / "result.json").unlink()
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "runs" / stopped.name))


def resumed(folder, task):
    return run(replace(tiny_config(folder.parent), resume=str(folder)), task=task)


def test_every_file_of_a_run_is_tried(stopped):
    made = {path.relative_to(stopped).as_posix() for path in stopped.rglob("*") if path.is_file()}
    trials = {name for name in made if "search/" in name}
    assert made - trials == {*FILES} - {*TRIALS, "result.json"}
    assert {*TRIALS} <= trials


@pytest.mark.parametrize("name", FILES)
def test_no_link_in_a_run_folder_is_followed(folder, victim, task, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    try:
        resumed(folder, task)
    except (LinkError, ConfigError, TrainingError) as refused:
        assert name in str(refused)  # noqa: PT017  the others go on, with a file of their own


def test_no_link_under_a_temporary_name_is_followed(folder, victim, task):
    for name in FILES:
        (folder / f"{name}.tmp").symlink_to(victim)
    for name in ("pretrain/summary.json", "finetune/search/lr-0.0001/summary.json"):  # so that they are written again
        (folder / name).unlink()
    assert resumed(folder, task)["folder"] == str(folder)


@pytest.mark.parametrize("name", [*FOLDERS, "finetune/search", "finetune/search/lr-0.0001"])
@pytest.mark.parametrize("there", [True, False])
def test_no_folder_in_a_run_folder_that_is_a_link_is_entered(folder, victim, task, name, there):
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).symlink_to(victim.parent if there else victim.parent / "not-there")
    with pytest.raises(LinkError, match=f"{name} is a symbolic link: .* valid: "):
        resumed(folder, task)


def test_what_the_user_names_may_be_a_link(folder, task, tmp_path):
    (tmp_path / "named").symlink_to(folder)
    assert resumed(tmp_path / "named", task)["folder"] == str(tmp_path / "named")
    assert (folder / "result.json").is_file()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    config = tiny_config(tmp_path / "link", finetuning={"tokens": 240, "evaluations": 1})
    run(config, task=task)
    (made,) = (tmp_path / "other").iterdir()
    made.rename(tmp_path / "moved")
    made.symlink_to(tmp_path / "moved")
    with pytest.raises(LinkError):  # a name that the run gives itself
        run(config, task=task)


def test_a_link_is_one_line_and_an_exit_status(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise LinkError(Path("runs/\x1b[31m/lock"))

    monkeypatch.setattr("seqzoo.runs.attempt.run", refuse)
    assert attempt(["model=lru"]) == FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert r"runs/\x1b[31m/lock is a symbolic link" in said


def test_all_files_of_a_run_can_be_read_by_whom_the_umask_lets(stopped):
    assert {path.stat().st_mode & 0o777 for path in stopped.rglob("*") if path.is_file()} == {0o644}


@pytest.mark.parametrize("escaped", ["${oc.env:SECRET}", "${oc.env:SECRET,x}", r'"\x24{oc.env:SECRET}"', "${recipe}"])
def test_no_interpolation_is_resolved(folder, task, monkeypatch, escaped):
    monkeypatch.setenv("SECRET", "s3cr3t")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("recipe: tiny", f"recipe: {escaped}"))
    with pytest.raises(ConfigError, match=r"config.yaml: line \d+: \$\{.* would be computed; valid: plain values"):
        resumed(folder, task)
    for file in folder.rglob("*"):
        assert file.is_dir() or b"s3cr3t" not in file.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x]\nb: *a\n", "stands for what is written elsewhere"),
        ("a: !!python/object/apply:os.getcwd []\n", "python/object"),
        ("recipe: !!str tiny\n", "would be made into something else"),
        ("a: " + "[" * 10_000, "nested too deeply"),
        ("a: x\n" * 100_000, "larger than"),
        ("a: [", "no YAML"),
        ("a: \0", "no YAML"),
        ("- a\n", "config.yaml"),
        ("nonsense", "config.yaml"),
        ("", "config.yaml"),
    ],
)
def test_a_configuration_that_is_more_than_data_is_refused(folder, text, message):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(folder)


def test_what_was_written_is_read_again(tmp_path, stopped):
    written = read_config(stopped)
    assert written.recipe == "tiny"
    assert written.finetuning.lr == 5e-3
    assert run_name(written) == run_name(replace(written, runs_dir=str(tmp_path)))


@pytest.mark.parametrize("key", ["vocab_size", "max_length", "num_classes"])
@pytest.mark.parametrize("value", [0, -1, 10**12, "many"])
def test_a_task_of_impossible_size_is_refused(folder, key, value):
    path = folder / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ConfigError, match=f"task.json(: {key}=| is damaged: {key} is )"):
        read_spec(folder)


@pytest.mark.parametrize("key", ["num_layers", "d_model"])
def test_a_model_of_impossible_size_is_refused(folder, key):
    path = folder / "config.yaml"
    path.write_text(re.sub(rf"{key}: \d+", f"{key}: 100000000", path.read_text()))
    with pytest.raises(ConfigError, match=f"model.{key}=100000000: valid"):
        read_config(folder)


def test_layers_without_end_are_refused(folder):
    path = folder / "config.yaml"
    path.write_text(re.sub("layers: null", f"layers: [{', '.join(['lru'] * 1001)}]", path.read_text()))
    with pytest.raises(ConfigError, match=r"model\.layers=1,001 layers: valid"):
        read_config(folder)


@pytest.mark.parametrize(("key", "value"), [("mlp_ratio", 9999), ("d_model", 65536)])
def test_no_memory_is_taken_for_a_model_that_its_weights_do_not_fit(folder, task, key, value):
    path = folder / "config.yaml"
    path.write_text(re.sub(rf"{key}: [0-9.]+", f"{key}: {value}", path.read_text()))
    with pytest.raises((TrainingError, ConfigError), match=r"do not fit|GB of"):
        load(folder)
    with pytest.raises((TrainingError, ConfigError), match=r"not fit|GB of"):
        resumed(folder, task)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\udcff", " " * (1 << 24) + "{}"])
def test_json_that_cannot_be_read_is_named(folder, content):
    (folder / "task.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"task\.json"):
        read_spec(folder)


@pytest.mark.parametrize("name", ["../../..", "..", ".", "", "a/b", "/", 3])
def test_a_pretraining_is_looked_for_beside_the_run_and_nowhere_else(folder, name):
    (folder / "result.json").write_text(json.dumps({"pretrain_run": name}))
    with pytest.raises(ConfigError, match=r"result.json: pretrain_run=.* valid: the name of a folder beside it"):
        load(folder, "pretrain")


@pytest.mark.parametrize("name", ["of nobody", "\x1b[31m"])
def test_a_pretraining_that_is_not_there_is_told_of_the_run(folder, name):
    (folder / "result.json").write_text(json.dumps({"pretrain_run": name}))
    with pytest.raises(ConfigError, match="which it was fine-tuned from, is not there") as error:
        load(folder, "pretrain")
    assert str(error.value).startswith(f"{folder}: ")
    assert error.value.args[0].isprintable()


@pytest.mark.parametrize("relative", [True, False])
def test_an_evaluation_writes_nothing_where_a_folder_says(tmp_path, monkeypatch, relative):
    """Prepared data are taken from there, and made anew in the user's own cache folder where there are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    listops = TaskConfig(
        name="lra_listops",
        max_length=32,
        mask_ratio=0.15,
        **{"num_train": 40, "num_val": 10, "num_test": 10, "generator_seed": 0},
        **{"min_length": 4, "length_bound": 32, "max_args": 3, "max_depth": 3},
    )
    theirs = Path("theirs") if relative else tmp_path / "theirs"
    config = tiny_config("runs", finetuning={"tokens": 240, "evaluations": 1})
    result = run(replace(config, task=listops, cache_dir=str(theirs)))
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*")}
    assert evaluate_run(result["folder"])["accuracy"] == result["test"]["accuracy"]
    assert {path: path.stat().st_mtime_ns for path in theirs.rglob("*")} == before
    assert not (tmp_path / "own").exists()
    shutil.rmtree(theirs)
    assert evaluate_run(result["folder"])["accuracy"] == result["test"]["accuracy"]
    assert not theirs.exists()
    assert [*(tmp_path / "own").rglob("manifest.json")]
