"""Blocks as ONNX, run by onnxruntime, against themselves."""

import pytest
import torch
from agreement import assert_close
from block_cases import CASES, assert_states_of_graphs_close, make, sequences, soon
from torch import nn

onnxruntime = pytest.importorskip("onnxruntime", minversion="1.32")
pytest.importorskip("onnxscript")
reference = pytest.importorskip("onnx.reference")

from seqzoo.interop import onnx  # noqa: E402

ANY = {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}
OFTEN = ("linear_attention-0-causal", "lru-0-causal")


def run(program, *inputs):
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})]


@soon([case for case in CASES if case.id in OFTEN], CASES)
@torch.no_grad()
def test_a_block_is_the_same_in_onnx(name, options, causal, tmp_path):
    block = make(name, options, causal, dtype=torch.float32)
    given = {"x": sequences(2, 9, dtype=torch.float32), "lengths": torch.tensor([9, 4])}
    program = onnx.export(block, (), tmp_path / "block.onnx", keywords=given, dynamic_shapes=ANY)
    assert (tmp_path / "block.onnx").stat().st_size
    for B, T in ((2, 9), (3, 70), (1, 2)):
        x, lengths = sequences(B, T, dtype=torch.float32), torch.arange(T, T - B, -1)
        (y,) = run(program, x, lengths)
        assert_close(y, block(x, lengths=lengths), 2e-5)


class Step(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, state):
        y, state = self.block.extend(x, self.kind(*state))
        return y, *state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case.values[:2], id=case.id) for case in CASES if case.values[2] and "-0-" in str(case.id)],
)
@torch.no_grad()
def test_steps_continue_a_state_in_onnx(name, options):
    block = make(name, options, True, dtype=torch.float32)
    x = sequences(2, 12, dtype=torch.float32)
    _, state = block.extend(x[:, :5], None)
    step = Step(block).eval()
    step.kind = type(state)
    program = onnx.export(step, (x[:, 5:7], list(state)), dynamic_shapes=({1: "time"}, [None] * len(state)))
    _, state = block.extend(x[:, :5], None)
    y, *after = run(program, x[:, 5:], *state)
    expected, expected_after = block.extend(x[:, 5:], block.extend(x[:, :5], None)[1])
    assert_close(y, expected, 2e-5)
    assert_states_of_graphs_close(after, expected_after, rtol=1e-4, atol=1e-5)
    later = sequences(2, 3, dtype=torch.float32)
    assert_close(block.extend(later, step.kind(*after))[0], block.extend(later, expected_after)[0], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_attention", "kda"])
@torch.no_grad()
def test_linear_attention_of_the_standard_is_ours(name):
    """By the evaluator that defines it, too."""
    block = make(name, {}, True, dtype=torch.float32)
    x = sequences(2, 9, dtype=torch.float32)
    program = onnx.export(block, (x,), dynamic_shapes=({0: "batch", 1: "time"},))
    assert [node.op_type for node in program.model.graph].count("LinearAttention") == 1
    assert program.model.opset_imports[""] == onnx.OPSET_OF_LINEAR_ATTENTION
    (y,) = reference.ReferenceEvaluator(program.model_proto).run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(y), block(x), 2e-5)


def test_training_and_documents_are_refused():
    block = make("lru", {}, True, dtype=torch.float32, train=True)
    x = sequences(1, 9, dtype=torch.float32)
    with pytest.raises(ValueError, match="in training"):
        onnx.export(block, (x,))
    with pytest.raises(ValueError, match="documents in one row"):
        onnx.export(block.eval(), (x,), keywords={"cu_seqlens": torch.tensor([0, 4, 9])})
