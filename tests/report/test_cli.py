import subprocess
import sys
from pathlib import Path

import pytest

from seqzoo.report.cli import main


def test_compares_runs(write_run, tmp_path, capsys):
    for pretrain, accuracy in ((False, 0.6), (True, 0.7)):
        runs = write_run(model="linear_transformer", pretrain=pretrain, accuracy=accuracy).parent
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    out = tmp_path / "report"
    assert main([str(runs), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "table.csv", "table.md"]
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if line.lstrip().startswith("linear_transformer"))
    assert " ".join(line.split()) == "linear_transformer 1.00 60.00 (1) 70.00 (1) +10.00 (3.4 to 16.5) 65.9 [1] -"
    assert "\x1b" not in printed
    assert "…" not in printed
    assert f"{runs / 'broken'}: result.json cannot be read" in printed
    assert "broken" in (out / "table.md").read_text(encoding="utf-8")


def test_writes_beside_the_runs_unless_told(write_run):
    runs = write_run().parent
    assert main([str(runs)]) == 0
    assert (runs / "table.md").exists()
    assert main([str(runs)]) == 0


def test_writes_a_page(write_run, tmp_path, capsys):
    runs = write_run().parent
    page = tmp_path / "new" / "report.html"
    assert main([str(runs), "--report", str(page)]) == 0
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report_files"]
    assert (runs / "table.md").exists()
    assert f"{page}, and its figures to {page.parent / 'report_files'}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "report", "report.pdf"])
def test_a_page_is_a_file_of_html(write_run, tmp_path, name, capsys):
    with pytest.raises(SystemExit) as error:
        main([str(write_run().parent), "--report", str(tmp_path / name)])
    assert error.value.code == 2
    assert "valid: a file whose name ends in .html" in capsys.readouterr().err


def test_nothing_to_report(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"No finished run to report in {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["model=lru"], ["--plot", "."], ["checkpoint=nowhere"]])
def test_unusable_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: ")
    assert arguments == [] or arguments[0].removeprefix("checkpoint=") in message


def test_the_script_passes_its_exit_status_on(tmp_path):
    script = Path(__file__).resolve().parents[2] / "eval_lra.py"
    done = subprocess.run([sys.executable, script, tmp_path], cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [[], ["--out"], ["--report"]])
def test_a_checkpoint_stands_alone(tmp_path, capsys, more):
    with pytest.raises(SystemExit) as error:
        main([f"checkpoint={tmp_path}", *more, str(tmp_path)])
    assert error.value.code == 2
    assert "stands alone" in capsys.readouterr().err


def test_evaluates_a_checkpoint(tmp_path, capsys, monkeypatch):
    evaluated = []

    def evaluate_run(folder):
        evaluated.append(folder)
        return {"model": "lru", "task": "lra_text", "accuracy": 0.75, "loss": 0.5, "n_test": 400}

    monkeypatch.setattr("seqzoo.runs.evaluate_run", evaluate_run)
    assert main([f"checkpoint={tmp_path}"]) == 0
    assert evaluated == [tmp_path]
    assert dict(line.split() for line in capsys.readouterr().out.splitlines()) == {
        "model": "lru",
        "task": "lra_text",
        "accuracy": "0.7500",
        "loss": "0.5000",
        "n_test": "400",
    }


def test_a_checkpoint_that_cannot_be_evaluated(tmp_path, capsys, monkeypatch):
    def evaluate_run(folder):
        raise FileNotFoundError(f"no model.safetensors in {folder}")

    monkeypatch.setattr("seqzoo.runs.evaluate_run", evaluate_run)
    assert main([f"checkpoint={tmp_path}"]) == 1
    assert "no model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["", ".tmp"])
def test_no_link_where_a_report_is_written_is_followed(write_run, tmp_path, victim, suffix):
    runs, out = write_run().parent, tmp_path / "out"
    (out / "report_files").mkdir(parents=True)
    arguments = [str(runs), "--out", str(out), "--report", str(out / "report.html")]
    assert main(arguments) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        path.unlink()
        path.with_name(path.name + suffix).symlink_to(victim)
    assert main(arguments) == 0
    assert not [path for path in out.rglob("*") if path.is_symlink()]


def test_a_folder_of_figures_that_is_a_link_is_refused(write_run, tmp_path, victim, capsys):
    runs = write_run().parent
    (tmp_path / "report_files").symlink_to(victim.parent)
    assert main([str(runs), "--report", str(tmp_path / "report.html")]) == 1
    assert "report_files is a symbolic link" in capsys.readouterr().err


def test_a_folder_to_write_to_may_be_a_link(write_run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    assert main([str(write_run().parent), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "there" / "table.md").is_file()


@pytest.mark.parametrize("pretrain", [False, True])
def test_what_runs_say_is_shown_as_text(write_run, tmp_path, capsys, pretrain):
    escape = "\x1b[31m\x07\u202e\n"
    text = {"model": "=cmd", "task_note": "| <img>", "hardware": "@x", "recipe": "-1+1"}
    text = {key: f"{value}{escape}" for key, value in text.items()}
    first = write_run(pretrain=pretrain, **text, commit=escape, versions={escape: escape})
    runs = first.parent
    first.rename(runs / f"run{escape}")
    broken = runs / f"broken{escape}"
    broken.mkdir()
    (broken / "result.json").write_text("{")
    (runs / f"again{escape}").mkdir()
    (runs / f"again{escape}" / "result.json").write_text('{"schema": "' + "\\u001b" + '"}')
    assert main([str(runs), "--out", str(tmp_path / "out"), "--report", str(tmp_path / "out" / "page.html")]) == 0
    printed = capsys.readouterr()
    texts = [printed.out, printed.err]
    texts += [path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".md", ".csv", ".html")]
    assert len(texts) > 5
    for said in texts:
        assert not {"\x1b", "\x07", "\u202e"} & {*said}
    assert r"broken\x1b[31m\x07\u202e\n" in printed.out
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(r"'=cmd\x1b[31m")
    assert "<img>" not in (tmp_path / "out" / "table.md").read_text()


def test_what_an_evaluation_says_is_shown_as_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("seqzoo.runs.evaluate_run", lambda folder: {"model": "\x1b[31m", "accuracy": 0.5})
    assert main([f"checkpoint={tmp_path}"]) == 0
    assert r"\x1b[31m" in capsys.readouterr().out
    (tmp_path / "\x1b[31m").mkdir()
    monkeypatch.undo()
    assert main([f"checkpoint={tmp_path / chr(27)}[31m"]) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../..", "..", "a/b", ""])
def test_a_pretraining_is_named_by_a_folder_beside_the_run(write_run, capsys, name):
    runs = write_run(pretrain=True, pretrain_run=name).parent
    assert main([str(runs)]) == 1
    assert "pretrain_run is" in capsys.readouterr().out


def test_a_deep_result_costs_no_more_than_its_run(write_run, capsys):
    runs = write_run().parent
    (write_run() / "result.json").write_text("[" * 100_000)
    other = write_run(seed=1, pretrain=True)
    for name in ("mixing.json", "metrics.jsonl"):
        (other / name).write_text("[" * 100_000)
    assert main([str(runs), "--report", str(runs / "page.html")]) == 0
    assert "nested too deeply" in capsys.readouterr().out


def test_two_names_of_one_folder(write_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(metrics=[{"stage": "finetune", "step": 1, "tokens": 5000, "val/accuracy": 0.6, "training_seconds": 1.0}])
    assert main(["runs", "--out", str(tmp_path / "r_files"), "--report", "r.html"]) == 0
    assert (tmp_path / "r_files" / "time_to_accuracy.csv").is_file()


@pytest.mark.parametrize("command", ["pack runs --into file/x.jsonl", "unpack x.jsonl --into file"])
def test_a_file_where_a_folder_is_needed(write_run, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    write_run()
    assert main(["pack", "runs", "--into", "x.jsonl"]) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert "--into: file is a file; valid: a folder, which is made where there is none" in capsys.readouterr().err


def test_a_run_that_a_study_does_not_have(write_run, tmp_path, capsys):
    write_run()
    study = tmp_path / "x.jsonl"
    main(["pack", str(tmp_path / "runs"), "--into", str(study)])
    assert main([str(study / "misspelt")]) == 1
    assert f"{study} has no result.json of a run misspelt" in capsys.readouterr().out
