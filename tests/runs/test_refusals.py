"""What cannot be run is refused in one line with exit status 2, before there is a folder."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from copy import deepcopy
from functools import reduce
from operator import getitem
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import tiny_config, toy_task

from seqzoo.config import CHOICES, Config, ConfigError, compose, from_dict, to_dict
from seqzoo.runs import run
from seqzoo.runs.cli import main
from seqzoo.runs.feasible import check_stage
from seqzoo.runs.parts import model_of
from seqzoo.valid import AS_IT_STANDS, Range, hints_of, kinds_of, marks_of, range_of

TINY = [
    *("model=lru", "model.d_model=8", "model.num_layers=1", "task=lra_text", "recipe=tiny", "finetuning.tokens=600"),
    *("n_val=null", "n_test=null", "device=cpu", "wandb.mode=disabled"),
]


def declared(group: Any = Config, prefix: str = "") -> dict[str, Any]:
    """The annotation of every key of the configuration that is no group."""
    keys: dict[str, Any] = {}
    for name, hint in hints_of(group).items():
        kind = kinds_of(hint)[0]
        inside = hasattr(kind, "__dataclass_fields__")
        keys |= declared(kind, f"{prefix}{name}.") if inside else {prefix + name: hint}
    return keys


KEYS = declared()
NUMBERS = {key: valid for key, hint in KEYS.items() if (valid := range_of(hint))}


def outside(valid: Range) -> list[float]:
    """Numbers next to a range and far from it."""
    low = valid.low if valid.open_low else valid.low - 1
    high = valid.high if valid.open_high else valid.high + 1
    return [low, high, -(10**30), 10**30, math.nan, math.inf, -math.inf]


BAD = {key: [*outside(valid), "many", "[1]", "{a: 1}"] for key, valid in NUMBERS.items()}
BAD |= {key: ["nonsense", "3.5", "[1]"] for key in CHOICES}
BAD |= {key: ["maybe", "[1]", "nan"] for key, hint in KEYS.items() if kinds_of(hint) == (bool,)}
BAD |= {"size": ["params:0", "flops:nan"], "budget": ["-1s", "9"], "model.name": ["", "null", "a/b"]}
BAD |= {key: [""] for key in ("runs_dir", "data_dir", "cache_dir", "resume", "task.text")}


@pytest.fixture
def refused(tmp_path, task, monkeypatch, capsys):
    """Calls the command with overrides that it must refuse; returns what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["seqzoo.runs.parts"], "build_task", lambda config, **places: task)
    monkeypatch.setattr(sys.modules["seqzoo.runs.run"], "write_description", lambda *_: pytest.fail("it is run"))

    monkeypatch.setattr("seqzoo.runs.feasible.held_by", lambda device: 4 << 30)

    def refuse(*overrides: str) -> str:
        status = main([*TINY, *overrides])
        said = capsys.readouterr()
        assert status == 2, overrides
        assert said.out == ""
        assert len(said.err.splitlines()) == 1, said.err
        assert list(tmp_path.iterdir()) == []
        return said.err

    return refuse


def test_every_key_says_what_is_valid():
    for key, hint in KEYS.items():
        kinds = set(kinds_of(hint))
        if kinds & {int, float}:
            assert key in NUMBERS, f"{key} is a number without a range"
            assert all(map(math.isfinite, NUMBERS[key][:2])), key
        elif kinds & {str, Any} and AS_IT_STANDS not in marks_of(hint):
            closed = {
                "recipe",
                "logger",
                "task.name",
                "size",
                "budget",
                "model.position",
                "model.pooling",
                "model.head",
            }
            assert key in CHOICES or key in closed | {"model.init", "task.difficulty"}, f"{key}: is it text?"


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_out_of_range_are_refused(key, plain):
    *path, last = key.split(".")
    for value in outside(NUMBERS[key]):
        changed = deepcopy(plain)
        group = reduce(getitem, path, changed)
        group[last] = value
        with pytest.raises(ConfigError, match=last):
            from_dict(changed)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return to_dict(compose(TINY))


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_command_refuses_what_no_key_can_be(refused, data):
    key = data.draw(st.sampled_from(sorted(BAD)))
    refused(f"{key}={data.draw(st.sampled_from(BAD[key]))}")


@pytest.mark.slow
@pytest.mark.parametrize("key", BAD)
def test_the_command_refuses_all_that_no_key_can_be(refused, key):
    for value in BAD[key]:
        refused(f"{key}={value}")


@given(
    key=st.sampled_from(sorted({*KEYS, "", "model", "hydra.run.dir", "model.block.state_dim"} - {"plugins"})),
    text=st.text(),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_makes_a_configuration_or_a_sentence(key, text):
    with suppress(ConfigError):
        compose([*TINY, f"{key}={text}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.mlp_ratio=1e-9", "valid: 0, or a width of 1 or more"),
        ("model.layers=[]", "valid: null, or a block for each layer"),
        ("model.layers=[3]", "no block {'name': 3}; valid: a block's name"),
        ("model.layers=[null]", "no block {'name': None}"),
        ("model.layers=[[lru]]", "no block {'name': ['lru']}"),
        ("model.layers=[{1:2,name:lru}]", "no option of lru '1'; valid: state_dim"),
        ("model.layers=[{name:lru,d_model:4}]", "no option of lru 'd_model'"),
        ("model.block.name=null", "no block {'name': None"),
        ("model=transformer model.num_heads=null", "num_heads=None: valid: int"),
        ("model.block.state_dim=0", "state_dim=0: valid: 1 or more"),
        ("model.block.state_dim=1000000000000", "state_dim=1000000000000: valid: 1 or more and up to 1,048,576"),
        ("model.block.state_dim=wide", "state_dim='wide': valid: int or null"),
        ("model.block.dropout=1", "dropout=1: valid: 0 or more and below 1"),
        ("model=vq_transformer model.block.commitment=nan", "commitment=nan: valid: 0 or more"),
        ("model=vq_transformer model.block.expand=1e-9", "does not divide d_model=0"),
        ("model.pooling=sum", "valid: mean, max, last, first"),
        ("model.d_model=65536 model.num_layers=20", "GB of parameters, gradients and moments"),
        ("model.d_model=1024 finetuning.batch_size=65536", "finetuning.batch_size=65536: 6 GB at least, of 4 GB here"),
        ("finetuning.tokens=null finetuning.epochs=1e-12", "valid: 1 token or more"),
        ("finetuning.tokens=0", "finetuning.tokens=0: valid: null, or above 0"),
        ("pretraining.tokens=0", "pretraining.tokens=0: valid: null, or above 0"),
        ("finetuning.tokens=null finetuning.epochs=0", "finetuning.epochs=0: valid: null, or above 0"),
        ("pretrain=true share=1e-8", "tokens a stage gets none"),
        ("pretrain=true pixel_loss=l1", "toy has no pixels; valid: cross_entropy"),
        ("pretrain=yes", "yes: no such folder; valid: true, false, or the folder of a run"),
        ("size=flops:0.5", "at its smallest width, 8"),
        ("task.num_train=10000000 task.max_length=1000000", "positions together"),
        ("hydra.run.dir=x", "no key 'hydra.run.dir'"),
        ("hydra.searchpath=[x]", "no key 'hydra.searchpath'"),
        ("model@x=lru", "no key 'model@x'"),
        ("+recipe=small", "no key can be added or taken away; valid: recipe=small"),
        ("~model", "valid: key=value"),
        ("=1", "valid: key=value"),
        ("seed=glob(*)", "has no list of values to sweep over"),
        ("seed=\uff11", "cannot be read; valid: key=value, the value in quotes"),
        ("seed=\u202e1", r"seed=\u202e1 cannot be read"),
        ("seed=[[", "cannot be read"),
        (f"seed={'9' * 5000}", "cannot be read"),
        (f"{'a' * 3000}=1", "no key 'aaa"),
        ("launcher=foo", "no launcher 'foo'; valid: here, local, slurm"),
        ("study=size", "add -m"),
        ("cache_dir=''", "cache_dir='': valid: a path"),
        ("runs_dir=/dev/null", "Not a directory; valid: runs_dir="),
        (f"runs_dir={'x' * 300}", "File name too long"),
    ],
)
def test_what_cannot_be_run_is_said_before_there_is_a_folder(refused, overrides, message):
    assert message in refused(*overrides.split())


def test_a_stage_is_shared_equally_by_processes(task):
    config = tiny_config("runs")
    model = model_of(config, task.spec, "classify")
    two = Mock(world_size=2, global_rank=0, device=torch.device("cpu"))
    check_stage("finetuning", config.finetuning, model, task.train, two)
    config.finetuning.batch_size = 7
    with pytest.raises(ConfigError, match=r"finetuning.batch_size=7: valid: a multiple of the 2 processes"):
        check_stage("finetuning", config.finetuning, model, task.train, two)


def test_a_warmup_that_never_ends_is_said(tmp_path, capsys):
    run(tiny_config(tmp_path, finetuning={"tokens": 200, "warmup_steps": 1000}), task=toy_task(60))
    assert "1,000 steps of warmup in 3: the learning rate never reaches 0.005" in capsys.readouterr().err
