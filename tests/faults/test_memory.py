from __future__ import annotations

from pathlib import Path

import pytest
from dying import in_child
from tiny_runs import tiny_config

from seqzoo.runs import run
from seqzoo.training import loop

STEPS, WARM = 20_000, 4_000
GROWTH = 10e6  # bytes: a tensor of the smallest size kept at every step would take twice that
PAGE = 4096


def resident() -> int:
    """Bytes of memory of this process."""
    return PAGE * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
def test_memory_stays_flat(task, tmp_path):
    """Over 20,000 steps, from the 4,000th on, as open files do."""

    def work() -> int:
        seen: dict[int, tuple[int, int]] = {}
        take_step = loop.Stage.take_step

        def counted(stage: loop.Stage) -> None:
            take_step(stage)
            if stage.state.step in (WARM, STEPS):
                seen[stage.state.step] = resident(), len(list(Path("/proc/self/fd").iterdir()))

        loop.Stage.take_step = counted  # type: ignore[method-assign]
        batch = {"batch_size": 4, "evaluations": 5}
        tokens = int(STEPS * 4 * task.train.lengths.double().mean()) + 1000
        run(tiny_config(tmp_path, finetuning={**batch, "tokens": tokens}), task=task)
        (before, files), (after, files_after) = seen[WARM], seen[STEPS]
        return 0 if after - before < GROWTH and files == files_after else 1

    assert in_child(work) == 0
