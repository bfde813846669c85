"""CSV in which text is nothing but text."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqzoo.report.sheet import to_sheet


def only(value):
    ((cell,),) = csv.reader(to_sheet([[value]]).splitlines())
    return cell


@pytest.mark.parametrize("text", ["=cmd|'/c calc'!A0", "+1+1", "-1+1", "@SUM(A1)", " =1", "\uff1d1", "-inf", "=", "-"])
def test_text_is_no_formula(text):
    assert only(text) == f"'{text}"


@pytest.mark.parametrize("text", ["\t=1", "\r=1", "\n=1", "\x1b[31m"])
def test_control_characters_are_escaped(text):
    assert only(text) == repr(text)[1:-1]


@pytest.mark.parametrize("value", [-0.5, -3, 0.1, "-0.5", "+1", "-1e-05", "-.5", "1 / 2", "a = b", "", None])
def test_numbers_and_other_text_stay(value):
    assert only(value) == ("" if value is None else str(value))


@given(st.text(min_size=1))
def test_no_text_begins_a_formula(text):
    shown = only(text)
    try:
        float(shown)
    except ValueError:
        assert shown.lstrip()[:1] not in tuple("=+-@\t\r")
