"""What is the codebook's own: exact counts, running means, starts and restarts, what it must not learn from."""

import pytest
import torch
from agreement import assert_close

from seqzoo import after_step, auxiliary_loss, build_block
from seqzoo.blocks.quantizers import FiniteScalarQuantizer, VectorQuantizer, kmeans
from seqzoo.blocks.vq_attention import exact_attention
from seqzoo.kernels import nearest_code, vq_attention


def quantizer(**changes):
    torch.manual_seed(0)
    options = {"length": 2.0, "ema": 0.9, "commitment": 0.5, "start": "random", "restart": 0.0, **changes}
    return VectorQuantizer(2, 5, 3, **options)


def keys(B=4, T=30, H=2, D=3, seed=1):
    return torch.randn(B, T, H, D, generator=torch.Generator().manual_seed(seed))


def test_codes_are_running_means_of_their_keys():
    q, k, lengths = quantizer(), keys(), torch.tensor([30, 1, 17, 8])
    before, codes = q.codebook.clone(), nearest_code(k, q.codebook)
    sums, counts = q.sums.clone(), q.counts.clone()
    result = q(k, lengths, record=True)
    assert torch.equal(q.codebook, before), "a forward pass moves nothing"
    q.after_step()
    error = 0.0
    for h in range(2):
        valid = [(k[b, t, h], codes[b, t, h]) for b in range(4) for t in range(lengths[b])]
        for s in range(5):
            mine = [key for key, code in valid if code == s]
            torch.testing.assert_close(q.counts[h, s], 0.9 * counts[h, s] + 0.1 * len(mine))
            total = torch.stack(mine).sum(0) if mine else torch.zeros(3)
            torch.testing.assert_close(q.sums[h, s], 0.9 * sums[h, s] + 0.1 * total)
        error += sum((key - before[h, code]).square().sum() for key, code in valid)
    torch.testing.assert_close(result.loss, 0.5 * error / lengths.sum())


def test_counts_are_exact_over_many_passes():
    q = quantizer(ema=0.0)
    ones = torch.ones(1, 4096, 2, 3)
    for _ in range(5):
        q(ones, None, record=True)
    assert q.new_counts.dtype == torch.int64
    q.after_step()
    assert q.counts.sum(-1).tolist() == [5 * 4096.0] * 2
    assert q.new_counts.sum() == 0


def test_evaluation_teaches_nothing():
    q = quantizer()
    state = {name: value.clone() for name, value in q.state_dict().items()}
    with torch.no_grad():
        assert q(keys(), None, record=False).loss is None
    assert q.eval()(keys(), None, record=False).loss is None
    assert q.new_counts.sum() == 0
    assert all(torch.equal(value, state[name]) for name, value in q.state_dict().items())


def test_kmeans_start_finds_clusters():
    torch.manual_seed(0)
    centres = 10 * torch.randn(2, 5, 3)
    k = centres[torch.arange(2), torch.randint(5, (4, 100, 2))] + 0.01 * torch.randn(4, 100, 2, 3)
    q = quantizer(start="kmeans")
    q(k, None, record=True)
    q.after_step()
    assert q.started
    distance = torch.cdist(centres, q.codebook).amin(-1)
    assert (distance < 0.1).all()
    moved = q.codebook.clone()
    q(k, None, record=True)
    q.after_step()
    assert_close(q.codebook, moved, 1e-2)  # from here on, running means


def test_kmeans_is_lloyds():
    torch.manual_seed(1)
    points = torch.randn(1, 50, 2)
    centres = kmeans(points, 4)
    nearest = torch.cdist(points, centres).argmin(-1)[0]
    for s in range(4):
        assert (points[0, nearest == s].mean(0) - centres[0, s]).norm() < 0.3


def test_dead_codes_restart_on_keys():
    q, k = quantizer(ema=0.0, restart=1.0), keys()
    with torch.no_grad():
        q.sums[:, 3:] = 1e6  # far from every key
    q(k, None, record=True)
    q.after_step()
    assert (q.counts >= 1).all()
    everything = k.flatten(0, 1).transpose(0, 1)  # [H, n, D]
    same = (q.codebook[:, 3:, None] == everything[:, None]).all(-1)  # [H, 2, n]
    assert same.any(-1).all()


def test_padding_is_never_sampled():
    q, k = quantizer(restart=1.0), keys()
    k[:, 5:] = 1e6
    q(k, torch.tensor([5, 1, 3, 2]), record=True)
    assert q._sample is not None
    assert q._sample.abs().max() < 100


def test_running_sums_stay_in_single_precision():
    block = build_block("vq_attention", 16).to(torch.bfloat16)
    assert block.quantizer.sums.dtype == block.quantizer.counts.dtype == torch.float32
    assert block.qk_proj.weight.dtype == torch.bfloat16
    assert build_block("vq_attention", 16).double().quantizer.sums.dtype == torch.float64


def test_auxiliary_loss_sums_over_blocks():
    torch.manual_seed(0)
    model = torch.nn.Sequential(build_block("vq_attention", 16), build_block("vq_attention", 16))
    x = torch.randn(2, 10, 16)
    model(x)
    total = auxiliary_loss(model)
    parts = []
    y = x
    for block in model:
        y = block(y)
        parts.append(auxiliary_loss(block))
    torch.testing.assert_close(total, sum(parts))
    assert total > 0
    assert torch.autograd.grad(total, model[0].qk_proj.weight, retain_graph=True)[0].abs().sum() > 0


def test_metrics_tell_the_codebooks_health():
    torch.manual_seed(0)
    block = build_block("vq_attention", 16, codebook_size=8)
    block(torch.randn(2, 50, 16)).sum().backward()
    after_step(block)
    metrics = block.metrics()
    assert 1 <= metrics["codebook_perplexity"] <= 8
    assert 0 < metrics["codes_used"] <= 1
    assert 0 < metrics["relative_error"] < 2


def test_finite_scalars():
    torch.manual_seed(0)
    q = FiniteScalarQuantizer(2, 130, 6, length=2.0)
    assert q.codebook.shape == (2, 125, 6)
    k = keys(H=2, D=6).requires_grad_()
    result = q(k, None, record=True)
    code = result.codebook[torch.arange(2), result.codes]  # [B, T, H, D]
    half_step = q.up.norm(dim=-1).sum(-1) / 4  # an axis is rounded by half of 2 / 4 at most
    assert ((code - result.keys).norm(dim=-1) <= half_step + 1e-5).all()
    result.keys.sum().backward()
    assert k.grad.abs().sum() > 0
    assert q.up.grad.abs().sum() > 0
    assert q.down.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "pq"}, "valid: vq, fsq"),
        ({"codebook_start": "zeros"}, "valid: random, kmeans"),
        ({"ema": 1.0}, "valid: 0 <= ema < 1"),
        ({"restart": -1.0}, "valid: 0 or more"),
        ({"quantizer": "fsq", "codebook_size": 3}, "valid with quantizer=fsq: 5 or more"),
        ({"block_len": 0}, "valid: 1 or more"),
    ],
)
def test_errors_say_what_is_valid(options, message):
    with pytest.raises(ValueError, match=message):
        build_block("vq_attention", 16, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([21, 7])])
def test_exact_attention_is_that_of_keys_that_are_codes(causal, lengths):
    generator = torch.Generator().manual_seed(0)
    B, T, H, D, L = 2, 21, 2, 4, 5
    q, v = torch.randn(2, B, T, H, D, generator=generator, dtype=torch.float64)
    codebook = torch.randn(H, T, D, generator=generator, dtype=torch.float64)
    k = codebook.transpose(0, 1).expand(B, T, H, D)
    bias = torch.randn(B, T, H, L + 1 if causal else 2 * L + 1, generator=generator, dtype=torch.float64)
    exact = exact_attention(q, k, v, bias, causal=causal, lengths=lengths)
    by_code = vq_attention(q, k, v, codebook, block_len=L, bias=bias, causal=causal, lengths=lengths)
    for b, length in enumerate([T, T] if lengths is None else lengths.tolist()):
        assert_close(exact[b, :length], by_code[b, :length], 1e-13)


def test_exact_steps_are_of_training_alone_and_end():
    torch.manual_seed(0)
    options = {"causal": True, "block_len": 4, "codebook_size": 3}
    block, plain = build_block("vq_attention", 16, exact_steps=2, **options), build_block("vq_attention", 16, **options)
    plain.load_state_dict(block.state_dict() | {"_extra_state": plain.get_extra_state()})
    x = torch.randn(2, 20, 16)

    def same() -> bool:
        return torch.allclose(block(x), plain(x))

    assert not same()
    with torch.no_grad():
        assert same(), "what is not learned from is what evaluation computes"
    after_step(block)
    resumed = build_block("vq_attention", 16, exact_steps=2, **options)
    resumed.load_state_dict(block.state_dict())
    for model in (block, resumed):
        assert model.exact_left == 1
        after_step(model)
        model.load_state_dict(plain.state_dict())  # the codes have moved
    assert same()
    assert torch.equal(resumed(x), block(x))
    with pytest.raises(ValueError, match="exact_steps=-1: valid: 0 or more"):
        build_block("vq_attention", 16, exact_steps=-1)


@pytest.mark.parametrize("transform", [lambda f: torch.func.grad(f), lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_nothing_is_learnt_inside_a_transform_of_functions(transform):
    block, x = build_block("vq_attention", 16, block_len=4, codebook_size=8), torch.randn(1, 9, 16)
    with pytest.raises(RuntimeError, match=r"VQAttention learns from passes in training.*valid: eval\(\) of this"):
        transform(lambda x: block.train()(x).sum())(x)
    transform(lambda x: block.eval()(x).sum())(x)
