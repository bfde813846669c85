"""Training on a GPU for as long as there is time: each model's step, then runs, resumable, where `eval_lra.py` reads.

    python benchmarks/gpu_train.py --deadline 150 --out results/gpu
    python eval_lra.py results/gpu

First the time of a training step of each of the models at `recipe=short`, tokens a second and model-flops
utilisation, into `step.jsonl`, a line as each is measured (`benchmarks/step.py` measures it, on random sequences); half
of the time at most. Then runs of the campaign, masked pretraining with fine-tuning after it, as `train.py -m` orders
them; the time over, the one in hand is saved, and the same command goes on with it. `--data` names unpacked data.

On a machine without network, PyTorch's own packages aside, training needs those of `gpu_train.txt`. One of them,
antlr4-python3-runtime, is published as source alone, of which a wheel is made beforehand:

    pip wheel --no-deps -w wheels antlr4-python3-runtime==4.9.3
    pip download --no-deps --only-binary=:all: --find-links wheels -d wheels -r benchmarks/gpu_train.txt \
        --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
    pip install --no-index --no-deps --target packages wheels/*.whl     there; then PYTHONPATH=packages
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE), str(HERE.parent)) if path not in sys.path]

import torch  # noqa: E402
from on_gpu import card  # noqa: E402
from on_gpu.log import Log  # noqa: E402
from step import line, measure, random_task  # noqa: E402

from seqzoo.config import available, compose  # noqa: E402
from seqzoo.runs import cli  # noqa: E402
from seqzoo.training.memory import keep_freed_memory  # noqa: E402

STEPS_SHARE = 0.5  # of the time, at most
FORMS = ("eager", "compiled")  # the first of all models before the second of any: compiling takes most of its time


def steps(log: Log, recipe: str, models: list[str], task: str, stages: list[str], number: int, until: float) -> int:
    """Measures a row for each model and form, the stages in turn; returns how many were not reached."""
    rows = [(form, stage, model) for form in FORMS for stage in stages for model in models]
    for done, (form, stage, model) in enumerate(rows):
        if time.monotonic() >= until:
            return len(rows) - done
        config = compose([f"model={model}", f"task={task}", f"recipe={recipe}", "wandb.mode=disabled"])
        part = config.pretraining if stage == "pretrain" else config.finetuning
        row: dict[str, Any] = {"recipe": recipe, "task": task, "model": model, "stage": stage, "batch": part.batch_size}
        row["form"] = f"{config.precision}-{form}"
        try:
            row |= measure(config, random_task(config, 100), stage, form, number)
        except Exception as error:  # such as memory that is not enough: the other models still count
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        log.write("step", row)
        print(line(row), flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


def campaign(options: argparse.Namespace, seconds: float) -> int:
    """The exit status of `train.py -m`: 3 where the time was up first."""
    overrides = [f"model={options.models}", f"task={options.tasks}", f"recipe={options.recipe}", "pretrain=true"]
    overrides += [f"runs_dir={options.out}", f"budget={seconds:.0f}s", "wandb.mode=disabled"]
    if options.data is not None:
        overrides.append(f"data_dir={options.data}")
    return cli.main(["-m", *overrides, *options.override])


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=150.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/gpu", metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="unpacked data; without it, a task's own source")
    parser.add_argument("--recipe", default="short")
    parser.add_argument("--models", default=",".join(available("model")))
    parser.add_argument("--tasks", default="lra_image,lra_text", help="of the runs; steps are those of the first")
    parser.add_argument("--stages", default="pretrain,finetune", help="of steps")
    parser.add_argument("--steps", type=int, default=24, help="that are timed, behind three that are not")
    parser.add_argument("override", nargs="*", help="of the runs' configuration, as train.py takes them")
    options = parser.parse_intermixed_args()
    keep_freed_memory()

    log = Log(options.out)
    log.begin("step")
    record = {"command": " ".join(["python", *sys.argv]), "unit": "ms, mean of a step", **card.describe()}
    log.describe(record, "step.json")
    task, stages = options.tasks.split(",")[0], options.stages.split(",")
    until = began + STEPS_SHARE * options.deadline
    record["not_reached"] = steps(log, options.recipe, options.models.split(","), task, stages, options.steps, until)
    log.describe(record, "step.json")
    left = began + options.deadline - time.monotonic()
    return campaign(options, left) if left >= 1 else 3


if __name__ == "__main__":
    sys.exit(main())
