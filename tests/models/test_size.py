from dataclasses import replace

import pytest
from often import others_slow

from seqzoo.config import available, compose
from seqzoo.models import build_model
from seqzoo.models.size import count_parameters, fit_width, flops_per_token, parse_size
from seqzoo.spec import TaskSpec

TOKENS = TaskSpec(name="tokens", kind="tokens", vocab_size=50, max_length=256, num_classes=3, mask_id=0)
PIXELS = TaskSpec(name="pixels", kind="pixels", vocab_size=256, max_length=128, num_classes=10)


def tiny(model):
    return compose([f"model={model}", "recipe=tiny"]).model


@pytest.mark.parametrize("model", available("model"))
@pytest.mark.parametrize("causal", others_slow([True, False], [False]))
def test_count_is_the_models(model, causal):
    built = build_model(tiny(model), TOKENS, head="classify", causal=causal)
    assert count_parameters(tiny(model), TOKENS, causal=causal) == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("model", available("model"))
@pytest.mark.parametrize("wanted", [60_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_width_is_the_nearest_to_the_size(model, wanted):
    fitted = fit_width(tiny(model), TOKENS, f"params:{wanted}", causal=False)
    assert abs(count_parameters(fitted, TOKENS, causal=False) - wanted) < 0.2 * wanted
    build_model(fitted, TOKENS, head="classify", causal=False)


OF_EACH_KIND = (
    *("transformer", "linear_transformer", "performer", "vq_transformer", "flash"),
    *("lru", "s4d", "mamba2", "kda"),
)


@pytest.mark.parametrize("model", others_slow(available("model"), OF_EACH_KIND))
def test_width_is_the_nearest_to_the_operations(model):
    fitted = fit_width(tiny(model), PIXELS, "flops:0.5M", causal=True)
    assert abs(flops_per_token(fitted, PIXELS, causal=True) - 5e5) < 0.2 * 5e5


def test_flops_of_a_transformer():
    """Projections and MLP 12 d² weights a layer, attention 2 T d products a query, 2 operations each."""
    d, layers, T = 64, 2, TOKENS.max_length
    flops = flops_per_token(tiny("transformer"), TOKENS, causal=False)
    assert flops == pytest.approx(2 * layers * (12 * d * d + 2 * T * d), rel=1e-2)


def test_a_model_that_answers_at_positions_has_another_head():
    """Scores of the whole vocabulary, at every position."""
    config = tiny("lru")
    spec = replace(TOKENS, answer="positions", num_classes=50)
    more = config.d_model * (50 - 3) + (50 - 3)
    assert count_parameters(config, spec, causal=True) == count_parameters(config, TOKENS, causal=True) + more
    assert flops_per_token(config, spec, causal=True) > flops_per_token(config, TOKENS, causal=True) + 2 * 49 * 64
    fitted = fit_width(config, spec, "params:60k", causal=True)
    assert abs(count_parameters(fitted, spec, causal=True) - 60_000) < 12_000


def test_sizes_are_read():
    assert parse_size("params:1.5M") == ("params", 1.5e6)
    assert parse_size("flops:300k") == ("flops", 3e5)
    for wrong in ("1M", "params=1M", "params:0", "params:1T"):
        with pytest.raises(ValueError, match="valid: params:<n> or flops:<n>"):
            parse_size(wrong)
    with pytest.raises(ValueError, match="no width up to 16,384"):
        fit_width(tiny("lru"), TOKENS, "params:1000G", causal=False)
    with pytest.raises(ValueError, match=r"size=flops:0.5: lru has flops:2,048 at its smallest width, 8"):
        fit_width(tiny("lru"), TOKENS, "flops:0.5", causal=False)
