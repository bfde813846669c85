"""Which form of an operation runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seqzoo.kernels import backends

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FORMS = {"chunked": "the chunked one", "reference": "the definition", "fused": "the fused one"}


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(backends, "DEFAULT", "auto")
    monkeypatch.setattr(backends, "FUSED_ON_GPU", True)
    monkeypatch.setattr(backends, "architecture", lambda device: 90)


def test_auto_takes_triton_on_a_gpu_only():
    assert backends.choose("op", "auto", FORMS, GPU) == "the fused one"
    assert backends.choose("op", "auto", FORMS, CPU) == "the chunked one"
    assert backends.choose("op", "auto", {"chunked": "the chunked one"}, GPU) == "the chunked one"


def test_auto_leaves_old_gpus_alone(monkeypatch):
    monkeypatch.setattr(backends, "architecture", lambda device: 75)
    assert backends.choose("op", "auto", FORMS, GPU) == "the chunked one"


def test_the_environment_names_another_default(monkeypatch):
    monkeypatch.setattr(backends, "DEFAULT", "fused")
    assert backends.choose("op", "auto", FORMS, CPU) == "the fused one"
    assert backends.choose("op", "chunked", FORMS, CPU) == "the chunked one"
    assert backends.choose("op", "auto", {"chunked": "the chunked one"}, CPU) == "the chunked one"


def test_the_environment_is_checked():
    environment = {**os.environ, "SEQZOO_BACKEND": "cuda", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", "import seqzoo"], env=environment, capture_output=True, text=True)
    assert "SEQZOO_BACKEND='cuda'; valid: auto, fused, chunked, reference" in process.stderr


def test_what_is_refused_is_said_once(caplog):
    for _ in range(2):
        assert backends.choose("op", "fused", FORMS, GPU, "no kernel likes it here") == "the chunked one"
    assert caplog.text.count("op: no kernel likes it here; the chunked form runs in place of the fused one") == 1
    assert backends.choose("op", "reference", FORMS, GPU, "no kernel likes it here") == "the definition"


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="op has no backend 'fast'; valid: auto, chunked, reference, fused"):
        backends.choose("op", "fast", FORMS, GPU)
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="valid: auto, chunked, reference; the fused form needs Triton"):
        backends.choose("op", "fused", FORMS, GPU)


def test_refusal():
    channels = {torch.float32: 8, torch.bfloat16: 16}
    x, wide = torch.zeros(2, 8), torch.zeros(2, 9)
    assert backends.refusal(x, x.bfloat16(), channels=channels) is None
    assert backends.refusal(wide.bfloat16(), channels=channels) is None
    assert "more than 8 channels in torch.float32" in backends.refusal(x, wide.bfloat16(), channels=channels)
    assert "computes in torch.float64" in backends.refusal(x.double(), channels=channels)
    assert "there is nothing in [[0, 8]]" in backends.refusal(x[:0], channels=channels)
    assert backends.refusal(x, channels=channels, also="no kernel today") == "no kernel today"


def test_a_table_is_read_at_the_newest_architecture_there_is(monkeypatch):
    table = {80: "a", 90: "b", 100: "c"}
    for known, entry in ((80, "a"), (86, "a"), (90, "b"), (120, "c")):
        monkeypatch.setattr(backends, "architecture", lambda device, known=known: known)
        assert backends.newest(table, GPU) == entry
