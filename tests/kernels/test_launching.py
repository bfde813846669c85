"""How kernels are started, and what they are compiled for."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from fused_calls import CALLS, MODULES, RAGGED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from seqzoo.kernels import backends, launching

interpreted = pytest.mark.skipif(not backends.INTERPRETED, reason="runs in Triton's interpreter")
# Sizes that change from batch to batch, from call to call, or with a GPU's multiprocessors.
VARYING = {"B", "T", "rows", "chunk_len", "segment_len", "chunks", "segments", "groups", "items", "middle"}


def functions() -> dict[str, Any]:
    """All that are compiled, by module and name."""
    return {
        f"{module.__name__}.{name}": x
        for module in MODULES
        for name, x in vars(module).items()
        if isinstance(x, JITFunction | InterpretedFunction) and x.fn.__module__ == module.__name__
    }


@interpreted
@pytest.mark.parametrize("operation", CALLS)
def test_every_kernel_starts_where_its_tensors_are(operation, monkeypatch):
    current: list[torch.device] = []
    started = []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    def run(self, *arguments, grid, warmup, **keywords):
        assert {x.device for x in arguments if isinstance(x, Tensor)} == {*current}
        started.append(self)

    monkeypatch.setattr(launching, "on", on)
    monkeypatch.setattr(InterpretedFunction, "run", run)
    for call in CALLS[operation](RAGGED):
        call()
    assert started
    assert not current


def test_work_is_cut_until_a_gpu_has_enough_to_do(monkeypatch):
    monkeypatch.setattr(backends, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    for programs, most, pieces in ((1, 8, 8), (100, 8, 2), (264, 8, 1), (1000, 8, 1), (1, 0, 1)):
        assert launching.cut_work(programs, most, device, wanted=2) == pieces
    for programs, T, length in ((1, 4096, 512), (100, 4096, 2048), (1000, 4096, 4096), (1, 1023, 1023), (1, 1030, 576)):
        assert launching.cut_time(programs, T, 64, device, least=512, wanted=2) == length


def test_the_device_of_tensors_is_made_current():
    device = launching.on(torch.device("cuda", 3))
    assert isinstance(device, torch.cuda.device)
    assert device.idx == 3


def test_no_global_that_a_kernel_reads_can_change():
    """A compiled kernel refuses one that did: whatever is to change is an argument."""
    read = {}
    for name, function in functions().items():
        known = function.fn.__globals__
        read |= {(name, x): known[x] for x in function.fn.__code__.co_names if x in known}
    constants = {key for key, x in read.items() if isinstance(x, tl.constexpr)}  # which can be called, as a function
    assert all(key in constants or callable(x) or isinstance(x, type(tl)) for key, x in read.items())
    names = "|".join(sorted({name for _, name in constants}))
    assert names
    assigned = re.compile(rf'(setattr|patch\.object)\([\w.]+, "({names})"|^\s*\w+\.({names}) =', re.M)
    files = [*Path(__file__).parents[1].rglob("*.py"), *Path(__file__).parents[2].glob("benchmarks/*.py")]
    assert not [file.name for file in files if assigned.search(file.read_text())]


def test_no_kernel_is_compiled_anew_for_another_batch():
    for name, kernel in functions().items():
        if name.endswith("_kernel"):
            left = kernel.kwargs if backends.INTERPRETED else vars(kernel)
            varying = VARYING & set(kernel.arg_names)
            assert varying <= set(left["do_not_specialize"] or ()), name


class _Sums(TorchDispatchMode):
    """Along which dimensions of what is added up step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if operator.overloadpacket in (torch.ops.aten.cumsum, torch.ops.aten.cumprod):
            self.made.append(arguments[0])
        return operator(*arguments, **(keywords or {}))


@interpreted
@pytest.mark.parametrize("operation", CALLS)
def test_no_sum_over_time_has_other_bits_in_another_run(operation, monkeypatch):
    """As a cumulative one of floating-point numbers in a single row has on a GPU, where B and H are 1."""
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    with _Sums() as sums:
        for call in CALLS[operation](RAGGED._replace(B=1, H=1)):
            call()
    assert not [x for x in sums.made if x.is_floating_point() and max(x.shape) == x.numel()]
