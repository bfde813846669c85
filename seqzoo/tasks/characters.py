"""Text as ids of characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..spec import TaskSpec
from .config import TaskConfig
from .data import token_dtype

SPECIALS = ("<mask>", "<pad>", "<unk>", "<eos>")
MASK, PAD, UNK, EOS = range(len(SPECIALS))


def code_points(text: str) -> np.ndarray:
    """One number for each Unicode character, uint32 [T].

    Raises:
        UnicodeEncodeError: half of a surrogate pair, which is no character.
    """
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def text_spec(config: TaskConfig, symbols: Sequence[str], *, num_classes: int, num_inputs: int = 1) -> TaskSpec:
    """What a model is told of texts to classify, alone or in pairs, whose ids stand for an alphabet's `symbols`."""
    return TaskSpec(
        name=config.name,
        kind="tokens",
        vocab_size=len(symbols),
        max_length=config.max_length,
        num_classes=num_classes,
        pad_id=PAD,
        mask_id=MASK,
        num_inputs=num_inputs,
        mask_ratio=config.mask_ratio,
    )


class Alphabet:
    """The characters seen `min_frequency` times and more in `texts`, the most frequent first and ties by code point.

    Args:
        texts: code points, uint32 [T] each.

    Attributes:
        symbols: what each id stands for, the specials first.
        dtype: the smallest that holds the ids.
    """

    def __init__(self, texts: Iterable[np.ndarray], min_frequency: int) -> None:
        counts = np.zeros(0x110000, np.int64)  # of every code point there is
        for text in texts:
            points, times = np.unique(text, return_counts=True)
            counts[points] += times
        characters = np.flatnonzero((counts > 0) & (counts >= min_frequency))
        characters = characters[np.argsort(-counts[characters], kind="stable")]
        self.symbols = [*SPECIALS, *map(chr, characters)]
        self.dtype = token_dtype(len(self.symbols))
        self._ids = np.full(len(counts), UNK, self.dtype)
        self._ids[characters] = np.arange(len(SPECIALS), len(self.symbols))

    def ids(self, text: np.ndarray) -> np.ndarray:
        """Code points [T] as ids [T]."""
        return self._ids[text]

    def tokens(self, text: np.ndarray) -> np.ndarray:
        """Code points [T] as ids [T + 1], closed by <eos>."""
        return np.append(self._ids[text], self.dtype(EOS))


def ids_of(text: str, symbols: Sequence[str]) -> list[int]:
    """A text as ids of the characters in `symbols`.

    Raises:
        ValueError: it has a character that is none of them.
    """
    numbers = {symbol: number for number, symbol in enumerate(symbols) if len(symbol) == 1}
    others = dict.fromkeys(character for character in text if character not in numbers)
    if others:
        known = "".join(sorted(numbers))
        raise ValueError(f"no {', '.join(map(repr, others))} among the characters; valid: {known!r}")
    return [numbers[character] for character in text]
