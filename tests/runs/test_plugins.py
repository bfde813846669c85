"""Blocks, tasks, metrics and loggers of a user's own, from train.py to a test of what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from registries import forgotten_afterwards
from tiny_runs import tiny_config

import seqzoo
from seqzoo.config import ConfigError, available, compose, from_dict
from seqzoo.plugins import PluginError
from seqzoo.report.cli import main as report
from seqzoo.runs.cli import main
from seqzoo.runs.folder import run_name
from seqzoo.tasks.__main__ import main as tasks_command

PLUGIN = """
import numpy as np
import torch
from torch import nn
import seqzoo
from seqzoo.tasks import from_arrays
from seqzoo.training.loggers import Logger

ENTRIES, RESULTS, DRAWN = [], [], 0


@seqzoo.register_block("own_mean", model={"mlp_ratio": 1, "block": {"decay": 0.25}})
class Mean(seqzoo.Block):
    def __init__(self, d_model, *, causal=False, decay: float = 0.5):
        super().__init__(d_model, causal=causal)
        self.decay, self.proj = decay, nn.Linear(d_model, d_model)

    def mix(self, x, state, lengths):
        distance = (torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs()
        return self.over_time(lambda v: (self.decay**distance) @ v, self.proj(x)), None


@seqzoo.register_task("own_parity", max_length=8, num_train=64, options={"symbols": 3})
def build(config, *, data_dir, cache_dir):
    generator = np.random.default_rng(DRAWN)
    inputs = [generator.integers(0, config.options["symbols"], 8) for _ in range(config.num_train)]
    labels = [int(row[0] > 0) for row in inputs]
    return from_arrays(config.name, kind="tokens", inputs=inputs, labels=labels, val_fraction=0.25, test_fraction=0.25)


@seqzoo.register_metric("own_margin")
def margin(scores, answers):
    return scores[:, 1] - scores[:, 0]


@seqzoo.register_metric("own_recall", reduce=lambda confusion: confusion[1, 1] / confusion[1].sum())
def recall(scores, answers):
    classes = scores.shape[1]
    flat = (answers * classes + scores.argmax(1)).bincount(minlength=classes**2)
    return flat.view(classes, classes)


@seqzoo.register_logger("own_list")
class List(Logger):
    def __init__(self, folder, config, group):
        ENTRIES.append({"folder": folder.name, "seed": config["seed"]})

    def log(self, entry):
        ENTRIES.append(entry)

    def finish(self, result):
        RESULTS.append(result)
"""
ASKED = [
    *("plugins=[own_plugin]", "model=own_mean", "task=own_parity", "recipe=tiny", "logger=own_list", "device=cpu"),
    *("model.d_model=8", "model.num_layers=1", "model.block.decay=0.7", "finetuning.evaluations=1"),
    *("finetuning.tokens=600", "finetuning.epochs=null", "finetuning.batch_size=8", "finetuning.warmup_steps=0"),
]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The present folder, with a plug-in in it; afterwards nothing of it is known."""
    (tmp_path / "own_plugin.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with forgotten_afterwards():
        yield tmp_path
    sys.modules.pop("own_plugin", None)


def test_train_runs_what_a_plugin_brings(plugin, capsys):
    asked = [*ASKED, f"runs_dir={plugin}/runs"]
    assert main(asked) == 0, capsys.readouterr().err
    (folder,) = (plugin / "runs").iterdir()
    assert folder.name.startswith("own_parity-own_mean-tiny-none-s0-")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["plugins"] == ["own_plugin"]
    assert config["model"]["block"] == {"name": "own_mean", "decay": 0.7}
    assert (config["model"]["mlp_ratio"], config["task"]["options"]) == (1, {"symbols": 3})

    model = seqzoo.load(folder)
    (block,) = (each for each in model.modules() if isinstance(each, seqzoo.Block))
    assert block.options == {"d_model": 8, "causal": False, "decay": 0.7}
    result = json.loads((folder / "result.json").read_text())
    assert {"loss", "accuracy", "own_margin", "own_recall"} <= result["test"].keys()
    assert 0 <= result["test"]["own_recall"] <= 1

    entries, results = sys.modules["own_plugin"].ENTRIES, sys.modules["own_plugin"].RESULTS
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert entries == [{"folder": folder.name, "seed": 0}, *lines]
    assert results == [result]
    assert not (folder / "wandb").exists()
    assert any("val/own_recall" in line for line in lines)

    assert main([f"resume={folder}", "plugins=own_plugin"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert tasks_command(["prepare", "own_parity", "plugins=[own_plugin]", f"cache_dir={plugin}"]) == 0
    sys.modules["own_plugin"].DRAWN = 1
    assert main(asked) == 2
    assert f"{folder} was trained on other data" in capsys.readouterr().err
    sys.modules["own_plugin"].DRAWN = 0
    assert report([f"checkpoint={folder}", "plugins=[own_plugin]"]) == 0
    assert f"own_recall {result['test']['own_recall']:.4f}" in capsys.readouterr().out


def test_a_name_that_another_registered_is_refused(plugin):
    compose(["plugins=[]"])
    compose(ASKED)
    del sys.modules["own_plugin"]
    compose(ASKED)  # the same, anew
    for register in (
        seqzoo.register_metric("own_margin"),
        seqzoo.register_logger("own_list"),
        seqzoo.register_logger("wandb"),
        seqzoo.register_task("own_parity", max_length=4),
    ):
        with pytest.raises(ValueError, match="there is one; valid: another name"):
            register(print)


def test_a_configuration_never_imports(plugin):
    plain = seqzoo.config.to_dict(tiny_config(plugin)) | {"plugins": ["own_plugin"]}
    config = from_dict(plain)
    assert config.plugins == ["own_plugin"]
    assert "own_plugin" not in sys.modules
    plain["model"]["block"] = {"name": "own_mean"}
    with pytest.raises(ConfigError, match=r"no block .own_mean.; valid: .* once what registers it"):
        from_dict(plain)


def test_names_are_known_once_they_are_asked_for(plugin):
    with pytest.raises(ConfigError, match="no model 'own_mean'"):
        compose(["model=own_mean"])
    config = compose(ASKED)
    assert "own_mean" in available("model")
    assert config.model.block == {"name": "own_mean", "decay": 0.7}
    assert compose([*ASKED[:4], "task.options.symbols=5"]).task.options == {"symbols": 5}
    with pytest.raises(ConfigError, match="no option of own_mean 'decya'"):
        compose([*ASKED[:4], "model.block.decya=1"])


def test_neither_plugins_nor_loggers_name_a_run():
    config = tiny_config("runs")
    name = run_name(config)
    config.plugins, config.logger = ["own_plugin"], "none"
    assert run_name(config) == name


def test_entry_points_are_loaded_where_they_are_named(plugin, monkeypatch):
    info = plugin / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seqzoo.plugins]\nown-package = own_plugin\n")
    monkeypatch.syspath_prepend(str(plugin))
    compose(["model=lru"])
    assert "own_plugin" not in sys.modules
    compose(["plugins=[own-package]", "model=own_mean"])
    assert "own_plugin" in sys.modules


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such.plugin", "../plugin.py"])
def test_a_plugin_that_is_not_there_is_named(name, plugin, capsys):
    with pytest.raises(PluginError, match=r"no module of that name .* valid: plugins=\[my_module\]"):
        compose([f"plugins=[{name}]"])
    assert main([f"plugins=[{name}]"]) == 2
    assert capsys.readouterr().err.startswith(f"train.py: plugins={name}: ")


def test_what_a_plugin_imports_is_another_matter(plugin):
    (plugin / "own_plugin.py").write_text("import no_such_package")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        compose(["plugins=[own_plugin]"])


def test_callbacks_see_each_line_and_change_nothing(task, tmp_path):
    seen = []

    def callback(stage, step, metrics, model):
        seen.append((stage, step, *metrics))
        assert sum(parameter.numel() for parameter in model.parameters())

    config = tiny_config(tmp_path / "one", finetuning={"tokens": 600})
    result = seqzoo.run(config, task=task, callbacks=[callback])
    text = (Path(result["folder"]) / "metrics.jsonl").read_text()
    assert seen == [(line["stage"], line["step"], *[*line][2:]) for line in map(json.loads, text.splitlines())]
    config.runs_dir = str(tmp_path / "two")
    assert seqzoo.run(config, task=task)["test"] == result["test"]


def test_tensorboard_is_another_logger(task, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            Path(folder).mkdir(exist_ok=True)
            written.append(["new", Path(folder).name])

        def add_scalar(self, tag, value, step):
            written.append([tag, value, step])

        def add_text(self, tag, text):
            written.append([tag, text])

        def close(self):
            written.append(["closed"])

    config = tiny_config(tmp_path, logger="tensorboard", finetuning={"tokens": 600})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
    monkeypatch.setattr("seqzoo.training.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger=tensorboard: it is not installed; pip install tensorboard"):
        seqzoo.run(config, task=task)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr("seqzoo.training.loggers.find_spec", lambda name: name)
    folder = Path(seqzoo.run(config, task=task)["folder"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars = [[f"{line['stage']}/{key}", line[key], line["step"]] for line in lines for key in [*line][2:]]
    assert [each for each in written if len(each) == 3] == scalars
    assert written[0] == ["new", "tensorboard"]
    assert written[-2][0] == "result"
    assert written[-1] == ["closed"]
    config.logger, config.seed = "tensorbord", 1
    with pytest.raises(ConfigError, match=r"no logger 'tensorbord' \(did you mean 'tensorboard'\?\); valid: wandb, te"):
        seqzoo.run(config, task=task)
