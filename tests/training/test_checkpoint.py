from __future__ import annotations

import pytest
import torch

from seqzoo.training import TrainingError
from seqzoo.training.checkpoint import load_last, load_metadata, load_weights, replacing, save_last, save_weights


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((2, 3), value), "layer.count": torch.tensor(7)}


def state(step: int) -> dict[str, object]:
    return {"step": step, "best": {"accuracy": 0.5}, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}


def test_weights_and_metadata_come_back(tmp_path):
    save_weights(tmp_path / "best.safetensors", weights(2.0), {"accuracy": 0.25, "step": 3})
    loaded = load_weights(tmp_path / "best.safetensors")
    assert torch.equal(loaded["layer.weight"], torch.full((2, 3), 2.0))
    assert loaded["layer.count"].item() == 7
    assert load_metadata(tmp_path / "best.safetensors") == {"accuracy": "0.25", "step": "3"}


def test_last_replaces_the_one_before(tmp_path):
    assert load_last(tmp_path / "last") is None
    save_last(tmp_path / "last", weights(1.0), state(10))
    save_last(tmp_path / "last", weights(2.0), state(20))
    loaded, restored = load_last(tmp_path / "last")
    assert restored["step"] == 20
    assert loaded["layer.weight"][0, 0] == 2
    assert torch.equal(restored["optimizer"]["state"][0]["exp_avg"], torch.ones(3))
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["state.pt", "weights-20.safetensors"]


@pytest.mark.parametrize("failing", ["save_file", "torch.save", "os.replace"])
def test_a_failure_while_writing_keeps_the_checkpoint_before(tmp_path, monkeypatch, failing):
    save_last(tmp_path, weights(1.0), state(10))

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    if failing == "torch.save":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(f"seqzoo.training.checkpoint.{failing}", fail)
    with pytest.raises(OSError, match="no space"):
        save_last(tmp_path, weights(2.0), state(20))
    monkeypatch.undo()
    loaded, restored = load_last(tmp_path)
    assert restored["step"] == 10
    assert loaded["layer.weight"][0, 0] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_replacing_leaves_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["state.pt", "weights-10.safetensors"])
@pytest.mark.parametrize("size", [0, 30, -20])
def test_a_truncated_file_is_named(tmp_path, name, size):
    save_last(tmp_path, weights(1.0), state(10))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TrainingError, match=f"{name} is damaged"):
        load_last(tmp_path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(TrainingError, match=r"best\.safetensors is missing"):
        load_weights(tmp_path / "best.safetensors")


def test_states_are_loaded_without_running_their_code(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("executed",))

    save_last(tmp_path, weights(1.0), state(10))
    torch.save({"step": 10, "surprise": Surprise()}, tmp_path / "state.pt")
    with pytest.raises(TrainingError, match="damaged"):
        load_last(tmp_path)
