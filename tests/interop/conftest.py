"""Small models of transformers with the weights of one seed."""

import pytest
import torch
from stock_models import DECODER, SIZES, V


@pytest.fixture(scope="session")
def transformers():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.set_verbosity_error()
    import seqzoo

    seqzoo.hf.register()
    return transformers


@pytest.fixture
def build(transformers):
    """Builds a model by name, its attention and options: Llama, Mistral, Bert, ..."""

    def build(name, attention="eager", **options):
        kind, config = {
            "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
            "Mistral": (transformers.MistralForCausalLM, transformers.MistralConfig),
            "Gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
            "GPTNeoX": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig),
            "GPTBigCode": (transformers.GPTBigCodeForCausalLM, transformers.GPTBigCodeConfig),
            "GptOss": (transformers.GptOssForCausalLM, transformers.GptOssConfig),
            "Bert": (transformers.BertModel, transformers.BertConfig),
            "Bart": (transformers.BartModel, transformers.BartConfig),
            "T5": (transformers.T5Model, transformers.T5Config),
        }[name]
        torch.manual_seed(0)
        model = kind(config(**{**(SIZES if name in ("Bert", "T5") else DECODER), **options})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)  # as drawn, all say much the same
        model.set_attn_implementation(attention)
        return model

    return build


@pytest.fixture
def ids():
    return torch.randint(1, V, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def both_sides():
    """A mask of padding in front of one sequence, and behind another."""
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = mask[2, 9:] = 0
    return mask


@pytest.fixture
def in_front():
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = mask[2, :9] = 0
    return mask
