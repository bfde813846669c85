"""What the README and docs/ say: their Python runs, their links lead somewhere, their tables hold."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from registries import forgotten_afterwards

from seqzoo import BLOCKS, Block, build_block, kernels
from seqzoo.config import available

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
SAMPLES = [
    pytest.param(sample, id=f"{page.name}-{number}")
    for page in PAGES
    for number, sample in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("sample", SAMPLES)
def test_sample(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    names: dict = {}
    with forgotten_afterwards():
        exec(sample, names)
    if "result" in names:
        assert names["result"]["test"]["accuracy"] > 0.6
        assert (tmp_path / names["result"]["folder"] / "result.json").exists()


def test_the_commands_name_what_exists():
    for group in ("model", "task", "recipe", "study"):
        for values in re.findall(rf"^    python train.py(?! plugins=).*\b{group}=([\w,]+)", TEXT, re.MULTILINE):
            assert set(values.split(",")) <= set(available(group))
    for group in ("model", "task", "recipe"):
        listed = "".join(line for line in TEXT.splitlines() if line.startswith(f"| `{group}=`"))
        assert all(f"`{name}`" in listed for name in available(group))


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), target


def without_code(text: str) -> str:
    return re.sub(r"(?s:```.*?```)|`[^`\n]*`|^    .*$", "", text, flags=re.MULTILINE)


def headings(page: Path) -> list[str]:
    """The anchors of a page's headings, as forges make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_page_is_reached_from_the_readme():
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)\s#]+)", README.read_text()))


def table(page: Path, first: str) -> list[list[str]]:
    """The cells of each row of the one table of `page` whose first column has the heading `first`."""
    (rows,) = re.findall(rf"^\| {first} \|.*\n\|[-:|]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]


def numbers_kept(block: Block, steps: int) -> int:
    """In the state of one sequence after so many steps, counts aside; what it begins with if it does not grow."""
    begun = block.initial_state(1)
    _, state = block.extend(torch.randn(1, steps, block.d_model), begun)
    kept = [name for name in begun._fields if name not in ("position", "written")]
    before, after = (sum(getattr(each, name).numel() for name in kept) for each in (begun, state))
    assert before in (0, after)
    return after


def test_the_table_of_blocks_holds():
    rows = table(README, "name")
    assert [row[0].strip("`") for row in rows] == list(BLOCKS)
    for name, kind, _, options, directions, about, state, at_64 in rows:
        name, steps = name.strip("`"), 7
        parameters = inspect.signature(BLOCKS[name]).parameters
        assert kind == f"`{BLOCKS[name].__name__}`"
        assert directions == "both"
        for option, default in re.findall(r"`(\w+)=(.*?)`", options):
            assert parameters[option].default == eval(default)
        with torch.device("meta"):
            large = build_block(name, d_model=8192, causal=True)
        count = sum(parameter.numel() for parameter in large.parameters())
        assert count == pytest.approx(evaluate(about.strip("`"), d=8192), rel=0.02)
        for d in (64, 96):
            build_block(name, d_model=d)
            block = build_block(name, d_model=d, causal=True)
            formula, each = re.fullmatch(r"`(.*)`( a step)?", state).groups()
            numbers = evaluate(formula, d=d, num_features=getattr(block, "num_features", None))
            assert numbers_kept(block, steps) == numbers * (steps if each else 1)
            if d == 64:
                assert at_64 == f"{numbers:,}{each or ''}"


def test_the_formulas_of_states_hold():
    options = {
        "softmax_attention": {"num_heads": 4, "num_kv_heads": 2},
        "linear_attention": {"num_heads": 2, "normalize": False},
        "performer": {"num_heads": 2, "num_features": 24},
        "vq_attention": {"num_heads": 2, "expand": 1, "codebook_size": 12, "block_len": 5},
        "gau": {"expand": 1, "key_dim": 24, "chunk_len": 5},
        "lru": {"state_dim": 10},
        "s4d": {"state_dim": 6},
        "conv": {"width": 8},
        "retnet": {"num_heads": 2, "expand": 1.5},
        "mamba2": {"num_heads": 4, "state_dim": 6, "num_groups": 2, "expand": 1.5, "conv_width": 3},
        "mamba3": {"num_heads": 4, "state_dim": 6, "expand": 1.5},
        "mamba": {"state_dim": 6, "expand": 1.5, "conv_width": 3},
        "gla": {"num_heads": 2},
        "hgrn2": {"num_heads": 2},
        "mlstm": {"num_heads": 2, "expand": 1.5, "conv_width": 3},
        "rg_lru": {"state_dim": 12, "conv_width": 3},
        "min_gru": {"expand": 1.5},
        "s5": {"state_dim": 24},
        "delta_net": {"num_heads": 2, "conv_width": 3},
        "gated_delta_net": {"num_heads": 2, "expand_k": 0.5, "expand": 1.25, "conv_width": 3},
        "kda": {"num_heads": 2, "conv_width": 3},
        "rwkv7": {"num_heads": 2},
    }
    rows = table(ROOT / "docs" / "blocks.md", "block")
    assert {re.match(r"`(\w+)`", row[0])[1] for row in rows} == set(BLOCKS)
    for title, state in rows:
        name = re.match(r"`(\w+)`", title)[1]
        given = options[name] | ({"attention": "softmax"} if "any other" in title else {})
        known = {"d_model": 32, "T": 7, "H": given.get("num_heads"), "D": 32 // given.get("num_heads", 32), **given}
        formula, *more = re.findall(r"`([^`]*[*][^`]*)`", state)
        assert numbers_kept(build_block(name, d_model=32, causal=True, **given), 7) == evaluate(formula, **known)
        for extra in more:  # of the block's `normalize`
            block = build_block(name, d_model=32, causal=True, **given | {"normalize": True})
            assert numbers_kept(block, 7) == evaluate(formula, **known) + evaluate(extra, **known)


def test_the_table_of_originals_is_what_was_recorded():
    worst: dict[tuple[str, str, str], float] = {}
    for row in json.loads((ROOT / "results" / "parity.json").read_text())["rows"]:
        key = row["original"], row["version"], f"`{row['block']}`"
        worst[key] = max(worst.get(key, 0.0), row["error"])
    assert table(ROOT / "docs" / "blocks.md", "original") == [[*key, f"{error:.0e}"] for key, error in worst.items()]


def evaluate(formula: str, **names: object) -> int:
    return int(eval(formula.replace("²", "**2").replace("·", "*"), {}, names))


def test_the_table_of_operations_holds():
    operations = [name for name in kernels.__all__ if name.islower() and name != "nearest_code"]
    assert sorted(row[0].strip("`") for row in table(README, "operation")) == sorted(operations)


def test_promises_name_tests_that_there_are():
    sources = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    slow = {
        name
        for source in sources
        for marks, name in re.findall(r"((?:^@.*\n(?:^[ \])].*\n)*)+)^def (test_\w+)", source, re.MULTILINE)
        if "@pytest.mark.slow\n" in marks
    }
    page = (ROOT / "docs" / "promises.md").read_text()
    named = re.findall(r"(\*?)`(test_\w+)`", page)
    assert {name for _, name in named} <= defined
    assert {name for italic, name in named if italic} == {name for _, name in named if name in slow}
    rows = [row for row in re.findall(r"^\| .*", page, re.MULTILINE) if "shown by" not in row]
    assert len(rows) > 20
    assert all("`test_" in row for row in rows)
