"""Keys that are text are taken as they stand, from the command line to the folder and back."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.config import ConfigError, compose, parse_text
from seqzoo.report.cli import main as report
from seqzoo.runs.campaign import expand, single
from seqzoo.runs.cli import main
from seqzoo.runs.folder import read_config, write_description
from seqzoo.training import Interrupted

TEXTS = [
    *("2024_11_28", "1.10", "1e5", "007", "é", "a~", "~", "#x", "a=b", "a,b", "a b", "yes", "{a: b}", "[", "(", "it's"),
    "\\",
]
TINY = ["model=lru", "task=lra_text", "recipe=tiny", "wandb.mode=disabled", "device=cpu"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_is_not_read_by_a_grammar(text):
    if text.lower() != "null" and "${" not in text and not (text[:1] in "'\"" and text[-1:] == text[:1]):
        assert parse_text("runs_dir", text) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_reaches_the_folder_and_comes_back(text, task, tmp_path):
    config = compose([*TINY, f"wandb.project={text}", f"task.text={text}x"])
    assert (config.wandb.project, config.task.text) == (text, f"{text}x")
    write_description(tmp_path, config, task)
    assert read_config(tmp_path) == config


def test_what_has_a_meaning_in_a_text():
    assert parse_text("data_dir", "null") is None
    assert parse_text("data_dir", "'null'") == "null"
    assert (parse_text("pretrain", "true"), parse_text("pretrain", "False")) == (True, False)
    assert parse_text("runs_dir", "true") == "true"
    assert parse_text("runs_dir", '"a b ü"') == parse_text("runs_dir", "'a b ü'") == "a b ü"
    for text, message in (("${seed}", "an interpolation"), ("\udce9", r"\\udce9: valid: UTF-8")):
        with pytest.raises(ConfigError, match=message):
            parse_text("runs_dir", text)


def test_a_tilde_is_the_home_folder_as_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose([*TINY, "runs_dir=~/runs", "data_dir=~", "cache_dir=~nobody_of_that_name/x"])
    assert (config.runs_dir, config.data_dir) == (f"{tmp_path}/runs", str(tmp_path))
    assert config.cache_dir == "~nobody_of_that_name/x"


def test_a_comma_makes_a_sweep_of_texts_with_m_only():
    assert single(["runs_dir=a,b"]) == ["runs_dir=a,b"]
    (swept,) = expand(["runs_dir=1.10, é#", "seed=0,1"])
    assert swept == [[f"runs_dir={folder}", f"seed={seed}"] for folder in ("1.10", "é#") for seed in (0, 1)]
    assert expand(["runs_dir='a,b'"]) == [[["runs_dir='a,b'"]]]
    assert expand(["pretrain=choice(false,true)"]) == [[["pretrain=false"], ["pretrain=true"]]]
    assert expand(["runs_dir=choice(2024_11_28, 1.10)"]) == [[["runs_dir=2024_11_28"], ["runs_dir=1.10"]]]


@pytest.mark.parametrize("name", ["2024_11_28", "é~#=,() x", "it's"])
def test_the_path_that_is_printed_can_be_resumed_and_evaluated(name, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = replace(task, spec=replace(task.spec, name="lra_text"))
    for module in ("parts", "finished"):
        monkeypatch.setattr(sys.modules[f"seqzoo.runs.{module}"], "build_task", lambda *_, **__: task, raising=False)
    sizes = ["model.d_model=8", "model.num_layers=1", "finetuning.tokens=600", "n_val=null", "n_test=null"]
    assert main([*TINY, *sizes, f"runs_dir={name}"]) == 0
    (folder,) = Path(name).iterdir()
    compared = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(compared)[-1] == name
    resume = next(word for word in shlex.split(str(Interrupted(folder))) if word.startswith("resume="))
    (folder / "result.json").unlink()
    assert main([resume]) == 0
    assert (folder / "result.json").exists()
    capsys.readouterr()
    assert report([f"checkpoint={folder}"]) == 0
    assert str(folder) in capsys.readouterr().out
