"""What a causal model remembers of sequences, and how it goes on with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.states import Held, State, state_of
from ..kernels.common import check_lengths
from .embedding import TokenEmbedding
from .generation import Sampling, as_prompts, as_seeds, generated
from .heads import PositionHead


@state_of()
class ModelState(NamedTuple):
    layers: tuple[State, ...]  # of the blocks, in order
    position: Tensor  # int64 [B]


class Streaming(nn.Module):
    """What a model with a `backbone` and a `head` can do with sequences step by step."""

    backbone: Any
    head: nn.Module

    def initial_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> ModelState:
        """What the model remembers of `batch_size` sequences of which it has seen nothing; by default where, and as
        precisely as, its parameters are. With `max_length`, caches of keys have room for so many steps.

        Raises:
            ValueError: the model is bidirectional.
        """
        self._require_causal()
        device = next(self.backbone.norm.parameters()).device if device is None else device
        layers = []
        for block in self._blocks():
            room = {"max_length": max_length} if block.grows else {}
            layers.append(block.initial_state(batch_size, device=device, dtype=dtype, **room))
        return ModelState(tuple(layers), torch.zeros(batch_size, dtype=torch.int64, device=device))

    def extend(
        self, inputs: Tensor, state: ModelState | None, *, lengths: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, ModelState]:
        """Scores of the next T steps of sequences that stand at `state`, None where they begin, and the state then.

        Any split of sequences over calls gives what the call of the model gives over the whole.

        Args:
            inputs: [B, T, ...], as of the call.
            state: from `initial_state` or `extend`. It stays what it was, and can be continued again.
            lengths: int64 [B], how many of the T steps of each sequence count; 0: it waits.
            last: only of the last step of each that counts, [B, 1, ...].

        Raises:
            ValueError: the model is bidirectional, or has no scores for every position, but classes; the state is of
                another number of sequences, or of another model; or a sequence is longer than absolute positions are
                valid.
        """
        self._require_causal()
        if not isinstance(self.head, PositionHead):
            raise ValueError(
                "this model tells classes of whole sequences, and nothing of their next step; valid: one with scores "
                'for every position, as of build_model(..., head="per_position")'
            )
        if state is None:
            state = self.initial_state(len(inputs))
        blocks = len(self._blocks())
        if not isinstance(state, ModelState) or len(state.layers) != blocks:
            raise ValueError(
                f"a state is what initial_state or extend of this model gave, of {blocks} blocks, or None; got "
                + (f"one of {len(state.layers)}" if isinstance(state, ModelState) else type(state).__name__)
            )
        if len(state.position) != len(inputs):
            raise ValueError(
                f"a state of {len(state.position)} sequences for inputs of {len(inputs)}; valid: a state of as many, "
                "or None to begin"
            )
        lengths = check_lengths("model", lengths, *inputs.shape[:2])
        return self(inputs, lengths, state=Held(state), last=last)

    def generate(
        self,
        prompts: Tensor | Sequence[Any],
        max_new: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Iterable[int] = (),
        never: Iterable[int] = (),
        seed: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The ids that follow each prompt, as many as `max_new`, or up to the first of `stop`, which ends them.

        What follows a prompt depends on it and its seed, not on what else there is. Prompts are read in one pass; then
        a symbol takes one step, of constant time and memory but for caches of keys.

        Args:
            prompts: int64 [B, T], or sequences of ids.
            lengths: int64 [B], of padded prompts.
            temperature: what scores are divided by; 0: always the likeliest.
            top_k: draw from so many of the likeliest.
            top_p: draw from the fewest of the likeliest that have this much of all probability.
            stop: ids that end a text.
            never: ids that are not drawn, such as that of padding, which no text has.
            seed: of the first prompt, the next having the next one; or one for each. None: from PyTorch's generator.

        Raises:
            ValueError: the model is bidirectional, classifies, reads pixels, or is in training mode; a prompt is empty,
                or with `max_new` longer than absolute positions are valid; or an option is out of its range.
        """
        options: dict[str, Any] = {"lengths": lengths, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"stop": stop, "never": never, "seed": seed}
        found: list[list[int]] = []
        for symbols in self.stream(prompts, max_new, **options):
            found = found or [[] for _ in symbols]
            for text, symbol in zip(found, symbols, strict=True):
                text += [] if symbol is None else [symbol]
        return found

    def stream(
        self,
        prompts: Tensor | Sequence[Any],
        max_new: int,
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Iterable[int] = (),
        never: Iterable[int] = (),
        seed: int | Sequence[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """What `generate` gives, step by step: an id for each prompt, None where one has stopped."""
        self._require_causal()
        if not (isinstance(self.head, PositionHead) and isinstance(self.backbone.embedding.inputs, TokenEmbedding)):
            kind = "pixels" if isinstance(self.head, PositionHead) else "sequences, and tells their classes"
            raise ValueError(
                f"this model reads {kind}, and has no next symbol to tell; valid: one of tokens with scores for every "
                "position, as task=char_lm trains"
            )
        if self.training:
            raise ValueError("this model is in training mode, in which it is not the same twice; valid: model.eval()")
        if isinstance(max_new, bool) or not isinstance(max_new, int) or max_new < 1:
            raise ValueError(f"max_new={max_new!r}; valid: 1 or more")
        table = self.backbone.embedding.inputs.table
        sampling = Sampling(temperature, top_k, top_p, tuple(never)).check(table.num_embeddings)
        rows = as_prompts(prompts, lengths, table.weight.device, table.num_embeddings)
        steps = max(map(len, rows)) + max_new - 1  # the last symbol is not read
        self.backbone.embedding.check_length(steps)
        state, seeds = self.initial_state(len(rows), max_length=steps), as_seeds(seed, len(rows))
        extend = torch.no_grad()(self.extend)
        return generated(extend, state, rows, max_new, sampling, frozenset(stop), seeds)

    def _blocks(self) -> list[Any]:
        return [layer.branch for layer in self.backbone.layers if layer.mixes]

    def _require_causal(self) -> None:
        if not self.backbone.causal:
            raise ValueError(
                "this model is bidirectional: it sees what comes later, and cannot go on where nothing does; valid: "
                "one that was built, or trained, with causal=true"
            )
