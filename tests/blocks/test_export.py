"""Blocks in graphs: exported for sequences of any number and length, compiled at any order of lengths, and traced; and
under transforms of functions."""

import pytest
import torch
from agreement import assert_close
from block_cases import CASES, DEFAULTS, D, assert_states_of_graphs_close, defaults, make, sequences, soon
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap

NODE = {  # one block of each operation, and the nodes that stand in its graph
    "softmax_attention": [],
    "linear_attention": ["linear_attention"],
    "performer": ["favor_attention"],
    "vq_attention": ["vq_attention"],
    "gau": ["gated_attention"],
    "lru": ["diagonal_scan"],
    "s4d": ["s4d_convolve"],
    "mlstm": ["linear_attention", "mlstm_largest"],
    "mamba": ["selective_scan"],
    "kda": ["delta_rule"],
}
ANY = {"x": {0: Dim("B"), 1: Dim("T")}, "lengths": {0: Dim("B")}}


def often(names, causal=(True,)):
    """The default options of each block, of which the rest is slow."""
    return soon([case for case in DEFAULTS if case.values[0] in names and case.values[2] in causal], CASES)


def nodes_of(program):
    """In graphs within the graph too, which there are where autocast is turned off."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    return sorted(name.split(".")[1] for name in names if name.startswith("seqzoo"))


@often(NODE)
def test_exports_for_any_number_and_length(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32)
    given = {"x": sequences(2, 10, dtype=torch.float32), "lengths": torch.tensor([10, 4])}
    program = torch.export.export(block, (), given, dynamic_shapes=ANY)
    if name in NODE and not options.get("window"):
        ways = 2 if name in ("lru", "mamba") and not causal else 1  # the others' two are one batch
        expected = NODE[name] * ways
        assert nodes_of(program) == expected or (name == "gau" and options.get("attention", "flash") != "flash")
    exported = program.module()
    for B, T in ((2, 10), (3, 150), (5, 2)):
        x, lengths = sequences(B, T, dtype=torch.float32), torch.arange(T, T - B, -1).clamp(min=0)
        assert_close(exported(x=x, lengths=lengths), block(x, lengths=lengths), 1e-6)


class Extend(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, state):
        return self.block.extend(x, state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(
            *case.values[:2], id=case.id, marks=() if case.values[0] in ("lru", "vq_attention") else pytest.mark.slow
        )
        for case in CASES
        if case.values[2] and "-0-" in str(case.id)
    ],
)
@torch.no_grad()
def test_extend_exports_for_any_number_of_steps(name, options):
    block = make(name, options, True, dtype=torch.float32)
    prefix = sequences(2, 6, dtype=torch.float32)
    _, state = block.extend(prefix, None)
    program = torch.export.export(
        Extend(block), (prefix, state), dynamic_shapes=({1: Dim("T")}, type(state)(*(None,) * len(state)))
    )
    exported = program.module()
    for T in (6, 130, 2):
        x = sequences(2, T, dtype=torch.float32, seed=3)
        y, after = exported(x, block.extend(prefix, None)[1])
        expected, expected_after = block.extend(x, block.extend(prefix, None)[1])
        assert_close(y, expected, 1e-6)
        assert_states_of_graphs_close(after, expected_after, rtol=1e-5, atol=1e-6)


@often(("linear_attention", "vq_attention"))
def test_an_exported_block_trains(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32)
    x = sequences(2, 10, dtype=torch.float32)
    exported = torch.export.export(block, (x,)).module()
    w = torch.randn_like(x)
    (exported(x) * w).sum().backward()
    found = {name: p.grad for name, p in exported.named_parameters()}
    (block(x) * w).sum().backward()
    for name, parameter in block.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            assert_close(found[name], parameter.grad, 1e-5, name)


@often(("s4d",))
def test_compiles_at_any_order_of_lengths(name, options, causal):
    block = make(name, options, causal, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    for T in (70, 130, 33, 64, 2, 1, 3, 5, 9, 17, 20, 40, 12, 8, 128):
        x = sequences(2, T, dtype=torch.float32).requires_grad_()
        y, expected = compiled(x), block(x)
        assert_close(y, expected, 1e-5)
        w = torch.randn_like(y)
        assert_close(*(torch.autograd.grad((z * w).sum(), x)[0] for z in (y, expected)), 1e-4)


@defaults
def test_gradients_of_each_sequence(name, options, causal):
    block = make(name, options, causal)
    x = sequences(3, 20)
    parameters = {name: p.detach() for name, p in block.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return functional_call(block, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        leaves = [p for p in block.parameters() if p.requires_grad]
        expected = torch.autograd.grad(block(x[i : i + 1]).square().sum(), leaves, allow_unused=True)
        for gradients, e in zip(found.values(), expected, strict=True):
            if e is not None and e.any():
                assert_close(gradients[i], e, 1e-9)


@defaults
@torch.no_grad()
def test_a_mapped_dimension_is_more_batch(name, options, causal):
    block = make(name, options, causal)
    x, lengths = sequences(6, 20).view(3, 2, 20, D), torch.tensor([[20, 3], [7, 20], [20, 20]])
    found = vmap(lambda x, lengths: block(x, lengths=lengths), (1, 1), out_dims=1)(x, lengths)
    for i in range(2):
        assert_close(found[:, i], block(x[:, i], lengths=lengths[:, i]), 1e-12)


@pytest.mark.parametrize("name", ["softmax_attention", "linear_attention", "mlstm", "vq_attention"])
@torch.no_grad()
def test_a_trace_is_right_at_other_lengths(name):
    _, options, causal = next(case.values for case in CASES if case.values[0] == name)
    block = make(name, options, causal, dtype=torch.float32)
    traced = torch.jit.trace(block, sequences(2, 10, dtype=torch.float32), check_trace=False)
    for T in (10, 131, 2):
        x = sequences(2, T, dtype=torch.float32)
        assert_close(traced(x), block(x), 1e-6)
