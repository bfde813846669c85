"""Models and single blocks as folders, and on the Hugging Face Hub: configuration, weights, and a card.

config.json          what was built: plain values, from which nothing is imported
model.safetensors    its weights
README.md            the card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
except ImportError as error:
    raise ImportError(f"saving and loading needs safetensors ({error}): pip install 'seqzoo[hf]'") from None

from ..blocks import Block, block_name, build_block, upgraded
from ..files import replacing_by_name, write_json, write_text
from ..messages import misfits, shortened, unknown
from ..models import ModelConfig, SequenceModel, build_model
from ..records import check, read_json
from ..valid import Width, range_of
from ..version import __version__

FORMAT = 1  # of config.json
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MADE = {"seqzoo": str, "format": int, "kind": str}  # shapes of a config.json, see `records.check`
BLOCK = {"block": str, "options": {"d_model": int, "causal": bool}}
MODEL = {"config": {"name": str}, "head": str, "causal": bool}
ANEW = "valid: what seqzoo.save_pretrained wrote"


def save_pretrained(module: nn.Module, folder: str | Path, *, run: str | Path | None = None) -> Path:
    """Writes a block, or a model of `build_model` or `seqzoo.load`, into a folder that `from_pretrained` reads.

    Args:
        module: what is written; its weights may lie on any device.
        folder: is made where it is not there; files of these names in it are replaced.
        run: the folder of the run that trained it, whose figures the card then has.

    Returns:
        The folder.

    Raises:
        ValueError: neither a block of `BLOCKS` nor a model that is as it was built; or `run` is not a finished run.
    """
    described, result = _described(module), _result(run)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_by_name(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, {"format": "pt", "seqzoo": __version__})
    write_json(folder / CONFIG, described)
    write_text(folder / CARD, _card(described, module, result))
    return folder


def push_to_hub(module: nn.Module, repository: str, *, run: str | Path | None = None, **options: Any) -> str:
    """Makes a repository "owner/name" on the Hub, if there is none, and uploads what `save_pretrained` writes.

    Args:
        module, run: as there.
        repository: its name.
        **options: `private` and `token`, of `HfApi.create_repo`, and whatever `HfApi.upload_folder` takes, such as
            `commit_message` or `revision`.

    Returns:
        Where the commit is.

    Raises:
        ValueError: as `save_pretrained`.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save_pretrained(module, folder, run=run)
        api = HfApi(token=options.pop("token", None))
        made = api.create_repo(repository, exist_ok=True, private=options.pop("private", None))
        message = {"commit_message": f"Written by seqzoo {__version__}"}
        return str(api.upload_folder(repo_id=made.repo_id, folder_path=folder, **{**message, **options}))


def from_pretrained(source: str | Path, **options: Any) -> Any:
    """The block or model in a folder of `save_pretrained`, or in a repository "owner/name" of the Hub, in eval mode.

    Nothing in it is imported or carried out. A block from outside of seqzoo has to be registered before.

    Args:
        source: the folder, or the repository.
        **options: of `huggingface_hub.snapshot_download`, such as `revision`, `token` or `cache_dir`.

    Raises:
        ValueError: there is no such folder or repository; it was not written by `save_pretrained`, or by a later
            version; its configuration is not valid; or its weights are damaged, or of another block or width.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _downloaded(str(source), options)
    elif options:
        raise ValueError(f"{source} is a folder, got {', '.join(options)}; valid: with a repository of the Hub only")
    try:
        described = read_json(folder / CONFIG)
        module = _built(described)
        weights = upgraded(module, load_file(folder / WEIGHTS))
    except FileNotFoundError as error:
        name = CONFIG if Path(str(error.filename)).name == CONFIG else WEIGHTS
        raise ValueError(f"{source} has no {name}; {ANEW}") from None
    except SafetensorError as error:
        raise ValueError(f"{source}: {WEIGHTS} is damaged ({error}); download or write it again") from None
    except ValueError as error:
        raise ValueError(f"{source}: {CONFIG}: {error}") from None
    if problems := misfits(weights, module.state_dict()):
        by = (
            ""
            if described["seqzoo"] == __version__
            else f", written by seqzoo {described['seqzoo']}, this is {__version__}"
        )
        raise ValueError(f"{source}: {WEIGHTS} is not of what {CONFIG} describes{by}: {problems}; {ANEW}")
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _downloaded(repository: str, options: Mapping[str, Any]) -> Path:
    """The folder in the cache of the Hub.

    Raises:
        ValueError: the Hub has no such repository, or is not reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{repository} is no folder; the Hub needs: pip install huggingface_hub") from None
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, **{"allow_patterns": [CONFIG, WEIGHTS], **options}))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = shortened(" ".join(str(error).split()))
        raise ValueError(f"{repository} is no folder, and no repository of the Hub that is reached: {said}") from None


def _described(module: nn.Module) -> dict[str, Any]:
    """The content of config.json."""
    made_by: dict[str, Any] = {"seqzoo": __version__, "format": FORMAT}
    if isinstance(module, Block):
        described = {**made_by, "kind": "block", "block": block_name(module), "options": module.options}
    elif not isinstance(module, SequenceModel):
        raise ValueError(f"{type(module).__name__}: valid: a block, or a model of seqzoo.models.build_model")
    elif module.plan is None:
        raise ValueError(
            f"{type(module).__name__} is not as build_model made it; valid: a model tuned whole, or its head"
        )
    else:
        described = {**made_by, "kind": "model", **asdict(module.plan)}
    described = json.loads(json.dumps(described))  # as it will be read
    if problems := misfits(module.state_dict(), _built(described).state_dict()):
        raise ValueError(
            f"the {described['kind']} was changed since it was built, {problems}; valid: low-rank changes merged "
            "first, pruning and parametrizations made permanent (prune.remove, parametrize.remove_parametrizations)"
        )
    return described


def _built(described: Any) -> nn.Module:
    """What a config.json describes, on the meta device.

    Raises:
        ValueError: it is not one of `save_pretrained`, or what it asks for is not valid.
    """
    try:
        check(described, MADE)
    except ValueError as error:
        raise ValueError(f"it is not of seqzoo: {error}; {ANEW}") from None
    if described["format"] > FORMAT:
        raise ValueError(
            f"it has format {described['format']}, of seqzoo {described['seqzoo']}; seqzoo {__version__} reads up to "
            f"{FORMAT}: pip install -U seqzoo"
        )
    if "${" in json.dumps(described):
        raise ValueError("something in it would be computed; valid: plain values")
    if described["kind"] == "model":
        return _built_model(described)
    if described["kind"] != "block":
        raise ValueError(f"kind={described['kind']!r}; valid: block, model")
    check(described, BLOCK)
    width, valid = described["options"]["d_model"], range_of(Width)
    if not (valid and valid.holds(width)):
        raise ValueError(f"d_model={width}: valid: {valid}")
    with torch.device("meta"):
        return build_block(described["block"], **described["options"])


def _built_model(described: dict[str, Any]) -> nn.Module:
    from ..runs.folder import TASK, spec_of  # needs the extra `train`, as models do

    check(described, {**MODEL, "spec": TASK})
    if others := sorted(described["spec"].keys() - {key.rstrip("?") for key in TASK}):
        raise ValueError(unknown("key", others[0], (key.rstrip("?") for key in TASK)))
    config, spec = _model_config(described["config"]), spec_of(described["spec"])
    with torch.device("meta"):
        return build_model(config, spec, head=described["head"], causal=described["causal"])


def _model_config(values: Any) -> ModelConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from None


def _result(run: str | Path | None) -> dict[str, Any] | None:
    """The figures of a run."""
    if run is None:
        return None
    from ..runs.folder import RESULT, read_result

    result = read_result(Path(run), RESULT)
    if result is None:
        raise ValueError(f"run={run}: it has no result.json; valid: the folder of a finished run")
    return result


def _card(described: Mapping[str, Any], module: nn.Module, result: Mapping[str, Any] | None) -> str:
    """The model's card, with the run's figures if there are any."""
    kind = described["kind"]
    name = described["block"] if kind == "block" else described["config"]["name"]
    options = described["options"] if kind == "block" else described["config"]
    count = sum(parameter.numel() for parameter in module.parameters())
    lines = ["---", "library_name: seqzoo", "tags:", "- seqzoo", f"- {name}", "---", "", f"# {name}", ""]
    what = "a sequence mixer" if kind == "block" else f"a model of the task {described['spec']['name']}"
    lines += [f"`{name}`, {what}, {count:,} parameters, written by seqzoo {described['seqzoo']}.", ""]
    use = "x)  # [batch, time, d_model]" if kind == "block" else "inputs, lengths)"
    lines += [
        "```python",
        "import seqzoo",
        "",
        'model = seqzoo.from_pretrained("<this repository>")',
        f"y = model({use}",
    ]
    lines += ["```", "", *_table("option", options)]
    if result is not None:
        lines += ["", "## Run", "", *_table("figure", _figures(result))]
    return "\n".join(lines) + "\n"


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a run measured, and of what."""
    told = ("task", "recipe", "objective", "pretrain", "tuning", "seed", "params", "commit")
    figures = {key: result[key] for key in told if result.get(key) is not None}
    for part in ("val", "test", "tokens_seen"):
        values = result.get(part)
        figures |= {f"{part} {key}": value for key, value in values.items()} if isinstance(values, dict) else {}
    return figures | {key: result[key] for key in ("n_test", "majority") if key in result}


def _table(what: str, values: Mapping[str, Any]) -> list[str]:
    rows = (f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in values.items())
    return [f"| {what} | value |", "|---|---|", *rows]
