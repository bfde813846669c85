import pytest
import torch

from seqzoo.config import ConfigError, compose, from_dict, to_dict
from seqzoo.kernels import cpu
from seqzoo.kernels.cpu import cpu_features
from seqzoo.precision import native_precision
from seqzoo.runs.folder import pretraining_key, run_name

ZEN4 = "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 clzero\nbogomips\t: 5000\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes this machine one without a GPU, of which PyTorch and Linux know so much."""

    def make(capabilities=None, cpuinfo=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        if capabilities is None:
            monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        else:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        if cpuinfo is not None:
            (tmp_path / "cpuinfo").write_text(cpuinfo)

    return make


@pytest.mark.parametrize(
    ("capabilities", "cpuinfo", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, None, "bf16"),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, None, "bf16"),
        ({"architecture": "aarch64", "bf16": True, "sve_max_length": 32}, None, "bf16"),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False}, None, "fp32"),
        (None, ZEN4, "bf16"),
        (None, GRAVITON, "bf16"),
        (None, ZEN4.replace("avx512_bf16", "avx512_vnni"), "fp32"),
        (None, None, "fp32"),
    ],
)
def test_a_cpu_has_bf16_by_its_instructions(machine, capabilities, cpuinfo, expected):
    machine(capabilities, cpuinfo)
    assert native_precision("cpu") == native_precision("auto") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_has_bf16_if_it_emulates_nothing(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert native_precision("cuda") == native_precision("auto") == expected


def test_this_machine_is_asked():
    assert all(isinstance(name, str) for name in cpu_features())
    assert native_precision("cpu") in ("fp32", "bf16")


@pytest.mark.parametrize("found", ["fp32", "bf16"])
def test_a_run_is_what_auto_stands_for(monkeypatch, found):
    monkeypatch.setattr("seqzoo.config.native_precision", lambda device: found)
    asked = ["model=lru", "recipe=tiny", "pretrain=true"]
    config, plain = compose([*asked, "precision=auto"]), compose([*asked, f"precision={found}"])
    assert config == plain
    assert run_name(config) == run_name(plain)
    assert pretraining_key(config) == pretraining_key(plain)
    monkeypatch.setattr("seqzoo.config.native_precision", lambda device: "another")
    assert from_dict(to_dict(config)) == config, "on another machine too"


def test_the_device_is_the_one_that_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("seqzoo.config.native_precision", lambda device: asked.append(device) or "fp32")
    compose(["precision=auto", "device=cpu"])
    compose(["precision=bf16"])
    assert asked == ["cpu"]


def test_jobs_of_a_cluster_are_told():
    with pytest.raises(ConfigError, match=r"precision=auto: jobs of a cluster .* valid: fp32, bf16"):
        compose(["precision=auto", "launcher=slurm"])
    compose(["precision=auto", "launcher=local"])
