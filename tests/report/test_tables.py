import csv
import io

import pytest

from seqzoo.report import build_report, compare, comparison_figure, published, to_csv, to_markdown
from seqzoo.report.figures import draw
from seqzoo.report.published import TASKS
from seqzoo.report.tables import PUBLISHED


@pytest.fixture
def comparisons(write_run, cells):
    """A transformer on two seeds, scratch and pretrained; an LRU from scratch alone; on one task."""
    for seed, (scratch, pretrained) in enumerate([(0.60, 0.70), (0.62, 0.74)]):
        write_run(accuracy=scratch, seed=seed)
        write_run(accuracy=pretrained, seed=seed, pretrain=True)
    write_run(model="lru", accuracy=0.8)
    return compare(cells())


def test_text_of_a_table(comparisons):
    report = build_report(comparisons, [])
    (table,) = report.tables
    assert table.title == (
        "lra_text: recipe short; bidirectional; masked pretraining on 2,000 tokens; fine-tuning on 5,000 tokens; "
        "400 test examples; majority class 50.00; 2 CPU cores"
    )
    assert table.rows == [
        ("lru", "1.00", "80.00 (1)", "-", "-", "89.4 recalled [1]", "-"),
        (
            "transformer",
            "1.00",
            "61.00 ± 1.41 (2)",
            "72.00 ± 2.83 (2)",
            "+11.00 (-4.3 to 26.2)",
            "absolute positions: 64.27 [2]",
            "absolute positions: 89.27 recalled [3]",
        ),
    ]
    first, second, third = report.notes[-3:]
    assert first.startswith("[1] Orvieto")
    assert first.endswith("recalled, not read there, and to be verified.")
    assert second.startswith("[2] Tay")
    assert "recalled" not in second
    assert third.startswith("[3] Amos")


@pytest.fixture
def mixed(write_run, cells):
    """A classification, and a language model on two seeds."""
    write_run(accuracy=0.8)
    for seed, bits in enumerate((2.0, 2.2)):
        write_run(task="char_lm", bits=bits, seed=seed, causal=True, task_note="text.txt")
    return compare(cells())


def test_bits_have_a_table_of_their_own(mixed):
    report = build_report(mixed, [])
    first, second = report.tables
    assert second.title == (
        "char_lm: recipe short; causal; no pretraining; fine-tuning on 5,000 tokens; 400 test examples; text.txt; "
        "2 CPU cores"
    )
    assert second.header == ("model", "params (M)", "bits per character")
    assert second.rows == [("transformer", "1.00", "2.100 ± 0.141 (2)")]
    assert len(first.rows[0]) == len(first.header) == 7
    assert any("fewer are better" in note for note in report.notes)
    assert "| model | params (M) | bits per character |\n| --- | ---: | ---: |\n" in to_markdown(report)
    accuracy, bits = csv.DictReader(io.StringIO(to_csv(mixed)))
    assert (accuracy["metric"], bits["metric"]) == ("accuracy", "bits_per_character")
    assert float(bits["scratch_mean"]) == pytest.approx(2.1)
    assert not any("fewer are better" in note for note in build_report(mixed[:1], []).notes)


def test_bits_have_a_panel_of_their_own(mixed, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("seqzoo.report.figures.draw", lambda chart: saved.append(draw(chart)) or saved[0])
    comparison_figure([mixed[1], mixed[0]])
    bits, accuracy = saved[0].get_axes()
    assert "bits per character" in bits.get_ylabel()
    assert bits.patches[0].get_height() == pytest.approx(2.1)
    assert 2.2 < bits.get_ylim()[1] < 4
    assert not bits.lines or all(line.get_label() != "majority class" for line in bits.lines)
    assert accuracy.get_ylim()[0] == 0
    assert accuracy.get_ylim()[1] > 100
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == ["from scratch", "majority class"]


def test_a_shortened_task_has_no_published_figure(write_run, cells):
    write_run(task_note="text cut to 512 characters")
    report = build_report(compare(cells()), [])
    assert not set(PUBLISHED) & set(report.tables[0].header)
    assert "text cut to 512 characters" in report.tables[0].title


def test_a_variant_has_no_published_figure(write_run, cells):
    write_run(tuning="head")
    report = build_report(compare(cells()), [])
    assert not set(PUBLISHED) & set(report.tables[0].header)
    assert "head tuning" in report.tables[0].title


def test_scratch_of_the_same_total_has_columns_where_there_is_one(write_run, cells):
    write_run(budgets=(2000, 5000), accuracy=0.7)
    write_run(budgets=(0, 7000), accuracy=0.65)
    comparisons = compare(cells())
    report = build_report(comparisons, [])
    (table,) = report.tables
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert (shown["scratch"], shown["scratch, same total"], shown["difference, same total"]) == (
        "-",
        "65.00 (1)",
        "+5.00 (-1.5 to 11.4)",
    )
    assert any(note.startswith("Same total:") for note in report.notes)
    (line,) = csv.DictReader(io.StringIO(to_csv(comparisons)))
    assert float(line["difference_same_total"]) == pytest.approx(0.05)
    assert float(line["difference_same_total_low"]) < 0.05


def test_markdown_columns_line_up(comparisons):
    lines = to_markdown(build_report(comparisons, [])).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {8}
    assert "+11.00" in table[-1]


def test_csv_keeps_full_precision(comparisons):
    lru, transformer = csv.DictReader(io.StringIO(to_csv(comparisons)))
    assert (lru["model"], lru["pretrained_mean"], lru["difference"]) == ("lru", "", "")
    assert float(transformer["scratch_mean"]) == pytest.approx(0.61, rel=1e-12)
    assert float(transformer["pretrained_std"]) == pytest.approx(0.04 / 2**0.5, rel=1e-12)
    assert float(transformer["difference"]) == pytest.approx(0.11, rel=1e-12)
    assert (transformer["objective"], transformer["pretrain_budget"]) == ("masked", "2000")
    assert (lru["scratch_interval"], transformer["scratch_interval"]) == ("binomial", "t")
    assert float(lru["scratch_low"]) < 0.8 < float(lru["scratch_high"])
    assert (transformer["scratch_seeds"], transformer["published_scratch"]) == ("0 / 1", "0.6427")


def test_figure_shows_what_was_measured(comparisons, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("seqzoo.report.figures.draw", lambda chart: saved.append(draw(chart)) or saved[0])
    picture = comparison_figure(comparisons)
    assert picture.startswith(b"\x89PNG")
    (axes,) = saved[0].get_axes()
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([80, 61, 72])
    majority = next(line for line in axes.lines if line.get_label() == "majority class")
    assert list(majority.get_ydata()) == [50, 50]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["lru", "transformer"]


@pytest.mark.parametrize(
    ("model", "task", "objective", "causal", "expected"),
    [
        ("transformer", "lra_listops", None, False, (36.37, False, "absolute positions")),
        ("transformer", "lra_pathx", None, False, ("x", False, "absolute positions")),
        ("transformer", "lra_image", "causal", True, (76.0, False, "absolute positions")),
        ("transformer", "lra_image", "masked", False, (74.22, True, "absolute positions")),
        ("performer", "lra_pathfinder", None, False, (77.05, False, "")),
        ("linear_transformer", "lra_retrieval", None, False, (53.09, False, "")),
        ("s4d", "lra_pathx", None, False, (97.32, False, "")),
        ("s4d", "lra_text", "masked", False, (90.34, True, "S4")),
        ("lru", "lra_pathx", None, False, (94.2, True, "")),
        ("s4d_ft", "lra_image", None, False, (90.89, False, "")),
        ("s4d_dfout", "lra_pathfinder", None, False, (94.3, False, "")),
        ("b2s6", "lra_listops", None, False, (63.85, False, "")),
        ("mamba", "lra_retrieval", None, False, (72.14, False, "")),
        ("mamba2", "lra_text", None, False, (86.09, False, "")),
        ("s5", "lra_pathx", None, False, (98.56, False, "")),
        ("rg_lru", "lra_text", None, False, (71.75, False, "Griffin")),
        ("hgrn2", "lra_retrieval", None, False, (95.07, False, "")),
        ("hgrn2", "lra_image", None, False, (89.33, False, "in two dimensions")),
    ],
)
def test_published_figures(model, task, objective, causal, expected):
    figure = published(model, task, objective, causal=causal)
    assert (figure.percent, figure.recalled, figure.label) == expected
    assert "20" in figure.source


@pytest.mark.parametrize(
    ("model", "task", "objective", "causal"),
    [
        ("lru", "lra_image", None, False),  # in colour there
        ("transformer", "lra_text", None, True),
        ("transformer", "lra_text", "masked", True),
        ("vq_transformer", "lra_text", None, False),
        ("transformer", "own_task", None, False),
    ],
)
def test_what_is_not_comparable_is_not_shown(model, task, objective, causal):
    assert published(model, task, objective, causal=causal) is None


def test_what_was_no_sequence_says_so():
    for task in ("lra_image", "lra_pathfinder", "lra_pathx"):
        assert "no sequences" in published("hgrn2", task, None, causal=False).source
    assert "no sequences" not in published("hgrn2", "lra_text", None, causal=False).source


def test_mean_of_the_published_causal_row():
    figures = [published("transformer", task, "causal", causal=True).percent for task in TASKS]
    assert sum(figures) / len(figures) == pytest.approx(81.81, abs=0.005)


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("s4d_ft", 88.26),
        ("s4d_dfout", 86.2),
        ("b2s6", 87.71),
        ("mamba", 66.59),
        ("mamba2", 70.54),
        ("s5", 87.46),
        ("hgrn", 86.91),
        ("hgrn2", 87.66),
        ("rg_lru", 62.45),
    ],
)
def test_means_of_published_rows(model, mean):
    figures = [published(model, task, None, causal=False).percent for task in TASKS]
    assert sum(figures) / len(figures) == pytest.approx(mean, abs=0.0051)
