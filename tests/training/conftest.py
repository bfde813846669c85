from __future__ import annotations

import pytest
import torch
from tiny_runs import toy_task

from seqzoo.tasks import Task


@pytest.fixture(scope="session")
def task() -> Task:
    return toy_task()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sharing operations this small between threads takes longer than doing them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
