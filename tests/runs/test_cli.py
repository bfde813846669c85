from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seqzoo.config import ConfigError, compose
from seqzoo.runs.cli import expand, main
from seqzoo.tasks import DataError
from seqzoo.training import Interrupted, TrainingError

TINY = [
    "model=transformer",
    "task=lra_text",
    "recipe=tiny",
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "finetuning.tokens=600",
    "finetuning.epochs=null",
    "finetuning.batch_size=8",
    "finetuning.evaluations=1",
    "n_val=null",
    "n_test=null",
    "device=cpu",
    "wandb.mode=disabled",
]


@pytest.fixture
def tiny(task, tmp_path, monkeypatch) -> list[str]:
    """Overrides of a run on the toy task in `tmp_path`."""
    parts = sys.modules["seqzoo.runs.parts"]
    monkeypatch.setattr(parts, "build_task", lambda config, **places: task)
    return [*TINY, f"runs_dir={tmp_path}"]


def test_a_run_ends_with_what_it_found(tiny, tmp_path, capsys):
    assert main(tiny) == 0
    said = capsys.readouterr()
    (folder,) = tmp_path.iterdir()
    assert f"run folder: {folder}" in said.out
    assert "majority class 0.5000" in said.out
    assert f"python eval_lra.py {tmp_path}" in said.out
    assert "finetune" in said.err
    assert main(tiny) == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert "is finished" in again.err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["model=transformr"], 2, "did you mean 'transformer'?"),
        (["recipe=tyni"], 2, "valid: "),
        (["task=lra_txt"], 2, "'lra_text'"),
        (["finetuning.lrr=0.1"], 2, "did you mean"),
        (["finetuning.lr=fast"], 2, "fast"),
        (["objective=next"], 2, "masked, causal"),
        (["no_equals_sign"], 2, "valid: key=value"),
        (["model=transformer,lru"], 2, "add -m"),
        (["resume=elsewhere"], 2, "not a run folder"),
        (["resume=elsewhere", "seed=1"], 2, "no other override"),
        (["-m", "seed=interval(0,1)"], 2, "no list of values"),
    ],
)
def test_mistakes_are_explained_in_a_line(arguments, status, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == status
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) <= 2
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("no reviews here"), 1),
        (TrainingError("step 3: loss is nan"), 1),
        (ConfigError("no such thing"), 2),
        (Interrupted(Path("runs/some")), 130),
    ],
)
def test_exit_status_of_a_failing_run(error, status, tiny, monkeypatch, capsys):
    def fail(config, deadline):
        raise error

    monkeypatch.setattr("seqzoo.runs.attempt.run", fail)
    assert main(tiny) == status
    said = capsys.readouterr().err
    assert ("resume=runs/some" if status == 130 else str(error)) in said


def test_unforeseen_errors_keep_their_traceback(tiny, monkeypatch):
    def fail(config, deadline):
        raise ValueError("a bug")

    monkeypatch.setattr("seqzoo.runs.attempt.run", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(tiny)


def test_sweeps_go_on_after_a_bad_cell(tiny, tmp_path, capsys):
    assert main(["-m", *tiny, "model.num_heads=2,3,4"]) == 1
    said = capsys.readouterr()
    assert said.out.count("test accuracy") == 2
    assert "2 of 3 runs finished" in said.out
    (failed,) = [line for line in said.out.splitlines() if line.startswith("failed:")]
    assert "model.num_heads=3" in failed
    assert len(list(tmp_path.glob("*/result.json"))) == 2


def test_sweeps_go_on_after_a_bug(tiny, monkeypatch, capsys):
    def fail(config, deadline):
        raise RuntimeError(f"no memory for seed {config.seed}")

    monkeypatch.setattr("seqzoo.runs.attempt.run", fail)
    assert main(["-m", *tiny, "seed=0,1"]) == 1
    said = capsys.readouterr()
    assert "no memory for seed 0" in said.err
    assert "no memory for seed 1" in said.err
    assert "0 of 2 runs finished" in said.out


def test_sweeps_expand_as_hydra_does():
    (part,) = expand(["a=1,2", "b=x", "c=range(0,4,2)", "d=choice(p,q)"])
    assert part == [[f"a={a}", "b=x", f"c={c}", f"d={d}"] for a in (1, 2) for c in (0, 2) for d in ("p", "q")]
    assert expand(["a=[1,2]", "b={x:1,y:2}", "c='1,2'"]) == [[["a=[1,2]", "b={x:1,y:2}", "c='1,2'"]]]
    assert expand([]) == [[[]]]


def test_cfg_prints_what_would_run(tmp_path, capsys):
    from omegaconf import OmegaConf

    from seqzoo.config import from_dict

    assert main(["--cfg", "model=transformer", "recipe=tiny", "seed=3"]) == 0
    printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert from_dict(printed) == compose(["model=transformer", "recipe=tiny", "seed=3"])
    assert printed["seed"] == 3


def test_help_lists_the_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for name in ("transformer", "lra_listops", "resume="):
        assert name in said


def test_the_script_itself():
    script = Path(__file__).resolve().parents[2] / "train.py"
    done = subprocess.run([sys.executable, script, "model=lstm"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no model 'lstm'" in done.stderr
    assert "Traceback" not in done.stderr
