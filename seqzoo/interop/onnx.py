"""Blocks, and models of them, as ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

OPSET = 18
OPSET_OF_LINEAR_ATTENTION = 27


def export(
    module: nn.Module,
    inputs: tuple[Any, ...],
    path: str | PathLike[str] | None = None,
    *,
    keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ONNXProgram:
    """`module` as ONNX, by `torch.onnx.export`, with a translation of every operation of `seqzoo.kernels`.

    Linear attention and the delta rule become `LinearAttention`, and the model then is of opset 27, which onnxruntime
    1.32 runs; everything else is of opset 18. Other recurrences become a Scan over steps, one after the other; FLASH,
    Transformer-VQ and windows become products of all pairs of steps.

    Args:
        module: in evaluation; documents in one row (`cu_seqlens`) have no translation.
        inputs, keywords: of its `forward`, as examples of their shapes. A state is given as a list of its tensors.
        path: where to write the model; None writes nothing.
        dynamic_shapes: as `torch.onnx.export` takes them, such as `({0: "batch", 1: "time"},)`.

    Returns:
        the program, whose `model_proto` is what was written.

    Raises:
        ImportError: onnx or onnxscript is not installed; `pip install "seqzoo[onnx]"`.
        ValueError: the module is in training, or has documents in one row.
    """
    if module.training:
        raise ValueError(f"{type(module).__name__} is in training; valid: module.eval(), what is exported is inference")
    translations = _translations()
    # Of an example that is a view the graph would ask for strides, which ONNX does not have.
    inputs, given = tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, (inputs, dict(keywords or {})))
    program = torch.onnx.export(
        _without_complex_parameters(module, inputs, given, dynamic_shapes),
        inputs,
        kwargs=given,
        dynamic_shapes=dynamic_shapes,
        opset_version=OPSET,
        custom_translation_table=translations,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    if any(node.op_type == "LinearAttention" for node in program.model.graph):
        # Of what else there is, nothing changes its meaning from the one to the other.
        program.model.opset_imports[""] = OPSET_OF_LINEAR_ATTENTION
    if path is not None:
        program.save(path)
    return program


def _without_complex_parameters(
    module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], dynamic_shapes: Any
) -> nn.Module:
    """`module`, or its graph in which what complex numbers make of parameters alone is a buffer: ONNX has no such
    numbers, and the exporter little that is done with them."""
    any_size = tree_map(lambda size: Dim.DYNAMIC if isinstance(size, str) else size, dynamic_shapes)
    program = torch.export.export(module, inputs, keywords, dynamic_shapes=any_size)
    graph = program.module()
    assert isinstance(graph, fx.GraphModule)
    _check_no_documents(graph)
    known: dict[fx.Node, Any] = {}
    complex_: set[fx.Node] = set()
    for node in graph.graph.nodes:
        of = node.all_input_nodes
        if node.op == "get_attr":
            known[node] = attrgetter(node.target)(graph)
        elif node.op == "call_function" and of and all(x in known for x in of):
            arguments, options = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*arguments, **options)
        else:
            continue
        if (isinstance(known[node], Tensor) and known[node].is_complex()) or complex_.intersection(of):
            complex_.add(node)
    ends = [node for node in complex_ if any(user not in known for user in node.users)]
    if not ends:
        return module
    for number, node in enumerate(ends):
        graph.register_buffer(f"made_{number}", known[node].detach().clone())
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"made_{number}"), lambda user: user not in known)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _check_no_documents(module: fx.GraphModule) -> None:
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)):
        names = [argument.name for argument in node.target._schema.arguments]
        if "starts" in names and dict(zip(names, node.args, strict=False)).get("starts") is not None:
            raise ValueError(
                "ONNX has no translation of documents in one row; valid: lengths or a mask in place of cu_seqlens"
            )


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    try:
        from onnxscript import evaluator, opset18

        from . import onnx_operations, onnx_pairs
        from .onnx_nodes import Nodes
    except ImportError as error:
        raise ImportError(f'ONNX needs onnx and onnxscript ({error}); pip install "seqzoo[onnx]"') from error

    def translated(operation: Callable[..., Any]) -> Callable[..., Any]:
        def translation(*arguments: Any) -> Any:
            nodes = Nodes()
            results = operation(nodes, *arguments)
            recorder: Any = evaluator.default()
            recorder.nodes.extend(nodes.made)
            results = [opset18.Identity(x) for x in results]
            return results[0] if len(results) == 1 else results

        return translation

    nodes, operators = torch.ops.seqzoo_nodes, torch.ops.seqzoo
    found: dict[Any, Callable[..., Any]] = {
        operators.attention_blockwise: onnx_pairs.attention,
        torch.ops.aten.expm1: onnx_operations.expm1,
        nodes.vq_attention: onnx_pairs.vq_attention,
        nodes.gated_attention: onnx_pairs.gated_attention,
    }
    for name in (
        *("diagonal_scan", "linear_attention", "delta_rule", "selective_scan", "favor_attention"),
        *("s4d_convolve", "mlstm_largest"),
    ):
        found[getattr(nodes, name)] = getattr(onnx_operations, name)
    return {operator.default: translated(operation) for operator, operation in found.items()}
