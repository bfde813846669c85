"""Configurations of tasks shared by tests."""

from __future__ import annotations

from seqzoo.tasks import TaskConfig


def cifar_pictures(name: str, **changes) -> TaskConfig:
    """CIFAR-10 as the task `name`, whole."""
    settings = {"max_length": 1024, "mask_ratio": 0.5, "val_fraction": 0.1, "split_seed": 42}
    return TaskConfig(name=name, **(settings | changes))


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
