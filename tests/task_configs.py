"""Configurations of tasks that take no time, shared by tests."""

from __future__ import annotations

from seqzoo.tasks import TaskConfig


def small_listops(**changes) -> TaskConfig:
    """ListOps with short expressions, and few of them."""
    settings = {
        "name": "lra_listops",
        "max_length": 256,
        "mask_ratio": 0.1,
        "max_depth": 5,
        "max_args": 10,
        "min_length": 20,
        "length_bound": 200,
        "num_train": 300,
        "num_val": 40,
        "num_test": 50,
        "generator_seed": 0,
    }
    return TaskConfig(**(settings | changes))
