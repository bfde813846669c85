"""The names of blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..messages import unknown
from ..names import is_taken
from ..valid import Range, check_options
from .base import Block
from .conv import Conv
from .delta_net import DeltaNet
from .gated_delta_net import GatedDeltaNet
from .gau import GAU
from .gla import GLA
from .hgrn2 import HGRN2
from .kda import KDA
from .linear_attention import LinearAttention
from .lru import LRU
from .mamba import Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .min_gru import MinGRU
from .mlstm import MLSTM
from .performer import Performer
from .retnet import RetNet
from .rg_lru import RGLRU
from .rwkv7 import RWKV7
from .s4d import S4D
from .s5 import S5
from .softmax_attention import SoftmaxAttention
from .vq_attention import VQAttention

BLOCKS: dict[str, type[Block]] = {
    "softmax_attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "performer": Performer,
    "vq_attention": VQAttention,
    "gau": GAU,
    "lru": LRU,
    "s4d": S4D,
    "conv": Conv,
    "retnet": RetNet,
    "gla": GLA,
    "hgrn2": HGRN2,
    "mlstm": MLSTM,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "rwkv7": RWKV7,
    "mamba": Mamba,
    "min_gru": MinGRU,
    "rg_lru": RGLRU,
    "s5": S5,
}

OF_MODELS = {  # the block in each model of train.py that has another name
    "transformer": "softmax_attention",
    "linear_transformer": "linear_attention",
    "vq_transformer": "vq_attention",
    "flash": "gau",
}
NUMBERS = {int: Range(0, 1 << 20), float: Range(0, 1_000_000)}  # of options that say nothing narrower
OWN: dict[str, dict[str, Any]] = {}  # of blocks that were registered: keys of the model that stands under their name

Kind = TypeVar("Kind", bound=type[Block])


def register_block(name: str, *, model: Mapping[str, Any] | None = None) -> Callable[[Kind], Kind]:
    """Decorates a block of one's own, a subclass of `Block`: from then on `name` builds it wherever blocks have names.

    Args:
        name: letters, digits and _.
        model: of train.py's `model=<name>`, which has such blocks in all layers: keys of
            `seqzoo.models.ModelConfig` beside a width of 128 and 4 layers, such as `mlp_ratio`.

    Raises:
        ValueError: the name is taken or none, or the class cannot be built as blocks are.
    """

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Block)):
            raise ValueError(f"register_block({name!r}): got {kind!r}; valid: a subclass of seqzoo.Block")
        taken = name in OF_MODELS or is_taken(name, BLOCKS, kind)
        if taken or not name.isidentifier():
            raise ValueError(
                f"register_block({name!r}): valid: letters, digits and _, and no name that there is: "
                f"{', '.join([*BLOCKS, *OF_MODELS])}"
            )
        parameters = inspect.signature(kind).parameters
        if missing := [key for key in ("d_model", "causal") if key not in parameters]:
            raise ValueError(
                f"register_block({name!r}): {kind.__name__} takes no {' and no '.join(missing)}; "
                "valid: def __init__(self, d_model, *, causal=False, and its options)"
            )
        BLOCKS[name] = kind
        OWN[name] = dict(model or {})
        return kind

    return register


def block_name(block: Block) -> str:
    """The key of `BLOCKS` under which a block's class stands.

    Raises:
        ValueError: it stands under none.
    """
    for name, kind in BLOCKS.items():
        if type(block) is kind:
            return name
    kind = type(block)
    raise ValueError(f"{kind.__name__} has no name; valid: seqzoo.register_block, or a block of {', '.join(BLOCKS)}")


def check_block(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError where a block or one of its options does not exist, or is of the wrong type or out of range."""
    if not isinstance(name, str):
        raise ValueError(f"a block is built by its name and then its width, as build_block('lru', 64), got {name!r}")
    if name in OF_MODELS:
        block = OF_MODELS[name]
        raise ValueError(f"no block {name!r}: in the model of that name it is {block!r}; valid: {', '.join(BLOCKS)}")
    if name not in BLOCKS:
        own = "one's own, once what registers it is imported (plugins=[module] of train.py)"
        raise ValueError(f"{unknown('block', name, BLOCKS)}, or {own}")
    parameters = inspect.signature(BLOCKS[name]).parameters
    valid = [key for key in parameters if key not in ("d_model", "causal")]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in valid:
                raise ValueError(unknown(f"option of {name}", option, valid))
    check_options(BLOCKS[name].__init__, options, default=NUMBERS)
