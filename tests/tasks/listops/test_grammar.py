from __future__ import annotations

import numpy as np
import pytest

from seqzoo.tasks.listops.grammar import SYMBOLS, Grammar, evaluate, tokenise


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
