"""What needs PyTorch, and may end with its process: a finding a line, as JSON. Run by `python -m seqzoo.doctor`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from .. import tasks
from ..kernels import backends
from ..tasks.store.cache import default_folder
from ..tasks.store.release import ARCHIVES
from ..training.loggers import wandb_mode
from .finding import BAD, OK, UNKNOWN, Finding
from .operations import BOUNDS, checks, worst

FIRST_WRONG, FIRST_RIGHT = (3, 4), (3, 7, 1)  # versions of Triton, see `canary`


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the findings; of operations, all names first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cache-dir", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    planned = list(checks(device))
    print(json.dumps({"device": device.type, "operations": [str(check) for check in planned]}), flush=True)
    for finding in (devices(device), *compilers(device), data(given.data_dir, given.cache_dir), wandb()):
        print(json.dumps(finding), flush=True)
    for check in planned:
        try:
            name, error = worst(check, device)
        except Exception as failure:
            said = f"{type(failure).__name__}: {str(failure).splitlines()[0][:60] if str(failure) else ''}"
            print(json.dumps(Finding(BAD, str(check), said)), flush=True)
            continue
        bound = BOUNDS[check.dtype]
        state = OK if error <= bound else BAD
        print(json.dumps(Finding(state, str(check), f"{name} {error:.0e} from its definition")), flush=True)


def devices(device: torch.device) -> Finding:
    """The one that training takes."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        others = torch.cuda.device_count() - 1
        named = (
            f"{torch.cuda.get_device_name(device)}, {memory / 1e9:,.0f} GB{f', and {others} more' if others else ''}"
        )
        old = backends.architecture(device) < backends.OLDEST_ARCHITECTURE
        return Finding(
            BAD if old else OK, "device", f"{named}{': older than sm_80, too old for Triton' if old else ''}"
        )
    built = f"PyTorch is built for CUDA {torch.version.cuda} and finds no GPU" if torch.version.cuda else "no GPU"
    return Finding(OK, "device", f"CPU, {torch.get_num_threads()} threads ({built})")


def compilers(device: torch.device) -> Iterator[Finding]:
    """What is known of Triton's version."""
    if device.type == "cpu" and not backends.INTERPRETED:
        yield Finding(OK, "triton", "not used: kernels run on a GPU")
        return
    try:
        number = version("triton")
    except Exception:
        yield Finding(UNKNOWN, "triton", "not installed: operations run in their PyTorch forms")
        return
    known = tuple(int(part) for part in number.split("+")[0].split(".")[:3] if part.isdecimal())
    if FIRST_WRONG <= known < FIRST_RIGHT and device.type == "cuda" and backends.architecture(device) == 90:
        yield Finding(OK, "triton", f"{number} is known for wrong code on Hopper; no kernel here has that pattern")
    else:
        yield Finding(OK, "triton", number)
    if backends.INTERPRETED and known < (3, 7) and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4):
        yield Finding(
            BAD, "triton", f"{number}'s interpreter fails with NumPy {version('numpy')}: numpy<2.4, triton>=3.7"
        )


def data(data_dir: Path | None, cache_dir: Path | None) -> Finding:
    """Which published data lie in the folders; none are needed to begin."""
    archives = (tasks.lra_text.ACL_IMDB, tasks.cifar10.ARCHIVE)
    names = [name for archive in archives for name in (archive.folder, archive.filename)]
    names += [task.FOLDER for task in (tasks.smnist, tasks.fsdd, tasks.acl_retrieval, tasks.speech_commands)]
    names += [*ARCHIVES, tasks.lra_listops.FOLDER]
    found = [name for name in names if data_dir is not None and (data_dir / name).exists()]
    cache = cache_dir or default_folder()
    prepared = sorted(path.parent.name.rsplit("-", 1)[0] for path in cache.glob("*/manifest.json"))
    where = f"in {data_dir}: {', '.join(found) or 'none'}" if data_dir else "no data_dir given"
    return Finding(OK, "data", f"{where}; prepared: {', '.join(dict.fromkeys(prepared)) or 'none'}")


def wandb() -> Finding:
    """What a run does with Weights & Biases unless told otherwise; nothing of a key is shown."""
    asked = os.environ.get("WANDB_MODE")
    return Finding(OK, "wandb", f"{wandb_mode(None)}{' (WANDB_MODE)' if asked else ''}")


if __name__ == "__main__":
    main()
