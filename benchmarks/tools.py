"""What of PyTorch's tools, and ONNX, every block goes through: a table of how far each is from the block itself.

    python benchmarks/tools.py                      all blocks, some minutes; onnx and onnxruntime from the extra `onnx`
    python benchmarks/tools.py --only lru,s4d       these rows; the others stay as they are
    python benchmarks/tools.py --compile            torch.compile at several lengths too, which takes far longer

Every tool is given a block once, and asked about other numbers of sequences and other lengths.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap

from seqzoo import BLOCKS, build_block

D = 16
OUT = Path(__file__).resolve().parents[1] / "results" / "tools.md"
SIZES = ((2, 9), (3, 70), (2, 2))
SMALL = {  # options that are wide by default
    "vq_attention": {"codebook_size": 8, "block_len": 8, "num_heads": 4},
    "gau": {"chunk_len": 8, "key_dim": 6},
    "s4d": {"state_dim": 4},
    "mamba": {"state_dim": 4},
    "mamba2": {"num_heads": 4, "state_dim": 8},
    "mamba3": {"num_heads": 4, "state_dim": 8},
}


class Extend(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.block.extend(x, state)


def of_length(run: Callable[[Tensor], Tensor], block: nn.Module) -> float:
    """The largest difference from the block, relative to its largest output."""
    furthest = 0.0
    for B, T in SIZES:
        x = torch.randn(B, T, D)
        y = block(x)
        furthest = max(furthest, float((run(x) - y).abs().max() / y.abs().max()))
    return furthest


def compiled(block: nn.Module) -> float:
    torch.compiler.reset()
    return of_length(torch.compile(block, fullgraph=True, backend="aot_eager"), block)


def exported(block: nn.Module) -> float:
    program = torch.export.export(block, (torch.randn(2, 9, D),), dynamic_shapes=({0: Dim("B"), 1: Dim("T")},))
    return of_length(program.module(), block)


def extended(block: nn.Module) -> float | None:
    if not block.causal:
        return None
    prefix, x = torch.randn(2, 6, D), torch.randn(2, 20, D)
    _, state = block.extend(prefix, None)
    shapes = ({1: Dim("T")}, type(state)(*(None,) * len(state)))
    program = torch.export.export(Extend(block), (prefix, state), dynamic_shapes=shapes)
    y, _ = program.module()(x, block.extend(prefix, None)[1])
    expected, _ = block.extend(x, block.extend(prefix, None)[1])
    return float((y - expected).abs().max() / expected.abs().max())


def in_onnx(block: nn.Module) -> float:
    import onnxruntime

    from seqzoo.interop import onnx

    program = onnx.export(block, (torch.randn(2, 9, D),), dynamic_shapes=({0: "batch", 1: "time"},))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return of_length(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), block)


def gradients_of_each(block: nn.Module) -> float:
    x = torch.randn(3, 20, D)
    named = {name: p for name, p in block.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in named.items()}, x)
    furthest = 0.0
    with torch.enable_grad():
        for i in range(len(x)):
            y = block(x[i : i + 1]).square().sum()
            expected = torch.autograd.grad(y, list(named.values()), allow_unused=True, materialize_grads=True)
            for g, e in zip(found.values(), expected, strict=True):
                furthest = max(furthest, float((g[i] - e).abs().max() / e.abs().max().clamp(min=1e-6)))
    return furthest


def forward_mode(block: nn.Module) -> float:
    """Beside reverse mode: wᵀ (J t) is (Jᵀ w)ᵀ t."""
    x, t = torch.randn(2, 20, D), torch.randn(2, 20, D)
    y, tangent = jvp(block, (x,), (t,))
    w = torch.randn_like(y)
    with torch.enable_grad():
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((block(x) * w).sum(), x)
    return float(((tangent * w).sum() - (gradient * t).sum()).abs() / (gradient.norm() * t.norm()))


def traced(block: nn.Module) -> float:
    return of_length(torch.jit.trace(block, torch.randn(2, 9, D), check_trace=False), block)


def scripted(block: nn.Module) -> float:
    return of_length(torch.jit.script(block), block)


TOOLS: dict[str, Callable[[nn.Module], float | None]] = {
    "compile": compiled,
    "export": exported,
    "export of `extend`": extended,
    "ONNX, onnxruntime": in_onnx,
    "vmap of grad": gradients_of_each,
    "jvp": forward_mode,
    "jit.trace": traced,
    "jit.script": scripted,
}


def row(name: str, causal: bool, tools: list[str]) -> list[str]:
    torch.manual_seed(0)
    block = build_block(name, D, causal=causal, **SMALL.get(name, {})).eval()
    cells = [name, "causal" if causal else "both ways"]
    for tool in TOOLS:
        if tool not in tools:
            cells.append("")
            continue
        try:
            with torch.no_grad():
                difference = TOOLS[tool](block)
            cells.append("" if difference is None else f"{difference:.0e}")
        except Exception as error:
            print(name, tool, type(error).__name__, str(error).strip()[:300], file=sys.stderr)
            cells.append("refused")
    return cells


def rows_of(text: str) -> dict[tuple[str, ...], list[str]]:
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {tuple(cells[:2]): cells for cells in lines[2:]}


def render(rows: dict[tuple[str, ...], list[str]]) -> str:
    order = sorted(rows, key=lambda key: (list(BLOCKS).index(key[0]), key[1] != "causal"))
    table = [["block", "directions", *TOOLS], ["---"] * (2 + len(TOOLS)), *(rows[key] for key in order)]
    text = [
        f"PyTorch {torch.__version__}: the largest difference from the block itself, relative to its largest output",
        "(of gradients, and of forward mode, to theirs), in single precision. Empty: not measured, or there is none.",
        "`python benchmarks/tools.py`.",
        "",
    ]
    return "\n".join([*text, *("| " + " | ".join(cells) + " |" for cells in table)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BLOCKS), help="blocks, by name")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tools = [tool for tool in TOOLS if arguments.compile or tool != "compile"]
    for name in arguments.only.split(","):
        for causal in (True, False):
            rows = rows_of(arguments.out.read_text()) if arguments.out.exists() else {}
            cells = row(name, causal, tools)
            before = rows.get((cells[0], cells[1]), [""] * len(cells))
            rows[cells[0], cells[1]] = [new or old for new, old in zip(cells, before, strict=True)]
            arguments.out.write_text(render(rows))
            print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
