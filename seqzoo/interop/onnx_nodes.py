"""Graphs of ONNX, written as one calls functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnxscript import ir

Value: TypeAlias = ir.Value
Step = Callable[["Nodes", list[Value], list[Value]], tuple[list[Value], list[Value]]]

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class Nodes:
    """Nodes in order: `nodes.MatMul(x, y)` adds one, and numbers among its inputs become constants."""

    def __init__(self) -> None:
        self.made: list[ir.Node] = []

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        return lambda *inputs, outputs=1, **attributes: self.add(operation, inputs, outputs, attributes)

    def add(self, operation: str, inputs: Sequence[Any], outputs: int, attributes: dict[str, Any]) -> Any:
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        node = ir.node(operation, values, attributes=attributes, num_outputs=outputs)
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else list(node.outputs)

    def constant(self, x: Any, like: Value | None = None) -> Value:
        """Integers as int64; other numbers as `like`, or in single precision."""
        array = np.asarray(x)
        if array.dtype.kind == "i":
            array = array.astype(np.int64)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        value = self.add("Constant", (), 1, {"value": ir.tensor(array)})
        return value if like is None else self.CastLike(value, like)

    def size(self, x: Value, axis: int) -> Value:
        """[1], int64."""
        return self.Shape(x, start=axis, end=axis + 1)

    def shape(self, *sizes: Any) -> Value:
        """Of numbers, and sizes of other values."""
        return self.Concat(*(self.constant([n]) if isinstance(n, int) else n for n in sizes), axis=0)

    def filled(self, x: Any, like: Value, *sizes: Any) -> Value:
        return self.Expand(self.constant(x, like), self.shape(*sizes))

    def steps(self, x: Value, axis: int = 1) -> Value:
        """0, 1, ... up to the size of x: [T], int64."""
        return self.Range(0, self.Squeeze(self.size(x, axis), [0]), 1)

    def valid(self, lengths: Value | None, x: Value) -> Value | None:
        """Which of the steps of x [B, T, ...] count: bool [B, T]."""
        return None if lengths is None else self.Less(self.steps(x), self.Unsqueeze(lengths, [1]))

    def kept(self, valid: Value | None, x: Value, rank: int, otherwise: float = 0.0) -> Value:
        """x [B, T, ...] of `rank` dimensions where steps count, or else another number."""
        if valid is None:
            return x
        return self.Where(self.Unsqueeze(valid, list(range(2, rank))), x, self.constant(otherwise, x))

    def by_head(self, *values: Value) -> list[Value]:
        """[B, T, H, D] -> [B, H, T, D], and back."""
        return [self.Transpose(x, perm=[0, 2, 1, 3]) for x in values]

    def wide(self, *values: Value | None) -> list[Any]:
        """In single precision at least, as sums are."""
        return [self.Cast(x, to=ir.DataType.FLOAT) if x is not None and x.dtype in HALVES else x for x in values]

    def scan(
        self, step: Step, states: Sequence[Value], inputs: Sequence[Value], reverse: bool = False
    ) -> tuple[list[Value], list[Value]]:
        """States after all steps, and the outputs of each, along axis 1 of inputs and outputs.

        Args:
            step: from the states and a step's inputs, without axis 1, makes the states and the step's outputs.
        """
        body = Nodes()
        before, given = (
            [ir.Value(name=f"{what}{i}") for i in range(len(of))] for what, of in (("state", states), ("step", inputs))
        )
        after, outputs = ([body.Identity(x) for x in values] for values in step(body, before, given))
        graph = ir.Graph([*before, *given], [*after, *outputs], nodes=body.made, name="step")
        found = self.add(
            "Scan",
            [*states, *inputs],
            len(after) + len(outputs),
            {
                "body": graph,
                "num_scan_inputs": len(inputs),
                "scan_input_axes": [1] * len(inputs),
                "scan_output_axes": [1] * len(outputs),
                "scan_input_directions": [int(reverse)] * len(inputs),
                "scan_output_directions": [int(reverse)] * len(outputs),
            },
        )
        found = found if isinstance(found, list) else [found]
        return found[: len(after)], found[len(after) :]
