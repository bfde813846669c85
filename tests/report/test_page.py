import csv
from html.parser import HTMLParser

import pytest

from seqzoo.files import write_all
from seqzoo.report import page_files

PNG = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (300).to_bytes(4, "big") + (100).to_bytes(4, "big")
CURVE = [{"stage": "finetune", "step": 1, "tokens": 5000, "val/accuracy": 0.6}]


class Page(HTMLParser):
    """Text, headings, table cells and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.alts, self.text, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[key] for key in ("href", "src") if key in values]
        self.alts += [values["alt"]] if "alt" in values else []
        self.ids += [values["id"]] if "id" in values else []

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def page(tmp_path, cells, monkeypatch):
    """Writes out/report.html, its figures undrawn, and reads it."""
    monkeypatch.setattr("seqzoo.report.page.to_png", lambda chart: PNG)

    def write(left_out=()):
        path = tmp_path / "out" / "report.html"
        written = page_files(path, cells(), left_out)
        assert {file.parent for file in written} <= {path.parent, path.parent / "report_files"}
        write_all(written)
        return Page(path.read_text(encoding="utf-8"))

    return write


@pytest.fixture
def study(write_run):
    """Runs that fill every section."""
    for model, accuracy in (("transformer", 0.6), ("lru", 0.65)):
        for seed in (0, 1):
            common = {"model": model, "seed": seed, "metrics": CURVE}
            speed = {"pretrain": 100.0, "finetune": 200.0}
            write_run(budgets=(5000, 5000), accuracy=accuracy + 0.1 + 0.01 * seed, tokens_per_second=speed, **common)
            write_run(budgets=(0, 5000), accuracy=accuracy + 0.01 * seed, tokens_per_second=speed, **common)
            write_run(budgets=(0, 10_000), accuracy=accuracy + 0.05 + 0.01 * seed, **common)
            write_run(model=model, seed=seed, budgets=(10_000, 10_000), accuracy=accuracy + 0.2)
            write_run(model=model, seed=seed, budgets=(0, 20_000), accuracy=accuracy + 0.1)
        write_run(model=model, budgets=(2500, 7500), accuracy=0.7)
        write_run(model=model, budgets=(0, 5000), train_fraction=0.1, accuracy=0.5)
        write_run(model=model, budgets=(0, 5000), params=9_000_000, accuracy=0.7)
        write_run(model=model, budgets=(5000, 5000), tuning="head", trained_params=130, accuracy=0.55)
        write_run(model=model, budgets=(0, 5000), init="random", accuracy=0.5)
        write_run(model=model, budgets=(5000, 5000), objective="causal", causal=True, accuracy=0.8)


def test_every_section(study, write_run, page):
    (write_run(task="own") / "mixing.png").write_bytes(PNG)
    shown = page()
    sections = [name for name in shown.ids if not name.startswith(("run-", "table-"))]
    assert sections == [
        "overview",
        "main",
        "scratch_and_pretrained",
        "learning_curves",
        "gain_over_budget",
        "share_of_pretraining",
        "data_scale",
        "model_size",
        "objective",
        "tuning",
        "init",
        "speed",
        "mixing",
        "runs",
    ]
    assert {address[1:] for address in shown.addresses if address.startswith("#")} >= set(sections)
    assert len(set(shown.ids)) == len(shown.ids)


def test_a_study_with_muon_has_its_tables_and_charts(write_run, page):
    for budgets, accuracy in (((0, 5000), 0.6), ((0, 10_000), 0.7), ((5000, 5000), 0.75)):
        write_run(budgets=budgets, accuracy=accuracy, optimizer="muon 2", metrics=CURVE)
    shown = page()
    assert {"table-1", "scratch_and_pretrained", "learning_curves"} <= set(shown.ids)
    assert "lra_text: test accuracy in percent; recipe short, muon 2; bidirectional" in shown.words
    assert "+5.00 -1.2 to 11.1, binomial" in shown.words


def test_a_shared_pretraining_takes_its_time_once(write_run, page):
    seconds = {"pretrain": 3600.0, "finetune": 1800.0, "total": 5400.0}
    source = write_run(pretrain=True, seconds=seconds)
    for finetuned in (6000, 7000):
        write_run(budgets=(2000, finetuned), seconds=seconds, pretrain_run=source.name)
    assert "2.5 hours in all" in page().words


def test_sections_without_data_are_left_out(write_run, page):
    write_run()
    shown = page()
    assert [name for name in shown.ids if not name.startswith(("run-", "table-"))] == [
        "overview",
        "main",
        "scratch_and_pretrained",
        "runs",
    ]
    assert "Left out" not in shown.words


def test_needs_nothing_but_its_figures_beside_it(study, page, tmp_path):
    shown = page()
    assert not {"script", "link", "iframe", "object"} & set(shown.tags)
    local = [address for address in shown.addresses if not address.startswith("#")]
    assert local
    for address in local:
        assert ":" not in address
        assert (tmp_path / "out" / address).is_file()
    assert "@import" not in shown.words
    assert "url(" not in shown.words
    assert shown.tags.count("img") == len(shown.alts)
    assert all(shown.alts)


def test_numbers_with_their_runs(write_run, page):
    first = write_run(budgets=(0, 5000), accuracy=0.6, seed=0)
    write_run(budgets=(0, 5000), accuracy=0.62, seed=1)
    write_run(budgets=(5000, 5000), accuracy=0.75)
    write_run(budgets=(0, 10_000), accuracy=0.7)
    shown = page()
    assert "61.00 ± 1.41 (2) 47.4 to 74.5, t runs 1 2" in shown.words
    assert "75.00 (1) 70.5 to 79.0, binomial run 3" in shown.words
    assert "+14.00 7.5 to 20.3, binomial +5.00 -1.2 to 11.1, binomial" in shown.words
    assert "64.27 [1] ours -3.27" in shown.words
    assert f"1 ../runs/{first.name} transformer 1,000,000 lra_text short" in shown.words


def test_a_scratch_cell_is_one_line_however_many_pretrainings(write_run, page):
    write_run(model="lru")
    for budget in (1000, 2000):
        write_run(model="transformer", budgets=(budget, 5000))
    assert page().words.count("lru 1,000,000 parameters") == 1


def test_packed_runs_have_a_table_of_their_own(write_run, page):
    for packing in (False, True):
        write_run(model=f"packed-{packing}", packing=packing)
    shown = page().words
    assert "packed-False 1,000,000 parameters" in shown
    assert "packed-True 1,000,000 parameters" in shown


def test_what_was_run(write_run, page):
    write_run(commit="0123456789abcdef+dirty", seconds={"total": 5400.0}, versions={"torch": "2.13.0", "numba": "1"})
    write_run(seed=1, commit="0123456789abcdef+dirty", seconds={"total": 5400.0}, hardware="1 x GPU")
    words = page().words
    assert "3.0 hours in all" in words
    assert "0123456+dirty (2)" in words
    assert "numba 1; torch 2.13.0" in words
    assert "1 x GPU (1); 2 CPU cores (1)" in words


def test_what_a_result_says_is_text(write_run, page):
    evil = "<script>alert(1)</script>"
    attribute = '"><img src=x onerror=alert(1)>'
    write_run(
        model=evil,
        task=attribute,
        recipe=evil,
        hardware=attribute,
        commit=evil,
        versions={evil: attribute},
        task_note=evil,
        metrics=CURVE,
    )
    shown = page()
    assert "script" not in shown.tags
    assert all(address.startswith(("#", "report_files/")) for address in shown.addresses)
    assert evil in shown.words


def test_left_out_runs_are_named(write_run, page, tmp_path):
    from seqzoo.report import LeftOut

    write_run()
    words = page([LeftOut(tmp_path / "runs" / "x", "no result.json: <unfinished>")]).words
    assert "../runs/x: no result.json: <unfinished>" in words


def test_pictures_of_mixing_are_shown_if_they_are_pictures(write_run, page):
    folder = write_run()
    (folder / "mixing.png").write_bytes(PNG)
    (write_run(model="lru") / "mixing.png").write_bytes(b"not a picture")
    shown = page()
    assert sum("attends to" in alt for alt in shown.alts) == 1
    assert f"../runs/{folder.name}/mixing.png" in shown.addresses
    assert f"../runs/{folder.name}/mixing.json" not in shown.addresses


def test_csv_holds_what_the_page_shows(study, page, tmp_path):
    words = page().words
    files = tmp_path / "out" / "report_files"
    with (files / "main.csv").open() as file:
        for line in csv.DictReader(file):
            for name in ("scratch", "pretrained", "scratch_same_total"):
                if line[f"{name}_mean"]:
                    assert f"{100 * float(line[f'{name}_mean']):.2f}" in words
            if line["difference_same_total"]:
                assert f"{100 * float(line['difference_same_total']):+.2f}" in words
    with (files / "gain_over_budget.csv").open() as file:
        point = max(csv.DictReader(file), key=lambda point: float(point["y"]))
    assert (float(point["x"]), point["x_label"]) == (0.02, "tokens of both stages (millions)")
    assert float(point["low"]) < float(point["y"]) < float(point["high"])
    assert f"{float(point['y']):+.2f} points" in words
    assert all((tmp_path / "out" / run / "result.json").is_file() for run in point["runs"].split())
    pictures = {path.stem for path in files.glob("*.png")}
    assert {path.stem for path in files.glob("*.csv")} == pictures - {"curves_1"} | {"main", "learning_curves"}


def test_equal_runs_give_an_equal_page(study, cells, tmp_path):
    path = tmp_path / "runs" / "report.html"
    write_all(page_files(path, cells(), []))
    before = path.read_bytes()
    write_all(page_files(path, cells(), []))  # the page among its runs is no run
    assert path.read_bytes() == before
    picture = (path.parent / "report_files" / "speed.png").read_bytes()
    assert picture.startswith(PNG[:8])
    assert b'src="report_files/speed.png"' in before
