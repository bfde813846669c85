import json

import pytest

from seqzoo.report import compare, studies
from seqzoo.report.gains import gain_over_budget, scratch_against_pretrained
from seqzoo.report.locality import distances


def lines(chart):
    """{label: [(x, y)]} of a chart of one panel."""
    (panel,) = chart.panels
    return {
        series.label: [(point.x, pytest.approx(point.y, rel=1e-9)) for point in series.points]
        for series in panel.series
    }


def test_bars_of_all_three_cells(write_run, cells):
    write_run(budgets=(2000, 5000), accuracy=0.7)
    write_run(budgets=(0, 5000), accuracy=0.6)
    write_run(budgets=(0, 7000), accuracy=0.65)
    chart = scratch_against_pretrained(compare(cells()))
    assert lines(chart) == {
        "from scratch": [("transformer", 60)],
        "from scratch, same total": [("transformer", 65)],
        "self-pretrained": [("transformer", 70)],
    }
    assert chart.panels[0].title.endswith("masked pretraining 2k + 5k tokens")


def test_the_budget_at_which_pretraining_begins_to_help(write_run, cells):
    for total, scratch, pretrained in ((2000, 0.6, 0.55), (4000, 0.6, 0.61), (8000, 0.6, 0.8)):
        write_run(budgets=(total // 2, total // 2), accuracy=pretrained)
        write_run(budgets=(0, total), accuracy=scratch)
    write_run(budgets=(2000, 6000), accuracy=0.5)  # another share, at one budget only
    chart = gain_over_budget(compare(cells()))
    assert lines(chart) == {"transformer, short, 50% masked pretraining": [(0.002, -5), (0.004, 1), (0.008, 20)]}
    (finding,) = chart.findings
    assert "the first gain whose interval leaves out zero is at 0.008 million tokens (+20.00 points, " in finding
    assert finding.endswith("over test examples alone, nothing said of other seeds).")


def test_precisions_have_lines_of_their_own(write_run, cells):
    for precision, accuracy in (("fp32", 0.7), ("bf16", 0.8)):
        for half in (2000, 4000):
            write_run(budgets=(half, half), accuracy=accuracy, precision=precision)
            write_run(budgets=(0, 2 * half), accuracy=0.6, precision=precision)
    assert lines(gain_over_budget(compare(cells()))) == {
        "transformer, short, 50% masked pretraining": [(0.004, 10), (0.008, 10)],
        "transformer, short, bf16, 50% masked pretraining": [(0.004, 20), (0.008, 20)],
    }


def test_a_gain_within_its_interval(write_run, cells):
    for half, pretrained in ((2000, 0.61), (4000, 0.6)):
        write_run(budgets=(half, half), accuracy=pretrained)
        write_run(budgets=(0, 2 * half), accuracy=0.6)
    (finding,) = gain_over_budget(compare(cells())).findings
    assert "no interval of a gain leaves out zero at any budget measured; the largest is +1.00 points" in finding


def test_share_of_pretraining(write_run, cells):
    for pretraining, accuracy in ((0, 0.6), (2000, 0.7), (4000, 0.65)):
        write_run(budgets=(pretraining, 8000 - pretraining), accuracy=accuracy)
    write_run(budgets=(1000, 1000))  # another total
    assert lines(studies.share_of_pretraining(cells())) == {
        "transformer, masked, 8k tokens": [(0, 60), (25, 70), (50, 65)]
    }


def test_one_share_is_no_study(write_run, cells):
    write_run(budgets=(2000, 6000))
    write_run(budgets=(0, 8000))
    assert studies.share_of_pretraining(cells()) is None


def test_data_scale(write_run, cells):
    for fraction, accuracy in ((0.01, 0.5), (0.1, 0.6), (1.0, 0.7)):
        write_run(train_fraction=fraction, accuracy=accuracy)
        write_run(train_fraction=fraction, accuracy=accuracy + 0.1, pretrain=True)
    write_run(train_fraction=0.1, tuning="head")
    chart = studies.data_scale(cells())
    assert chart.panels[0].log_x
    assert lines(chart) == {
        "transformer, from scratch 5k": [(1, 50), (10, 60), (100, 70)],
        "transformer, masked 2k + 5k": [(1, 60), (10, 70), (100, 80)],
    }


def test_data_scale_in_epochs_is_one_line_though_tokens_differ(write_run, cells):
    for fraction in (0.1, 1.0):
        tokens = int(50_000 * fraction)
        write_run(train_fraction=fraction, budgets=(0, tokens), epochs={"pretrain": None, "finetune": 20})
        write_run(train_fraction=fraction, budgets=(tokens, tokens), epochs={"pretrain": 0.5, "finetune": 20})
    assert lines(studies.data_scale(cells())) == {
        "transformer, from scratch 20 epochs": [(10, 60), (100, 60)],
        "transformer, masked 0.5 + 20 epochs": [(10, 60), (100, 60)],
    }


def test_a_line_never_mixes_settings(write_run, cells):
    for fraction, tokens, epochs in ((0.1, 5000, 10), (1.0, 50_000, 12), (1.0, 60_000, None)):
        write_run(train_fraction=fraction, budgets=(0, tokens), epochs={"finetune": epochs})
    assert studies.data_scale(cells()) is None


def test_model_size(write_run, cells):
    for params, accuracy in ((100_000, 0.6), (1_000_000, 0.7)):
        write_run(params=params, accuracy=accuracy)
    write_run(model="lru")
    assert lines(studies.model_size(cells())) == {"transformer, from scratch 5k": [(100_000, 60), (1_000_000, 70)]}


def test_speed_has_a_panel_for_each_hardware(write_run, cells):
    for hardware, speed in (("2 CPU cores", 1000.0), ("1 x GPU", 9000.0)):
        write_run(model=f"on {hardware}", hardware=hardware, tokens_per_second={"pretrain": 0.0, "finetune": speed})
    write_run(model="not measured")
    panels = studies.speed(cells()).panels
    assert {panel.title.splitlines()[-1]: [point.x for point in panel.series[0].points] for panel in panels} == {
        "2 CPU cores": [1000],
        "1 x GPU": [9000],
    }


def test_speed_is_that_of_runs_with_the_cores_to_themselves(write_run, cells):
    def at(speed, share, **more):
        speeds = {"pretrain": 0.0, "finetune": speed}
        write_run(tokens_per_second=speeds, cpu_share={"pretrain": None, "finetune": share}, **more)

    at(1000.0, 0.95, accuracy=0.6)
    at(500.0, 0.5, accuracy=0.7, seed=1)
    at(400.0, 0.4, model="lru")
    chart = studies.speed(cells())
    assert lines(chart) == {"transformer, from scratch": [(1000, 65)]}
    assert "2 runs that shared their cores left out." in chart.caption
    at(900.0, None, model="s4d")
    assert len(studies.speed(cells()).panels[0].series) == 2, "where nobody counted, it is taken as it is"


def test_objectives(write_run, cells):
    write_run(pretrain=True, accuracy=0.7)
    write_run(accuracy=0.6)
    write_run(pretrain=True, objective="causal", causal=True, accuracy=0.8)
    write_run(model="lru", pretrain=True)  # of one objective only
    chart = studies.objectives(cells())
    assert lines(chart) == {
        "bidirectional, from scratch 5k": [("transformer", 60)],
        "bidirectional, masked 2k + 5k": [("transformer", 70)],
        "causal, causal 2k + 5k": [("transformer", 80)],
    }
    assert "bidirectional" not in chart.panels[0].title


def test_tunings_show_what_moved(write_run, cells):
    write_run(pretrain=True, accuracy=0.7)
    write_run(pretrain=True, accuracy=0.6, tuning="head", trained_params=130)
    write_run(accuracy=0.5)  # no other tuning from scratch
    chart = studies.tunings(cells())
    assert lines(chart) == {"transformer, masked 2k + 5k": [("full", 70), ("head", 60)]}
    assert [point.note for point in chart.panels[0].series[0].points] == ["1M", "130"]


def test_inits(write_run, cells):
    write_run(model="lru", accuracy=0.7)
    write_run(model="lru", accuracy=0.6, init="random")
    assert lines(studies.inits(cells())) == {"from scratch 5k": [("lru, structured", 70), ("lru, random", 60)]}


def test_distances_of_the_seeds_that_were_analysed(write_run, cells):
    def mixing(folder, *distances):
        blocks = [{"mean_distance": [distance, distance + 2], "window_share": [0.5]} for distance in distances]
        stages = dict.fromkeys(("initial", "pretrain", "finetune"), blocks)
        (folder / "mixing.json").write_text(json.dumps({"schema": 1, "window": 16, "stages": stages}))

    mixing(write_run(pretrain=True), 9, 19)
    mixing(write_run(pretrain=True, seed=1), 29, 39)
    write_run(pretrain=True, seed=2)
    (write_run(pretrain=True, seed=3) / "mixing.json").write_text("not finished")
    nothing_moves = write_run(pretrain=True, seed=4)
    mixing(nothing_moves, 9)
    content = (nothing_moves / "mixing.json").read_text()
    (nothing_moves / "mixing.json").write_text(content.replace("[9, 11]", "[null, null]"))
    write_run(model="lru", pretrain=True)
    chart = distances(cells())
    mean, near = chart.panels
    assert [series.label for series in mean.series][1:] == ["after pretraining", "after fine-tuning"]
    assert {(point.x, point.y, len(point.runs)) for series in mean.series for point in series.points} == {
        ("transformer", 25, 2)
    }
    assert near.series[0].points[0].y == 50
    assert near.y_label == "weight within 16 positions (%)"


def test_a_plain_comparison_is_no_study(write_run, cells):
    write_run(budgets=(0, 5000))
    write_run(budgets=(0, 7000))
    write_run(budgets=(2000, 5000))
    found = cells()
    assert gain_over_budget(compare(found)) is None
    for study in (
        studies.share_of_pretraining,
        studies.data_scale,
        studies.model_size,
        studies.speed,
        studies.objectives,
        studies.tunings,
        studies.inits,
    ):
        assert study(found) is None
