import itertools

import pytest

from seqzoo.config import ConfigError, available, compose, from_dict, to_dict


@pytest.mark.parametrize(
    ("model", "task", "recipe"), list(itertools.product(available("model"), available("task"), available("recipe")))
)
def test_every_combination_composes(model, task, recipe):
    config = compose([f"model={model}", f"task={task}", f"recipe={recipe}"])
    assert (config.model.name, config.task.name, config.recipe) == (model, task, recipe)
    assert from_dict(to_dict(config)) == config


def test_a_recipe_sets_sizes_by_task_and_model():
    assert compose(["model=transformer", "task=lra_text"]).model.d_model == 512
    assert compose(["model=s4d", "task=lra_text"]).model.d_model == 256
    tiny = compose(["model=s4d", "task=lra_text", "recipe=tiny"])
    assert (tiny.model.d_model, tiny.task.max_length, tiny.n_test) == (64, 1024, 2000)


def test_overrides_win_over_the_recipe():
    config = compose(["model=lru", "recipe=tiny", "finetuning.lr=3e-4", "model.block.r_min=0.5", "model.num_layers=3"])
    assert (config.finetuning.lr, config.model.block["r_min"], config.model.num_layers) == (3e-4, 0.5, 3)


def test_a_layer_may_have_its_own_block():
    config = compose(["model.layers=[lru,{name:softmax_attention,num_heads:2}]"])
    assert config.model.layers == ["lru", {"name": "softmax_attention", "num_heads": 2}]


def test_causal_pretraining_makes_the_model_causal():
    assert compose(["pretrain=true", "objective=causal"]).causal
    assert not compose(["pretrain=true", "objective=masked"]).causal
    assert compose(["causal=true"]).causal


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model=transformr",
            r"no model 'transformr' \(did you mean 'transformer'\?\); valid: flash, linear_transformer, lru",
        ),
        ("task=lra_txt", r"no task 'lra_txt' \(did you mean 'lra_text'\?\); valid: .*lra_image"),
        ("recipe=large", "no recipe 'large'; valid: paper, short, small, tiny"),
        ("sed=1", r"no key 'sed' \(did you mean 'seed'\?\); valid: model, task"),
        ("finetuning.lrr=1", r"did you mean 'finetuning.lr'\?\); valid: finetuning.tokens"),
        ("model.d=3", "no key 'model.d'.*valid: model.name, model.d_model"),
        ("finetuning.lr=fast", "finetuning.lr: Value 'fast'"),
        ("objective=mask", "objective=mask: valid: masked, causal"),
        ("wandb.mode=on", "wandb.mode=on: valid: null, online, offline, disabled"),
        ("pretraining.tokens=5", "pretraining takes one budget: tokens or epochs, got tokens=5 epochs="),
        ("finetuning.batch_size=0", "finetuning.batch_size=0: valid: 1 or more"),
        ("task.mask_ratio=2", "mask_ratio is 2.0; valid: between 0 and 1"),
        ("seed=-1", "seed=-1: valid: 0 or more"),
        ("device=tpu", "device=tpu: valid: auto, cpu, cuda"),
        ("pretrain=3", "pretrain=3: valid: true, false, or the folder of a run"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_valid(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose([override])
    assert "\n" not in str(caught.value)
