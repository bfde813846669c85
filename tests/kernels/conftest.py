from __future__ import annotations

import pytest
from quick_interpreter import quick

from seqzoo.kernels import backends


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    if not backends.INTERPRETED:
        yield
        return
    with quick():
        yield
