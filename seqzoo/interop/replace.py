"""Blocks in place of attention layers of any model."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import AsSelfAttention, Block
from ..blocks.softmax_attention import SoftmaxAttention
from .compared import difference

OWN = "a build that returns a module of your own around a block"


class Replaced(NamedTuple):
    """A layer that `replace` came to, and what it did."""

    name: str
    old: str
    new: str | None  # None: it stands as it stood
    copied: tuple[str, ...]  # parameters of the old one that the new one begins with
    left: tuple[str, ...]  # the others
    why: str = ""  # of what was not done

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.name}: {self.old}, kept: {self.why}"
        said = [f"{self.name}: {self.old} -> {self.new}", f"copied {', '.join(self.copied) or 'nothing'}"]
        said += [f"left {', '.join(self.left)}"] if self.left else []
        said += [self.why] if self.why else []
        return "; ".join(said)


def replace(
    model: nn.Module,
    kind: type[nn.Module] | tuple[type[nn.Module], ...],
    build: Callable[[Any], nn.Module | None],
) -> list[Replaced]:
    """Puts blocks in place of all layers of a class, with their weights where these fit.

        changed = seqzoo.replace(encoder, nn.MultiheadAttention, lambda old: build_block("lru", old.embed_dim))
        print(*changed, sep="\\n")

    A block stands behind what its place is called with: that of PyTorch's layers (`AsSelfAttention`), of transformers
    (`seqzoo.hf.Mixer`), or of timm (as it is). It is moved to the old layer's device, dtype and mode. Weights fit where
    a block has queries, keys and values as the old layer had them: the same heads of the same width. With
    `build_block("softmax_attention", d, num_heads=..., rotary=False, bias=True)`, or `rotary=True` for a layer of
    transformers that rotates halves by the usual base of 10,000, outputs are then what they were; both layers are given
    random inputs, and where a `softmax_attention` computes something else, the report says how far off it is. Copied
    parameters are trained where the old ones were. An `nn.TransformerEncoder` with a new layer makes no nested tensors
    of padded batches any more.

    Args:
        model: it is changed in place, once everything is built.
        kind: the class, or several.
        build: gives a block, or any module, for an old layer; None leaves it as it is.

    Returns:
        What was done, layer by layer.

    Raises:
        ValueError: there is no such layer in the model, the model is one itself, or a layer is called with what no
            block takes, returns what no block does, hides what comes later where the block does not, or is a layer
            around attention.
    """
    if isinstance(model, kind):
        raise ValueError(
            f"the model is a {_name(model)} itself; valid: a model that holds it, or the block in its place"
        )
    places = [
        (prefix, parent, child, old)
        for prefix, parent in model.named_modules()
        for child, old in parent._modules.items()
        if isinstance(old, kind)
    ]
    if not places:
        kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        there = Counter(
            type(m) for m in model.modules() if "Attention" in type(m).__name__ or "Attn" in type(m).__name__
        )
        found = ", ".join(f"{each.__module__}.{each.__name__} ({n})" for each, n in there.items())
        raise ValueError(f"no {kinds} in {type(model).__name__}; attention in there: {found or 'none'}")
    made: dict[int, tuple[nn.Module | None, Replaced]] = {}
    report = []
    for prefix, parent, child, old in places:
        name = f"{prefix}.{child}" if prefix else child
        if id(old) not in made:
            if isinstance(parent, nn.TransformerDecoderLayer) and child == "multihead_attn":
                made[id(old)] = None, Replaced(name, _name(old), None, (), (), "it attends to another sequence")
            else:
                made[id(old)] = _new(name, old, build(old), model)
        report.append(made[id(old)][1]._replace(name=name))
    for _, parent, child, old in places:
        new = made[id(old)][0]
        if new is not None:
            parent._modules[child] = new
    put = {id(new) for new, _ in made.values() if new is not None}
    for stack in model.modules():
        if isinstance(stack, nn.TransformerEncoder) and any(id(each) in put for each in stack.modules()):
            stack.use_nested_tensor = False  # for which weights are read out of its first layer's attention
    return report


def _new(name: str, old: nn.Module, new: nn.Module | None, model: nn.Module) -> tuple[nn.Module | None, Replaced]:
    """What is put in place of `old`, with its weights."""
    if new is None:
        return None, Replaced(name, _name(old), None, (), (), "build gave None")
    own = next((parameter for parameter in old.parameters() if parameter.is_floating_point()), None)
    if own is not None and not any(parameter.is_meta for parameter in new.parameters()):
        new = new.to(own.device, own.dtype)
    copied, why = _copy(old, new) if isinstance(new, Block) else (set(), "not a block of seqzoo")
    left = tuple(key for key, _ in old.named_parameters() if key not in copied)
    if copied and isinstance(new, SoftmaxAttention):
        why = "; ".join(filter(None, (why, *_beside(old, new), difference(old, new, model))))
    done = Replaced(name, _name(old), _name(new), tuple(sorted(copied)), left, why)
    put = _callable_as(name, old, new) if isinstance(new, Block) else new
    return put.train(old.training), done


def _callable_as(name: str, old: nn.Module, block: Block) -> nn.Module:
    """The block, called as the layer was."""
    if isinstance(old, nn.MultiheadAttention):
        if not old.batch_first:
            raise ValueError(f"{name}: batch_first=False; valid: a model with batch_first=True, as blocks are")
        return AsSelfAttention(block)
    given = list(inspect.signature(old.forward).parameters)
    if not _is_of_transformers(old):
        _check_arguments(name, old, {*given[:1], *inspect.signature(block.forward).parameters})
        return block
    from .mixer import TAKEN, Mixer

    _check_arguments(name, old, TAKEN)
    _check_attention(name, old)
    if getattr(old, "is_causal", None) is True and not block.causal:
        raise ValueError(
            f"{name}: {_name(old)} hides what comes later, {_name(block)} does not; valid: a block with causal=True"
        )
    return Mixer(block, getattr(old, "layer_idx", None), given)


def _check_arguments(name: str, old: nn.Module, taken: Collection[str]) -> None:
    given = inspect.signature(old.forward).parameters.values()
    others = [each.name for each in given if each.name not in taken and each.kind is not each.VAR_KEYWORD]
    if others:
        raise ValueError(f"{name}: {_name(old)} is called with {', '.join(others)}, which no block takes; valid: {OWN}")


def _check_attention(name: str, old: nn.Module) -> None:
    """Of a layer of transformers, that it is attention and nothing around it, and returns outputs and weights."""
    for inside, layer in old.named_modules():
        if inside and "Attention" in _name(layer) and "hidden_states" in inspect.signature(layer.forward).parameters:
            around = f"{name}: {_name(old)} is a layer around the {_name(layer)} in its {inside}"
            raise ValueError(f"{around}; valid: {_name(layer)}, or {OWN}")
    if others := _returned(old) - {2}:
        raise ValueError(f"{name}: {_name(old)} returns {max(others)}; valid: 2 values, outputs and weights, or {OWN}")


def _returned(old: nn.Module) -> set[int]:
    """How many values its `forward` returns, as far as its source tells: annotations in transformers tell otherwise."""
    forward: Any = type(old).forward
    if inspect.signature(forward).return_annotation is Tensor:
        return {1}
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return set()
    given = (each.value for each in ast.walk(source) if isinstance(each, ast.Return))
    return {len(values.elts) for values in given if isinstance(values, ast.Tuple)}


def _copy(old: nn.Module, block: Block) -> tuple[set[str], str]:
    """Copies what fits. The names of parameters of `old` that were copied, and why others were not."""
    if not (isinstance(getattr(block, "qkv_proj", None), nn.Linear) and isinstance(block.out_proj, nn.Linear)):
        return set(), f"{type(block).__name__} has no queries, keys and values to copy"
    found = _projections(old)
    heads, groups = _heads(old)
    if found is None or heads is None:
        return set(), "no queries, keys and values were recognised"
    own_heads: Any = block.num_heads
    own_groups: Any = getattr(block, "num_kv_heads", own_heads)
    if (heads, groups) != (own_heads, own_groups):
        return set(), f"{heads} heads and {groups} of keys there, {own_heads} and {own_groups} here"
    qkv, out = found
    turned, why = _turns(old, block)
    of_qkv = {key for part in qkv for key, _ in part.values()}
    projects = any(
        isinstance(layer, nn.Linear) and f"{name}.weight" not in of_qkv for name, layer in old.named_modules()
    )
    copied: set[str] = set()
    for layer, parts in ((block.qkv_proj, qkv), (block.out_proj, out)):
        for kind in ("weight", "bias"):
            target, given = getattr(layer, kind), [part[kind] for part in parts if kind in part]
            if not given:
                if target is not None and kind == "bias":
                    nn.init.zeros_(target)
                elif target is not None and layer is block.out_proj and not projects:
                    nn.init.eye_(target)  # the model projects the outputs elsewhere
                continue
            whole = torch.cat([value.detach() for _, value in given])
            if target is None or target.shape != whole.shape:
                shape = "none" if target is None else list(target.shape)
                why = f"{kind} is {list(whole.shape)} there and {shape} here"
                continue
            if turned and layer is block.qkv_proj:
                whole = _as_pairs(whole, own_heads, own_groups)
            with torch.no_grad():
                target.copy_(whole)
            target.requires_grad_(any(value.requires_grad for _, value in given))
            copied |= {key for key, _ in given}
    return copied, why


Part = dict[str, tuple[str, Tensor]]  # "weight" and "bias": the parameter's name and value


def _projections(old: nn.Module) -> tuple[list[Part], list[Part]] | None:
    """The layers of queries, keys and values, in this order or in one, and that of outputs, if there is one."""
    if isinstance(old, nn.MultiheadAttention):
        if old.in_proj_weight is None or old.bias_k is not None or old.add_zero_attn:
            return None
        qkv = [_named(old, {"weight": "in_proj_weight", "bias": "in_proj_bias"})]
        return qkv, [_linear(old, "out_proj")]
    for names, ends in (
        (("qkv",), ("proj", "projection")),
        (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense")),
        (("query", "key", "value"), ()),
    ):
        if all(isinstance(getattr(old, name, None), nn.Linear) for name in names):
            end = next((name for name in ends if isinstance(getattr(old, name, None), nn.Linear)), None)
            return [_linear(old, name) for name in names], [] if end is None else [_linear(old, end)]
    return None


def _beside(old: nn.Module, block: SoftmaxAttention) -> Iterator[str]:
    """What the old layer does that outputs of a few steps in evaluation do not show."""
    names = ("dropout", "attention_dropout")
    dropped = [rate for name in names if isinstance(rate := getattr(old, name, None), float) and rate > 0]
    dropped += [layer.p for layer in old.modules() if isinstance(layer, nn.Dropout) and layer.p > 0]
    if dropped:
        yield f"dropout of {', '.join(f'{rate:g}' for rate in dropped)} there, none here"
    of_model = getattr(getattr(old, "config", None), "sliding_window", None)
    window = getattr(old, "sliding_window", of_model)
    if isinstance(window, int) and block.window is None:
        yield f"a window of {window} there, none here"


def _linear(old: nn.Module, name: str) -> Part:
    return _named(old, {kind: f"{name}.{kind}" for kind in ("weight", "bias")})


def _named(old: nn.Module, names: dict[str, str]) -> Part:
    there = dict(old.named_parameters())
    return {kind: (name, there[name]) for kind, name in names.items() if name in there}


def _heads(old: nn.Module) -> tuple[int | None, int | None]:
    """Of queries, and of keys and values."""
    config = getattr(old, "config", None)
    for source, name in ((old, "num_heads"), (old, "num_attention_heads"), (config, "num_attention_heads")):
        if isinstance(heads := getattr(source, name, None), int):
            return heads, heads // (getattr(old, "num_key_value_groups", None) or 1)
    return None, None


def _turns(old: nn.Module, block: Block) -> tuple[bool, str]:
    """Whether queries and keys are turned there as `block` turns them, in halves instead of pairs; and if not, why."""
    there, here = "position_embeddings" in inspect.signature(old.forward).parameters, getattr(block, "rotary", False)
    if there != here:
        return False, f"rotary positions {'there' if there else 'here'} alone"
    if not here:
        return False, ""
    rope = getattr(getattr(old, "config", None), "rope_parameters", None) or {}
    if rope.get("rope_theta", 1e4) != 1e4 or rope.get("rope_type", "default") != "default":
        return True, f"rotary positions there are {rope}"
    return True, ""


def _as_pairs(qkv: Tensor, H: int, G: int) -> Tensor:
    """Rows of queries and keys, of which channels i and D / 2 + i are turned together, as pairs 2i and 2i + 1."""
    D = qkv.shape[0] // (H + 2 * G)
    q, k, v = qkv.split([H * D, G * D, G * D])
    q, k = (x.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2) for x in (q, k))
    return torch.cat([q, k, v])


def _is_of_transformers(module: nn.Module) -> bool:
    return any(each.__module__.split(".")[0] == "transformers" for each in type(module).__mro__)


def _name(module: nn.Module) -> str:
    return type(module).__name__
