"""Documents in one row: what every block makes of each is what it makes of that one alone."""

import copy
import math

import pytest
import torch
from agreement import assert_close
from block_cases import (
    CASES,
    DEFAULTS,
    OF_EACH_OPERATION,
    D,
    builder,
    defaults,
    every,
    make,
    parameter_gradients,
    sequences,
    soon,
)

import seqzoo
from seqzoo import auxiliary_loss
from seqzoo.blocks import Block
from seqzoo.kernels import backends
from seqzoo.testing import contract

LENGTHS = contract.DOCUMENTS
STARTS = torch.tensor([0, *LENGTHS]).cumsum(0)
T = int(STARTS[-1])
SHARING_CHUNKS = (  # with others: what is not finite may reach those
    "linear_attention",
    "retnet",
    "mamba2",
    "mamba3",
    "gla",
    "hgrn2",
    "mlstm",
    "delta_net",
    "gated_delta_net",
    "kda",
    "rwkv7",
)
IN_TRITON = (  # the others with -m slow
    "softmax_attention-0-causal",
    "linear_attention-0-causal",
    "lru-0-causal",
    "kda-0-causal",
)
streaming = pytest.mark.parametrize(("name", "options", "causal"), [case for case in CASES if case.values[2]])


def pieces(x, starts=STARTS):
    return [x[:, start:end] for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False)]


def alone(block, x, starts=STARTS):
    return torch.cat([block(document) for document in pieces(x, starts) if document.shape[1]], 1)


def gradients(block, x, y, seed=2):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    parameters = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad((y * weight).sum(), [x, *parameters], allow_unused=True)


def assert_same_gradients(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            assert_close(a, e, tolerance, "gradient")


@every
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_document_is_as_if_alone(name, options, causal, dtype):
    contract.each_document_is_as_if_alone(builder(name, options, causal), dtype)


@every
def test_documents_of_any_lengths(name, options, causal):
    block = make(name, options, causal)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        count = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(0, 50, (count,), generator=generator)
        lengths[0] += 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        x = sequences(1, int(starts[-1]))
        assert_close(block(x, cu_seqlens=starts), alone(block, x, starts), 1e-10, f"{lengths.tolist()}")


@every
def test_a_row_is_as_a_batch_of_rows(name, options, causal):
    block, lengths = make(name, options, causal), torch.tensor(LENGTHS)
    x = sequences(len(LENGTHS), int(lengths.max()))
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    assert_close(block(x[valid][None], cu_seqlens=STARTS)[0], block(x, lengths=lengths)[valid], 1e-10)


@every
def test_nothing_of_another_document_is_seen(name, options, causal):
    block = make(name, options, causal)
    x = sequences(1, T)
    expected = block(x, cu_seqlens=STARTS)
    garbage = torch.full_like(x, math.nan) if name not in SHARING_CHUNKS else 1e6 * sequences(1, T, seed=8)
    for n in (0, 2, 4):
        here = slice(int(STARTS[n]), int(STARTS[n + 1]))
        others = garbage.clone()
        others[:, here] = x[:, here]
        others.requires_grad_()
        y = block(others, cu_seqlens=STARTS)
        assert_close(y[:, here], expected[:, here], 1e-12)
        (dx,) = torch.autograd.grad(y[:, here].sum(), others)
        outside = torch.ones(T, dtype=torch.bool)
        outside[here] = False
        assert (dx[:, outside].nan_to_num() == 0).all()


@streaming
def test_states_are_handed_on(name, options, causal):
    """Rows of documents one after another, by which each goes on, some at a time not at all."""
    block = make(name, options, causal)
    steps = torch.tensor([[5, 0, 30, 1], [0, 0, 7, 60], [9, 3, 0, 2]])
    whole = [sequences(1, int(n), seed=seed) for seed, n in enumerate(steps.sum(0))]
    whole = [x.requires_grad_() for x in whole]
    outputs, taken, state = [[] for _ in whole], [0] * len(whole), None
    for lengths in steps:
        row = [x[:, at : at + n] for x, at, n in zip(whole, taken, lengths.tolist(), strict=True)]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        y, state = block.extend(torch.cat(row, 1), state, cu_seqlens=starts)
        for output, document in zip(outputs, pieces(y, starts), strict=True):
            output.append(document)
        taken = [at + n for at, n in zip(taken, lengths.tolist(), strict=True)]
    assert state.position.tolist() == steps.sum(0).tolist()
    row, expected = torch.cat([torch.cat(parts, 1) for parts in outputs], 1), torch.cat([block(x) for x in whole], 1)
    assert_close(row, expected, 1e-10)
    actual, right = (torch.autograd.grad(y.square().sum(), [*whole, *block.parameters()]) for y in (row, expected))
    if name != "vq_attention":  # straight-through gradients depend on which blocks are there
        assert_same_gradients(actual, right, 1e-9)
    last = sequences(len(whole), 3, seed=9)
    y, _ = block.extend(last, state)
    for n, x in enumerate(whole):
        assert_close(y[n : n + 1], block(torch.cat([x, last[n : n + 1]], 1))[:, -3:], 1e-10)


@pytest.mark.parametrize(
    ("name", "options", "causal", "form"),
    [
        pytest.param(
            *case.values,
            form,
            id=f"{form}-{case.id}",
            marks=[pytest.mark.slow] * (form == "fused" and case.id not in IN_TRITON),
        )
        for case in CASES
        if "-0-" in str(case.id)
        for form in ("reference", "chunked", "fused")
    ],
)
def test_every_form_takes_documents(name, options, causal, form, monkeypatch):
    block, starts = make(name, options, causal), torch.tensor([0, 5, 5, 42, 43, 70])
    fast = copy.deepcopy(block).float()
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    x = sequences(1, 70).requires_grad_()
    expected = alone(block, x, starts)
    right = gradients(block, x, expected)
    monkeypatch.setattr(backends, "DEFAULT", form)
    z = x.detach().float().requires_grad_()
    y = fast(z, cu_seqlens=starts)
    assert_close(y, expected, 1e-5)
    assert_same_gradients(gradients(fast, z, y), right, 1e-4)


@soon(OF_EACH_OPERATION, DEFAULTS)
def test_compiles_whole_without_looking_at_documents(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32, train=name == "vq_attention")
    x = sequences(1, 60, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ends in ([0, 20, 20, 51, 60], [0, 1, 2, 3, 60]):  # in one graph
        starts = torch.tensor(ends)
        y, expected = (each(x, cu_seqlens=starts) for each in (compiled, block))
        torch.testing.assert_close(y, expected)
        for a, e in zip(parameter_gradients(block, y), parameter_gradients(block, expected), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@every
def test_what_is_gathered_is_of_real_steps(name, options, causal):
    """Codebooks and losses move as they do by sequences that are padded."""
    if options.get("codebook_start") == "kmeans":
        pytest.skip("which keys it begins with depends on how many positions there are")
    lengths = torch.tensor([30, 4, 17])
    x = sequences(3, 30, dtype=torch.float32)
    valid = torch.arange(30) < lengths[:, None]
    padded, packed = (make(name, options, causal, dtype=torch.float32, train=True).eval() for _ in range(2))
    for module in (*padded.modules(), *packed.modules()):
        module.training = not isinstance(module, torch.nn.Dropout)
    padded(x, lengths=lengths)
    packed(x[valid][None], cu_seqlens=torch.tensor([0, 30, 34, 51]))
    losses = [auxiliary_loss(block) for block in (padded, packed)]
    torch.testing.assert_close(losses[1], losses[0])
    for block in (padded, packed):
        torch.manual_seed(3)
        seqzoo.after_step(block)
    for key, tensor in padded.state_dict().items():
        torch.testing.assert_close(packed.state_dict()[key], tensor, msg=key)


@defaults
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "end with T = 10"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, r"int32 or int64 \[N \+ 1\].*float32"),
        ({"cu_seqlens": torch.tensor([0, 4, 10]), "lengths": torch.tensor([10])}, "got cu_seqlens and lengths"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 10]), "attention_mask": torch.ones(1, 10)},
            "got a mask, and lengths or cu_seqlens",
        ),
    ],
)
def test_wrong_documents_are_named(name, options, causal, given, message):
    block = make(name, options, causal)
    with pytest.raises(ValueError, match=f"{type(block).__name__}: .*{message}"):
        block(sequences(1, 10), **given)


def test_states_of_other_documents_are_refused():
    block = make("lru", {}, True)
    _, state = block.extend(sequences(1, 10), None, cu_seqlens=torch.tensor([0, 4, 10]))
    assert len(state.position) == 2
    with pytest.raises(ValueError, match="LRU: a state of 2 sequences for 3 documents; valid: a state of as many"):
        block.extend(sequences(1, 10), state, cu_seqlens=torch.tensor([0, 4, 5, 10]))
    with pytest.raises(ValueError, match=r"a batch of 1, got 2; x.reshape"):
        block(sequences(2, 10), cu_seqlens=torch.tensor([0, 4, 10]))


def test_a_block_that_knows_lengths_alone_is_left_to_them():
    class Mean(Block):
        def mix(self, x, state, lengths):
            return x.mean(1, keepdim=True).expand_as(x), None

    block, x = Mean(D, causal=False), sequences(1, 10)
    assert block(x, lengths=torch.tensor([4])).shape == x.shape
    assert block(x, attention_mask=torch.ones(1, 10)).shape == x.shape
    with pytest.raises(ValueError, match="Mean knows no documents in one row; valid: lengths or a mask"):
        block(x, cu_seqlens=torch.tensor([0, 4, 10]))
