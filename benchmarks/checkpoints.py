"""What checkpoints of the largest `short` model cost, into results/checkpoints.md: a minute.

Seconds are those of this machine, its disk included. What they are of a run's time follows from the rule by which a
stage saves (`seqzoo.training.saves`), played on a clock: a phase of ten minutes, which is what `short` is made for,
with the validations of its recipe.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from seqzoo.config import available, compose
from seqzoo.models import build_model
from seqzoo.models.size import count_parameters
from seqzoo.runs.provenance import of_benchmark
from seqzoo.spec import TaskSpec
from seqzoo.training import saves
from seqzoo.training.checkpoint import Checkpoint, save_checkpoint, save_weights
from seqzoo.training.optimizer import build_optimizer

RESULT = Path(__file__).resolve().parents[1] / "results" / "checkpoints.md"
SPEC = TaskSpec(name="lra_text", kind="tokens", vocab_size=140, max_length=4096, num_classes=2, mask_id=0)
PHASE = 600.0  # seconds
TIMES = 15


def largest() -> tuple[int, str]:
    """The `short` model with the most parameters, and how many."""
    counted = []
    for model in available("model"):
        config = compose([f"model={model}", "task=lra_text", "recipe=short"])
        counted.append((count_parameters(config.model, SPEC, causal=config.causal), model))
    return max(counted)


def measured(name: str) -> dict[str, float]:
    """Megabytes, and seconds by the clock and of a processor, of a checkpoint and of the best weights alone."""
    config = compose([f"model={name}", "task=lra_text", "recipe=short"])
    model = build_model(config.model, SPEC, head="classify", causal=config.causal)
    optimizer = build_optimizer(model, config.finetuning)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    checkpoint = Checkpoint(model.state_dict(), optimizer.state_dict()["state"], {"step": 1})
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for kind, save in (
            ("last", lambda path: save_checkpoint(path, checkpoint)),
            ("best", lambda path: save_weights(path, checkpoint.weights)),
        ):
            path, clock, processor = Path(folder) / kind, [], []
            for _ in range(TIMES):
                started, used = time.perf_counter(), time.process_time()
                save(path)
                clock.append(time.perf_counter() - started)
                processor.append(time.process_time() - used)
            found |= {f"{kind} MB": path.stat().st_size / 1e6, f"{kind} clock": min(clock)}
            found[f"{kind} usual"] = statistics.median(clock)
            found[f"{kind} processor"] = min(processor)
    return found


def share(last: float, best: float, validations: int) -> float:
    """The part of a phase that goes into saving; every validation is taken for the best so far."""
    now = 0.0
    with patch.object(saves.time, "monotonic", lambda: now):
        kept, left = saves.Saves(), validations
        while now < PHASE:
            now += 0.05
            if left and now >= (validations - left + 1) * PHASE / (validations + 1):
                left -= 1
                with kept.one():
                    now += last + best
            elif kept.due():
                with kept.one():
                    now += last
        return kept.spent / now


def main() -> None:
    torch.set_num_threads(1)
    parameters, name = largest()
    found = measured(name)
    config = compose([f"model={name}", "task=lra_text", "recipe=short", "pretrain=true"])
    stages = {"pretraining": config.pretraining.evaluations, "fine-tuning": config.finetuning.evaluations}
    setting = of_benchmark({"threads": 1})
    lines = [
        "# What checkpoints cost",
        "",
        f"`{setting['command']}`, {setting['hardware']}, PyTorch {setting['versions']['torch']},",
        f"other work beside it. The largest model at `recipe=short` is `{name}`, {parameters:,} parameters.",
        "",
        "| file | MB | seconds by the clock, least of 15 | median | of a processor, least |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| `{kind}.safetensors` | {found[f'{kind} MB']:.1f} | {found[f'{kind} clock']:.2f} "
            f"| {found[f'{kind} usual']:.2f} | {found[f'{kind} processor']:.2f} |"
            for kind in ("last", "best")
        ),
        "",
        "Part of a phase of ten minutes that goes into saving, by the rule of `seqzoo/training/saves.py`, with every",
        "validation taken for the best so far, from the least times:",
        "",
        "| stage | validations | by the clock | by the processor |",
        "|---|---:|---:|---:|",
        *(
            f"| {stage} | {number} "
            f"| {100 * share(found['last clock'], found['best clock'], number):.2f} % "
            f"| {100 * share(found['last processor'], found['best processor'], number):.2f} % |"
            for stage, number in stages.items()
        ),
        "",
        "Checkpoints between validations wait until all that was saved is 1 % of the time; what validations save is",
        "the rest. So they are written where training waits for them: another thread would save less than that.",
        "",
    ]
    RESULT.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
