"""Studies: the records of many finished runs in one file, a run a line, to be read as run folders are.

A line of `<study>.jsonl` is a JSON object, and lines are sorted by name:

    {"run": name, "config": ..., "task": ..., "result": ..., "pretraining": ..., "mixing": ..., "metrics": ...}

It holds what the run's folder has in config.yaml, task.json, result.json, pretrain/summary.json, mixing.json and
metrics.jsonl, each only if the folder has it. A run is addressed by a path wherever it lies: `runs/<name>`, or
`<study>.jsonl/<name>` as if the file were a folder, and its records by the names they have in a folder, such as
`<study>.jsonl/<name>/result.json`.

A line has at most `LARGEST_LINE` bytes, for which these are left out:

- of a stage's lines in metrics.jsonl all but 60 of training, evenly by position, the first and the last kept, and the
  next fewer of `POINTS` where the line would be too long; their numbers have `DIGITS` significant digits. Lines of
  validation are all there, and exact, even where they alone are too long;
- of mixing.json what a report does not read, all but `MIXING` of a layer; its picture is `mixing/<name>.png` beside the
  study;
- weights: what needs them says so; and the symbols of task.json, which serve to read what those write.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from . import records
from .files import LinkError, inside, write_bytes, write_json, write_text

SUFFIX = ".jsonl"
LARGEST_LINE = 8192  # bytes, that packing aims at
POINTS = (60, 50, 40, 30, 20, 10, 2)  # of training a stage: the first with which the line is short enough
DIGITS = 4
LARGEST = 1 << 28  # bytes of a file that is read
LARGEST_READ = 1 << 20  # bytes of a line that is read
START = b'{"run":'
KEYS = {
    "config.yaml": "config",
    "task.json": "task",
    "result.json": "result",
    "pretrain/summary.json": "pretraining",
    "mixing.json": "mixing",
}
MIXING = ("mean_distance", "window_share")
NEEDED = ("config.yaml", "result.json")
CURVE, PICTURE, PICTURES = "metrics.jsonl", "mixing.png", "mixing"


class Study(NamedTuple):
    """What a study file holds."""

    runs: dict[str, dict[str, Any]]  # by name, sorted
    faults: list[str]  # a line that cannot be read, and why


def read_study(file: Path) -> Study:
    """The runs of a study file, of two lines with one name the later.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, or too large.
    """
    status = file.stat()
    return _read_study(file, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


def named_as_study(path: Path) -> bool:
    """Whether a path is a file that can be given as a study."""
    return path.suffix == SUFFIX and path.is_file()


def is_study(file: Path) -> bool:
    """Whether a file that was found among others is a study."""
    if not named_as_study(file):
        return False
    try:
        with file.open("rb") as lines:
            return any(line.startswith(START) for line in lines)
    except OSError:
        return False


def is_packed(run: Path) -> bool:
    """Whether a run is addressed as a line of a study."""
    return named_as_study(run.parent)


def packed_run(runs_dir: Path, name: str) -> Path | None:
    """The run of that name in one of the study files in a folder."""
    for file in sorted(runs_dir.glob(f"*{SUFFIX}")):
        try:
            if name in read_study(file).runs:
                return file / name
        except (OSError, ValueError):
            continue
    return None


def read(path: Path) -> Any:
    """A record of a run, its `config.yaml` or a JSON file, from its folder or from its line.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read; says why.
    """
    if (place := _place(path)) is None:
        return (records.read_yaml if path.suffix == ".yaml" else records.read_json)(path)
    file, name, record = place
    line = read_study(file).runs.get(name, {})
    if (key := KEYS.get(record)) not in line:
        raise FileNotFoundError(f"{file} has no {record} of a run {name}")
    value = copy.deepcopy(line[key])
    if key == "config":
        _check_plain(value)
    return value


def exists(path: Path) -> bool:
    """Whether a run has a record."""
    if (place := _place(path)) is None:
        return path.exists()
    file, name, record = place
    try:
        return KEYS.get(record) in read_study(file).runs.get(name, {})
    except (OSError, ValueError):
        return False


def picture_of(run: Path) -> Path:
    """Where the picture of a run's mixing is, if it has one."""
    return run.parent.parent / PICTURES / f"{run.name}.png" if is_packed(run) else run / PICTURE


def read_metrics(run: Path, key: str = "") -> Iterator[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` that have a number for `key`, in order; none where it has no such file.

    Left out is what is no line of metrics, such as one that was cut off while it was written.
    """
    try:
        if is_packed(run):
            lines = _lines(read_study(run.parent).runs.get(run.name, {}).get("metrics"), key)
        else:
            lines = map(parse_line, filter(lambda line: key in line, records.read_text(run / CURVE).split("\n")))
        yield from (line for line in lines if is_line(line) and (not key or _is_number(line.get(key))))
    except (OSError, ValueError):
        return


def parse_line(text: str) -> Any:
    """The value of a line of JSON, or None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_line(value: Any) -> bool:
    """Whether a value is a line of metrics: of a stage, after some steps and tokens."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("stage"), str)
        and type(value.get("step")) is int
        and _is_number(value.get("tokens"))
    )


def pack(runs: Iterable[Path], into: Path) -> tuple[int, list[tuple[Path, str]]]:
    """Writes finished runs into a study file, in which others stay and those of the same name are replaced, and the
    pictures of their mixing beside it. Returns how many lines it has then, and the runs left out, each with why.

    Args:
        runs: their folders, or lines of other studies. Of two with one name the later is left out.
        into: the file, which is made where there is none.

    Raises:
        ValueError: the file has lines that cannot be read, which would be lost.
        LinkError: the folder of pictures is a symbolic link.
    """
    lines: dict[str, bytes] = {}
    if into.exists():
        study = read_study(into)
        if study.faults:
            raise ValueError(f"{into}, {study.faults[0]}; valid: a study whose lines can all be read")
        lines = {name: _encoded(record) for name, record in study.runs.items()}
    left_out = []
    packed: dict[str, Path] = {}
    pictures = inside(into.parent, PICTURES)
    for run in runs:
        try:
            name, line = run.resolve().name, line_of(run)
            if packed.setdefault(name, run) != run:
                raise ValueError(f"a run of that name is {packed[name]}; valid: names that differ")
            picture = picture_of(run)
            if picture.is_file() and picture != pictures / f"{name}.png":
                write_bytes(pictures / f"{name}.png", picture.read_bytes())
        except LinkError:
            raise
        except (OSError, ValueError) as error:
            left_out.append((run, str(error)))
            continue
        lines[name] = line
    if lines:
        write_bytes(into, b"".join(lines[name] for name in sorted(lines)))
    return len(lines), left_out


def unpack(file: Path, into: Path) -> Iterator[tuple[Path, str | None]]:
    """Writes the runs of a study as folders in `into`; yields each folder, and why it was not written where it was not.

    A folder appears as a whole or not at all, and one that is there already is left as it is.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: it cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for name in read_study(file).runs:
        run, folder = file / name, into / name
        if os.path.lexists(folder):
            yield folder, "it is there already"
            continue
        begun = inside(into, f".{name}.tmp")
        try:
            shutil.rmtree(begun, ignore_errors=True)
            for record in KEYS:
                if not exists(run / record):
                    continue
                if record == "config.yaml":
                    write_text(begun / record, OmegaConf.to_yaml(OmegaConf.create(read(run / record))))
                else:
                    write_json(begun / record, read(run / record))
            if lines := list(read_metrics(run)):
                write_text(begun / CURVE, "".join(json.dumps(line) + "\n" for line in lines))
            if (picture := picture_of(run)).is_file():
                write_bytes(begun / PICTURE, picture.read_bytes())
            begun.rename(folder)
        except (OSError, ValueError, OmegaConfBaseException) as error:
            shutil.rmtree(begun, ignore_errors=True)
            yield folder, str(error)
        else:
            yield folder, None


def line_of(run: Path) -> bytes:
    """The line of a finished run, with its end.

    Raises:
        FileNotFoundError: a record that every finished run has is missing.
        ValueError: a record cannot be read, or the line would be too long to be read.
    """
    record: dict[str, Any] = {"run": run.resolve().name}
    for name, key in KEYS.items():
        try:
            record[key] = read(run / name)
        except FileNotFoundError:
            if name in NEEDED:
                raise FileNotFoundError(f"no {name}: no finished run") from None
        except ValueError as error:
            raise ValueError(f"{name} cannot be read: {error}") from None
    if fault := _fault(record):
        raise ValueError(fault)
    if "task" in record:
        record["task"] = {key: value for key, value in record["task"].items() if key != "symbols"}
    if "mixing" in record:
        record["mixing"] = _what_is_read(record["mixing"])
    lines = list(read_metrics(run))
    for points in POINTS:
        line = _encoded({**record, **({"metrics": _columns(_thinned(lines, points))} if lines else {})})
        if len(line) <= LARGEST_LINE:
            break
    if len(line) > LARGEST_READ:
        raise ValueError(f"its validation lines take {len(line):,} bytes; valid: {LARGEST_READ:,}")
    return line


def _is_number(value: Any) -> bool:
    return type(value) in records.NUMBER and records.is_finite(value)


def _place(path: Path) -> tuple[Path, str, str] | None:
    """The study file, the name of the run and that of the record, if `path` is a record in a study."""
    if f"{SUFFIX}{os.sep}" not in str(path):
        return None
    parts = path.parts
    for place in range(len(parts) - 2, 0, -1):
        if parts[place - 1].endswith(SUFFIX) and (file := Path(*parts[:place])).is_file():
            return file, parts[place], "/".join(parts[place + 1 :])
    return None


@lru_cache(maxsize=16)
def _read_study(file: Path, version: tuple[int, ...]) -> Study:
    """`read_study`, of a file as it was at a time."""
    runs, faults = {}, []
    for number, line in enumerate(records.read_bytes(file, LARGEST).split(b"\n"), start=1):
        if not line:
            continue
        try:
            if len(line) > LARGEST_READ:
                raise ValueError(f"it is larger than {LARGEST_READ:,} bytes")
            record = json.loads(line)
            if fault := _fault(record):
                raise ValueError(fault)
            runs[record["run"]] = record
        except RecursionError:
            faults.append(f"line {number}: it is nested too deeply")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    return Study(dict(sorted(runs.items())), faults)


def _fault(record: Any) -> str | None:
    """What is wrong with a line."""
    if not isinstance(record, dict) or not records.is_name(record.get("run")):
        return "it has no name of a run"
    for name, key in KEYS.items():
        if key in record and not isinstance(record[key], dict):
            return f"its {name} is {type(record[key]).__name__}, not keys and values"
        if name in NEEDED and key not in record:
            return f"it has no {name}"
    return None


def _check_plain(value: Any, depth: int = 1) -> None:
    """Raises ValueError where a configuration holds what `records.read_yaml` would not let through."""
    if depth > records.DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, str) and "${" in value:
        raise ValueError(f"{value} would be computed; valid: plain values")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_plain(part, depth + 1)


def _what_is_read(mixing: dict[str, Any]) -> dict[str, Any]:
    """A mixing.json without what takes most of it.

    Raises:
        ValueError: it is another.
    """
    try:
        stages = {
            stage: [{key: layer[key] for key in MIXING} for layer in layers]
            for stage, layers in mixing["stages"].items()
        }
    except (AttributeError, KeyError, TypeError):
        raise ValueError("mixing.json cannot be read: it is not what the analysis writes") from None
    return {**mixing, "stages": stages}


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _thinned(lines: list[dict[str, Any]], points: int) -> list[dict[str, Any]]:
    """All validation lines, and `points` of the others of each stage, rounded."""
    of_validation = [any(key.startswith("val/") for key in line) for line in lines]
    counts = Counter(str(line.get("stage")) for line, whole in zip(lines, of_validation, strict=True) if not whole)
    kept = {
        stage: {round(place * (count - 1) / (points - 1)) for place in range(points)} if count > points else None
        for stage, count in counts.items()
    }
    thinned, met = [], Counter[str]()
    for line, whole in zip(lines, of_validation, strict=True):
        stage = str(line.get("stage"))
        if whole:
            thinned.append(line)
        elif (places := kept[stage]) is None or met[stage] in places:
            thinned.append({key: _rounded(value) for key, value in line.items()})
        met[stage] += not whole
    return thinned


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _columns(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Lines with every key written once: a row has the number of its kind, which are a stage and keys, and values."""
    keys: dict[str, int] = {}
    kinds: dict[tuple[Any, ...], int] = {}
    rows = []
    for line in lines:
        values = {key: value for key, value in line.items() if key != "stage"}
        kind = str(line.get("stage")), *(keys.setdefault(key, len(keys)) for key in values)
        rows.append([kinds.setdefault(kind, len(kinds)), *values.values()])
    return {"keys": list(keys), "kinds": [list(kind) for kind in kinds], "rows": rows}


def _lines(columns: Any, key: str) -> Iterator[dict[str, Any]]:
    """The lines in `_columns` that have `key`, up to one that is damaged."""
    try:
        stages = [stage for stage, *_ in columns["kinds"]]
        kinds = [[columns["keys"][place] for place in places] for _, *places in columns["kinds"]]
        wanted = [not key or key in kind for kind in kinds]
        for kind, *values in columns["rows"]:
            if wanted[kind]:
                yield {"stage": stages[kind], **dict(zip(kinds[kind], values, strict=True))}
    except (KeyError, IndexError, TypeError, ValueError):
        return
