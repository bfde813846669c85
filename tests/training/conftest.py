from __future__ import annotations

import pytest
from tiny_runs import one_thread as one_thread
from tiny_runs import toy_task

from seqzoo.tasks import Task


@pytest.fixture(scope="session")
def task() -> Task:
    return toy_task()
