from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_configs import small_listops

from seqzoo.tasks import DataError, build_task, lra_listops, origin_of
from seqzoo.tasks.listops_generator import generate
from seqzoo.tasks.listops_grammar import EOS, SYMBOLS, Grammar, evaluate, tokenise

SMALL = Grammar(max_depth=5, max_args=10, min_length=20, length_bound=200)


def draw(num_rows: int, grammar: Grammar = SMALL, *, seed: int = 0, workers: int | None = 1):
    return generate(grammar, num_rows, seed=seed, workers=workers, advance=lambda rows: None)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("( ( ( [MAX 4 ) 3 ) ] )", 4),
        ("[MIN 4 3 ]", 3),
        ("[MED 1 2 9 ]", 2),
        ("[MED 1 2 ]", 1),
        ("[MED 9 1 4 8 ]", 6),
        ("[SM 7 8 9 ]", 4),
        ("[MAX 2 [MIN 9 [SM 5 3 ] ] [MED 1 1 ] ]", 8),
    ],
)
def test_evaluate(expression, value):
    assert evaluate(tokenise(expression)) == value


def test_tokenise_keeps_the_brackets():
    tokens = tokenise("( ( ( [MAX 4 ) 3 ) ] )")
    assert [SYMBOLS[token] for token in tokens] == ["[MAX", "4", "3", "]"]
    assert SYMBOLS[:6] == ("<mask>", "<pad>", "<unk>", "<eos>", "0", "1")
    assert len(SYMBOLS) == 19


@pytest.mark.parametrize("expression", ["", "1 2", "[MAX 1 2", "[MAX ]", "1 ]", "[MAX 1 ] ]"])
def test_evaluate_refuses_what_is_no_expression(expression):
    with pytest.raises(ValueError, match="not a ListOps expression"):
        evaluate(tokenise(expression))


def test_tokenise_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'\[AVG' is no symbol of ListOps; valid: 0 1 2"):
        tokenise("( [AVG 1 )")


def test_generated_expressions_follow_the_grammar():
    rows, labels = draw(1000)
    assert [evaluate(row) for row in rows] == labels.tolist()
    assert all(20 < len(row) < 200 for row in rows)
    assert len({row.tobytes() for row in rows}) == 1000
    operators = [token for row in rows for token in row.tolist() if token >= SYMBOLS.index("[MIN")]
    brackets = operators.count(SYMBOLS.index("]"))
    shares = [operators.count(SYMBOLS.index(symbol)) / brackets for symbol in ("[MIN", "[MAX", "[MED", "[SM")]
    assert shares == pytest.approx([0.25] * 4, abs=0.02)
    depths = {max(np.cumsum([(14 <= t <= 17) - (t == 18) for t in row.tolist()])) for row in rows}
    assert max(depths) == 4  # the root's depth is 1, and below depth 5 there are digits only


def test_a_tiny_grammar_is_exhausted_and_then_refused():
    """One operator on two digits: 400 expressions, each found once."""
    tiny = Grammar(max_depth=2, max_args=2, min_length=3, length_bound=5)
    rows, labels = draw(400, tiny)
    digits = range(4, 14)
    assert sorted(map(bytes, rows)) == [bytes([o, a, b, 18]) for o in range(14, 18) for a in digits for b in digits]
    assert [evaluate(row) for row in rows] == labels.tolist()
    with pytest.raises(ValueError, match="401 rows were asked for and only 400 distinct ones found"):
        draw(401, tiny)


@pytest.mark.parametrize("workers", [2, 3, None])
def test_rows_do_not_depend_on_the_number_of_workers(workers):
    rows, labels = draw(6000, seed=5)
    other_rows, other_labels = draw(6000, seed=5, workers=workers)
    assert b"".join(map(bytes, rows)) == b"".join(map(bytes, other_rows))
    assert labels.tolist() == other_labels.tolist()


def test_a_seed_is_a_stream_of_its_own():
    first, second = ({bytes(row) for row in draw(500, seed=seed)[0]} for seed in (0, 1))
    assert len(first & second) < 5
    assert bytes(draw(1)[0][0]) == bytes(draw(500)[0][0])  # asking for more only adds


def test_published_settings_give_the_published_distribution():
    rows, labels = draw(3000, Grammar())
    lengths = np.array([len(row) for row in rows])
    assert 500 < lengths.min() < 520
    assert 1950 < lengths.max() < 2000
    assert lengths.mean() == pytest.approx(1035, abs=25)
    shares = np.bincount(labels) / 3000
    assert shares[[0, 9]] == pytest.approx(0.17, abs=0.025)
    assert shares[1:9] == pytest.approx(0.083, abs=0.025)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_depth": 1}, "at least 2"),
        ({"max_args": 1}, "at least 2"),
        ({"min_length": 199}, "no length lies between"),
    ],
)
def test_grammars_that_draw_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        Grammar(**{"max_depth": 5, "max_args": 10, "min_length": 20, "length_bound": 200, **settings})


def test_the_task(tmp_path):
    task = build_task(small_listops(), data_dir=None, cache_dir=tmp_path)
    assert [len(split) for split in (task.train, task.val, task.test)] == [300, 40, 50]
    assert (task.spec.vocab_size, task.spec.num_classes, task.spec.mask_id, task.spec.pad_id) == (19, 10, 0, 1)
    assert task.train.values.dtype == torch.uint8
    assert task.note == "max_depth 5, min_length 20, length_bound 200, num_train 300, num_val 40, num_test 50"
    seen = set()
    for split in (task.train, task.val, task.test):
        batch = split.batch(torch.arange(len(split)))
        for row, length, label in zip(batch.inputs.numpy(), batch.lengths, batch.labels, strict=True):
            assert row[length - 1] == EOS
            assert evaluate(row[: length - 1]) == label
            seen.add(bytes(row.astype(np.uint8)[:length]))
    assert len(seen) == 390


def test_the_same_task_from_the_cache_and_from_other_workers(tmp_path):
    values = [
        build_task(small_listops(workers=workers), data_dir=None, cache_dir=tmp_path / cache).train.values
        for workers, cache in ((1, "a"), (2, "a"), (2, "b"))
    ]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert len(list((tmp_path / "a").glob("lra_listops-*"))) == 1
    other_seed = build_task(small_listops(generator_seed=1), data_dir=None, cache_dir=tmp_path / "a")
    assert not torch.equal(values[0][:1000], other_seed.train.values[:1000])


def test_cut_expressions_are_noted(tmp_path):
    task = build_task(small_listops(max_length=64), data_dir=None, cache_dir=tmp_path)
    assert "expressions cut to 64 symbols" in task.note
    assert task.train.lengths.max() == 64
    assert (task.train.values[task.train.offsets[1:] - 1] == EOS).all()


@pytest.mark.parametrize(("change", "message"), [({"num_val": 0}, "num_val=0"), ({"workers": 0}, "workers=0")])
def test_settings_out_of_range(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build_task(small_listops(**change), data_dir=None, cache_dir=tmp_path)


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Files in the released layout, with four rows a split, and the configuration that asks for them."""
    small = {"num_train": 4, "num_val": 4, "num_test": 4}
    monkeypatch.setattr(lra_listops, "PUBLISHED", lra_listops.PUBLISHED | small)
    folder = tmp_path / "data" / "lra_release" / "lra_release" / "listops-1000"
    folder.mkdir(parents=True)
    for i, name in enumerate(("basic_train.tsv", "basic_val.tsv", "basic_test.tsv")):
        rows = [f"( ( ( [MAX {i} ) {n} ) ] )\t{max(i, n)}" for n in range(4)]
        (folder / name).write_text("\n".join(["Source\tTarget", *rows]) + "\n")
    config = small_listops(**{k: v for k, v in lra_listops.PUBLISHED.items() if k != "name"}, max_length=2048)
    return folder, config, tmp_path


def test_released_files_are_read(released):
    _, config, tmp_path = released
    task = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert task.note == "released rows"
    batch = task.val.batch(torch.arange(4))
    assert [SYMBOLS[token] for token in batch.inputs[2, :5]] == ["[MAX", "1", "2", "]", "<eos>"]
    assert batch.lengths.tolist() == [5] * 4
    assert batch.labels.tolist() == [1, 1, 2, 3]


def test_released_files_are_not_taken_for_another_grammar(released):
    _, config, tmp_path = released
    config.min_length, config.length_bound = 20, 200
    task = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert task.note == "min_length 20, length_bound 200"
    assert task.train.lengths.min() > 20


def test_changed_files_are_read_anew(released):
    folder, config, tmp_path = released
    before = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    path = folder / "basic_test.tsv"
    path.write_text(path.read_text().replace("[MAX", "[MIN"))
    os.utime(path, ns=(1, 1))
    after = build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    assert before.test.values[0] != after.test.values[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("Source", "Sauce"), r"basic_train\.tsv: the header is b'Sauce\\tTarget'"),
        (lambda text: text.replace("\t2", " 2"), r"basic_train\.tsv, row 4: expected an expression, a tab and a digit"),
        (
            lambda text: text.replace("\t2", "\t12"),
            r"basic_train\.tsv, row 4: expected an expression, a tab and a digit",
        ),
        (lambda text: text.replace("[MAX 0 ) 1", "[MÄX 0 ) 1"), r"basic_train\.tsv, row 3: 'ascii' codec can't decode"),
        (lambda text: text.replace("[MAX 0 ) 1", "[MUX 0 ) 1"), r"basic_train\.tsv, row 3: '\[MUX' is no symbol"),
        (lambda text: text[: text.rindex("(")].rsplit("\n", 1)[0], r"basic_train\.tsv holds 3 rows, expected 4"),
    ],
    ids=["header", "label", "two digits", "no ASCII", "symbol", "cut"],
)
def test_damaged_rows_are_named(released, damage, message):
    folder, config, tmp_path = released
    path = folder / "basic_train.tsv"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=message):
        build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def test_a_missing_file_is_named(released):
    folder, config, tmp_path = released
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"basic_val\.tsv is missing\.\nPut it there; without the folder, rows are gen"):
        build_task(config, data_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


@settings(max_examples=200, deadline=None)
@given(
    st.binary() | st.lists(st.sampled_from([*SYMBOLS, "(", ")", "\t", "\n", "\r", "é"])).map(" ".join).map(str.encode)
)
def test_any_rows_are_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "basic_train.tsv")
        path.write_bytes(b"Source\tTarget\n" + content)
        with suppress(DataError):
            expressions, labels = lra_listops._read(path, 1)
            assert (len(expressions), len(labels)) == (1, 1)
            assert 0 <= labels[0] <= 9


@pytest.fixture(scope="module")
def published(real_data) -> list[tuple[str, int]]:
    """1,000 rows that the published generator drew at its defaults: expression and label."""
    path = real_data("listops/lra_generator_1000.tsv") / "listops" / "lra_generator_1000.tsv"
    return [(row[0], int(row[1])) for row in (line.split("\t") for line in path.read_text().splitlines()[1:])]


@pytest.fixture(scope="module")
def original(real_data) -> list[tuple[str, int]]:
    """The 10,000 rows of an original test set, which has FIRST and LAST where the benchmark has MED and SM."""
    path = real_data("listops/spinn_test_d14.tsv") / "listops" / "spinn_test_d14.tsv"
    return [(row[1], int(row[0])) for row in (line.split("\t") for line in path.read_text().splitlines())]


def nested(expression: str) -> list:
    """The tree that parentheses alone make of an expression: a symbol, or a list of two trees."""
    open_lists: list[list] = [[]]
    for symbol in expression.split():
        if symbol == "(":
            open_lists.append([])
        elif symbol == ")":
            closed = open_lists.pop()
            open_lists[-1].append(closed)
        else:
            open_lists[-1].append(symbol)
    ((tree,),) = open_lists
    return tree


def counted(tree: list | str) -> int:
    """The published generator's length of a tree: 1 for a digit, and 2 and its arguments' for an operator."""
    if isinstance(tree, str):
        return 1
    rest, _ = tree  # the whole of an operator is [[[operator, argument], argument, ...], "]"]
    length = 2
    while isinstance(rest, list):
        rest, argument = rest
        length += counted(argument)
    return length


def in_published_form(tokens: np.ndarray) -> str:
    """Ids as the benchmark writes them, with a pair of parentheses for each argument and each closing bracket."""
    nodes: list[list[str]] = [[]]
    for token in tokens.tolist():
        symbol = SYMBOLS[token]
        if symbol.startswith("["):
            nodes.append([symbol])
        elif symbol == "]":
            whole, *arguments = nodes.pop()
            for argument in (*arguments, "]"):
                whole = f"( {whole} {argument} )"
            nodes[-1].append(whole)
        else:
            nodes[-1].append(symbol)
    ((expression,),) = nodes
    return expression


def test_the_published_generators_rows(published):
    """Evaluator, tokeniser and length agree with every row; parentheses say nothing that brackets do not."""
    assert len(published) == 1000
    for expression, label in published:
        tokens = tokenise(expression)
        assert evaluate(tokens) == label
        assert in_published_form(tokens) == expression
        assert len(tokens) == counted(nested(expression))
        assert 500 < len(tokens) < 2000


def test_the_original_rows(original):
    """Every MIN and MAX by our evaluator, every FIRST and LAST, which we have not, by what they say."""
    assert len(original) == 10_000
    for expression, label in original:
        nodes: list[list[str]] = [[]]
        for symbol in expression.replace("(", " ").replace(")", " ").split():
            if symbol.startswith("["):
                nodes.append([symbol])
            elif symbol == "]":
                operator, *arguments = nodes.pop()
                if operator in ("[FIRST", "[LAST"):
                    nodes[-1].append(arguments[0 if operator == "[FIRST" else -1])
                else:
                    nodes[-1].append(str(evaluate(tokenise(" ".join([operator, *arguments, "]"])))))
            else:
                nodes[-1].append(symbol)
        assert nodes == [[str(label)]]


def test_original_rows_without_other_operators(original):
    """Whole, as the benchmark's are: tokens, their parentheses and their length."""
    ours = [(text, label) for text, label in original if "[FIRST" not in text and "[LAST" not in text]
    assert len(ours) > 500
    for expression, label in ours:
        tokens = tokenise(expression)
        assert evaluate(tokens) == label
        assert in_published_form(tokens) == expression
        assert len(tokens) == counted(nested(expression))


def published_draws(seed: int, num_rows: int) -> list[list[str]]:
    """What the published algorithm keeps at its defaults, symbol by symbol, drawn from Python's generator in its order:
    whether there is an operator, how many arguments, the arguments, which operator."""
    rng = random.Random(seed)

    def draw_node(depth: int) -> list[str]:
        if depth == 10 or rng.random() > 0.25:
            return [str(rng.randrange(10))]
        arguments = [draw_node(depth + 1) for _ in range(rng.randint(2, 10))]
        return [rng.choice(["[MIN", "[MAX", "[MED", "[SM"]), *itertools.chain(*arguments), "]"]

    rows: list[list[str]] = []
    while len(rows) < num_rows:
        row = draw_node(1)
        if 500 < len(row) < 2000:
            rows.append(row)
    return rows


def test_the_published_rows_are_draws_from_seed_0(published):
    """All of them, so that the algorithm above is the published one."""
    drawn = {" ".join(row) for row in published_draws(0, 1000)}
    assert drawn == {" ".join(SYMBOLS[token] for token in tokenise(expression)) for expression, _ in published}


def test_ours_are_distributed_as_published(published):
    """20,000 rows of ours beside 2,000 of the published algorithm's: their lengths do not differ by Kolmogorov and
    Smirnov at the level of 1 %, though they would if ours were one deeper or less deep. Nor do our labels, by chi
    squared, differ from those of the 1,000 published rows, though uniform ones would.

    The lengths of those 1,000 are no measure: seed 0 is an unlucky one. Their mean, 1,081, is 3.7 standard errors above
    that of 15,000 draws from seeds 1 to 15, with which ours agree."""
    rows, labels = draw(20_000, Grammar())
    lengths = np.array([len(row) for row in rows])
    theirs = np.array([len(row) for row in published_draws(1, 2000)])
    assert not lengths_differ(lengths, theirs)
    for depth in (9, 11):
        others, _ = draw(5000, Grammar(max_depth=depth))
        assert lengths_differ(np.array([len(row) for row in others]), theirs)
    counts = np.bincount([label for _, label in published], minlength=10)
    assert not labels_differ(np.bincount(labels, minlength=10) / len(labels), counts)
    assert labels_differ(np.full(10, 0.1), counts)


def lengths_differ(ours: np.ndarray, theirs: np.ndarray) -> bool:
    at = np.concatenate([ours, theirs])
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (ours, theirs)]
    critical = np.sqrt(-np.log(0.01 / 2) / 2 * (1 / len(ours) + 1 / len(theirs)))
    return bool(np.abs(below[0] - below[1]).max() > critical)


def labels_differ(shares: np.ndarray, counts: np.ndarray) -> bool:
    expected = shares * counts.sum()
    return bool(((counts - expected) ** 2 / expected).sum() > 21.67)  # the 99th percentile


def test_released_rows_are_told_from_generated_ones(released):
    folder, config, tmp_path = released
    places = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    found = origin_of(config, **places)
    assert found["origin"].keys() == {"basic_train.tsv", "basic_val.tsv", "basic_test.tsv"}
    shutil.copytree(folder, tmp_path / "copy" / "listops-1000")
    assert origin_of(config, data_dir=tmp_path / "copy", cache_dir=tmp_path / "cache") == found, "moved, not changed"
    with (folder / "basic_val.tsv").open("a") as file:
        file.write("[MAX 1 2 ]\t2\n")
    assert origin_of(config, **places) != found
    config.num_train = 3
    assert origin_of(config, **places) == {}, "so many are generated"
