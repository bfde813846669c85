import pytest
import torch

from seqzoo.models import LadderModel, ModelConfig, build_model
from seqzoo.models.ladder import Ladder
from seqzoo.spec import TaskSpec

TOKENS = TaskSpec(name="tokens", kind="tokens", vocab_size=12, max_length=32, num_classes=3, pad_id=1, mask_id=0)


def ladder_model(spec=TOKENS, head="classify", reduction=4):
    config = ModelConfig(name="m", d_model=16, num_layers=2, block={"name": "lru"}, mlp_ratio=2)
    return LadderModel(build_model(config, spec, head=head, causal=False), reduction=reduction)


def test_a_side_layer_reads_what_its_gate_lets_through():
    ladder = Ladder(8, 2, reduction=2).double()
    h = torch.randn(3, 5, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        ladder.gates.copy_(torch.tensor([50.0, -50.0]))  # layer 1 reads the frozen layer alone, layer 2 the side alone
        first = ladder.down[1](h[1])
        first = first + ladder.layers[0].branch(ladder.layers[0].norm(first))
        second = first + ladder.layers[1].branch(ladder.layers[1].norm(first))
        torch.testing.assert_close(ladder(list(h)), ladder.up(ladder.norm(second)))
        ladder.gates.zero_()
        half = (ladder.down[1](h[1]) + ladder.down[0](h[0])) / 2
        torch.testing.assert_close(
            ladder.layers[0](half, None), half + ladder.layers[0].branch(ladder.layers[0].norm(half))
        )
        assert not torch.equal(ladder(list(h)), ladder([h[0] + 1, *h[1:]]))


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_gradients_reach_the_ladder_and_the_head_only(num_inputs):
    spec = TaskSpec(**{**vars(TOKENS), "num_inputs": num_inputs})
    model = ladder_model(spec).train()
    shape = (4,) if num_inputs == 1 else (4, 2)
    model(torch.randint(2, 12, (*shape, 20)), torch.randint(1, 21, shape)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
        assert parameter.grad is None or parameter.grad.any(), name


def test_a_ladder_serves_a_head_at_every_position():
    assert ladder_model(head="per_position")(torch.ones(2, 20, dtype=torch.int64), torch.tensor([20, 7])).shape == (
        2,
        20,
        12,
    )


@pytest.mark.parametrize("reduction", [0, 17])
def test_a_ladder_without_width_is_refused(reduction):
    with pytest.raises(ValueError, match=f"ladder.reduction={reduction}: valid: 1 to d_model, 16"):
        ladder_model(reduction=reduction)
