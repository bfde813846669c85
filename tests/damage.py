"""Damage to files, drawn from a seed: the same number is the same damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**63,
        10**400,
        0.5,
        -0.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1",
        "\x1b[31m",
    ),
    *("${oc.env:HOME}", "../..", "\ud800", [], [1], ["x"], [[[]]], {}, {"x": 1}, {"loss": None}),
)


def half(content: bytes, draw: random.Random) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes, draw: random.Random) -> bytes:
    return b""


def flipped(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return b"\x00"
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def garbage(content: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((1, 8, 100, 5000)))


def tail(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(16)


def brackets(content: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"[", b'{"a":')) * 100_000


def other_json(content: bytes, draw: random.Random) -> bytes:
    return json.dumps(draw.choice(JUNK)).encode()


def cut_anywhere(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def spliced(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return (
        content[:place]
        + draw.choice((b"\x00", b"\n", b"{", b"}", b'"', b": ", b"- ", b"&a *a", b"!!x "))
        + content[place:]
    )


def other_field(content: bytes, draw: random.Random) -> bytes:
    """A value somewhere in the JSON or YAML becomes another, or goes."""
    try:
        values = json.loads(content)
    except ValueError:
        lines = content.splitlines()
        place = draw.randrange(len(lines)) if lines else 0
        key = lines[place].partition(b":")[0] if lines else b"x"
        return b"\n".join([*lines[:place], key + b": " + json.dumps(draw.choice(JUNK)).encode(), *lines[place + 1 :]])
    places = list(_places(values))
    if not places:
        return json.dumps(draw.choice(JUNK)).encode()
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(JUNK)
    return json.dumps(values).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


CONTENT: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(half, empty, flipped, garbage, tail, brackets, other_json, cut_anywhere, spliced),
    *(other_field,) * 6,
)
PLACE = ("missing", "folder", "loop")


def damage(path: Path, seed: int) -> str:
    """Damages what is at `path`; returns how, in a word."""
    draw = random.Random(seed)
    kind = draw.choice((*CONTENT, *PLACE))
    content = path.read_bytes() if path.is_file() else b""
    _clear(path)
    if kind == "folder":
        path.mkdir(parents=True)
    elif kind == "loop":
        path.symlink_to(path)
    elif callable(kind):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kind(content, draw))
    return kind if isinstance(kind, str) else kind.__name__


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
