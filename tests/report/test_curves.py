import pytest

from seqzoo.report.curves import learning_curves, pretraining_losses, read_curve

PRETRAINING = [{"stage": "pretrain", "step": 1, "tokens": 2_000_000, "val/loss": 2.5}]
FINETUNING = [
    {"stage": "finetune", "step": 1, "tokens": 1_000_000, "train/loss": 0.7},
    {"stage": "finetune", "step": 2, "tokens": 2_000_000, "val/loss": 0.7, "val/accuracy": 0.55},
    {"stage": "finetune", "step": 4, "tokens": 4_000_000, "val/loss": 0.6, "val/accuracy": 0.65},
]


def test_reads_the_lines_of_a_stage(write_run):
    folder = write_run(metrics=PRETRAINING + FINETUNING)
    assert read_curve(folder, "finetune", "val/accuracy") == [(2_000_000, 0.55), (4_000_000, 0.65)]
    assert read_curve(folder, "pretrain", "val/loss") == [(2_000_000, 2.5)]


def test_a_line_cut_off_ends_the_curve(write_run):
    folder = write_run(metrics=FINETUNING)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "tok')
    assert len(read_curve(folder, "finetune", "val/accuracy")) == 2


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"[1]\n3\n", b'{"stage": "finetune", "tokens": "many"}\n'])
def test_no_curve(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_curve(tmp_path, "finetune", "val/accuracy") == []


def test_a_pretrained_curve_starts_where_pretraining_ended(write_run, cells):
    write_run(budgets=(2_000_000, 4_000_000), metrics=PRETRAINING + FINETUNING)
    write_run(budgets=(0, 4_000_000), metrics=FINETUNING)
    (chart,) = learning_curves(cells())
    (panel,) = chart.panels
    curves = {series.label: [(point.x, point.y) for point in series.points] for series in panel.series}
    assert curves == {
        "from scratch": [(2.0, pytest.approx(55)), (4.0, pytest.approx(65))],
        "self-pretrained": [(4.0, pytest.approx(55)), (6.0, pytest.approx(65))],
    }


def test_a_chart_for_each_task_and_none_for_variants_or_bits(write_run, cells):
    write_run(metrics=FINETUNING)
    write_run(metrics=FINETUNING, task="lra_image")
    write_run(metrics=FINETUNING, task="lra_pathfinder", tuning="head")
    write_run(metrics=FINETUNING, task="char_lm", bits=2.0, causal=True)
    charts = learning_curves(cells())
    assert [chart.title.split(",")[0] for chart in charts] == [
        "Learning curves: lra_text",
        "Learning curves: lra_image",
    ]


def test_a_shared_pretraining_is_drawn_once(write_run, cells):
    first = write_run(budgets=(2_000_000, 4_000_000), metrics=PRETRAINING + FINETUNING)
    write_run(budgets=(2_000_000, 5_000_000), metrics=FINETUNING, pretrain_run=first.name)
    chart = pretraining_losses(cells())
    (series,) = chart.panels[0].series
    assert [(point.x, point.y, point.runs) for point in series.points] == [(2.0, 2.5, (first,))]


def test_nothing_pretrained_has_no_losses(write_run, cells):
    write_run(metrics=FINETUNING)
    assert pretraining_losses(cells()) is None
