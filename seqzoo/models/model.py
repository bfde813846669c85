from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..blocks import BLOCKS, Part, build_block, check_block
from ..blocks.base import advance
from ..blocks.forward_mode import LayerNorm
from ..blocks.states import Held
from ..kernels.documents import Documents, check_documents
from ..spec import TaskSpec
from ..valid import BelowOne, NotNegative, Range, Text, Width, check_ranges
from .embedding import Embedding, PixelEmbedding
from .heads import ClassificationHead, PairHead, PositionHead
from .streaming import ModelState, Streaming

HEADS = ("classify", "per_position", "regress")
INITS = ("structured", "random")
RANDOM_STD = 0.1


MOST_LAYERS = 1000


@dataclass(kw_only=True)
class ModelConfig:
    """What a model is made of."""

    name: Text
    d_model: Width
    num_layers: Annotated[int, Range(1, MOST_LAYERS)]
    num_heads: Width | None = None  # of blocks that have heads, whose options refer to it
    block: dict[str, Any] = field(default_factory=dict)  # name, and options of the block's class
    layers: list[Any] | None = None  # hybrids: a block for each layer, a name or a mapping like `block`
    blocks_per_layer: Annotated[int, Range(1, 16)] = 1  # gated blocks that do an MLP's work stand twice in a layer
    mlp_ratio: NotNegative = 0.0  # hidden width of each layer's MLP over d_model; 0: none
    position: str = "none"  # absolute positions in the embedding: none, sinusoidal or learned
    pooling: str = "mean"  # mean, max, last or first
    head: str = "linear"  # linear or mlp
    dropout: BelowOne = 0.0  # of residual branches
    init: str = "structured"  # of parameters: what each module was designed with, or all of them N(0, 0.1²)

    def __post_init__(self) -> None:
        check_ranges(self, "model.")
        if not self.name or "/" in self.name:
            raise ValueError(f"model.name={self.name}: valid: what can be part of a folder's name")
        if self.layers is not None and not 0 < len(self.layers) <= MOST_LAYERS:
            given = f"{len(self.layers):,} layers" if self.layers else "[]"
            raise ValueError(f"model.layers={given}: valid: null, or a block for each layer, up to {MOST_LAYERS:,}")
        if self.init not in INITS:
            raise ValueError(f"model.init={self.init}: valid: {', '.join(INITS)}")

    def blocks(self) -> list[dict[str, Any]]:
        """The "name" and "options" of each layer's block.

        Raises:
            ValueError: there is something else in its place.
        """
        listed = [self.block] * self.num_layers if self.layers is None else self.layers
        blocks = [dict(entry) if isinstance(entry, Mapping) else {"name": entry} for entry in listed]
        for block in blocks:
            if not isinstance(block.get("name"), str):
                raise ValueError(f"no block {block}; valid: a block's name, or a mapping of its name and options")
        return [{"name": block.pop("name"), "options": block} for block in blocks]


class Residual(nn.Module):
    """x + dropout(branch(norm(x))), the branch a block or an MLP."""

    branch: Any  # a `Block` if it mixes

    def __init__(self, branch: nn.Module, d_model: int, dropout: float, *, mixes: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.branch = branch
        self.dropout = nn.Dropout(dropout)
        self.mixes = mixes

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None = None,
        state: Any = None,
        part: Part | None = None,
    ) -> Any:
        """[B, T, d_model]; where the branch has a state, that and the state after it."""
        y = self.norm(x)
        if not self.mixes:
            y = self.branch(y)
        elif state is not None:
            y, state = self.branch.extend(y, Held.of(state), lengths=lengths)
            return x + self.dropout(y), state
        elif part is not None:
            y = self.branch(y, lengths=lengths, part=part)
        elif cu_seqlens is None:
            y = self.branch(y, lengths=lengths)
        else:
            y = self.branch(y, cu_seqlens=cu_seqlens)
        return x + self.dropout(y)


def at_depth(depth: float, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a block that stands behind so much of a model's layers, in [0, 1): see `Block.by_depth`.

    Raises:
        ValueError: as `check_block` does.
    """
    check_block(name, options)
    by_depth = BLOCKS[name].by_depth
    return options if by_depth is None else {by_depth: depth, **options}


def mlp(d_model: int, hidden: int) -> nn.Sequential:
    """[..., d_model] -> [..., d_model], one hidden layer."""
    return nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))


class Backbone(nn.Module):
    """Embedding, residual layers and a last norm; what pretraining hands over to fine-tuning.

    Args of the call: as of a `SequenceModel`, of single sequences.

    Returns: [B, T, d_model]; with a state, that and the state after it.
    """

    frozen = False

    def __init__(self, config: ModelConfig, spec: TaskSpec, *, causal: bool) -> None:
        super().__init__()
        D = config.d_model
        self.causal = causal
        self.embedding = Embedding(spec, D, config.position)
        self.layers = nn.ModuleList()
        layers = config.blocks()
        for n, planned in enumerate(layers):
            options = at_depth(n / len(layers), **planned)
            for _ in range(config.blocks_per_layer):
                block = build_block(planned["name"], D, causal=causal, **options)
                self.layers.append(Residual(block, D, config.dropout, mixes=True))
            if config.mlp_ratio:
                hidden = round(config.mlp_ratio * D)
                if hidden < 1:
                    raise ValueError(f"mlp_ratio={config.mlp_ratio} of d_model={D}: valid: 0, or a width of 1 or more")
                self.layers.append(Residual(mlp(D, hidden), D, config.dropout, mixes=False))
        self.norm = LayerNorm(D)

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        part: Part | None = None,
    ) -> Any:
        if (state := Held.of(state)) is not None:
            outputs, state = self.layer_outputs(inputs, lengths, mask, cu_seqlens, state)
            return self.norm(outputs[-1]), state
        x = self._embedded(inputs, mask, cu_seqlens, part)
        for layer in self.layers:
            x = layer(x, lengths, cu_seqlens, part=part)
        return self.norm(x)

    def layer_outputs(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        part: Part | None = None,
    ) -> Any:
        """What the embedding and then each layer puts out, [B, T, d_model] each, before the last norm; with a state,
        that and the state after it."""
        if state is None:
            outputs = [self._embedded(inputs, mask, cu_seqlens, part)]
            for layer in self.layers:
                outputs.append(layer(outputs[-1], lengths, cu_seqlens, part=part))
            return outputs
        outputs = [self.embedding(inputs, mask, None, state.position, lengths)]
        before, after = iter(state.layers), []
        for layer in self.layers:
            if layer.mixes:
                x, reached = layer(outputs[-1], lengths, state=Held(next(before)))
                after.append(reached)
            else:
                x = layer(outputs[-1], lengths)
            outputs.append(x)
        return outputs, ModelState(tuple(after), advance(state.position, inputs, lengths))

    def _embedded(self, inputs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, part: Part | None) -> Tensor:
        if part is not None:
            inputs, mask = part.own(inputs), None if mask is None else part.own(mask)
        return self.embedding(inputs, mask, documents_of(inputs, cu_seqlens), part=part)

    def freeze(self) -> None:
        """From now on nothing in here moves: no parameter, no codebook or feature (it stays in eval mode), no dropout.

        As inputs are integers, autograd has nothing to record in here either.
        """
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """As of any module, but a frozen one stays in eval mode."""
        return super().train(mode and not self.frozen)


@dataclass(frozen=True)
class Plan:
    """What `build_model` was given."""

    config: ModelConfig
    spec: TaskSpec
    head: str
    causal: bool


class SequenceModel(Streaming):
    """A backbone and a head.

    Args of the call:
        inputs: as in `Batch`; pairs [B, 2, T, ...] are read as 2B sequences.
        lengths: int64 [B] or, of pairs, [B, 2]; None: every step counts.
        mask: bool, shaped as the positions; true where the input is to be hidden.
        cu_seqlens: int32 or int64 [N + 1], in place of lengths (None), with inputs [1, T, ...]: where each of N
            documents begins that lie one behind the other in the row, and T. Of pairs, two follow each other.
        state, last: as of `extend`, which calls the model with them, so that hooks see its steps too.
        part: the steps that are this rank's. Inputs, lengths and mask are whole all the same, classes are scored on
            each rank, and scores for positions are of the part's.

    Returns: [B, classes], of documents [N, classes], or a score for every position (of 2B sequences, if pairs).
    """

    plan: Plan | None = None  # of a model that is as it was built

    def __init__(self, backbone: Backbone, head: nn.Module, *, num_inputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_inputs = num_inputs

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        last: bool = False,
        part: Part | None = None,
    ) -> Any:
        inputs, lengths, mask = self._singly(inputs, lengths, mask)
        state = Held.of(state)
        if state is None:
            x = self.features(inputs, lengths, mask, cu_seqlens, part=part)
            return self.head(x, lengths, documents_of(inputs, cu_seqlens), part)
        x, state = self.features(inputs, lengths, mask, cu_seqlens, state)
        if last:
            x = x[:, -1:] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1][:, None]
        return self.head(x, lengths), state

    def features(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: ModelState | None = None,
        part: Part | None = None,
    ) -> Any:
        """What the head reads of sequences: [B, T, d_model]; with a state, that and the state after it."""
        return self.backbone(inputs, lengths, mask, cu_seqlens, None if state is None else Held(state), part)

    def _singly(
        self, inputs: Tensor, lengths: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The two sequences of each pair as rows of their own."""
        axes = 2 + isinstance(self.backbone.embedding.inputs, PixelEmbedding)
        if self.num_inputs == 1 or inputs.dim() == axes:
            return inputs, lengths, mask
        lengths = None if lengths is None else lengths.flatten()
        return inputs.flatten(0, 1), lengths, None if mask is None else mask.flatten(0, 1)


class JointModel(SequenceModel):
    """`model` with a second head, which says in training what stands at hidden positions.

    Without a mask it is called as `model` is, and answers alike.

    Args of a call with a mask:
        whole: what the first head reads is computed from inputs of which nothing is hidden, in the same pass: a batch
            twice as large.

    Returns: what the first head says, and what the second does.
    """

    def __init__(self, model: SequenceModel, second: nn.Module) -> None:
        super().__init__(model.backbone, model.head, num_inputs=model.num_inputs)
        self.second = second

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ModelState | None = None,
        last: bool = False,
        part: Part | None = None,
        *,
        whole: bool = False,
    ) -> Any:
        if mask is None:
            return super().forward(inputs, lengths, mask, cu_seqlens, state, last, part)
        inputs, lengths, mask = self._singly(inputs, lengths, mask)
        assert mask is not None
        documents = documents_of(inputs, cu_seqlens)
        if not whole:
            first = second = self.features(inputs, lengths, mask, cu_seqlens, part=part)
        elif documents is None:
            both = None if lengths is None else torch.cat((lengths, lengths))
            masks = torch.cat((torch.zeros_like(mask), mask))
            first, second = self.features(torch.cat((inputs, inputs)), both, masks, None, part=part).chunk(2)
        else:
            masks = torch.cat((torch.zeros_like(mask), mask), 1)
            ends = torch.cat((documents.starts, documents.T + documents.starts[1:]))
            first, second = self.features(torch.cat((inputs, inputs), 1), None, masks, ends).chunk(2, 1)
        return self.head(first, lengths, documents, part), self.second(second, lengths, documents, part)

    def without_second(self) -> SequenceModel:
        """What answers the task: the same backbone and first head."""
        model = SequenceModel(self.backbone, self.head, num_inputs=self.num_inputs)
        model.plan = None if self.plan is None else replace(self.plan, head=self.plan.head.split("+")[0])
        return model


def documents_of(inputs: Tensor, cu_seqlens: Tensor | None) -> Documents | None:
    """The documents that lie in the row of `inputs` [1, T, ...].

    Raises:
        ValueError: as `check_documents` says.
    """
    return check_documents("model", cu_seqlens, None, *inputs.shape[:2])


def build_model(config: ModelConfig, spec: TaskSpec, *, head: str, causal: bool) -> SequenceModel:
    """A model for a task.

    Args:
        config: its layers and sizes.
        spec: the task's description.
        head: "classify", "per_position" (scores over the vocabulary, or over pixel levels) or "regress" (pixel values).
            Two with a + between them make a `JointModel`, such as "classify+per_position".
        causal: hide from every position what comes later.

    Raises:
        ValueError: an unknown block, option, pooling, position or head, or sizes that do not fit; says what is valid.
    """
    first, *others = head.split("+")
    if len(others) > 1 or not {first, *others} <= set(HEADS):
        raise ValueError(f"head={head!r}; valid: {', '.join(HEADS)}, or two of them, such as {HEADS[0]}+{HEADS[1]}")
    if causal and config.pooling == "first" and "classify" in (first, *others):
        raise ValueError("model.pooling=first: a causal model has read one position there; valid: mean, max, last")
    backbone = Backbone(config, spec, causal=causal)
    model = SequenceModel(backbone, _head(config, spec, first), num_inputs=spec.num_inputs)
    for second in others:
        model = JointModel(model, _head(config, spec, second))
    model.plan = Plan(config, spec, head, causal)
    if config.init == "random":
        # Amos, Berant and Gupta 2024, section 3.3; norms too, as in the authors' code.
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=RANDOM_STD)
    return model


def task_head(spec: TaskSpec) -> str:
    """The head that gives the answers a task asks for, as `build_model` names it."""
    return "classify" if spec.answer == "class" else "per_position"


def _head(config: ModelConfig, spec: TaskSpec, head: str) -> nn.Module:
    if head != "classify":
        return PositionHead(config.d_model, spec, regress=head == "regress")
    if spec.num_inputs == 2:
        return PairHead(config.d_model, spec.num_classes, pooling=config.pooling)
    return ClassificationHead(config.d_model, spec.num_classes, pooling=config.pooling, kind=config.head)
