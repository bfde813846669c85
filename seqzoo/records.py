"""Files that somebody else may have written, read as data: nothing in them is carried out, and none is too much."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST = 1 << 24  # bytes
LARGEST_YAML = 1 << 17  # bytes: it is slow to read
DEEPEST = 16  # levels of YAML


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
        FileNotFoundError: there is none.
        ValueError: it is larger, or a folder, a device or a pipe, which could be waited for without end.
    """
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(-1 if largest is None else largest + 1)
    if largest is not None and len(content) > largest:
        raise ValueError(f"it is larger than {largest:,} bytes")
    return content
