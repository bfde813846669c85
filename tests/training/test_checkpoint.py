from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seqzoo.messages import say_once
from seqzoo.training import TrainingError
from seqzoo.training.checkpoint import (
    CHECKSUM,
    Checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value), "layer.count": torch.tensor(7)}


def checkpoint(step: int, value: float = 1.0) -> Checkpoint:
    optimizer = {0: {"exp_avg": torch.full((3,), value), "step": torch.tensor(float(step))}}
    return Checkpoint(weights(value), optimizer, {"step": step, "seconds": 0.1, "best": {"accuracy": 0.5}})


def test_weights_and_metadata_come_back(tmp_path):
    save_weights(tmp_path / "best.safetensors", weights(2.0), {"accuracy": 0.25, "step": 3})
    loaded = load_weights(tmp_path / "best.safetensors")
    assert torch.equal(loaded["layer.weight"], torch.full((2, 3), 2.0))
    assert loaded["layer.count"].item() == 7
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        assert {"accuracy": "0.25", "step": "3"}.items() < file.metadata().items()


def test_a_checkpoint_comes_back_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "finetune" / "last.safetensors"
    assert load_checkpoint(path) is None
    save_checkpoint(path, checkpoint(10))
    save_checkpoint(path, checkpoint(20, 2.0))
    loaded = load_checkpoint(path)
    assert loaded.state == checkpoint(20).state
    torch.testing.assert_close(loaded.weights, weights(2.0), rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer, checkpoint(20, 2.0).optimizer, rtol=0, atol=0)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["safetensors.torch.save_file", "seqzoo.files.os.fsync", "seqzoo.files.os.replace"])
def test_a_failure_while_writing_keeps_the_checkpoint_before(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, checkpoint(10))

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, checkpoint(20, 2.0))
    monkeypatch.undo()
    loaded = load_checkpoint(path)
    assert loaded.state["step"] == 10
    assert loaded.weights["layer.weight"][0, 0] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [0, 30, -20])
def test_a_truncated_file_is_named(tmp_path, size):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, checkpoint(10))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TrainingError, match=r"last\.safetensors is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_is_never_read_in_silence(tmp_path, capsys, dtype):
    """Wherever it is: a number, a name, a type, a shape, a counter, the checksum."""
    path = tmp_path / "last.safetensors"
    saved = Checkpoint({"w": torch.tensor([[1, 0, 1]]).to(dtype)}, {0: {"step": torch.tensor(3.0)}}, {"step": 3})
    save_checkpoint(path, saved)
    content = path.read_bytes()
    read = 0
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with suppress(TrainingError):
            loaded = load_checkpoint(path)
            assert "has no checksum" in capsys.readouterr().err, at
            assert loaded.state == saved.state
            assert torch.equal(loaded.weights["w"], saved.weights["w"])
            assert torch.equal(loaded.optimizer[0]["step"], saved.optimizer[0]["step"])
            say_once.cache_clear()
            read += 1
    assert 0 < read <= len(CHECKSUM), "those whose checksum has another name"


def test_weights_that_have_changed_are_named(tmp_path):
    path = tmp_path / "best.safetensors"
    save_weights(path, weights(2.0))
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"best\.safetensors is damaged \(its checksum is not"):
        load_weights(path)


def test_weights_of_before_are_read_and_that_is_said_once(tmp_path, capsys):
    path = tmp_path / "best.safetensors"
    save_file(weights(2.0), path, {"accuracy": "0.5"})
    for _ in range(2):
        torch.testing.assert_close(load_weights(path), weights(2.0), rtol=0, atol=0)
    assert capsys.readouterr().err.count(f"{path} has no checksum") == 1


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(TrainingError, match=r"best\.safetensors is missing"):
        load_weights(tmp_path / "best.safetensors")


def test_what_is_no_checkpoint_is_refused_without_running_its_code(tmp_path, capsys):
    class Surprise:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"step": 10, "surprise": Surprise()}, tmp_path / "last.safetensors")
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(tmp_path / "last.safetensors")
    save_weights(tmp_path / "last.safetensors", weights(1.0))
    with pytest.raises(TrainingError, match="damaged"):
        load_checkpoint(tmp_path / "last.safetensors")
    assert not capsys.readouterr().out
