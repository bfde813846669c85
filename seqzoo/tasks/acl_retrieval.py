"""Retrieval from full papers and a citation graph: does one paper of the ACL Anthology cite the other.

A stand-in for Long Range Arena's Retrieval, of other papers and pairs: scores on the two do not compare. It is made of
a folder `aan` with `documents.jsonl` (a JSON object a line: id, title, abstract, text) and `citations.tsv` (the ids of
a citing and a cited paper, a tab between them), or `scisumm_docs.jsonl` and `aan_citations.tsv` of the same form.

- A pair is a citing paper and one that it cites, or one that neither cites it nor is cited by it. Each citation is
  matched by one such pair of the same citing paper, so that classes are balanced in every split.
- The other paper is drawn from the cited papers of the same year as the cited one, as often as they are cited.
  Otherwise what is often cited would tell: drawn evenly, knowing the second paper alone answers 69 % of the test pairs
  of that collection; drawn so, half. A citation for which there is no such paper is left out.
- A paper's pairs as the citing one are all in one split, and no two papers are paired twice, in whichever order; two
  that cite each other are one pair. Papers themselves are in more than one split.
- The text is the title, the abstract and the body, a newline between them, cut to `max_length - 1` characters and
  closed by <eos>. The vocabulary are the characters seen `min_frequency` times and more in the papers of training
  pairs, after the cut, the most frequent first and ties by code point. Others are <unk>.

Neither the order of rows nor anything but the seeds decides what is drawn.
"""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .characters import Alphabet, code_points, text_spec
from .config import TaskConfig
from .data import Task, assemble, split_arrays
from .store.cache import Stored, cached
from .store.sources import DataError, MissingData, given_folder, sha256_of

FOLDER = "aan"
FILES = (("documents.jsonl", "citations.tsv"), ("scisumm_docs.jsonl", "aan_citations.tsv"))
ADVICE = (
    f"Put {' and '.join(FILES[0])} into a folder {FOLDER} and set data_dir to the folder that holds it; "
    "configs/task/acl_retrieval.yaml says what they are."
)
FIELDS = ("title", "abstract", "text")


class Triple(NamedTuple):
    """Two pairs: `citing` cites `cited`, and has nothing to do with `other`."""

    citing: str
    cited: str
    other: str


def build(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> Task:
    """The task as `config` describes it, from the cache where it has been built before from the same files.

    Raises:
        DataError: the papers or citations are missing or damaged, or too few.
        ValueError: a key of `config` is missing or does not belong to this task.
    """
    settings = config.settings("val_fraction", "test_fraction", "split_seed", "generator_seed", "min_frequency")
    if settings["val_fraction"] + settings["test_fraction"] >= 1:
        raise ValueError(f"task {config.name}: val_fraction and test_fraction leave nothing to train on")
    papers, citations = _files(given_folder(FOLDER, data_dir, ADVICE))
    request = {"max_length": config.max_length, **settings, **_digests(papers, citations)}

    def prepare(work: Path) -> Stored:
        return _prepare(papers, citations, config.max_length, **settings)

    stored = cached(cache_dir, config.name, request, prepare)
    symbols = stored.facts["symbols"]
    spec = text_spec(config, symbols, num_classes=2, num_inputs=2)
    return assemble(spec, stored.arrays, symbols=symbols)


def origin(config: TaskConfig, *, data_dir: Path | None, cache_dir: Path) -> dict[str, Any]:
    """What papers and citations say; nothing where there are none."""
    try:
        return {"origin": _digests(*_files(given_folder(FOLDER, data_dir, ADVICE)))}
    except MissingData:
        return {}


def _digests(*paths: Path) -> dict[str, str]:
    """SHA-256 of files by what their names end in."""
    return {path.suffix: sha256_of(path) for path in paths}


def _prepare(
    papers: Path,
    citations: Path,
    max_length: int,
    *,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    generator_seed: int,
    min_frequency: int,
) -> Stored:
    texts, years = read_papers(papers, max_length - 1)
    triples = draw_pairs(years, read_citations(citations, years), seed=generator_seed)
    splits = split_by_citing(triples, {"test": test_fraction, "val": val_fraction}, seed=split_seed)
    for name, part in splits.items():
        if not part:
            raise DataError(
                f"{papers} and {citations} make {len(triples):,} pairs of citing and cited paper, none of them for the "
                f"{name} split.\nGive more, or change val_fraction and test_fraction."
            )

    alphabet = Alphabet(
        (texts[id] for id in sorted({id for triple in splits["train"] for id in triple})), min_frequency
    )
    tokens = {id: alphabet.tokens(text) for id, text in texts.items()}
    arrays: dict[str, np.ndarray] = {}
    for name in ("train", "val", "test"):
        pairs = [pair for t in splits[name] for pair in ((t.citing, t.cited), (t.citing, t.other))]
        labels = np.tile([1, 0], len(splits[name]))
        arrays |= split_arrays(name, (tokens[id] for pair in pairs for id in pair), labels, alphabet.dtype)
    return Stored(arrays, {"symbols": alphabet.symbols}, f"{FOLDER}: {papers.name}, {citations.name}")


def draw_pairs(years: Mapping[str, int], citations: Collection[tuple[str, str]], *, seed: int) -> list[Triple]:
    """Each citation with a paper to tell the cited one from.

    Args:
        years: of every paper.
        citations: pairs of citing and cited paper, in any order.
    """
    cited_in = defaultdict(list)  # papers by year, one as often as it is cited
    taken = {id: {id} for id in years}  # what a paper may not be paired with any more
    pairs = []
    for citing, cited in sorted(citations):
        if cited in taken[citing]:  # itself, or a pair the other way round
            continue
        pairs.append((citing, cited))
        cited_in[years[cited]].append(cited)
        taken[citing].add(cited)
        taken[cited].add(citing)
    draw = random.Random(seed)
    triples = []
    for citing, cited in pairs:
        others = [id for id in cited_in[years[cited]] if id not in taken[citing]]
        if others:
            other = others[int(draw.random() * len(others))]
            taken[citing].add(other)
            taken[other].add(citing)
            triples.append(Triple(citing, cited, other))
    return triples


def split_by_citing(triples: Iterable[Triple], fractions: Mapping[str, float], *, seed: int) -> dict[str, list[Triple]]:
    """Triples by split, in their order: `fractions` of the citing papers, and "train" with the others'."""
    triples = list(triples)
    draw = random.Random(seed)
    order = {citing: draw.random() for citing in sorted({t.citing for t in triples})}
    shuffled = sorted(order, key=lambda citing: (order[citing], citing))
    split_of: dict[str, str] = {}
    start = 0
    for name, fraction in fractions.items():
        end = start + round(len(shuffled) * fraction)
        split_of |= dict.fromkeys(shuffled[start:end], name)
        start = end
    splits: dict[str, list[Triple]] = {name: [] for name in (*fractions, "train")}
    for triple in triples:
        splits[split_of.get(triple.citing, "train")].append(triple)
    return splits


def _files(folder: Path) -> tuple[Path, Path]:
    for papers, citations in FILES:
        if (folder / papers).is_file() and (folder / citations).is_file():
            return folder / papers, folder / citations
    raise DataError(f"{folder} does not hold both {' and '.join(FILES[0])}.\n{ADVICE}")


def read_papers(path: Path, max_characters: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The text, as code points, and the year of each paper, by id."""
    texts: dict[str, np.ndarray] = {}
    years: dict[str, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, row {number}"
            try:
                paper = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is no JSON: {error}") from error
            if not isinstance(paper, dict) or not all(isinstance(paper.get(key), str) for key in ("id", *FIELDS)):
                raise DataError(f"{where}: expected an object with the strings id, {', '.join(FIELDS)}")
            id = paper["id"]
            if id in texts:
                raise DataError(f"{where}: the paper {id} was there before")
            years[id] = _year(id, where)
            text = "\n".join(filter(None, (paper[key].strip() for key in FIELDS)))
            if not text:
                raise DataError(f"{where}: the paper {id} has no text")
            try:
                texts[id] = code_points(text[:max_characters])
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: {error}") from error
    return texts, years


def _year(id: str, where: str) -> int:
    """The year in an Anthology id, P05-1001 or, since 2020, 2020.acl-main.1; the Anthology begins in 1952."""
    if match := re.fullmatch(r"[A-Z](\d\d)-\d{4,5}", id, re.ASCII):
        return 1900 + int(match[1]) if int(match[1]) >= 52 else 2000 + int(match[1])
    if match := re.fullmatch(r"(\d{4})\.[^\s.]+\.\d+", id, re.ASCII):
        return int(match[1])
    raise DataError(f"{where}: {id[:40]!r} is no id of the ACL Anthology, such as P05-1001 or 2020.acl-main.1")


def read_citations(path: Path, papers: Collection[str]) -> set[tuple[str, str]]:
    """Pairs of citing and cited paper, of the rows that name two of `papers`; a header names none."""
    citations = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, row {number}"
            try:
                columns = line.decode("utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {error}") from error
            if len(columns) != 2 or not all(columns):
                raise DataError(f"{where}: {len(columns)} columns; expected 2, the ids of a citing and a cited paper")
            citing, cited = columns
            if citing in papers and cited in papers:
                citations.add((citing, cited))
    return citations
