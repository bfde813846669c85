"""Runs of one phase stand beside self-pretrained ones and those from scratch on as many tokens."""

from __future__ import annotations

import csv
import io

import pytest

from seqzoo.report import build_report, compare, read_result, to_csv, to_markdown
from seqzoo.report.charts import phases_of, training
from seqzoo.report.curves import learning_curves
from seqzoo.report.gains import scratch_against_pretrained
from seqzoo.report.headline import main_tables
from seqzoo.report.origins import overview, run_lines
from seqzoo.report.studies import speed
from seqzoo.report.tables import Sources


@pytest.fixture
def write_joint(write_run):
    def write(*, budget=7000, weight=1.0, passes=1, whole=0.0, draws=None, **changes):
        joint = {"weight": weight, "passes": passes} | ({"whole": whole} if whole else {})
        joint |= {"draws": draws} if draws else {}
        return write_run(budgets=(0, budget), objective="joint", joint=joint, **changes)

    return write


@pytest.fixture
def three_columns(write_run, write_joint, cells):
    """Three seeds from scratch with both budgets, self-pretrained, and in one phase, augmented and not."""
    for seed in range(3):
        more = 0.01 * seed
        write_run(budgets=(0, 5000), accuracy=0.60 + more, seed=seed)
        write_run(budgets=(0, 7000), accuracy=0.65 + more, seed=seed)
        write_run(budgets=(2000, 5000), accuracy=0.70 + more, seed=seed)
        write_joint(accuracy=0.75 + more, seed=seed)
        write_joint(accuracy=0.80 + more, seed=seed, augment=True)
    return compare(cells())


def test_one_phase_is_compared_at_the_same_total(three_columns):
    (comparison,) = three_columns
    (row,) = comparison.rows
    plain, augmented = row.one_phase
    assert (plain.mean, augmented.mean) == pytest.approx((0.76, 0.81))
    assert [row.gain_of(cell).mean for cell in row.one_phase] == pytest.approx([0.10, 0.15])
    interval = row.gain_of(plain).interval
    assert interval.kind == "t"
    assert interval.low < 0.10 < interval.high
    assert (row.gain.mean, row.difference.mean) == pytest.approx((0.05, 0.10)), "as without it"
    assert phases_of(comparison) == ["one phase", "one phase, augmented"]


def test_it_is_a_column_of_every_table(three_columns):
    report = build_report(three_columns, [])
    (table,) = report.tables
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert shown["one phase"] == "76.00 ± 1.00 (3)"
    assert shown["one phase, augmented"] == "81.00 ± 1.00 (3)"
    assert shown["difference, one phase"] == "+10.00 (3.3 to 16.6)"
    assert shown["difference, one phase, augmented"].startswith("+15.00 (")
    assert shown["scratch, same total"] == "66.00 ± 1.00 (3)"
    assert any(note.startswith("One phase: ") for note in report.notes)
    assert "| one phase | difference, one phase |" in to_markdown(report)

    (line,) = csv.DictReader(io.StringIO(to_csv(three_columns)))
    assert float(line["one_phase_mean"]) == pytest.approx(0.76)
    assert float(line["difference_one_phase"]) == pytest.approx(0.10)
    assert float(line["difference_one_phase_low"]) < 0.10 < float(line["difference_one_phase_high"])
    assert float(line["one_phase_augmented_mean"]) == pytest.approx(0.81)
    assert line["one_phase_augmented_seeds"] == "0 / 1 / 2"
    assert line["augment"] == "False"

    folders = [cell.results[0].folder for row in three_columns[0].rows for cell in row.cells]
    numbers = {result.folder: 1 for row in three_columns[0].rows for cell in row.cells for result in cell.results}
    assert len(numbers) == 3 * len(folders)
    (page,) = main_tables(three_columns, numbers, Sources())
    entries = dict(zip(page.header, page.rows[0], strict=True))
    assert entries["one phase"].text == "76.00 ± 1.00 (3)"
    gain = entries["gain of one phase at the same total"]
    assert (gain.text, gain.detail, gain.strong) == ("+10.00", "3.3 to 16.6, t", True)
    assert not entries["gain at the same total"].strong, "-1.5 to 11.5"
    assert page.header[-1].startswith("published")

    chart = scratch_against_pretrained(three_columns)
    heights = {series.label: series.points[0].y for series in chart.panels[0].series}
    assert heights["one phase"] == pytest.approx(76)
    assert heights["one phase, augmented"] == pytest.approx(81)


def test_without_pretraining_it_stands_beside_scratch(write_run, write_joint, cells):
    write_run(budgets=(0, 7000), accuracy=0.65)
    write_joint(accuracy=0.75)
    write_joint(accuracy=0.70, augment=True, model="lru")
    (comparison, alone) = compare(cells())
    assert comparison.pretraining is None
    (row,) = comparison.rows
    assert row.gain_of(row.one_phase[0]).mean == pytest.approx(0.10)
    (row,) = alone.rows
    assert alone.conditions.augment, "nothing that is not augmented is there"
    assert (row.scratch, row.gain_of(row.one_phase[0])) == (None, None)
    (table, other) = build_report([comparison, alone], []).tables
    assert "augmented" in other.title
    assert dict(zip(other.header, other.rows[0], strict=True))["difference, one phase"] == "-"
    assert dict(zip(table.header, table.rows[0], strict=True))["difference, one phase"].startswith("+10.00 (")
    numbers = {run.folder: 1 for row in (*comparison.rows, *alone.rows) for cell in row.cells for run in cell.results}
    (page, _) = main_tables([comparison, alone], numbers, Sources())
    gain = dict(zip(page.header, page.rows[0], strict=True))["gain of one phase at the same total"]
    assert (gain.detail, gain.strong) == ("3.7 to 16.2, binomial", False), "nothing is known of other seeds"


def test_other_totals_are_not_put_side_by_side(write_run, write_joint, cells):
    write_run(budgets=(2000, 5000), accuracy=0.7)
    write_run(budgets=(0, 5000), accuracy=0.6)
    write_joint(budget=5000, accuracy=0.75)
    pretrained, alone = compare(cells())
    assert pretrained.rows[0].one_phase == ()
    assert alone.rows[0].gain_of(alone.rows[0].one_phase[0]).mean == pytest.approx(0.15)


def test_augmented_runs_are_a_variant_of_their_own(write_run, write_joint, cells):
    write_run(budgets=(0, 7000), accuracy=0.6)
    write_run(budgets=(0, 7000), accuracy=0.65, augment=True)
    write_joint(accuracy=0.7, augment=True)
    plain, augmented = compare(cells())
    assert (plain.conditions.plain, augmented.conditions.plain) == (True, False)
    assert [phases_of(each) for each in (plain, augmented)] == [["one phase, augmented"], ["one phase"]]
    assert [row.gain_of(row.one_phase[0]).mean for each in (plain, augmented) for row in each.rows] == pytest.approx(
        [0.1, 0.05]
    )
    assert "augmented" in build_report([augmented], []).tables[0].title
    numbers = {result.folder: 1 for row in augmented.rows for cell in row.cells for result in cell.results}
    assert "augmented" in main_tables([augmented], numbers, Sources())[0].title


def test_weights_and_passes_do_not_mix(write_run, write_joint, cells):
    write_run(budgets=(0, 7000))
    for settings in ({"weight": 0.5}, {"passes": 2}, {}):
        write_joint(**settings)
    (comparison,) = compare(cells())
    assert phases_of(comparison) == ["one phase, masked loss times 0.5", "one phase", "one phase, two passes"]
    assert "one_phase_masked_loss_times_0.5_mean" in to_csv([comparison]).splitlines()[0].split(",")


def test_augmentation_by_the_draw_that_hides_is_told_apart(write_run, write_joint, cells):
    write_run(budgets=(0, 7000))
    write_joint(whole=0.5, augment=True)
    write_joint(whole=0.5, draws=2, augment=True)
    write_joint(whole=0.5, seed=1)
    (comparison,) = compare(cells())
    assert phases_of(comparison) == [
        "one phase, 0.5 of inputs whole",
        "one phase, 0.5 of inputs whole, augmented",
        "one phase, 0.5 of inputs whole, augmented, by the same draw",
    ]


def test_shares_of_whole_inputs_do_not_mix(write_run, write_joint, cells):
    write_run(budgets=(0, 7000))
    for whole in (0.0, 0.25, 0.5):
        write_joint(whole=whole)
    found = cells()
    (comparison,) = compare(found)
    assert phases_of(comparison) == ["one phase", "one phase, 0.25 of inputs whole", "one phase, 0.5 of inputs whole"]
    assert "one_phase_0.5_of_inputs_whole_mean" in to_csv([comparison]).splitlines()[0].split(",")
    results = [result for cell in found for result in cell.results]
    lines = run_lines(results, results[0].folder.parent)
    assert any("passes 1, 0.5 of inputs whole" in entry for line in lines for entry in line)
    with pytest.raises(ValueError, match=r"joint\.whole is 1"):
        read_result(write_joint(whole=1.0, seed=1))


def test_the_page_says_how_they_were_trained(write_run, write_joint, cells):
    curve = [{"stage": "finetune", "step": 1, "tokens": 7_000_000, "val/accuracy": 0.5}]
    write_run(metrics=curve, tokens_per_second={"finetune": 10.0})
    write_joint(metrics=curve, tokens_per_second={"finetune": 10.0}, augment=True, budget=5000)
    found = cells()
    assert {training(cell) for cell in found} == {"from scratch", "one phase, augmented"}
    (chart,) = learning_curves(found)
    assert {series.label for series in chart.panels[0].series} == {"from scratch", "one phase, augmented"}
    assert {series.label.partition(", ")[2] for series in speed(found).panels[0].series} == {
        "from scratch",
        "one phase, augmented",
    }
    results = [result for cell in found for result in cell.results]
    assert overview(results)[0][1] == ["2: 1 from scratch, 0 self-pretrained, 1 in one phase"]
    (line,) = [line for line in run_lines(results, results[0].folder.parent) if "augmented" in line]
    assert "bidirectional, one phase on 5k, masked loss times 1, passes 1" in line


def test_a_result_in_one_phase_is_read(write_joint, write_run):
    result = read_result(write_joint(weight=0.5, passes=2))
    assert (result.one_phase, result.pretraining, result.augment) == ((0.5, 2, 0.0, False), None, False)
    assert read_result(write_run()).one_phase is None
    with pytest.raises(ValueError, match=r"objective is 'joint'; valid: 'masked', 'causal'$"):
        read_result(write_run(objective="joint", pretrain=True))
    with pytest.raises(ValueError, match=r"result\.json has no joint\.weight"):
        read_result(write_run(objective="joint"))
