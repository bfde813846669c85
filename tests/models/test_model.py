import copy

import pytest
import torch
from agreement import assert_close
from model_cases import PAIRS, PIXELS, TOKENS, config, inputs
from torch.func import functional_call, grad, jvp, vmap

from seqzoo.blocks import BLOCKS
from seqzoo.models import build_model
from seqzoo.models.embedding import sinusoids
from seqzoo.models.heads import pool


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
def test_pooling_sees_valid_positions_only(pooling):
    x = torch.randn(3, 6, 4)
    lengths = torch.tensor([1, 4, 6])
    dirty = x.clone()
    for b, n in enumerate(lengths.tolist()):
        dirty[b, n:] = torch.nan
    for b, n in enumerate(lengths.tolist()):
        valid = x[b, :n]
        expected = {"mean": valid.mean(0), "max": valid.amax(0), "last": valid[-1], "first": valid[0]}[pooling]
        torch.testing.assert_close(pool(dirty, lengths, pooling)[b], expected)


def test_a_mean_is_not_summed_in_half_precision():
    pooled = pool(torch.full((2, 3000, 4), 100, dtype=torch.float16), torch.tensor([3000, 7]), "mean")
    assert pooled.dtype == torch.float16
    assert (pooled == 100).all()


@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned"])
def test_shapes(spec, position):
    lengths = torch.randint(1, 21, (4, 2) if spec.num_inputs == 2 else (4,))
    x = inputs(spec)
    scores = build_model(config(position=position), spec, head="classify", causal=False)(x, lengths)
    assert scores.shape == (4, spec.num_classes)
    per_position = build_model(config(position=position), spec, head="per_position", causal=True)(x, lengths)
    expected = {"tokens": (4, 20, 12), "pixels": (4, 20, 3, 256), "pairs": (8, 20, 12)}[spec.name]
    assert per_position.shape == expected


def test_regression_gives_a_number_per_channel():
    y = build_model(config(), PIXELS, head="regress", causal=False)(inputs(PIXELS), torch.full((4,), 20))
    assert y.shape == (4, 20, 3)
    with pytest.raises(ValueError, match="only pixels can be regressed"):
        build_model(config(), TOKENS, head="regress", causal=False)


@pytest.mark.parametrize(
    "block",
    [
        "softmax_attention",
        "linear_attention",
        "vq_attention",
        "lru",
        "s4d",
        "conv",
        "mamba2",
        "mlstm",
        "hgrn2",
        "rg_lru",
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_never_changes_a_score(block, causal):
    torch.manual_seed(0)
    model = (
        build_model(config(block={"name": block}, mlp_ratio=2), TOKENS, head="classify", causal=causal).double().eval()
    )
    x = inputs(TOKENS)
    lengths = torch.tensor([20, 7, 1, 13])
    together = model(x, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(model(x[b : b + 1, :n], lengths[b : b + 1]), together[b : b + 1])
    garbage = x.clone()
    garbage[1, 7:] = 5
    torch.testing.assert_close(model(garbage, lengths), together)


@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("head", ["classify", "per_position"])
def test_without_lengths_every_step_counts(spec, head):
    model, x = build_model(config(), spec, head=head, causal=False).eval(), inputs(spec)
    assert torch.equal(model(x, None), model(x, torch.full((4, spec.num_inputs)[: spec.num_inputs], 20)))


def test_a_pair_is_two_sequences_in_neighbouring_rows():
    torch.manual_seed(0)
    model = build_model(config(), PAIRS, head="classify", causal=False).eval()
    x, lengths = inputs(PAIRS), torch.randint(1, 21, (4, 2))
    together = model(x, lengths)
    for b in range(4):
        torch.testing.assert_close(model(x[b : b + 1], lengths[b : b + 1]), together[b : b + 1])
    swapped = model(x.flip(1), lengths.flip(1))
    assert not torch.allclose(swapped, together)


def test_mask_hides_tokens_and_pixels():
    lengths = torch.full((4,), 20)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 3:6] = True
    for spec in (TOKENS, PIXELS):
        torch.manual_seed(0)
        embed = build_model(config(), spec, head="classify", causal=False).backbone.embedding
        x = inputs(spec)
        other = x.clone()
        other[:, 3:6] = 7
        assert torch.equal(embed(x, mask), embed(other, mask))
        assert not torch.equal(embed(x, mask)[:, 3:6], embed(x, None)[:, 3:6])
        assert torch.equal(embed(x, mask)[:, 6:], embed(x, None)[:, 6:])
    torch.testing.assert_close(
        embed.inputs.normalise(torch.tensor([[[255, 0, 51]]])), torch.tensor([[[2.5, -2.5, -1.5]]])
    )
    assert lengths.sum() == 80


def test_sinusoids_are_the_published_ones():
    table = sinusoids(50, 6)
    for position in (0, 1, 49):
        for i in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * i / 6))
            torch.testing.assert_close(table[position, 2 * i], angle.sin())
            torch.testing.assert_close(table[position, 2 * i + 1], angle.cos())
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(sinusoids(50, 6), table)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned"])
@pytest.mark.parametrize("head", ["classify", "per_position"])
def test_weights_are_all_that_a_model_is(spec, position, head):
    """Built without memory and given some that nobody wrote, it computes the same once weights are loaded."""
    options = {"head": head, "causal": False}
    settings = config(block={"name": "softmax_attention", "num_heads": 2}, position=position, mlp_ratio=1)
    trained = build_model(settings, spec, **options).eval()
    with torch.device("meta"):
        model = build_model(settings, spec, **options).eval()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan)
    model.load_state_dict(trained.state_dict())
    x, lengths = inputs(spec), torch.full((4, 2) if spec.num_inputs == 2 else (4,), 20)
    assert torch.equal(model(x, lengths), trained(x, lengths))
    weights = trained.state_dict()
    with torch.device("meta"):
        model = build_model(settings, spec, **options).eval()
    model.load_state_dict(weights, assign=True)
    assert torch.equal(model(x, lengths), trained(x, lengths))


@pytest.mark.parametrize("spec", [TOKENS, PIXELS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned"])
def test_replicas_have_no_parameters_of_their_own(spec, position):
    """`nn.DataParallel` gives them tensors by the same names."""
    model = build_model(config(position=position), spec, head="classify", causal=False).eval()
    x, lengths = inputs(spec), torch.tensor([20, 7, 1, 13])
    expected = model(x, lengths)
    replica = copy.deepcopy(model)
    for module in replica.modules():
        parameters, module._parameters = module._parameters, {}
        for name, parameter in parameters.items():
            setattr(module, name, None if parameter is None else parameter.detach())
    assert torch.equal(replica(x, lengths), expected)


@pytest.mark.parametrize("spec", [TOKENS, PIXELS], ids=lambda spec: spec.name)
def test_a_model_under_vmap_and_its_second_derivatives(spec):
    torch.manual_seed(0)
    settings = config(block={"name": "softmax_attention", "num_heads": 2}, position="learned", mlp_ratio=1)
    model = build_model(settings, spec, head="classify", causal=False).double().eval()
    x, weights = inputs(spec), {name: weight.detach() for name, weight in model.named_parameters()}
    way = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def score(weights, x):
        return functional_call(model, weights, (x[None], None)).square().sum()

    each = vmap(score, (None, 0))(weights, x)
    assert_close(each, torch.stack([score(weights, one) for one in x]), 1e-12)
    slope = grad(lambda weights: jvp(lambda w: score(w, x[0]), (weights,), (way,))[1])(weights)
    expected = jvp(grad(lambda weights: score(weights, x[0])), (weights,), (way,))[1]
    for name in weights:
        assert_close(slope[name], expected[name], 1e-10, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", [TOKENS, PIXELS], ids=lambda spec: spec.name)
@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
def test_a_cast_model_computes_in_its_dtype(dtype, spec, position):
    settings = config(block={"name": "softmax_attention", "num_heads": 2}, position=position)
    model = build_model(settings, spec, head="classify", causal=False)
    x, lengths = inputs(spec), torch.tensor([20, 7, 1, 13])
    expected = model(x, lengths)
    scores = model.to(dtype)(x, lengths)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "first"])
@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
def test_batches_and_sequences_of_nothing(spec, pooling):
    settings = config(block={"name": "softmax_attention", "num_heads": 2}, pooling=pooling, position="sinusoidal")
    model = build_model(settings, spec, head="classify", causal=False)
    x, lengths = inputs(spec), torch.randint(1, 21, (4, 2) if spec.num_inputs == 2 else (4,))
    assert model(x[:0], lengths[:0]).shape == (0, spec.num_classes)
    before = model(x, lengths)
    lengths[2] = 0
    after = model(x, lengths)
    torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]])
    after.square().sum().backward()
    assert after.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_hybrids_and_repeated_blocks():
    layers = ["lru", {"name": "softmax_attention", "num_heads": 2}]
    model = build_model(config(layers=layers, blocks_per_layer=2, mlp_ratio=2), TOKENS, head="classify", causal=False)
    kinds = [type(layer.branch).__name__ for layer in model.backbone.layers]
    assert kinds == ["LRU", "LRU", "Sequential", "SoftmaxAttention", "SoftmaxAttention", "Sequential"]


def test_errors_say_what_is_valid():
    model = build_model(config(), TOKENS, head="classify", causal=False)
    with pytest.raises(ValueError, match="token id 12 is outside the vocabulary; valid: 0 to 11"):
        model(torch.full((1, 3), 12), torch.tensor([3]))
    with pytest.raises(ValueError, match="valid: mean, max, last, first"):
        build_model(config(pooling="sum"), TOKENS, head="classify", causal=False)
    with pytest.raises(
        ValueError, match="pooling=first: a causal model has read one position there; valid: mean, max, last"
    ):
        build_model(config(pooling="first"), TOKENS, head="classify", causal=True)
    with pytest.raises(ValueError, match="valid: none, sinusoidal, learned"):
        build_model(config(position="rope"), TOKENS, head="classify", causal=False)
    with pytest.raises(ValueError, match="valid: linear, mlp"):
        build_model(config(head="deep"), TOKENS, head="classify", causal=False)
    with pytest.raises(ValueError, match="no option of lru 'heads'"):
        build_model(config(block={"name": "lru", "heads": 2}), TOKENS, head="classify", causal=False)
    positioned = build_model(config(position="learned"), TOKENS, head="classify", causal=False)
    with pytest.raises(ValueError, match="absolute positions are valid up to 32"):
        positioned(torch.full((1, 33), 2), torch.tensor([33]))


@pytest.mark.parametrize("block", BLOCKS)
def test_random_weights_are_normal_in_every_parameter_and_no_buffer(block):
    models = {}
    for init in ("structured", "random"):
        torch.manual_seed(0)
        models[init] = build_model(
            config(d_model=64, block={"name": block}, init=init), TOKENS, head="classify", causal=False
        )
    everything = torch.cat([parameter.detach().flatten() for parameter in models["random"].parameters()])
    assert abs(everything.mean()) < 0.003
    assert everything.std() == pytest.approx(0.1, rel=0.03)
    norm = models["random"].backbone.norm.weight.detach()
    assert norm.std() == pytest.approx(0.1, rel=0.3)
    for (name, ours), designed in zip(models["random"].named_buffers(), models["structured"].buffers(), strict=True):
        assert torch.equal(ours, designed), name
    scores = models["random"](inputs(TOKENS), torch.full((4,), 20))
    assert scores.isfinite().all()


def test_unknown_weights_say_what_is_valid():
    with pytest.raises(ValueError, match=r"model.init=zeros: valid: structured, random"):
        config(init="zeros")


def test_layer_outputs_end_in_what_the_backbone_norms():
    backbone = build_model(config(mlp_ratio=2), TOKENS, head="classify", causal=False).backbone
    lengths = torch.tensor([20, 3, 7, 12])
    outputs = backbone.layer_outputs(inputs(TOKENS), lengths)
    assert len(outputs) == 1 + len(backbone.layers)
    assert torch.equal(backbone.norm(outputs[-1]), backbone(inputs(TOKENS), lengths))


def test_a_frozen_backbone_stays_in_eval_mode():
    model = build_model(config(dropout=0.5), TOKENS, head="classify", causal=False)
    model.backbone.freeze()
    model.train()
    assert model.head.training
    assert not any(module.training for module in model.backbone.modules())
    x, lengths = inputs(TOKENS), torch.full((4,), 20)
    features = model.backbone(x, lengths)
    assert not features.requires_grad
    assert torch.equal(features, model.backbone(x, lengths))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("spec", [TOKENS, PIXELS, PAIRS], ids=lambda spec: spec.name)
def test_a_second_head_reads_what_is_hidden(spec, whole):
    models = {}
    for head in ("classify", "per_position", "classify+per_position"):
        torch.manual_seed(0)
        models[head] = build_model(config(block={"name": "vq_attention"}), spec, head=head, causal=False)
    both = models["classify+per_position"]
    models["per_position"].backbone.load_state_dict(both.backbone.state_dict())
    models["per_position"].head.load_state_dict(both.second.state_dict())
    x = inputs(spec)
    lengths = torch.randint(1, 21, (4, 2) if spec.num_inputs == 2 else (4,))
    mask = torch.rand((*lengths.shape, 20)) < 0.3
    for model in models.values():
        model.eval()
    torch.testing.assert_close(both(x, lengths), models["classify"](x, lengths))
    answers, filled = both(x, lengths, mask, whole=whole)
    torch.testing.assert_close(answers, models["classify"](x, lengths, None if whole else mask))
    torch.testing.assert_close(filled, models["per_position"](x, lengths, mask))
    assert both.without_second().state_dict().keys() == models["classify"].state_dict().keys()


@pytest.mark.parametrize("head", ["classified", "classify+", "classify+per_position+regress"])
def test_heads_that_there_are_not(head):
    with pytest.raises(ValueError, match=r"valid: classify, per_position, regress, or two of them, such as"):
        build_model(config(), TOKENS, head=head, causal=False)
