import math
from itertools import product

import pytest
import torch
from often import others_slow

from seqzoo.analysis import distance_profile, effective_rank, mixing_matrix, mixing_report, row_entropy
from seqzoo.config import available, compose
from seqzoo.models import build_model


def model_of(name, task, *, causal=False):
    small = ["task=lra_text", "model.d_model=16", "model.num_layers=2", "model.num_heads=2"]
    config = compose([f"model={name}", *small]).model
    torch.manual_seed(0)
    return build_model(config, task.spec, head="classify", causal=causal)


MODELS = available("model")


@pytest.mark.parametrize(
    ("name", "causal"),
    others_slow(product(MODELS, (False, True)), [(name, n % 2 == 1) for n, name in enumerate(MODELS)]),
)
def test_every_model_of_the_zoo(name, causal, task):
    model = model_of(name, task, causal=causal).train()
    batch = task.test.batch(torch.arange(3))
    layers = mixing_report(model, batch)
    per_layer = 2 if name in ("flash", "mamba", "vq_transformer") else 1
    of_channels = {"mamba": 32, "min_gru": 16, "rg_lru": 16}
    expected_heads = 1 if name in ("conv", "flash", "lru", "s4d", "s5") else of_channels.get(name, 2)
    longest = int(batch.lengths.max())
    assert len(layers) == 2 * per_layer
    assert len({layer.layer for layer in layers}) == len(layers)
    for layer in layers:
        heads = len(layer.entropy)
        assert heads == expected_heads
        for values, low, high in (
            (layer.entropy, 0, math.log(longest)),
            (layer.normalized_entropy, 0, 1),
            (layer.effective_rank, 1, longest),
            (layer.mean_distance, 0, longest),
            (layer.window_share, 0, 1),
        ):
            assert len(values) == heads
            assert all(low <= value <= high + 1e-6 for value in values)
        assert len(layer.distance_profile) == longest
        assert sum(layer.distance_profile) == pytest.approx(1)
        assert layer.picture.shape == (batch.lengths[0], batch.lengths[0])
        if causal:
            assert (layer.picture.triu(1) == 0).all()
    assert model.training


def test_is_what_the_matrices_say(task):
    """The means over sequences of different lengths, from matrices of the padded batch."""
    model = model_of("transformer", task).eval()
    batch = task.test.batch(torch.arange(3))
    block = model.backbone.layers[0]
    with torch.no_grad():
        weights = mixing_matrix(block.branch, block.norm(model.backbone.embedding(batch.inputs, None)), batch.lengths)
    (first, _) = mixing_report(model, batch)
    assert first.block == "SoftmaxAttention"
    assert first.entropy == pytest.approx(row_entropy(weights).nanmean(-1).mean(0).tolist(), rel=1e-4)
    assert first.effective_rank == pytest.approx(effective_rank(weights).mean(0).tolist(), rel=1e-3)
    profile, T = distance_profile(weights).mean((0, 1)), weights.shape[-1]
    folded = profile[T - 1 :] + torch.cat([torch.zeros(1), profile[: T - 1].flip(0)])
    assert first.distance_profile == pytest.approx(folded[: len(first.distance_profile)].tolist(), abs=1e-5)
    n = int(batch.lengths[0])
    torch.testing.assert_close(first.picture, weights[0, :, :n, :n].mean(0) * n)


def test_long_sequences_are_pooled_in_the_picture_only(task):
    model = model_of("lru", task)
    batch = task.test.batch(torch.arange(1))._replace(inputs=torch.randint(0, 4, (1, 300)), lengths=torch.tensor([300]))
    layer = mixing_report(model, batch)[0]
    assert layer.picture.shape == (256, 256)
    assert len(layer.distance_profile) == 300


def test_both_sequences_of_a_pair_count(task):
    batch = task.test.batch(torch.arange(4))
    pair = batch._replace(inputs=batch.inputs.unflatten(0, (2, 2)), lengths=batch.lengths.unflatten(0, (2, 2)))
    model = model_of("transformer", task)
    assert mixing_report(model, pair)[0].entropy == mixing_report(model, batch)[0].entropy
