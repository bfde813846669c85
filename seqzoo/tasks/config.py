"""The keys of a task's configuration file, `configs/task/<name>.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

from ..valid import Between, Count, Examples, Length, Number, Range, Text, Width, check_ranges

COUNTS = {"train": "num_train", "val": "num_val", "test": "num_test"}  # the key of each split's size
CUT = {"val_fraction": 0.1, "split_seed": 42}
DRAWN = {"generator_seed": 0}
# How data are drawn, split, cut and spelt where nobody says otherwise, as the files have it; but for what tasks note
# in words of their own.
USUAL: dict[str, dict[str, float]] = {
    **dict.fromkeys(("fsdd", "lra_image", "scifar", "smnist"), CUT),
    "acl_retrieval": {"max_length": 4000, **CUT, "test_fraction": 0.1, "min_frequency": 15, **DRAWN},
    "associative_recall": {**DRAWN, "num_val": 3000, "num_test": 3000},
    "char_lm": {"val_fraction": 0.05, "test_fraction": 0.05, "min_frequency": 1},
    "induction_heads": {**DRAWN, "num_val": 2000, "num_test": 2000},
    "lra_retrieval": {"min_frequency": 1},
    "lra_text": {**CUT, "min_frequency": 15},
    "selective_copying": {**DRAWN, "num_val": 1000, "num_test": 1000},
}
POSITIONS = 2 * 10**10  # of all splits together, generated: bytes, at least


@dataclass(kw_only=True)
class TaskConfig:
    """What shapes a task's data. The first three keys are every task's; the others are None where they do not apply."""

    name: str
    max_length: Length  # in tokens, <eos> included; longer sequences are cut, pictures made smaller
    mask_ratio: Between  # share of positions hidden in masked pretraining

    # cut from the published training split, so that nothing is ever chosen by looking at the test split
    val_fraction: Between | None = None
    split_seed: Number | None = None
    test_fraction: Between | None = None  # of data that are published without a test split

    min_frequency: Number | None = None  # text: rarer characters are <unk>

    permuted: bool | None = None  # pictures: read in one random order of pixels, the same for all

    difficulty: str | None = None  # Pathfinder, see `seqzoo.tasks.pathfinder.parameters.DIFFICULTIES`

    # ListOps, see `seqzoo.tasks.listops.grammar.Grammar`; the bounds on generated lengths are excluded
    max_depth: Annotated[int, Range(1, 1000)] | None = None
    max_args: Annotated[int, Range(1, 1000)] | None = None
    min_length: Annotated[int, Range(0, 1 << 20)] | None = None
    length_bound: Length | None = None

    # what is generated
    num_train: Examples | None = None
    num_val: Examples | None = None
    num_test: Examples | None = None
    generator_seed: Number | None = None  # also of the pairs that are drawn for acl_retrieval
    workers: Annotated[int, Range(1, 1024)] | None = (
        None  # threads that generate, None for one a core; does not change the data
    )

    # recall, see `seqzoo.tasks.recall`; with num_train, num_val, num_test and generator_seed
    num_pairs: Count | None = None
    num_queries: Count | None = None
    num_tokens: Count | None = None
    num_symbols: Width | None = None

    # character language modelling
    text: Text | None = None  # a UTF-8 file, its path absolute or relative to data_dir

    options: dict[str, Any] | None = None  # of a task of one's own, see `seqzoo.tasks.register_task`

    def __post_init__(self) -> None:
        check_ranges(self, f"task={self.name}: task.", absent=True)
        self.permuted = self.permuted or None  # the same data as without it, under the same name
        counts = [count for key in COUNTS.values() if (count := getattr(self, key)) is not None]
        if sum(counts) * self.max_length > POSITIONS:
            raise ValueError(
                f"task={self.name}: {sum(counts):,} sequences of up to {self.max_length:,} positions; valid: up to "
                f"{POSITIONS:,} positions together"
            )

    @property
    def unusual(self) -> str:
        """The keys of `USUAL` that have another value here, with it; empty: none has."""
        usual = USUAL.get(self.name, {})
        given = {key: getattr(self, key) for key in usual}
        return ", ".join(f"{key} {value}" for key, value in given.items() if value not in (None, usual[key]))

    def settings(self, *names: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
        """The keys that a task reads besides the common ones.

        Raises:
            ValueError: one of `names` is None, or a key is set that is neither in `names` nor `optional`.
        """
        known = ("name", "max_length", "mask_ratio", *names, *optional)
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"task {self.name} needs {', '.join(missing)}; see configs/task/{self.name}.yaml")
        if foreign := [name for name in given if name not in known]:
            raise ValueError(f"task {self.name} has no use for {', '.join(foreign)}; valid: {', '.join(known)}")
        return {name: getattr(self, name) for name in (*names, *optional)}
