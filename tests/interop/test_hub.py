"""Blocks and models as folders, written and read; and what is said of folders that are something else."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import model_cases
import pytest
import torch
from block_cases import VARIANTS, D, make, sequences
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_config, toy_task
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import seqzoo
from seqzoo import BLOCKS, from_pretrained, save_pretrained
from seqzoo.models import build_model
from seqzoo.training.tuning import tune

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_comes_back(name, tmp_path):
    options = VARIANTS[name][-1]
    block = make(name, options, True, dtype=torch.float32)
    assert save_pretrained(block, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = from_pretrained(tmp_path / "new" / "folder")
    assert (type(loaded), loaded.options, loaded.training) == (type(block), block.options, False)
    theirs = loaded.state_dict()
    assert block.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in block.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_block_in_half_precision_comes_back_as_it_was(tmp_path):
    block, x = make("lru", {}, True, dtype=torch.bfloat16), sequences(2, 9).bfloat16()
    loaded = from_pretrained(save_pretrained(block, tmp_path))
    assert torch.equal(loaded(x), block(x))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize(
    ("spec", "head", "changes"),
    [
        (model_cases.TOKENS, "classify", {"position": "learned", "mlp_ratio": 2.0}),
        (model_cases.PIXELS, "classify+per_position", {"layers": ["lru", {"name": "conv", "width": 3}]}),
        (model_cases.PAIRS, "classify", {"pooling": "max", "head": "mlp", "block": {"name": "performer"}}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_model_comes_back(spec, head, changes, tmp_path):
    model = build_model(model_cases.config(**changes), spec, head=head, causal=False).eval()
    loaded = from_pretrained(save_pretrained(model, tmp_path))
    x = model_cases.inputs(spec)
    lengths = torch.full(x.shape[:2] if spec.num_inputs == 2 else x.shape[:1], 20)
    assert torch.equal(loaded(x, lengths), model(x, lengths))
    assert loaded.plan == model.plan
    if "+" in head:
        assert from_pretrained(save_pretrained(model.without_second(), tmp_path / "first")).plan.head == "classify"


def test_a_run_comes_back_with_a_card_of_its_figures(tmp_path):
    task = toy_task()
    result = seqzoo.run(tiny_config(tmp_path / "runs"), task=task)
    model, batch = seqzoo.load(result["folder"]), task.test.batch(torch.arange(8))
    loaded = from_pretrained(save_pretrained(model, tmp_path / "model", run=result["folder"]))
    assert torch.equal(loaded(batch.inputs, batch.lengths), model(batch.inputs, batch.lengths))
    card = (tmp_path / "model" / "README.md").read_text().splitlines()
    accuracy, params = f"{result['test']['accuracy']:.4g}", result["params"]
    for row in (f"test accuracy | {accuracy}", "seed | 0", f"params | {params}", "d_model | 16", "task | toy"):
        assert f"| {row} |" in card
    huggingface_hub = pytest.importorskip("huggingface_hub")
    assert huggingface_hub.ModelCard.load(tmp_path / "model" / "README.md").data.library_name == "seqzoo"


def test_a_model_tuned_otherwise_is_refused(tmp_path):
    model = build_model(model_cases.config(), model_cases.TOKENS, head="classify", causal=False)
    with pytest.raises(ValueError, match=r"run=.*: it has no result\.json; valid: the folder of a finished run"):
        save_pretrained(model, tmp_path / "other", run=tmp_path)
    tuned = tune(model, tiny_config(tmp_path, tuning="ladder"))
    with pytest.raises(ValueError, match="LadderModel is not as build_model made it; valid: a model tuned whole"):
        save_pretrained(tuned, tmp_path / "other")
    pytest.importorskip("peft")
    model = build_model(model_cases.config(), model_cases.TOKENS, head="classify", causal=False)
    tuned = tune(model, tiny_config(tmp_path, tuning="lora"))
    with pytest.raises(ValueError, match=r"the model was changed since it was built, .*valid: low-rank changes merged"):
        save_pretrained(tuned, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_it_is_uploaded_and_read_from_where_it_was_downloaded(tmp_path, monkeypatch):
    """With the Hub's client in between, as far as it goes without a network."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = {}

    class Api:
        def __init__(self, **options):
            asked["api"] = options

        def create_repo(self, repo_id, **options):
            asked["repo"] = repo_id, options
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            asked["upload"] = repo_id, options
            Path(folder_path).rename(tmp_path / "hub")
            Path(folder_path).mkdir()
            return "https://there/commit"

    def download(repository, **options):
        asked["download"] = repository, options
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    block = make("lru", {}, True, dtype=torch.float32)
    assert seqzoo.push_to_hub(block, "me/it", private=True, token="t", revision="v1") == "https://there/commit"
    assert asked["api"] == {"token": "t"}
    assert asked["repo"] == ("me/it", {"exist_ok": True, "private": True})
    assert asked["upload"][1] == {"commit_message": f"Written by seqzoo {seqzoo.__version__}", "revision": "v1"}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
    x = sequences(2, 9, dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(from_pretrained("me/it", revision="v1")(x), block(x))
    assert asked["download"] == ("me/it", {"allow_patterns": [CONFIG, WEIGHTS], "revision": "v1"})


def described(**changes):
    """Changes config.json."""

    def change(folder):
        path = folder / CONFIG
        values = json.loads(path.read_text())
        for key, value in changes.items():
            *inside, last = key.split("__")
            part = values
            for name in inside:
                part = part[name]
            part[last] = value
        path.write_text(json.dumps(values))

    return change


def weights(change):
    def changed(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return changed


BLOCK_FAULTS = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), r"has no config\.json; valid: what seqzoo"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), r"has no model\.safetensors; valid: what seqzoo"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), r"config\.json: Expecting"),
    "another library's": (
        lambda folder: (folder / CONFIG).write_text('{"model_type": "llama"}'),
        "it is not of seqzoo: it has no seqzoo",
    ),
    "of a later version": (described(format=2, seqzoo="9.0"), "it has format 2, of seqzoo 9.0; .* reads up to 1: pip"),
    "of another kind": (described(kind="task"), "kind='task'; valid: block, model"),
    "of no block": (described(block="lrv"), r"no block 'lrv' \(did you mean 'lru'\?\)"),
    "an option": (described(options__heads=3), "no option of lru 'heads'"),
    "a value": (described(options__state_dim="many"), "state_dim='many': valid: int"),
    "a width": (described(options__d_model=0), "d_model=0: valid: 1 or more"),
    "no width": (described(options__d_model="16"), r"options\.d_model is '16', not int"),
    "computed": (described(options__r_min="${oc.env:HOME}"), "something in it would be computed"),
    "another block": (described(block="conv", options={"d_model": D, "causal": True}), "is not of what config.json"),
    "another width": (described(options__d_model=2 * D), r"is not of what config\.json describes: .* the model wants"),
    "another version's weights": (
        lambda folder: (described(seqzoo="0.0.9")(folder), weights(lambda t: t.pop("in_proj.weight"))(folder)),
        r"written by seqzoo 0\.0\.9, this is .*: in_proj.weight is missing",
    ),
    "damaged": (lambda folder: (folder / WEIGHTS).write_bytes(b"\x08" + bytes(20)), r"model\.safetensors is damaged"),
}


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_what_is_wrong_with_a_block_is_said(fault, tmp_path):
    save_pretrained(make("lru", {}, True, dtype=torch.float32), tmp_path)
    change, message = BLOCK_FAULTS[fault]
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        from_pretrained(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


MODEL_FAULTS = {
    "a block": (described(config__block={"name": "lrv"}), "no block 'lrv'"),
    "a key": (described(config__depth=3), "depth"),
    "a number": (described(config__num_layers=10**9), r"model\.num_layers=1000000000: valid"),
    "a name": (described(config__name="../it"), r"model\.name=\.\./it"),
    "a size": (described(spec__vocab_size=10**12), "vocab_size=1000000000000: valid"),
    "of the task": (described(spec__colour="red"), "no key 'colour'"),
    "a head": (described(head="regress"), "only pixels can be regressed"),
    "no heads": (described(head=[]), r"head is \[\], not str"),
    "another task's": (described(spec__vocab_size=13), "embedding.inputs.table.weight has shape"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_what_is_wrong_with_a_model_is_said(fault, tmp_path):
    save_pretrained(build_model(model_cases.config(), model_cases.TOKENS, head="classify", causal=False), tmp_path)
    change, message = MODEL_FAULTS[fault]
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_other_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"Linear: valid: a block, or a model of seqzoo\.models\.build_model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "a")
    model = build_model(model_cases.config(), model_cases.TOKENS, head="classify", causal=False)
    model.head = nn.Linear(16, 7)
    with pytest.raises(ValueError, match=r"the model was changed since it was built, head\.scores"):
        save_pretrained(model, tmp_path / "a")
    model.plan = None
    with pytest.raises(ValueError, match="SequenceModel is not as build_model made it"):
        save_pretrained(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="is a folder, got revision"):
        from_pretrained(tmp_path, revision="v1")
    pytest.importorskip("huggingface_hub")
    for source in (tmp_path / "nowhere", "me/it"):
        with pytest.raises(ValueError, match="is no folder, and no repository of the Hub that is reached: "):
            from_pretrained(source, local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "undo"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")),
        (parametrizations.orthogonal, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    ],
    ids=["pruned", "parametrized"],
)
def test_changes_of_a_layer_are_made_permanent_first(change, undo, tmp_path):
    block, x = make("softmax_attention", {}, True, dtype=torch.float32), sequences(2, 9, dtype=torch.float32)
    change(block.out_proj)
    message = r"the block was changed since it was built, out_proj.*valid: .*prune\.remove, parametrize\.remove_param"
    with pytest.raises(ValueError, match=message):
        save_pretrained(block, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    undo(block.out_proj)
    assert torch.equal(from_pretrained(save_pretrained(block, tmp_path / "a"))(x), block(x))


def test_a_block_quantized_is_refused(tmp_path):
    block = torch.ao.quantization.quantize_dynamic(make("lru", {}, True, dtype=torch.float32), {nn.Linear})
    with pytest.raises(ValueError, match="the block was changed since it was built, "):
        save_pretrained(block, tmp_path / "a")


def test_a_configuration_imports_nothing(tmp_path, monkeypatch):
    save_pretrained(make("lru", {}, True, dtype=torch.float32), tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    described(plugins=["evil"], auto_map={"AutoModel": "evil.Model"})(tmp_path)
    from_pretrained(tmp_path)
    assert "evil" not in sys.modules
    described(block="evil.Model")(tmp_path)
    with pytest.raises(ValueError, match=r"no block 'evil\.Model'"):
        from_pretrained(tmp_path)
    assert "evil" not in sys.modules


def test_a_plan_is_a_value():
    model = build_model(model_cases.config(), model_cases.TOKENS, head="classify", causal=False)
    assert model.plan != replace(model.plan, causal=True)
