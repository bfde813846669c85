"""What holds for every test."""

from __future__ import annotations

import gc
import os
import sys

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before anything imports PyTorch, as train.py says
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core each, for the processes that a test starts too

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

SAID_ONCE = (
    ("seqzoo.kernels.backends", "_say_once"),
    ("seqzoo.blocks.learning", "_warn_once"),
    ("seqzoo.messages", "say_once"),
)


def pytest_collection_finish() -> None:
    """What has been imported stays, and is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(autouse=True)
def _alone():
    """A test passes or fails for what it tests, whichever others run before it: what is drawn, compiled and said once
    begins anew."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    for module, name in SAID_ONCE:
        if module in sys.modules:
            getattr(sys.modules[module], name).cache_clear()


@pytest.fixture
def victim(tmp_path):
    """A file elsewhere, for links to lead to: nothing may change it or come to lie beside it."""
    path = tmp_path / "elsewhere" / "victim"
    path.parent.mkdir()
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    from seqzoo.kernels import backends

    if not backends.INTERPRETED:
        yield
        return
    from quick_interpreter import quick

    with quick():
        yield
