"""Attention of stock models in seqzoo's operations, beside the same written out over all pairs of steps."""

import pytest
import torch
import torch.nn.functional as F
from stock_models import DECODER, SIZES

import seqzoo

KINDS = ("softmax", "linear", "favor")
CACHES = (None, "static")


@pytest.fixture
def plainly(transformers):
    """The names of attention functions over whole masks, which hold weights [B, H, T, S]: what is expected."""
    from transformers.masking_utils import sdpa_mask

    from seqzoo.interop.attention import features

    def plain(kind):
        def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
            q, k, v = (x.double() for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            if kind == "softmax":
                weights = (q @ k.mT * scaling).exp()
            elif kind == "linear":
                weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
            else:
                D = q.shape[-1]
                W = features(0, getattr(module, "layer_idx", 0), q.shape[1], int(D * torch.tensor(D).log()), D)
                phi = [
                    (x @ W.double().mT - x.square().sum(-1, keepdim=True) / 2).exp()
                    for x in (q * scaling**0.5, k * scaling**0.5)
                ]
                weights = phi[0] @ phi[1].mT
            if attention_mask is not None:
                weights = weights * attention_mask
            y = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)
            return y.transpose(1, 2).to(query.dtype).contiguous(), None

        return attention

    def always(**options):
        return sdpa_mask(**{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    for kind in KINDS:
        transformers.AttentionInterface.register(f"plain_{kind}", plain(kind))
        transformers.AttentionMaskInterface.register(f"plain_{kind}", always)
    return {kind: f"plain_{kind}" for kind in KINDS}


def both(build, plainly, name, kind, **options):
    return build(name, plainly[kind], **options), build(name, f"seqzoo_{kind}", **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_llama(build, plainly, ids, both_sides, kind):
    expected, model = both(build, plainly, "Llama", kind)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    there = both_sides.bool()
    y = model(ids, attention_mask=both_sides).logits[there]
    torch.testing.assert_close(y, expected(ids, attention_mask=both_sides).logits[there], atol=1e-4, rtol=1e-4)
    assert (y - model(ids).logits[there]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_generates_from_prompts_padded_in_front(build, plainly, ids, in_front, kind, cache):
    expected, model = both(build, plainly, "Llama", kind)
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    y = model.generate(ids, **options)
    assert torch.equal(y, expected.generate(ids, **options))
    assert len(y[:, 12:].unique()) > 6  # not the same over and over


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces(build, ids, in_front, kind):
    """The second piece has steps of padding in front, and some that count."""
    model, cache = build("Llama", f"seqzoo_{kind}"), None
    whole = model(ids, attention_mask=in_front).logits
    pieces = []
    for begin, end in ((0, 6), (6, 11), (11, 12)):
        output = model(ids[:, begin:end], attention_mask=in_front[:, :end], past_key_values=cache, use_cache=True)
        pieces.append(output.logits)
        cache = output.past_key_values
    there = in_front.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[there], whole[there], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(build, ids, kind):
    model = build("Llama", f"seqzoo_{kind}")
    places = torch.cat([torch.arange(5), torch.arange(3), torch.arange(4)]).expand(3, -1)
    alone = [model(part).logits for part in ids.split([5, 3, 4], 1)]
    y = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(y, torch.cat(alone, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_bert_and_attention_to_another_sequence(build, plainly, ids, both_sides, kind):
    expected, model = both(build, plainly, "Bert", kind)
    y, z = (each(ids, attention_mask=both_sides).last_hidden_state for each in (model, expected))
    torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)  # where padding is queried too
    expected, model = both(
        build, plainly, "Bart", kind, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4
    )
    for T in (7, 12):  # other in number than the keys, and as many
        options = {"attention_mask": both_sides, "decoder_input_ids": ids[:, :T].flip(0)}
        y, z = (each(ids, **options).last_hidden_state for each in (model, expected))
        torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
def test_sliding_windows(build, plainly, ids, both_sides, in_front, cache):
    expected, model = both(build, plainly, "Mistral", "softmax", sliding_window=5)
    there = both_sides.bool()
    y, z = (each(ids, attention_mask=both_sides).logits[there] for each in (model, expected))
    torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


OTHERS = {  # windows in some layers, of both directions, and queries of another sequence with a cache
    "Qwen2ForCausalLM": {**DECODER, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Gemma3ForCausalLM": {**DECODER, "head_dim": 8, "sliding_window": 5},
    "ModernBertModel": {**SIZES, "local_attention": 6, "pad_token_id": 0},
    "BartForConditionalGeneration": {
        **{"vocab_size": 97, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        **{"encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0, "decoder_start_token_id": 1},
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_other_stock_models(transformers, ids, both_sides, in_front, name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**OTHERS[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    mask, answers = in_front if "CausalLM" in name else both_sides, []
    for attention in ("sdpa", "seqzoo_softmax"):
        model.set_attn_implementation(attention)
        if name == "ModernBertModel":
            answers.append([model(ids, attention_mask=mask).last_hidden_state[mask.bool()]])
            continue
        options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 2}
        caches = CACHES if "CausalLM" in name else (None,)
        answers.append([model.generate(ids, cache_implementation=cache, **options) for cache in caches])
    for theirs, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "favor"])
def test_sums_forget_no_window(build, ids, kind):
    with pytest.raises(ValueError, match=r"a sliding window of 5 over 12 keys.*sliding_window=None"):
        build("Mistral", f"seqzoo_{kind}", sliding_window=5)(ids)
    build("Mistral", f"seqzoo_{kind}", sliding_window=12)(ids)  # hides nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(build, plainly, ids, both_sides, kind):
    gradients = []
    for model in both(build, plainly, "Llama", kind):
        model.train()(ids, attention_mask=both_sides, labels=ids.masked_fill(both_sides == 0, -100)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "favor"])
def test_a_state_takes_the_place_of_keys_and_values(build, ids, in_front, kind):
    model = build("Llama", f"seqzoo_{kind}")
    options = {"attention_mask": in_front, "max_new_tokens": 6, "do_sample": False}
    cache = seqzoo.hf.StateCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    assert cache.get_seq_length() == 17
    assert all(layer.keys is None for layer in cache.layers)
    size = sum(part.numel() for part in torch.utils._pytree.tree_leaves(cache.layers[0].state))
    M, D = 8 * 2, 8  # 2.08 features for a channel
    assert size == 3 * 4 * (D * (D + 1) if kind == "linear" else M * (D + 1) + M)
    beams = {**options, "num_beams": 3, "max_new_tokens": 4}
    cache = seqzoo.hf.StateCache(model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **beams), model.generate(ids, **beams))


REFUSALS = {
    "dropout": ("Llama", {"attention_dropout": 0.1}, "dropout=0.1 of attention weights"),
    "cap": ("Gemma2", {"head_dim": 8}, r"a cap on scores \(softcap\)"),
    "sinks": ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
    "bias": ("T5", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_heads": 4, "dropout_rate": 0.0}, "a bias by position"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_operation_has_is_refused(build, ids, kind, case):
    name, options, message = REFUSALS[case]
    model = build(name, f"seqzoo_{kind}", **options).train()
    with pytest.raises(ValueError, match=message):
        model(ids, **({"decoder_input_ids": ids} if name == "T5" else {}))


def test_other_refusals(build, ids):
    model = build("Llama", "seqzoo_softmax")
    with pytest.raises(ValueError, match="weights to return"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"a mask of one's own, \[3, 1, 12, 12\]"):
        model(ids, attention_mask=torch.zeros(3, 1, 12, 12))
    holes = torch.ones(3, 12, dtype=torch.long)
    holes[1, 5] = 0
    with pytest.raises(ValueError, match="padding between steps that count"):
        model(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="a StateCache does not keep"):
        model(ids, past_key_values=seqzoo.hf.StateCache(model.config))
    packed = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    for options in ({}, {"use_cache": False, "attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ValueError, match="position_ids begin anew within a row"):
            model(ids, position_ids=packed, **options)
    from transformers.masking_utils import create_causal_mask

    with pytest.raises(ValueError, match="a mask of transformers that it cannot keep"):
        create_causal_mask(model.config, torch.zeros(3, 12, 32), None, None, block_sequence_ids=torch.zeros(3, 12))


def test_features_are_those_of_their_seed(transformers):
    from seqzoo.interop.attention import _drawn, features

    before = torch.random.get_rng_state()
    drawn = features(3, 1, 2, 5, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    _drawn.cache_clear()
    assert torch.equal(drawn, features(3, 1, 2, 5, 4))
    assert not torch.equal(drawn, features(3, 2, 2, 5, 4))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph_with_a_mask(build, ids, both_sides, kind):
    model = build("Llama", f"seqzoo_{kind}", use_cache=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mask in (torch.ones_like(both_sides), both_sides):
        y = compiled(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(y, model(ids, attention_mask=mask).logits[mask.bool()], atol=1e-4, rtol=1e-4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="valid: fullgraph=False, or an attention_mask, of ones"):
        compiled(ids)
    compiled = torch.compile(model, backend="aot_eager")
    for places in (None, torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)):
        y = compiled(ids, position_ids=places).logits
        torch.testing.assert_close(y, model(ids, position_ids=places).logits, atol=1e-4, rtol=1e-4)
