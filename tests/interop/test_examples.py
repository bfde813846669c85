"""The example programs, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def lines_of(name: str, needed: str) -> str:
    pytest.importorskip(needed, exc_type=(ImportError, RuntimeError))
    command = [sys.executable, ROOT / "examples" / name]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.slow
def test_llama_mixer():
    said = lines_of("llama_mixer.py", "transformers")
    assert "model.layers.1.self_attn: LlamaAttention -> LRU" in said
    assert float(re.findall(r"step \d+: (.*) bits a byte", said)[-1]) < 3
    assert len(set(re.findall(r"a state of (.*) bytes", said))) == 1


@pytest.mark.slow
def test_vit_mixer():
    said = lines_of("vit_mixer.py", "timm")
    assert "blocks.1.attn: Attention -> SoftmaxAttention; copied proj.bias, proj.weight, qkv.bias, qkv.weight" in said
    assert float(re.search(r"the same to (.*)", said)[1]) < 1e-5
    assert int(re.search(r"in (\d+)% of pictures", said)[1]) > 90
