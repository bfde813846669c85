"""Text from a run's folder, and the example that makes one."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from seqzoo.config import ConfigError, compose
from seqzoo.generate import Writer, main
from seqzoo.runs import load, run
from seqzoo.runs.folder import read_spec, read_symbols
from seqzoo.tasks.characters import ids_of

ROOT = Path(__file__).resolve().parents[1]
PATTERN = "abcde\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run that has learnt to repeat six characters."""
    place = tmp_path_factory.mktemp("generate")
    (place / "text.txt").write_text(PATTERN * 400)
    overrides = ["model=lru", "task=char_lm", "recipe=tiny", f"task.text={place / 'text.txt'}", "task.max_length=24"]
    budget = ["finetuning.tokens=20000", "finetuning.evaluations=1", "finetuning.lr=1e-2", "model.d_model=16"]
    where = [f"runs_dir={place / 'runs'}", f"cache_dir={place / 'cache'}", "wandb.mode=disabled", "device=cpu"]
    return Path(run(compose([*overrides, *budget, "model.num_layers=1", *where]))["folder"])


def test_a_folder_holds_its_alphabet(folder):
    symbols = read_symbols(folder)
    assert set(PATTERN) == set(symbols[4:])
    assert len(symbols) == read_spec(folder).vocab_size
    assert [symbols[number] for number in ids_of("cab", symbols)] == list("cab")


def test_text_is_streamed(folder, capsys):
    greedy = ["--prompt", "ab", "--tokens", "7", "--temperature", "0"]
    assert main([str(folder), *greedy]) == 0
    assert capsys.readouterr().out == "abcde\nabc\n"
    assert main([str(folder), *greedy, "--stop", "e"]) == 0
    assert capsys.readouterr().out == "abcde\n"
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(folder), "--temperature", "9", "--tokens", "40", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    model, symbols = load(folder), read_symbols(folder)
    assert not {"<mask>", "<pad>"} & set(Writer(folder).write("\n", 300, temperature=99.0, seed=0))
    (found,) = model.generate([ids_of("\n", symbols)], 40, temperature=9.0, seed=2, never=[0, 1])
    assert texts[2] == "\n" + "".join(symbols[number] for number in found) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "aé?"], r"no 'é', '\?' among the characters; valid: '.nabcde'"),
        (["--stop", "z"], "no 'z' among the characters"),
        (["--tokens", "0"], "max_new=0; valid: 1 or more"),
        (["--top-p", "2"], "top_p=2.0; valid"),
    ],
)
def test_what_cannot_be_is_said(folder, arguments, message, capsys):
    assert main([str(folder), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_older_folders_are_told_what_to_do(folder, tmp_path, capsys):
    older = Path(shutil.copytree(folder, tmp_path / folder.name))
    described = json.loads((older / "task.json").read_text())
    symbols = described.pop("symbols")
    (older / "task.json").write_text(json.dumps(described))
    assert main([str(older)]) == 2
    assert "does not say what its ids stand for, being of an earlier version" in capsys.readouterr().err
    assert list(Writer(older, data_dir=tmp_path).symbols) == symbols, "its text is where it was"
    (older / "task.json").write_text(json.dumps({**described, "symbols": symbols[1:]}))
    with pytest.raises(ConfigError, match="9 symbols for ids up to 9"):
        Writer(older)
    (older / "task.json").write_text(json.dumps({**described, "answer": "class"}))
    with pytest.raises(ConfigError, match="does not ask for the next symbol; valid: a run of task=char_lm"):
        Writer(older)


@pytest.mark.slow
def test_the_example_writes(tmp_path):
    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    command = [sys.executable, str(ROOT / "examples" / "char_lm.py"), "--tokens", "300000", "--runs-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = spent()
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert spent() - begun < 120, "seconds of processor time"
    bits, text = out.split(" bits per character of text that it has not seen\n\n")
    assert float(bits.splitlines()[-1]) < 4
    assert len(text) >= 400
    assert text.startswith("The ")
