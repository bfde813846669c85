import itertools

import pytest
import yaml

from seqzoo.config import CONFIGS, ConfigError, available, compose, from_dict, to_dict


def combinations():
    """Every task meets every recipe, which sets sizes by it, with one model after another; with -m slow every model."""
    models, tasks, recipes = (available(group) for group in ("model", "task", "recipe"))
    soon = [
        (models[n % len(models)], task, recipe) for n, (recipe, task) in enumerate(itertools.product(recipes, tasks))
    ]
    met = {case[:2] for case in soon}
    later = [
        pytest.param(model, task, recipes[(m + t) % len(recipes)], marks=pytest.mark.slow)
        for (m, model), (t, task) in itertools.product(enumerate(models), enumerate(tasks))
        if (model, task) not in met
    ]
    return soon + later


@pytest.mark.parametrize(("model", "task", "recipe"), combinations())
def test_combinations_compose(model, task, recipe):
    config = compose([f"model={model}", f"task={task}", f"recipe={recipe}"])
    assert (config.model.name, config.task.name, config.recipe) == (model, task, recipe)
    assert from_dict(to_dict(config)) == config


def test_a_recipe_sets_sizes_by_task_and_model():
    assert compose(["model=transformer", "task=lra_text"]).model.d_model == 512
    assert compose(["model=s4d", "task=lra_text"]).model.d_model == 256
    tiny = compose(["model=s4d", "task=lra_text", "recipe=tiny"])
    assert (tiny.model.d_model, tiny.task.max_length, tiny.n_test) == (64, 512, 2000)


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
            r"no model 'transformr' \(did you mean 'transformer'\?\); valid: conv, delta_net, flash",
        ),
        ("task=lra_txt", r"no task 'lra_txt' \(did you mean 'lra_text'\?\); valid: .*lra_image"),
        ("recipe=large", "no recipe 'large'; valid: laptop, paper, short, small, tiny"),
        ("sed=1", r"no key 'sed' \(did you mean 'seed'\?\); valid: model, task"),
        ("finetuning.lrr=1", r"did you mean 'finetuning.lr'\?\); valid: finetuning.tokens"),
        ("model.d=3", "no key 'model.d'.*valid: model.name, model.d_model"),
        ("finetuning.lr=fast", "finetuning.lr: Value 'fast'"),
        ("objective=mask", "objective=mask: valid: masked, causal"),
        ("wandb.mode=on", "wandb.mode=on: valid: null, online, offline, disabled"),
        ("pretraining.tokens=5", "pretraining takes one budget: tokens or epochs, got tokens=5 epochs="),
        ("finetuning.batch_size=0", "finetuning.batch_size=0: valid: 1 or more"),
        ("task.mask_ratio=2", "task.mask_ratio=2.0: valid: above 0 and below 1"),
        ("seed=-1", "seed=-1: valid: 0 or more"),
        ("device=tpu", "device=tpu: valid: auto, cpu, cuda"),
        ("tuning=adapter", "tuning=adapter: valid: full, head, lora, ladder"),
        ("lora.rank=0", "lora.rank=0: valid: 1 or more"),
        ("lora.lr_ratio=-1", r"lora.lr_ratio=-1.0: valid: above 0"),
        ("ladder.reduction=0", "ladder.reduction=0: valid: 1 or more"),
        ("model.init=zeros", "model.init=zeros: valid: structured, random"),
        ("train_fraction=0", r"train_fraction=0.0: valid: null, or above 0 and up to 1"),
        ("train_fraction=1.5", r"train_fraction=1.5: valid: null"),
        ("share=1", r"share=1.0: valid: null, or 0 or more and below 1"),
        ("share=-0.1", r"share=-0.1: valid: null"),
        ("share=0.4", r"share=0.4: nothing is pretrained; valid: pretrain=true, or share=0"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_valid(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose([override])
    assert "\n" not in str(caught.value)


SPLIT = ["recipe=tiny", "pretraining.tokens=2000", "finetuning.tokens=4000"]


def test_a_share_of_both_budgets_goes_to_pretraining():
    config = compose([*SPLIT, "pretrain=true", "share=0.25"])
    assert (config.pretraining.tokens, config.finetuning.tokens) == (1500, 4500)
    assert from_dict(to_dict(config)) == config, "it is not split again"
    epochs = ["pretraining.tokens=null", "finetuning.tokens=null", "pretraining.epochs=10", "finetuning.epochs=20"]
    config = compose(["recipe=tiny", *epochs, "pretrain=true", "share=0.6"])
    assert (config.pretraining.epochs, config.finetuning.epochs) == (18, 12)


def test_one_optimiser_for_both_stages_or_one_for_each():
    config = compose([*SPLIT, "optimizer=muon"])
    assert (config.optimizer, config.pretraining.optimizer, config.finetuning.optimizer) == (None, "muon", "muon")
    config = compose([*SPLIT, "pretraining.optimizer=muon", "finetuning.optimizer=adamw"])
    assert (config.pretraining.optimizer, config.finetuning.optimizer) == ("muon", "adamw")
    with pytest.raises(ConfigError, match="optimizer=sgd: valid: null, adamw, muon"):
        compose([*SPLIT, "optimizer=sgd"])


def test_no_share_is_training_from_scratch_on_both_budgets():
    config = compose([*SPLIT, "pretrain=true", "share=0"])
    assert not config.pretrain
    assert (config.finetuning.tokens, config.share) == (6000, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pretrain=true", "finetuning.tokens=null", "finetuning.epochs=3"],
            r"finetuning tokens=None epochs=3.0; valid: both in",
        ),
        (["pretrain=runs/there"], "pretrain=runs/there has had its budget; valid: pretrain=true"),
    ],
)
def test_budgets_that_cannot_be_split_are_explained(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose([*SPLIT, "share=0.5", *overrides])


def test_the_whole_train_split_is_no_fraction_of_it():
    assert compose(["train_fraction=1"]) == compose()
    assert compose(["train_fraction=0.05"]).train_fraction == 0.05


@pytest.mark.parametrize("name", available("study"))
def test_every_run_of_a_study_composes(name):
    text = (CONFIGS / "study" / f"{name}.yaml").read_text()
    assert text.startswith(f"# python train.py -m study={name} ")
    study = yaml.safe_load(text)
    cells = []
    for part in study if isinstance(study, list) else [study]:
        axes = {key: str(values).split(",") for key, values in {"recipe": "tiny", **part}.items()}
        if isinstance(study, list):  # hundreds of runs: every model and every task is composed above
            axes |= {"model": axes["model"][:1], "seed": ["0"]}
        cells += itertools.product(*([f"{key}={value}" for value in values] for key, values in axes.items()))
    assert len({repr(compose(cell)) for cell in cells}) == len(cells) > 1
