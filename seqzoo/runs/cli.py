"""The command line of `train.py`.

Sweeps are expanded with Hydra's parser and run here, because Hydra's own sweeper composes all cells before the first
and stops at the first failure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain

from ..config import GROUPS, ConfigError, available, check_keys, compose, to_dict
from ..failures import ends
from .attempt import STOPPED, UNFINISHED, attempt
from .campaign import expand, run_campaign, single
from .folder import BUSY

EPILOGUE = """{groups}

every other key is a dotted override; --cfg shows them all:
  python train.py model=lru task=lra_text recipe=tiny pretrain=true
  python train.py model=transformer finetuning.lr=3e-4 seed=1
  python train.py -m model=transformer,lru pretrain=false,true seed=0,1,2
  python train.py -m study=data_scale model=lru task=lra_image budget=2h    sweeps of configs/study/, for two hours
  python train.py -m launcher=slurm seed=0,1,2                  a job of a cluster for each run
  python train.py pretrain=runs/<folder> finetuning.lr=1e-4     reuse that run's pretraining
  python train.py resume=runs/<folder>                          continue an interrupted run
  torchrun --nproc-per-node 2 train.py model=lru                one run on two GPUs
  torchrun --nproc-per-node 2 train.py model=lru sequence_parallel=2    half of each sequence's time on either

The same command again continues what is unfinished and skips what is finished; in a second terminal it takes other
runs.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; returns the exit status.

    0: done; 1: a run failed; 2: the arguments ask for something that does not exist; 3: unfinished, because the time
    was up or another process is at work on it; 130: interrupted, and saved.
    """
    return ends("train.py", lambda: _main(argv), stopped=STOPPED)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    sweep = expand(arguments.overrides) if arguments.multirun else [[single(arguments.overrides)]]
    if arguments.cfg:
        for run in chain(*sweep):
            _print_config(run)
        return 0
    if arguments.multirun:
        return run_campaign(sweep)
    ((overrides,),) = sweep
    check_keys(overrides)
    if any(override.startswith("launcher") and override != "launcher=here" for override in overrides):
        raise ConfigError("launcher= queues the runs of a sweep; add -m, for one run too")
    status = attempt(overrides)
    return UNFINISHED if status == BUSY else status


def _print_config(overrides: list[str]) -> None:
    from omegaconf import OmegaConf

    print(OmegaConf.to_yaml(OmegaConf.create(to_dict(compose(overrides)))), end="")


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"{group + '=':<9}{', '.join(available(group))}" for group in GROUPS)
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a sequence mixer on a task, from scratch or after self-pretraining on the same data.",
        epilog=EPILOGUE.format(groups=groups),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choose model=, task=, recipe=; set any key")
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep: comma lists are run one after another")
    parser.add_argument("--cfg", action="store_true", help="print the resolved configuration and exit")
    return parser
