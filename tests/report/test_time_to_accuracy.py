import csv
import io

import pytest

from seqzoo.report import build_report, compare, to_markdown
from seqzoo.report.cli import main
from seqzoo.report.time_to_accuracy import LEGEND, time_tables, times_of, to_csv, with_times


def curve(*accuracies, seconds=10.0, noted=True):
    """Validations every 1,000 tokens and so many seconds, after one of pretraining that is as good as can be."""
    validations = [
        {"stage": "finetune", "step": k, "tokens": 1000 * k, "val/accuracy": accuracy}
        | ({"training_seconds": seconds * k} if noted else {})
        for k, accuracy in enumerate(accuracies, start=1)
    ]
    pretraining = {"stage": "pretrain", "step": 9, "tokens": 9000, "val/accuracy": 1.0, "training_seconds": 1.0}
    return [pretraining, {"stage": "finetune", "step": 1, "tokens": 500, "train/loss": 1.0}, *validations]


def rows(times):
    (table,) = time_tables(times)
    return {row[:2]: row[2:] for row in table.rows}


def test_the_first_validation_that_is_as_accurate_counts(write_run, cells):
    write_run(metrics=curve(0.5, 0.56, 0.54, 0.61))
    write_run(metrics=curve(0.55, 0.55, 0.62, 0.58), seed=1)
    write_run(model="lru", metrics=curve(0.5, 0.5, 0.6))
    (table,) = time_tables(times_of(cells()))
    assert table.title == "lra_text: seconds to a validation accuracy; recipe short; bidirectional; 2 CPU cores"
    assert table.header == ("model", "training", "55 %", "60 %", "65 %")
    assert table.rows == [
        ("lru", "from scratch 5k", "30 (1 of 1)", "30 (1 of 1)", "-"),
        ("transformer", "from scratch 5k", "15 (2 of 2)", "35 (2 of 2)", "-"),
    ]


def test_the_mean_is_over_the_seeds_that_get_there(write_run, cells):
    write_run(metrics=curve(0.5, 0.56, 0.7))
    write_run(metrics=curve(0.5, 0.56, 0.57), seed=1)
    (row,) = rows(times_of(cells())).values()
    assert row == ("20 (2 of 2)", "30 (1 of 2)", "30 (1 of 2)")


def test_pretraining_takes_its_time(write_run, cells):
    speed = {"pretrain": 20.0, "finetune": 1.0}
    write_run(budgets=(2000, 5000), metrics=curve(0.7), tokens_per_second=speed)
    write_run(budgets=(0, 5000), metrics=curve(0.7))
    assert rows(times_of(cells())) == {
        ("transformer", "from scratch 5k"): ("10 (1 of 1)",) * 3,
        ("transformer", "masked 2k + 5k"): ("110 (1 of 1)",) * 3,
    }


def test_runs_that_noted_no_seconds_have_their_mean_speed(write_run, cells):
    write_run(metrics=curve(0.5, 0.7, noted=False), tokens_per_second={"pretrain": 0.0, "finetune": 50.0})
    write_run(model="lru", metrics=curve(0.7, noted=False))
    write_run(model="s4d", budgets=(2000, 5000), metrics=curve(0.7))
    assert rows(times_of(cells())) == {("transformer", "from scratch 5k"): ("40 (1 of 1)",) * 3}


def test_runs_that_shared_their_cores_are_left_out_and_counted(write_run, cells):
    shared = {"pretrain": None, "finetune": 0.89}
    write_run(metrics=curve(0.7), cpu_share={"pretrain": None, "finetune": 0.9})
    write_run(metrics=curve(0.7, seconds=99), cpu_share=shared, seed=1)
    write_run(model="lru", metrics=curve(0.7), cpu_share=shared)
    times = times_of(cells())
    assert rows(times) == {("transformer", "from scratch 5k"): ("10 (1 of 1)",) * 3}
    (table,) = time_tables(times)
    assert table.title.endswith("; 2 runs that shared their cores left out")
    assert [line["seeds_disturbed"] for line in csv.DictReader(io.StringIO(to_csv(times)))] == ["1"] * 6


def test_a_disturbed_pretraining_counts_too(write_run, cells):
    options = {"budgets": (2000, 5000), "tokens_per_second": {"pretrain": 20.0, "finetune": 1.0}}
    write_run(metrics=curve(0.7), cpu_share={"pretrain": 0.5, "finetune": 1.0}, **options)
    assert time_tables(times_of(cells())) == []


def test_recipes_hardware_and_precision_are_not_mixed(write_run, cells):
    on_a_gpu = {"model": "s4d", "hardware": "1 x GPU"}
    for change in ({}, {"recipe": "tiny"}, on_a_gpu, {"precision": "bf16"}, {"model": "lru"}):
        write_run(metrics=curve(0.7), **change)
    assert sorted(len(table.rows) for table in time_tables(times_of(cells()))) == [1, 1, 1, 2]


def test_seeds_on_two_kinds_of_hardware_are_timed_apart(write_run, cells):
    for seed, (seconds, hardware) in enumerate(((10, "2 CPU cores"), (30, "2 CPU cores"), (1, "1 x GPU"))):
        write_run(metrics=curve(0.7, seconds=seconds), seed=seed, hardware=hardware)
    shown = {table.title.split("; ")[-1]: table.rows[0][2] for table in time_tables(times_of(cells()))}
    assert shown == {"2 CPU cores": "20 (2 of 2)", "1 x GPU": "1 (1 of 1)"}


@pytest.mark.parametrize("change", [{"task": "lra_listops"}, {"tuning": "head"}, {"accuracy": 0.5}])
def test_what_has_no_time_to_show(write_run, cells, change):
    write_run(metrics=curve(0.7) if "accuracy" not in change else curve(0.3), **change)
    assert time_tables(times_of(cells())) == []


def test_the_sheet_has_full_precision(write_run, cells):
    write_run(metrics=curve(0.5, 0.6, seconds=1 / 3))
    lines = list(csv.DictReader(io.StringIO(to_csv(times_of(cells())))))
    assert [(line["accuracy"], line["seeds_that_reach_it"]) for line in lines] == [
        ("0.55", "1"),
        ("0.6", "1"),
        ("0.65", "0"),
    ]
    assert float(lines[0]["seconds"]) == pytest.approx(2 / 3, rel=1e-12)
    assert lines[2]["seconds"] == ""
    assert (lines[0]["model"], lines[0]["params"], lines[0]["precision"]) == ("transformer", "1000000", "fp32")


def test_it_follows_the_other_tables(write_run, cells):
    write_run(metrics=curve(0.7))
    found = cells()
    report = with_times(build_report(compare(found), []), times_of(found))
    assert len(report.tables) == 2
    text = to_markdown(report)
    assert "| model | training | 55 % | 60 % | 65 % |\n" in text
    assert LEGEND in text
    plain = build_report(compare(found), [])
    assert with_times(plain, []) == plain


def test_the_command_writes_it(write_run, tmp_path, capsys):
    runs = write_run(metrics=curve(0.42, 0.7)).parent
    page = tmp_path / "report.html"
    arguments = [str(runs), "--out", str(tmp_path / "out"), "--report", str(page)]
    assert main([*arguments, "--reach", "lra_text=40,70", "--reach", "lra_listops=30"]) == 0
    assert "time_to_accuracy.csv" in capsys.readouterr().out
    assert (
        "| transformer | from scratch 5k | 10 (1 of 1) | 20 (1 of 1) |" in (tmp_path / "out" / "table.md").read_text()
    )
    shown = page.read_text()
    assert 'id="time_to_accuracy"' in shown
    assert '<th scope="col">40 %</th>' in shown
    for folder in (tmp_path / "out", tmp_path / "report_files"):
        assert len((folder / "time_to_accuracy.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("given", ["lra_text", "lra_text=", "=50", "lra_text=a", "lra_text=0", "lra_text=101"])
def test_what_is_to_be_reached_is_a_percentage(tmp_path, capsys, given):
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path), "--reach", given])
    assert error.value.code == 2
    assert "valid: a task and percentages, such as lra_text=60,65" in capsys.readouterr().err
