"""A reader of offline W&B files, `run-<id>.wandb`.

They are LevelDB logs behind a header of 7 bytes (":W&B", the magic number 0xBEE1 and version 0): blocks of 32 KiB, each
a row of chunks of a crc32, a length and a type before the data; a record is one FULL chunk, or FIRST, MIDDLE and LAST.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
CHUNK = struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4


def read_records(path: Path) -> Iterator[Any]:
    """The protobuf records of a file, in order; a wrong checksum is a ValueError."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    if not data.startswith(HEADER):
        raise ValueError(f"{path} begins with {data[:7]!r}, not with {HEADER!r}")
    position, record = len(HEADER), b""
    while position + CHUNK.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:  # too little for a chunk: zeros
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        position += CHUNK.size
        payload = data[position : position + length]
        if len(payload) < length:  # not written to its end yet
            return
        if zlib.crc32(bytes([kind]) + payload) != checksum:
            raise ValueError(f"{path}: wrong checksum at {position}")
        position += length
        record = payload if kind in (FULL, FIRST) else record + payload
        if kind in (FULL, LAST):
            yield Record.FromString(record)


def read_run(path: Path, timeout: float = 30.0) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Configuration, logged lines and summary of the finished run in a file.

    W&B's service may still be writing when `finish` returns: waits up to `timeout` seconds for the record of the exit.
    """
    deadline = time.monotonic() + timeout
    while not any(record.WhichOneof("record_type") == "exit" for record in read_records(path)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} has no record of the run's exit")
        time.sleep(0.1)
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history = []
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
        elif kind == "summary":
            summary |= _items(record.summary.update)
    return config, history, summary


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
