"""What is shown of text that came from somewhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.messages import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\r\tc\x07\x7f", r"a\nb\r\tc\x07\x7f"),
        ("\x9b31m \u2028\u202e", r"\x9b31m \u2028\u202e"),
        ("\udcff", r"\udcff"),
        ("±1.5 μ é 日本 'C:\\x' 🙂", "±1.5 μ é 日本 'C:\\x' 🙂"),
    ],
)
def test_what_is_not_printed_is_escaped(text, shown):
    assert printable(text) == shown


@given(st.text())
def test_all_that_is_shown_is_printed(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert printable_lines(text).replace("\n", "").isprintable()
    assert printable_lines(text).count("\n") == text.count("\n")
