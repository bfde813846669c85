"""What a causal block's next step takes, after how many, and what is kept for it: extend by one step, on this machine.

    python benchmarks/decode.py                     every block and model: minutes
    python benchmarks/decode.py --only mamba2,gla --positions 64,4096

Steps at all positions take turns, and softmax attention takes turns with a plain cache: the same layers and rotation
around keys and values of a fixed size, at one position for all rows. So slow phases of the machine meet all of them.
Seconds are of processor time, one thread, and the shortest counts. A state is made by extending 1,024 steps; then it is
told that it stands at a position, and a cache of keys is filled with random ones up to there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo import BLOCKS, build_block
from seqzoo.blocks.cache import KeyValueCache
from seqzoo.blocks.rotary import rotate
from seqzoo.config import available, compose
from seqzoo.models import ModelState, build_model
from seqzoo.runs import provenance
from seqzoo.spec import TaskSpec
from seqzoo.training.memory import keep_freed_memory

D_MODEL = 128
BEGUN = 1024  # steps
Step = Callable[[], Any]


def at(state: Any, position: int) -> Any:
    """The state, which stands behind 1,024 steps, as if it stood at `position`."""
    if isinstance(state, ModelState):
        return ModelState(
            tuple(at(layer, position) for layer in state.layers), torch.full_like(state.position, position)
        )
    there = torch.full_like(state.position, position)
    if not isinstance(state, KeyValueCache):
        return state._replace(position=there)
    filled = KeyValueCache.empty(
        len(there),
        position + 1,
        tuple(state.keys.shape[2:]),
        tuple(state.values.shape[2:]),
        device=None,
        dtype=state.keys.dtype,
    )
    filled.keys.normal_()
    filled.values.normal_()
    return filled._replace(position=there, written=there.clone())


def size(state: Any) -> int:
    """Bytes of one sequence."""
    parts = state.layers if isinstance(state, ModelState) else ()
    own = sum(part.nbytes for part in state if isinstance(part, Tensor)) // len(state.position)
    return own + sum(map(size, parts))


def again(state: Any) -> Any:
    """The state as it was before it was continued, the next entry of a cache being free once more."""
    for each in state.layers if isinstance(state, ModelState) else (state,):
        if isinstance(each, KeyValueCache):
            each.written.copy_(each.position)
    return state


def plain(block: Any, B: int, position: int) -> Step:
    """A step of the block with a cache of a fixed size."""
    H, D, place = block.num_heads, block.head_dim, torch.tensor([position])
    keys, values = torch.randn(2, B, H, position + 1, D)
    x = torch.randn(B, 1, H * D)

    def step() -> Tensor:
        q, k, v = block.qkv_proj(x).view(B, 1, 3, H, D).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, place), rotate(k, place), v))
        keys[:, :, position], values[:, :, position] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, keys[:, :, : position + 1], values[:, :, : position + 1])
        return block.out_proj(y.transpose(1, 2).flatten(2))

    return step


def timed(steps: dict[Any, Step], repeats: int) -> dict[Any, list[float]]:
    """Milliseconds of processor time of each, in turns."""
    times: dict[Any, list[float]] = {key: [] for key in steps}
    for turn in range(repeats + 2):
        for key, step in steps.items():
            start = time.process_time()
            step()
            if turn >= 2:
                times[key].append(1e3 * (time.process_time() - start))
    return times


@torch.no_grad()
def measure(name: str, kind: str, B: int, positions: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row a position: milliseconds of one step, shortest and median, steps of all rows a second, bytes of a state."""
    torch.manual_seed(0)
    if kind == "block":
        block: Any = build_block(name, D_MODEL, causal=True).eval()
        many, one = torch.randn(B, BEGUN, D_MODEL), torch.randn(B, 1, D_MODEL)
    else:
        spec = TaskSpec(name="text", kind="tokens", vocab_size=100, max_length=1 << 17, num_classes=100, answer="next")
        config = replace(compose([f"model={name}", "task=char_lm", "task.text=x", "recipe=tiny"]).model)
        block = build_model(config, spec, head="per_position", causal=True).eval()
        many, one = torch.randint(100, (B, BEGUN)), torch.randint(100, (B, 1))
    _, begun = block.extend(many, None)
    states = {position: at(begun, position) for position in positions}
    steps: dict[Any, Step] = {}
    for position, state in states.items():
        steps[position, "ours"] = lambda state=state: block.extend(one, again(state))  # type: ignore[misc]
        if name == "softmax_attention":
            steps[position, "plain"] = plain(block, B, position)
    rows = []
    for (position, whose), times in timed(steps, repeats).items():
        row = {"name": name if whose == "ours" else "plain cache", "kind": kind, "batch": B, "position": position}
        row |= {"min_ms": min(times), "median_ms": statistics.median(times), "tokens_per_second": 1e3 * B / min(times)}
        rows.append({**row, "bytes": size(states[position])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds of a step by its position, and bytes of a state at the first and the last."""
    positions = sorted({row["position"] for row in rows})
    lines = []
    for kind, B in dict.fromkeys((row["kind"], row["batch"]) for row in rows):
        chosen = [row for row in rows if (row["kind"], row["batch"]) == (kind, B)]
        heads = " | ".join(f"after {position:,}" for position in positions)
        lines += [f"| {kind}, batch {B} | {heads} | tokens a second | bytes of a state | at the last |"]
        lines += ["|---|" + "---:|" * (len(positions) + 3)]
        for name in dict.fromkeys(row["name"] for row in chosen):
            mine = [{row["position"]: row for row in chosen if row["name"] == name}[position] for position in positions]
            times = " | ".join(f"{row['min_ms']:.2f}" for row in mine)
            rate = f"{mine[-1]['tokens_per_second']:,.0f}"
            lines.append(f"| `{name}` | {times} | {rate} | {mine[0]['bytes']:,} | {mine[-1]['bytes']:,} |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Of models: tokens a second, and bytes of a state, by the position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    models = [row for row in rows if row["kind"] == "model"]
    names = list(dict.fromkeys(row["name"] for row in models))
    for axis, key, label in zip(
        axes, ("tokens_per_second", "bytes"), ("tokens a second", "bytes of a state"), strict=True
    ):
        for number, name in enumerate(names):
            mine = [row for row in models if row["name"] == name]
            style = ("-", "--", ":")[number // 10]
            axis.plot([row["position"] for row in mine], [row[key] for row in mine], style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="position", ylabel=label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help="blocks and models by name; all by default")
    parser.add_argument("--positions", default="1024,4096,16384,65536")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/decode"))
    options = parser.parse_args()
    only = None if options.only is None else options.only.split(",")
    positions = [int(position) for position in options.positions.split(",")]
    torch.set_num_threads(1)
    keep_freed_memory()

    wanted = [("softmax_attention", "block", 1), ("softmax_attention", "block", 8)]
    wanted += [(name, "block", 1) for name in BLOCKS if name != "softmax_attention"]
    wanted += [(name, "model", 1) for name in available("model")]
    rows: list[dict[str, Any]] = []
    for name, kind, B in wanted:
        if only is None or name in only:
            rows += measure(name, kind, B, positions, options.repeats)
            print(name, kind, B, *(f"{row['name']} {row['min_ms']:.3f}" for row in rows[-len(positions) :]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    setting = {"d_model": D_MODEL, "models": "recipe=tiny", "dtype": "float32", "repeats": options.repeats}
    setting |= {"unit": "ms of processor time, one thread"}
    (options.out / "decode.json").write_text(
        json.dumps({**provenance.of_benchmark(setting), "rows": rows}, indent=1) + "\n"
    )
    (options.out / "decode.md").write_text(table(rows))
    if any(row["kind"] == "model" for row in rows):
        plot(rows, options.out / "decode.png")


if __name__ == "__main__":
    main()
