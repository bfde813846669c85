"""What reads files that are damaged, in ways drawn from seeds: a value, or a sentence that names the file, and nothing
else. Every corpus is `CASES` seeds from its first on; a few of each are tried on every change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage
from tiny_runs import tiny_config

from seqzoo.analysis.run import analyse_run
from seqzoo.failures import told
from seqzoo.files import to_json, write_bytes, write_json
from seqzoo.report.cli import main as report
from seqzoo.runs import evaluate_run, load, run
from seqzoo.runs.folder import read_config, reusable_pretraining
from seqzoo.tasks import TaskConfig, build_task, lra_text
from seqzoo.training.checkpoint import load_checkpoint, load_weights

CASES, FEW = 2000, 15
FIRST = {"configuration": 10_000, "checkpoint": 20_000, "run folder": 30_000, "data": 40_000}  # seeds
SHORT = {"tokens": 240, "evaluations": 1}
ALL = pytest.param(CASES, id="all", marks=pytest.mark.slow)
EVERY = [pytest.param(FEW, id="few"), ALL]


def said(reading: Callable[[], Any]) -> str | None:
    """What a reader refuses in words; None: it took what is there. Anything else is a bug."""
    try:
        reading()
    except Exception as error:
        found = told(error)
        if found is None:
            raise
        return found.message
    return None


def outcomes(corpus: str, cases: int, trial: Callable[[int], str | None]) -> list[str | None]:
    """What is said in each case; a bug is told with the seed that shows it."""
    found = []
    for seed in range(FIRST[corpus], FIRST[corpus] + cases):
        try:
            found.append(trial(seed))
        except Exception as error:
            error.add_note(f"seed {seed} of the {corpus} corpus")
            raise
    assert sum(message is not None for message in found) > 0
    return found


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory) -> Path:
    """A run with both stages, a search and an analysis."""
    config = tiny_config(tmp_path_factory.mktemp("runs"), pretrain=True, pretraining=SHORT, finetuning=SHORT)
    folder = Path(run(replace(config, lr="search"), task=task)["folder"])
    write_bytes(folder / "mixing.json", to_json(analyse_run(folder, n=2, task=task).to_json()))
    return folder


@pytest.mark.parametrize("cases", EVERY)
def test_configurations(cases, finished, tmp_path):
    content = (finished / "config.yaml").read_bytes()
    path = tmp_path / "config.yaml"

    def trial(seed: int) -> str | None:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(content)
        damage(path, seed)
        message = said(lambda: read_config(tmp_path))
        assert message is None or str(tmp_path) in message
        return message

    outcomes("configuration", cases, trial)


@pytest.mark.parametrize("cases", EVERY)
def test_checkpoints(cases, finished, tmp_path):
    """No damage is ever taken for weights."""
    content, expected = (finished / "finetune" / "last.safetensors").read_bytes(), None
    path = tmp_path / "finetune" / "last.safetensors"
    expected = load_checkpoint(finished / "finetune" / "last.safetensors")
    assert expected is not None

    def trial(seed: int) -> str | None:
        shutil.rmtree(path.parent, ignore_errors=True)
        write_bytes(path, content)
        damage(path, seed)

        def reading() -> None:
            kept = load_checkpoint(path)
            assert kept is None or all(torch.equal(kept.weights[key], value) for key, value in expected.weights.items())
            assert kept is None or kept.state == expected.state
            if kept is not None:
                assert load_weights(path).keys()

        message = said(reading)
        assert message is None or str(path) in message
        return message

    outcomes("checkpoint", cases, trial)


@pytest.mark.parametrize("cases", [pytest.param(4, id="few"), ALL])
def test_run_folders(cases, finished, task, tmp_path, capsys):
    """One file is damaged, in a run that is finished or, in two of five, not: it is tested, reused, continued and
    analysed, and the report of it and another run is written whatever it holds."""
    config, runs = tiny_config(tmp_path, pretrain=True, pretraining=SHORT, finetuning=SHORT), tmp_path / "runs"
    names = [path.relative_to(finished).as_posix() for path in sorted(finished.rglob("*")) if path.is_file()]
    sound = tmp_path / "of another seed"
    shutil.copytree(finished, sound)
    write_json(sound / "result.json", {**json.loads((sound / "result.json").read_text()), "seed": 1})
    searched = [name for name in names if "search" in name]
    records = [name for name in names if name not in searched and not name.endswith(".safetensors")]
    names = [name for name in names if name not in searched] + searched[:3] + 2 * records

    def trial(seed: int) -> str | None:
        shutil.rmtree(runs, ignore_errors=True)
        folder, name = runs / finished.name, names[seed % len(names)]
        shutil.copytree(finished, folder)
        shutil.copytree(sound, runs / sound.name)
        if seed % 5 < 2 and name != "result.json":
            (folder / "result.json").unlink()
        damage(folder / name, seed)
        assert report([str(runs)]) == 0
        messages = [said(partial(load, folder, stage)) for stage in ("initial", "pretrain", "finetune")]
        messages.append(said(lambda: evaluate_run(folder, task=task)))
        messages.append(said(lambda: reusable_pretraining(replace(config, pretrain=str(folder)), task)))
        if seed % 7 == 0:
            messages.append(said(lambda: report([str(runs), "--report", str(tmp_path / "page.html")])))
            messages.append(said(lambda: analyse_run(folder, n=2, task=task)))
        if seed % 3 == 0:
            messages.append(said(lambda: run(replace(config, resume=str(folder)), task=task)))
        capsys.readouterr()
        assert all(message is None or str(folder) in message for message in messages)
        return next((message for message in messages if message is not None), None)

    outcomes("run folder", cases, trial)


@pytest.mark.parametrize("cases", EVERY)
def test_data(cases, tmp_path, monkeypatch):
    """Published files, and what was prepared of them: either is read as it was, or refused, or prepared anew."""
    monkeypatch.setattr(lra_text, "REVIEWS_PER_FOLDER", 4)
    data, cache = tmp_path / "data", tmp_path / "cache"
    config = TaskConfig(
        name="lra_text", max_length=32, mask_ratio=0.15, val_fraction=0.25, split_seed=1, min_frequency=1
    )

    def published() -> None:
        for split in ("train", "test"):
            for kind in ("neg", "pos"):
                for number in range(4):
                    path = data / "aclImdb" / split / kind / f"{number}_{7 if kind == 'pos' else 3}.txt"
                    write_bytes(path, f"{kind} film {number}".encode())

    def build() -> Any:
        return build_task(config, data_dir=data, cache_dir=cache)

    published()
    expected = build()
    (entry,) = cache.glob("lra_text-*")
    prepared = tmp_path / "prepared"
    shutil.copytree(entry, prepared)
    reviews = sorted(path.relative_to(data) for path in data.rglob("*.txt"))
    files = sorted(path.name for path in entry.iterdir())

    def trial(seed: int) -> str | None:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)
        if seed % 2:
            shutil.rmtree(data)
            published()
            damage(data / reviews[seed % len(reviews)], seed)
            message = said(build)
            assert message is None or str(data) in message
            return message
        shutil.copytree(prepared, entry)
        damage(entry / files[seed % len(files)], seed)
        shutil.rmtree(data)
        published()
        task = build()
        for split in ("train", "val", "test"):
            assert torch.equal(getattr(task, split).values, getattr(expected, split).values)
        return None

    outcomes("data", cases, trial)
