"""The keys of a task's configuration file, `configs/task/<name>.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

COUNTS = {"train": "num_train", "val": "num_val", "test": "num_test"}  # the key of each split's size


@dataclass(kw_only=True)
class TaskConfig:
    """What shapes a task's data. The first three keys are every task's; the others are None where they do not apply."""

    name: str
    max_length: int  # in tokens, <eos> included; longer sequences are cut
    mask_ratio: float  # share of positions hidden in masked pretraining

    # cut from the published training split, so that nothing is ever chosen by looking at the test split
    val_fraction: float | None = None
    split_seed: int | None = None
    test_fraction: float | None = None  # of data that are published without a test split

    min_frequency: int | None = None  # text: rarer characters are <unk>

    difficulty: str | None = None  # Pathfinder, see `seqzoo.tasks.pathfinder_parameters.DIFFICULTIES`

    # ListOps, see `seqzoo.tasks.listops_grammar.Grammar`; the bounds on generated lengths are excluded
    max_depth: int | None = None
    max_args: int | None = None
    min_length: int | None = None
    length_bound: int | None = None

    # what is generated
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    generator_seed: int | None = None  # also of the pairs that are drawn for acl_retrieval
    workers: int | None = None  # threads that generate, None for one a core; does not change the data

    # recall, see `seqzoo.tasks.recall`; with num_train, num_val, num_test and generator_seed
    num_pairs: int | None = None
    num_queries: int | None = None
    num_tokens: int | None = None
    num_symbols: int | None = None

    # character language modelling
    text: str | None = None  # a UTF-8 file, its path absolute or relative to data_dir

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"task={self.name}: max_length is {self.max_length}; valid: 2 and more")
        for key in ("mask_ratio", "val_fraction", "test_fraction"):
            share = getattr(self, key)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"task={self.name}: {key} is {share}; valid: between 0 and 1, both excluded")
        for key in COUNTS.values():
            count = getattr(self, key)
            if count is not None and count < 1:
                raise ValueError(
                    f"task={self.name}: {key} is {count}; valid: 1 and more, each split needs at least one"
                )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"task={self.name}: workers is {self.workers}; valid: 1 and more, or null for one a core")

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
