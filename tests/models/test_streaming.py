"""Models step by step: scores as of the whole, and texts that go on."""

import numpy as np
import pytest
import torch
from agreement import assert_close
from model_cases import PIXELS, TOKENS, config

from seqzoo.models import JointModel, LadderModel, ModelState, build_model
from seqzoo.models.generation import Sampling

HYBRID = {"layers": ["softmax_attention", "lru", {"name": "gau", "attention": "softmax", "key_dim": 8}], "mlp_ratio": 2}
MODELS = {
    "sinusoidal": {"position": "sinusoidal", "block": {"name": "mamba2", "num_heads": 4, "state_dim": 4}},
    "learned": {"position": "learned", "block": {"name": "linear_attention"}},
    "hybrid": {**HYBRID, "blocks_per_layer": 2},
    "vq": {"block": {"name": "vq_attention", "block_len": 4, "codebook_size": 8}},
}
each_model = pytest.mark.parametrize("name", MODELS)


def model_of(spec=TOKENS, head="per_position", causal=True, **changes):
    torch.manual_seed(0)
    return build_model(config(**changes), spec, head=head, causal=causal).double().eval()


def tokens(*shape):
    return torch.randint(2, 12, shape, generator=torch.Generator().manual_seed(1))


@each_model
@torch.no_grad()
def test_any_split_has_the_scores_of_the_whole(name):
    model, x = model_of(**MODELS[name]), tokens(3, 20)
    whole = model(x, None)
    state, parts = None, []
    for piece in x.split([7, 1, 1, 11], 1):
        scores, state = model.extend(piece, state)
        parts.append(scores)
    assert_close(torch.cat(parts, 1), whole, 1e-10)
    lengths = torch.tensor([9, 1, 4])
    scores, state = model.extend(x[:, :9], None, lengths=lengths)
    last, same = model.extend(x[:, :9], None, lengths=lengths, last=True)
    assert same.position.tolist() == state.position.tolist() == [9, 1, 4]
    for b, n in enumerate(lengths.tolist()):
        assert_close(scores[b, :n], whole[b, :n], 1e-10)
        assert_close(last[b, 0], whole[b, n - 1], 1e-10)
    rows = [2, 0]
    step = torch.stack([x[b, n : n + 1] for b, n in ((2, 4), (0, 9))])
    scores, _ = model.extend(step, state.select(rows).fork())
    assert_close(scores[:, 0], torch.stack([whole[2, 4], whole[0, 9]]), 1e-10)


@torch.no_grad()
def test_pixels_and_models_with_something_beside_them(tmp_path):
    pixels = model_of(PIXELS)
    x = torch.randint(256, (2, 9, 3), dtype=torch.uint8)
    _, state = pixels.extend(x[:, :5], None)
    assert_close(pixels.extend(x[:, 5:], state)[0], pixels(x, None)[:, 5:], 1e-10)
    x = tokens(2, 9)
    joint = model_of(head="per_position+per_position", block={"name": "gla"})
    ladder = LadderModel(model_of(), reduction=4).double().eval()
    for model in (joint, ladder):
        assert isinstance(model, JointModel | LadderModel)
        _, state = model.extend(x[:, :5], model.initial_state(2))
        assert_close(model.extend(x[:, 5:], state)[0], model(x, None)[:, 5:], 1e-10)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(ladder.extend(x[:, 5:], loaded)[0], ladder.extend(x[:, 5:], state)[0])
    half = state.repeat(2).to(torch.bfloat16)
    assert isinstance(half, ModelState)
    assert half.position.tolist() == [5] * 4
    assert {part.dtype for part in half.layers[0]} == {torch.float32, torch.int64}


def greedy(model, prompt, steps):
    """As long as there is: the likeliest symbol behind the whole, all of it read anew for each."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]), None)[0, -1].argmax()))
    return ids[len(prompt) :]


@each_model
@torch.no_grad()
def test_texts_are_those_of_the_whole(name):
    model = model_of(**MODELS[name])
    prompts = [[3], [4, 5, 6, 7, 8], [9, 2]]
    found = model.generate(prompts, 12, temperature=0)
    assert found == [greedy(model, prompt, 12) for prompt in prompts]
    padded = torch.tensor([[3, 0, 0, 0, 0], [4, 5, 6, 7, 8], [9, 2, 0, 0, 0]])
    assert model.generate(padded, 12, lengths=torch.tensor([1, 5, 2]), temperature=0) == found
    stop = found[1][3]
    stopped = model.generate(prompts, 12, temperature=0, stop=[stop])
    for row, text in zip(stopped, found, strict=True):
        assert row == (text[: text.index(stop) + 1] if stop in text else text)


def test_a_text_depends_on_its_prompt_and_seed_alone():
    model = model_of(**HYBRID)
    prompts = [[3, 4, 5], [6], [3, 4, 5]]
    options = {"temperature": 1.5, "top_k": 9, "top_p": 0.95}
    found = model.generate(prompts, 10, seed=5, **options)
    assert model.generate(prompts, 10, seed=5, **options) == found
    assert model.generate(prompts[1:], 10, seed=6, **options) == found[1:]
    assert model.generate(prompts, 6, seed=[7, 6, 5], **options)[0] == found[2][:6]
    assert found[0] != found[2]
    torch.manual_seed(3)
    drawn = model.generate(prompts, 10)
    torch.manual_seed(3)
    assert model.generate(prompts, 10) == drawn != model.generate(prompts, 10)


def test_symbols_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(20_000, -1)
    uniform = torch.from_numpy(np.random.default_rng(0).random(20_000))

    def frequencies(**options):
        return Sampling(**options).draw(scores, uniform).bincount(minlength=4) / 20_000

    def close(found, likely):
        assert_close(found.double(), torch.tensor(likely, dtype=torch.float64) / sum(likely), 0.02)

    e = np.exp
    close(frequencies(), [1, e(3), e(1), e(2)])
    close(frequencies(temperature=2.0), [1, e(1.5), e(0.5), e(1)])
    close(frequencies(top_k=2), [0, e(3), 0, e(2)])
    close(frequencies(top_p=0.9), [0, e(3), e(1), e(2)])  # 0.64 and 0.24 are not yet so much
    close(frequencies(top_p=0.6), [0, 1, 0, 0])
    close(frequencies(temperature=0), [0, 1, 0, 0])
    close(frequencies(never=(1,)), [1, 0, e(1), e(2)])
    close(frequencies(never=(1,), temperature=0), [0, 0, 0, 1])
    close(frequencies(never=(0, 1, 2), top_k=3), [0, 0, 0, 1])
    tied = torch.zeros(1, 4)
    assert Sampling(top_k=1).draw(tied, torch.tensor([0.99])).tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"causal": False}, {}, "bidirectional.*valid: one that was built, or trained, with causal=true"),
        ({"head": "classify"}, {}, "tells their classes.*valid: one of tokens"),
        ({"spec": PIXELS}, {}, "reads pixels.*valid: one of tokens"),
        ({"position": "learned"}, {"max_new": 31}, "a sequence of 33 steps; absolute positions are valid up to 32"),
        ({}, {"prompts": []}, "no prompts; valid: 1 or more"),
        ({}, {"prompts": [[3], []]}, r"prompt 1 is .* \[0\]; valid: 1 id or more"),
        ({}, {"prompts": [[3, 12]]}, "prompt 0 has an id 12; valid: 0 to 11"),
        ({}, {"prompts": "text"}, "prompts are int64.*got str"),
        (
            {},
            {"prompts": torch.ones(2, 3, dtype=torch.int64), "lengths": [4, 1]},
            r"lengths=\[4, 1\]; valid: .*up to 3",
        ),
        ({}, {"max_new": 0}, "max_new=0; valid: 1 or more"),
        ({}, {"temperature": -1}, "temperature=-1; valid: 0"),
        ({}, {"top_k": 0}, "top_k=0; valid: 1 or more"),
        ({}, {"top_p": 0.0}, "top_p=0.0; valid: above 0"),
        ({}, {"never": [12]}, r"never=\[12\]; valid: some ids of 0 to 11, not all"),
        ({}, {"never": range(12)}, r"never=\[0, 1, .*not all"),
        ({}, {"seed": [1, 2]}, r"seed=\[1, 2\]; valid: .*one for each of 1 prompts"),
    ],
)
def test_what_cannot_be_is_named(changes, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**changes).generate(**{"prompts": [[3, 4, 5]], "max_new": 4, **arguments})


def test_states_that_do_not_fit_are_named():
    model, x = model_of(), tokens(2, 5)
    _, state = model.extend(x, None)
    with pytest.raises(ValueError, match="a state of 2 sequences for inputs of 3; valid"):
        model.extend(tokens(3, 1), state)
    with pytest.raises(ValueError, match="of 2 blocks, or None; got RecurrentState"):
        model.extend(x, state.layers[0])
    with pytest.raises(ValueError, match="of 3 blocks, or None; got one of 2"):
        model_of(**HYBRID).extend(x, state)
    with pytest.raises(ValueError, match=r"classes of whole sequences.*valid: one with scores for every position"):
        model_of(head="classify").extend(x, None)
    with pytest.raises(ValueError, match=r"training mode.*valid: model\.eval"):
        model.train().generate([[3]], 2)
    with pytest.raises(ValueError, match="bidirectional"):
        model_of(causal=False).initial_state(2)
    longer = model_of(position="sinusoidal")
    _, state = longer.extend(tokens(2, 30), None)
    with pytest.raises(ValueError, match="a sequence of 33 steps; absolute positions are valid up to 32"):
        longer.extend(tokens(2, 3), state)
    longer.extend(tokens(2, 3), state, lengths=torch.tensor([2, 1]))
