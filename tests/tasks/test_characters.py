from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.tasks.characters import EOS, UNK, Alphabet, code_points


def test_the_most_frequent_first_and_ties_by_code_point():
    alphabet = Alphabet([code_points("cabba"), code_points("é🎬b")], 1)
    assert alphabet.symbols == ["<mask>", "<pad>", "<unk>", "<eos>", "b", "a", "c", "é", "🎬"]
    assert alphabet.dtype is np.uint8


def test_rare_characters_are_unknown():
    alphabet = Alphabet([code_points("aab")], 2)
    assert alphabet.symbols[4:] == ["a"]
    assert alphabet.tokens(code_points("abz")).tolist() == [4, UNK, UNK, EOS]


def test_an_empty_text():
    alphabet = Alphabet([code_points("")], 0)
    assert len(alphabet.symbols) == 4
    assert alphabet.tokens(code_points("")).tolist() == [EOS]


def test_half_a_surrogate_pair_is_no_character():
    with pytest.raises(UnicodeEncodeError):
        code_points("\ud800")


@settings(max_examples=30)
@given(st.lists(st.text(), min_size=1))
def test_text_is_what_its_ids_stand_for(texts):
    alphabet = Alphabet(map(code_points, texts), 1)
    for text in texts:
        tokens = alphabet.tokens(code_points(text))
        assert "".join(alphabet.symbols[id] for id in tokens[:-1]) == text
        assert tokens[-1] == EOS
