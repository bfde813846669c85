"""Files that somebody else may have written, read as data: nothing in them is carried out, and none is too much."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from types import NoneType
from typing import Any

from .messages import shortened

LARGEST = 1 << 24  # bytes
LARGEST_YAML = 1 << 17  # bytes: it is slow to read
DEEPEST = 16  # levels of YAML
NUMBER = (int, float)  # in a shape


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, too large or nested too deeply.
    """
    try:
        return json.loads(read_text(path, LARGEST))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, as `OmegaConf.load` has it, but without all that stands for something else.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no YAML, too large or nested too deeply, or has an alias, a tag or an interpolation; says
            where.
    """
    import yaml
    from omegaconf import OmegaConf

    text = read_text(path, LARGEST_YAML)
    depth, root = 0, None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if fault := _fault(event, depth):
                raise ValueError(f"line {event.start_mark.line + 1}: {fault}; valid: plain values")
            if root is None and isinstance(event, yaml.NodeEvent):
                root = event
        if not isinstance(root, yaml.MappingStartEvent):
            raise ValueError(f"it holds {type(yaml.safe_load(text)).__name__} in place of keys and values")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())}") from None


def check(value: Any, shape: Any, name: str = "it") -> None:
    """Holds a value that was read against what it should be.

    Args:
        shape: a type; `[shape]`, a list of such; a dictionary of shapes, in which keys that may be missing end in "?"
            and others may be there; or a tuple of types and a dictionary, any of which will do. Types are exact, `true`
            is no integer, and numbers are finite.
        name: of the value, for the message.

    Raises:
        ValueError: it is something else; says what and where.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {_shown(value)}, not keys and values")
        for key, inner in shape.items():
            known, place = key.rstrip("?"), key.rstrip("?") if name == "it" else f"{name}.{key.rstrip('?')}"
            if known in value:
                check(value[known], inner, place)
            elif key == known:
                raise ValueError(f"it has no {place}")
    elif isinstance(shape, list):
        if type(value) is not list:
            raise ValueError(f"{name} is {_shown(value)}, not a list")
        for number, part in enumerate(value):
            check(part, shape[0], f"{name}[{number}]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if isinstance(value, dict) and (inner := next((kind for kind in kinds if isinstance(kind, dict)), None)):
            check(value, inner, name)
        elif type(value) not in kinds or not is_finite(value):
            named = " or ".join(_named(kind) for kind in kinds)
            raise ValueError(f"{name} is {_shown(value)}, not {named}")


def is_finite(value: Any) -> bool:
    """False for a number that is none, or that no float holds."""
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:
        return False


def _named(kind: Any) -> str:
    return "keys and values" if isinstance(kind, dict) else "null" if kind is NoneType else kind.__name__


def _shown(value: Any) -> str:
    return shortened(repr(value) if is_finite(value) else "no finite number")


def is_name(value: Any) -> bool:
    """Whether a value that was read is a plain name, which leads from no folder to another but one in it."""
    return isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\\", "\0"} & {*value}


def _fault(event: Any, depth: int) -> str | None:
    """What is wrong with a part of a YAML file at that depth."""
    import yaml

    if isinstance(event, yaml.AliasEvent):
        return f"*{event.anchor} stands for what is written elsewhere"
    if tag := getattr(event, "tag", None):
        return f"{tag} would be made into something else"
    if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
        return f"{event.value} would be computed"
    return "it is nested too deeply" if depth > DEEPEST else None


def read_text(path: Path, largest: int | None = None) -> str:
    """The text in a file, of `largest` bytes at most.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not UTF-8; or as `read_bytes` does.
    """
    return read_bytes(path, largest).decode()


def read_bytes(path: Path, largest: int | None = None) -> bytes:
    """What is in a file, of `largest` bytes at most.

    Raises:
        FileNotFoundError: there is none, or no folder that it could be in.
        ValueError: it is larger, or a folder, a device or a pipe, which could be waited for without end; or the
            operating system refuses it.
    """
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no regular file")
            content = file.read(-1 if largest is None else largest + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    if largest is not None and len(content) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    return content
