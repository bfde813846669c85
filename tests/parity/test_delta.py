"""DeltaNet, Gated DeltaNet and KDA beside layers of transformers and recurrences of fla, in double precision."""

from __future__ import annotations

import inspect
import math
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close

from seqzoo import build_block
from seqzoo.kernels import delta_rule
from seqzoo.kernels.agreement import relative_error

B, T, D, H = 2, 100, 32, 4


@pytest.fixture
def double(monkeypatch):
    """They cast to single precision inside; here, to double."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)


def drawn(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module


def compare(block, original, by_our_names, tolerance=1e-12):
    """The largest relative error of outputs and of all gradients of layers with the same weights."""
    block.load_state_dict({name: x.detach() for name, x in by_our_names(lambda x: x).items()})
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    expected, y = original(x), block(z)
    w = torch.randn_like(y)
    expected.backward(w)
    y.backward(w)
    gradients = by_our_names(lambda x: x.grad)
    assert gradients.keys() == dict(block.named_parameters()).keys()
    pairs = {"y": (y, expected), "dx": (z.grad, x.grad)}
    pairs |= {name: (parameter.grad, gradients[name]) for name, parameter in block.named_parameters()}
    for name, pair in pairs.items():
        assert_close(*pair, tolerance, name)
    return max(relative_error(*pair)[0] for pair in pairs.values())


def in_pytorch(module, monkeypatch):
    """A module of transformers without the kernels of fla, which it takes where they are installed, and which need a
    GPU."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        monkeypatch.setattr(module, name, inspect.unwrap(function))
    return module


@pytest.mark.parametrize("G", [1, 2, 4])
def test_layer_of_qwen3_next(G, double, monkeypatch, record_parity):
    """Which has q, k, v and r of a key head together."""
    modeling = in_pytorch(pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next"), monkeypatch)
    from transformers import Qwen3NextConfig

    Dk, Dv = 6, 12
    config = Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        linear_num_key_heads=G,
        linear_num_value_heads=H,
        linear_key_head_dim=Dk,
        linear_value_head_dim=Dv,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    original = drawn(modeling.Qwen3NextGatedDeltaNet(config, 0).double())
    block = build_block("gated_delta_net", D, causal=True, num_key_heads=G, expand_k=6 * H / D, expand=12 * H / D)
    assert (block.key_dim, block.value_dim) == (Dk, Dv)

    def by_our_names(of):
        of_heads = of(original.in_proj_qkvz.weight).view(G, -1, D)
        qkvr = (part.flatten(0, 1) for part in of_heads.split((Dk, Dk, Dv * H // G, Dv * H // G), 1))
        q, k, v, r = qkvr
        b, a = (part.flatten(0, 1) for part in of(original.in_proj_ba.weight).view(G, -1, D).chunk(2, 1))
        return {
            "in_proj.weight": torch.cat([q, k, v, b, a, r]),
            "conv.weight": of(original.conv1d.weight)[:, 0],
            "decay.A_log": of(original.A_log),
            "decay.dt_bias": of(original.dt_bias),
            "norm.weight": of(original.norm.weight),
            "out_proj.weight": of(original.out_proj.weight),
        }

    error = compare(block.double(), original, by_our_names)
    record_parity("gated_delta_net", "Qwen3NextGatedDeltaNet of transformers", version("transformers"), error)


def test_layer_of_kimi_linear(double, monkeypatch, record_parity):
    """Whose last layer of the gate has no bias, as that of fla has."""
    modeling = in_pytorch(pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear"), monkeypatch)
    from transformers import KimiLinearConfig

    config = KimiLinearConfig(
        hidden_size=D, num_hidden_layers=1, linear_num_heads=H, linear_head_dim=D // H, layer_types=["linear_attention"]
    )
    torch.manual_seed(0)
    original = drawn(modeling.KimiLinearDeltaAttention(config, 0).double())

    def by_our_names(of):
        gate = original.forget_gate
        layers = (original.q_proj, original.k_proj, original.v_proj, original.b_proj, gate.f_a_proj, original.g_a_proj)
        return {
            "in_proj.weight": torch.cat([of(layer.weight) for layer in layers]),
            "conv.weight": of(original.conv1d.weight)[:, 0],
            "decay_proj.weight": of(gate.f_b_proj.weight),
            "gate_proj.weight": of(original.g_b_proj.weight),
            "decay.A_log": of(gate.A_log).flatten(),
            "decay.dt_bias": of(gate.dt_bias),
            "norm.weight": of(original.o_norm.weight),
            "out_proj.weight": of(original.o_proj.weight),
        }

    error = compare(build_block("kda", D, causal=True, num_heads=H).double(), original, by_our_names)
    record_parity("kda", "KimiLinearDeltaAttention of transformers", version("transformers"), error)


def recurrence_of_fla(name):
    """`recurrence(q, k, v, beta, g, **options)` of [B, T, H, ...] by the block's name; g is None of `delta_net`."""
    if name == "delta_net":
        plain = pytest.importorskip("fla.ops.delta_rule.naive").delta_rule_recurrence

        def recurrence(q, k, v, beta, g, **options):
            o, state = plain(*(x.transpose(1, 2) for x in (q, k, v, beta)), **options)
            return o.transpose(1, 2), state

        return recurrence
    if name == "gated_delta_net":
        return pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    kda = pytest.importorskip("fla.ops.kda.naive").naive_recurrent_kda
    return lambda q, k, v, beta, g, **options: kda(q, k, v, g, beta, **options)


NAMES = ("delta_net", "gated_delta_net", "kda")
RECURRENCES = {
    "delta_net": "delta_rule_recurrence",
    "gated_delta_net": "naive_recurrent_gated_delta_rule",
    "kda": "naive_recurrent_kda",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [1.0, 2.0])
def test_operation_is_the_recurrence_of_fla(name, most, double, record_parity):
    recurrence = recurrence_of_fla(name)
    torch.manual_seed(0)
    q, k = (torch.randn(B, T, H, 5, dtype=torch.float64) for _ in range(2))
    k, v = F.normalize(k, dim=-1), torch.randn(B, T, H, 7, dtype=torch.float64)
    beta = most * torch.randn(B, T, H, dtype=torch.float64).sigmoid()
    shape = {"delta_net": None, "gated_delta_net": (B, T, H), "kda": (B, T, H, 5)}[name]
    g = None if shape is None else F.logsigmoid(torch.randn(shape, dtype=torch.float64))
    first = torch.randn(B, H, 5, 7, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, beta, g, first) if x is not None]
    expected = recurrence(q, k, v, beta, g, initial_state=first, output_final_state=True)
    actual = delta_rule(q / math.sqrt(5), k, v, beta, log_decay=g, initial_state=first, output_final_state=True)
    ways = [torch.randn_like(x) for x in actual]
    pairs = list(zip(actual, expected, strict=True))
    pairs += zip(*(torch.autograd.grad(outputs, inputs, ways) for outputs in (actual, expected)), strict=True)
    for pair in pairs:
        assert_close(*pair, 1e-12)
    error = max(relative_error(*pair)[0] for pair in pairs)
    record_parity(name, f"{RECURRENCES[name]} of fla, the operation alone", version("fla-core"), error)


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("options", [{}, {"negative_eigenvalues": True}])
def test_delta_net_around_the_recurrence_of_fla(options, double, record_parity):
    """In the equations of fla's layer, which needs a GPU."""
    recurrence = recurrence_of_fla("delta_net")
    torch.manual_seed(0)
    block = drawn(build_block("delta_net", D, causal=True, num_heads=H, **options).double())
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    qkv, b = (x @ block.in_proj.weight.T).split((3 * D, H), -1)
    qkv = F.conv1d(qkv.mT, block.conv.weight[:, None], padding=3, groups=3 * D)[..., :T].mT
    q, k, v = (y.unflatten(-1, (H, -1)) for y in F.silu(qkv).chunk(3, -1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    o, _ = recurrence(q, k, v, b.sigmoid() * (2 if options else 1), None)
    expected = rms(o, block.norm.weight).flatten(2) @ block.out_proj.weight.T
    y, wrt = block(x), [x, *block.parameters()]
    w = torch.randn_like(y)
    pairs = [(y, expected)]
    pairs += zip(*(torch.autograd.grad(z, wrt, w, retain_graph=True) for z in (y, expected)), strict=True)
    for pair in pairs:
        assert_close(*pair, 1e-12)
    error = max(relative_error(*pair)[0] for pair in pairs)
    record_parity("delta_net", "delta_rule_recurrence of fla in its layer's equations", version("fla-core"), error)
