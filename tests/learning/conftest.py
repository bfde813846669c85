from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny_runs import one_thread as one_thread

from seqzoo.config import compose
from seqzoo.tasks import Task, build_task

FOLDERS = {"lra_text": "aclImdb", "lra_image": "cifar-10-batches-py"}  # under SEQZOO_DATA_DIR
SHORT = {
    "lra_listops": ["task.max_length=128", "task.max_depth=4", "task.length_bound=120", "task.num_train=10000"],
    "lra_text": ["task.max_length=64"],
    "lra_image": [],
}


@pytest.fixture(scope="session")
def short_task(tmp_path_factory) -> Callable[[str], Task]:
    """`short_task("lra_text")`: the task, short; a skip where its data are not at hand."""

    @cache
    def build(name: str) -> Task:
        data_dir = os.environ.get("SEQZOO_DATA_DIR")
        if name in FOLDERS and not (data_dir and Path(data_dir, FOLDERS[name]).exists()):
            pytest.skip(f"needs {FOLDERS[name]} in the folder SEQZOO_DATA_DIR names")
        config = compose([f"task={name}", "recipe=tiny", *SHORT[name]])
        return build_task(config.task, data_dir=data_dir, cache_dir=tmp_path_factory.mktemp("cache"))

    return build
