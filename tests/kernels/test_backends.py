"""Which form of an operation runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.kernels import backends, measured
from seqzoo.kernels.common import dtype_name

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FORMS = {"chunked": "the chunked one", "reference": "the definition", "fused": "the fused one"}


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(backends, "DEFAULT", "auto")
    key = measured.Key(90, "op", "bfloat16", 64)
    monkeypatch.setattr(measured, "FASTER", {key: measured.Measured(0, "a card", "a run")})
    monkeypatch.setattr(backends, "architecture", lambda device: 90)


def fit(device: torch.device, dtype=torch.bfloat16, width=64, refused=None) -> backends.Fit:
    return backends.Fit(device, dtype, width, refused)


def test_auto_takes_triton_where_it_was_measured_to_be_faster():
    assert backends.choose("op", "auto", FORMS, fit(GPU)) == "the fused one"
    assert backends.choose("op", "auto", {"chunked": "the chunked one"}, fit(GPU)) == "the chunked one"


@pytest.mark.parametrize(
    ("operation", "other"),
    [("op", fit(CPU)), ("another", fit(GPU)), ("op", fit(GPU, torch.float16)), ("op", fit(GPU, width=128))],
)
def test_auto_takes_triton_nowhere_else(operation, other):
    assert backends.choose(operation, "auto", FORMS, other) == "the chunked one"


@pytest.mark.parametrize("architecture", [75, 86, 100, 120])
def test_auto_leaves_other_gpus_alone(monkeypatch, architecture):
    monkeypatch.setattr(backends, "architecture", lambda device: architecture)
    assert backends.choose("op", "auto", FORMS, fit(GPU)) == "the chunked one"


def test_a_graph_knows_what_was_measured():
    def asked(x: torch.Tensor) -> torch.Tensor:
        known = measured.Key(90, "op", dtype_name(x.dtype), measured.width_class(x.shape[-1]))
        return x + 1 if known in measured.FASTER else x

    asked_in_a_graph = torch.compile(asked, backend="eager", fullgraph=True)
    assert asked_in_a_graph(torch.zeros(50, dtype=torch.bfloat16)).all()
    assert not asked_in_a_graph(torch.zeros(32, dtype=torch.bfloat16)).any()


def test_the_environment_names_another_default(monkeypatch):
    monkeypatch.setattr(backends, "DEFAULT", "fused")
    assert backends.choose("op", "auto", FORMS, fit(CPU)) == "the fused one"
    assert backends.choose("op", "chunked", FORMS, fit(CPU)) == "the chunked one"
    assert backends.choose("op", "auto", {"chunked": "the chunked one"}, fit(CPU)) == "the chunked one"


@pytest.mark.parametrize(
    ("variable", "value", "valid"),
    [("SEQZOO_BACKEND", "cuda", "auto, fused, chunked, reference"), ("SEQZOO_FEW_WARPS", "two", "0, 1")],
)
def test_the_environment_is_checked(variable, value, valid):
    environment = {**os.environ, variable: value, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "import seqzoo.kernels"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert f"{variable}={value!r}; valid: {valid}" in process.stderr


def test_what_is_refused_is_said_once(caplog):
    for _ in range(2):
        assert backends.choose("op", "fused", FORMS, fit(GPU, refused="no kernel likes it here")) == "the chunked one"
    assert caplog.text.count("op: no kernel likes it here; the chunked form runs in place of the fused one") == 1
    assert backends.choose("op", "reference", FORMS, fit(GPU, refused="no kernel likes it here")) == "the definition"


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="op has no backend 'fast'; valid: auto, chunked, reference, fused"):
        backends.choose("op", "fast", FORMS, fit(GPU))
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="valid: auto, chunked, reference; the fused form needs Triton"):
        backends.choose("op", "fused", FORMS, fit(GPU))


def test_what_of_a_call_is_looked_at():
    channels = {torch.float32: 8, torch.bfloat16: 16}
    x, wide = torch.zeros(2, 8), torch.zeros(2, 9)
    assert backends.fit(x, x.bfloat16(), channels=channels) == (CPU, torch.float32, 16, None)
    assert backends.fit(wide.bfloat16(), channels=channels) == (CPU, torch.bfloat16, 16, None)
    assert backends.fit(wide.bfloat16(), channels=channels, width=0).width == 0
    assert "more than 8 channels in torch.float32" in backends.fit(x, wide.bfloat16(), channels=channels).refused
    assert "computes in torch.float64" in backends.fit(x.double(), channels=channels).refused
    assert "there is nothing in [[0, 8]]" in backends.fit(x[:0], channels=channels).refused
    assert backends.fit(x, channels=channels, also="no kernel today").refused == "no kernel today"
