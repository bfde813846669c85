from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.tasks import DataError, Task, TaskConfig, acl_retrieval, build_task, origin_of
from seqzoo.tasks.acl_retrieval import draw_pairs, read_citations, read_papers, split_by_citing

IDS = [f"P{year:02}-{number:04}" for year in (98, 99, 0, 1) for number in range(8)]
YEARS = dict(zip(IDS, [year for year in (1998, 1999, 2000, 2001) for _ in range(8)], strict=True))
# every paper cites three of the year before
CITATIONS = {(IDS[i], IDS[i // 8 * 8 - 8 + (i + k) % 8]) for i in range(16, 32) for k in (0, 1, 3)}


def config(**changes) -> TaskConfig:
    settings = {
        "name": "acl_retrieval",
        "max_length": 4000,
        "mask_ratio": 0.15,
        "val_fraction": 0.2,
        "test_fraction": 0.2,
        "split_seed": 42,
        "generator_seed": 0,
        "min_frequency": 1,
    }
    return TaskConfig(**(settings | changes))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "aan"
    folder.mkdir()
    papers = [{"id": id, "title": f"On {id}", "abstract": "", "text": f"Body of {id}.\n"} for id in IDS]
    (folder / "documents.jsonl").write_text("".join(json.dumps(paper) + "\n" for paper in papers))
    rows = ["citing\tcited", "P98-0000\tX99-9999", *map("\t".join, sorted(CITATIONS))]
    (folder / "citations.tsv").write_text("\n".join(rows))
    return tmp_path


def decode(task: Task, split: str) -> list[tuple[str, str]]:
    """The pairs of a split, by their titles."""
    part = getattr(task, split)
    batch = part.batch(torch.arange(len(part)))
    texts = [["".join(task.symbols[token] for token in tokens) for tokens in pair] for pair in batch.inputs]
    return [(a[3:11], b[3:11]) for a, b in texts]


def test_the_task(data_dir, tmp_path):
    task = build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    pairs = {split: decode(task, split) for split in ("train", "val", "test")}
    labels = {split: getattr(task, split).labels.tolist() for split in pairs}
    citing = {split: {a for a, _ in pairs[split]} for split in pairs}
    assert sorted(map(len, citing.values())) == [3, 3, 10]
    assert len(set.union(*citing.values())) == 16
    for split in pairs:
        for (a, b), label in zip(pairs[split], labels[split], strict=True):
            assert ((a, b) in CITATIONS) == label
            assert (b, a) not in CITATIONS
        assert sum(labels[split]) * 2 == len(labels[split])
    together = [frozenset(pair) for split in pairs.values() for pair in split]
    assert len(together) == len(set(together)) == 2 * len(CITATIONS)
    assert (task.spec.num_inputs, task.spec.num_classes, task.majority) == (2, 2, 0.5)
    assert task.note == "val_fraction 0.2, test_fraction 0.2, min_frequency 1"
    tokens = task.train.values[: task.train.offsets[1]]
    id = pairs["train"][0][0]
    assert "".join(task.symbols[token] for token in tokens) == f"On {id}\nBody of {id}.<eos>"


def test_texts_are_cut(data_dir, tmp_path):
    task = build_task(config(max_length=6), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert task.train.lengths.unique().tolist() == [6]


def test_the_published_names_the_same_task_in_any_order_of_rows(data_dir, tmp_path):
    first = build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    folder = data_dir / "aan"
    for old, new in zip(*acl_retrieval.FILES, strict=True):
        rows = (folder / old).read_text().splitlines()
        (folder / old).unlink()
        (folder / new).write_text("\n".join(reversed(rows)))
    second = build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("acl_retrieval-*"))) == 2
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(first, split).values, getattr(second, split).values)


def test_seeds(data_dir, tmp_path):
    def pairs(**changes):
        task = build_task(config(**changes), data_dir=data_dir, cache_dir=tmp_path / "cache")
        return decode(task, "test"), {pair for split in ("train", "val", "test") for pair in decode(task, split)}

    test, everything = pairs()
    other_test, same = pairs(split_seed=1)
    assert same == everything
    assert {a for a, _ in other_test} != {a for a, _ in test}
    drawn_test, drawn = pairs(generator_seed=1)
    assert {a for a, _ in drawn_test} == {a for a, _ in test}
    assert drawn != everything


graphs = st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(IDS)), max_size=150)


@given(graphs, st.randoms(use_true_random=False), st.integers(0, 3))
def test_what_is_drawn(citations, shuffling, seed):
    triples = draw_pairs(YEARS, set(citations), seed=seed)
    pairs = [frozenset((t.citing, other)) for t in triples for other in (t.cited, t.other)]
    assert len(pairs) == len(set(pairs))
    for citing, cited, other in triples:
        assert (citing, cited) in citations
        assert (citing, other) not in citations
        assert (other, citing) not in citations
        assert len({citing, cited, other}) == 3
        assert YEARS[other] == YEARS[cited]
        assert other in {b for _, b in citations}
    shuffling.shuffle(citations)
    assert draw_pairs(YEARS, list(dict.fromkeys(citations)), seed=seed) == triples


@given(graphs, st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_citing_paper_is_in_one_split(citations, val, test):
    triples = draw_pairs(YEARS, set(citations), seed=0)
    splits = split_by_citing(triples, {"test": test, "val": val}, seed=0)
    citing = {name: {t.citing for t in part} for name, part in splits.items()}
    n = len({t.citing for t in triples})
    assert sum(map(len, citing.values())) == n
    assert (len(citing["test"]), len(citing["val"])) == (round(n * test), min(round(n * val), n - round(n * test)))
    assert sorted(t for part in splits.values() for t in part) == sorted(triples)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "row 3 is no JSON"),
        (b"[" * 100_000, "row 3 is no JSON"),
        (b"\xff", "row 3 is no JSON: 'utf-8' codec"),
        (b"[]", "row 3: expected an object with the strings id, title, abstract, text"),
        (b'{"id": "P99-0001", "title": "t", "abstract": "", "text": null}', "row 3: expected an object"),
        (b'{"id": "P98-0001", "title": "t", "abstract": "", "text": ""}', "row 3: the paper P98-0001 was there before"),
        (b'{"id": "P99", "title": "t", "abstract": "", "text": ""}', "row 3: 'P99' is no id of the ACL Anthology"),
        (b'{"id": "P99-0001", "title": " ", "abstract": "", "text": "\\n"}', "row 3: the paper P99-0001 has no text"),
        (b'{"id": "P99-0001", "title": "\\ud800", "abstract": "", "text": ""}', "row 3: 'utf-32-le' codec"),
    ],
)
def test_damaged_papers_are_named(data_dir, tmp_path, row, message):
    path = data_dir / "aan" / "documents.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], row, *lines[3:]]))
    with pytest.raises(DataError, match=f"documents.jsonl, {message}"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"P98-0000", "row 3: 1 columns; expected 2"),
        (b"P98-0000\tP98-0001\tx", "row 3: 3 columns; expected 2"),
        (b"P98-0000\t", "row 3: 2 columns"),
        (b"P98-0000\t\xff", "row 3: 'utf-8' codec"),
    ],
)
def test_damaged_citations_are_named(data_dir, tmp_path, row, message):
    path = data_dir / "aan" / "citations.tsv"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], row, *lines[3:]]))
    with pytest.raises(DataError, match=f"citations.tsv, {message}"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


@given(st.binary(max_size=60) | st.lists(st.sampled_from([b"P98-0001", b"\t", b"\n", b"\r"])).map(b"".join))
def test_any_bytes_are_citations_or_an_error_that_names_the_row(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "citations.tsv"
    path.write_bytes(content)
    fault = None
    try:
        citations = read_citations(path, YEARS)
    except DataError as error:
        fault = str(error)
    assert citations <= {("P98-0001", "P98-0001")} if fault is None else f"{path}, row " in fault


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(IDS),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "title", "abstract", "text"]), inner),
    max_leaves=8,
)


@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_paper_or_an_error_that_names_the_row(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "documents.jsonl"
    path.write_bytes(content)
    fault = None
    try:
        texts, years = read_papers(path, 10)
    except DataError as error:
        fault = str(error)
    assert set(texts) == set(years) <= set(IDS) if fault is None else f"{path}, row " in fault


@pytest.mark.parametrize(
    ("id", "year"), [("P52-1001", 1952), ("P51-1001", 2051), ("W18-63001", 2018), ("2020.acl-main.1", 2020)]
)
def test_the_year_is_in_the_id(id, year):
    assert acl_retrieval._year(id, "here") == year


def test_missing_files(data_dir, tmp_path):
    (data_dir / "aan" / "citations.tsv").unlink()
    with pytest.raises(DataError, match=r"aan does not hold both documents.jsonl and citations.tsv\.\nPut"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"no aan in .*\nPut documents.jsonl"):
        build_task(config(), data_dir=tmp_path / "aan", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="no aan: data_dir is not set"):
        build_task(config(), data_dir=None, cache_dir=tmp_path / "cache")


def test_too_few_citations(data_dir, tmp_path):
    (data_dir / "aan" / "citations.tsv").write_text("P99-0000\tP98-0001\nP99-0001\tP98-0002\n")
    with pytest.raises(DataError, match=r"make 2 pairs of citing and cited paper, none of them for the test split"):
        build_task(config(), data_dir=data_dir, cache_dir=tmp_path / "cache")


def test_fractions_that_leave_nothing(data_dir, tmp_path):
    with pytest.raises(ValueError, match="val_fraction and test_fraction leave nothing to train on"):
        build_task(config(val_fraction=0.5, test_fraction=0.5), data_dir=data_dir, cache_dir=tmp_path)


def test_the_collection(real_data):
    folder = real_data("aan") / "aan"
    texts, years = read_papers(folder / "scisumm_docs.jsonl", 3999)
    citations = read_citations(folder / "aan_citations.tsv", years)
    assert (len(texts), len(citations)) == (1604, 9516)
    triples = draw_pairs(years, citations, seed=0)
    assert len(triples) == 9471
    splits = split_by_citing(triples, {"test": 0.1, "val": 0.1}, seed=42)
    assert {name: len(part) for name, part in splits.items()} == {"test": 854, "val": 949, "train": 7668}

    # What is known of the second paper alone, its share of citations in training, says next to nothing.
    cited, other = (Counter(getattr(t, key) for t in splits["train"]) for key in ("cited", "other"))
    right = [(cited[t.cited] > other[t.cited]) + (cited[t.other] < other[t.other]) for t in splits["test"]]
    assert sum(right) / (2 * len(right)) < 0.55


def test_other_papers_are_told_apart(data_dir, tmp_path):
    found = origin_of(config(), data_dir=data_dir, cache_dir=tmp_path)
    assert found["origin"].keys() == {".jsonl", ".tsv"}
    shutil.copytree(data_dir / "aan", tmp_path / "copy" / "aan")
    assert origin_of(config(), data_dir=tmp_path / "copy", cache_dir=tmp_path) == found
    path = tmp_path / "copy" / "aan" / "citations.tsv"
    path.write_text(path.read_text().rsplit("\n", 1)[0])
    assert origin_of(config(), data_dir=tmp_path / "copy", cache_dir=tmp_path) != found
