import json
import shutil

import pytest

from seqzoo.report import Pretraining, build_report, cells_of, compare, load_results, studies
from seqzoo.report.charts import namer
from seqzoo.study import pack


def compared(folder):
    results, unreadable = load_results([folder])
    assert unreadable == []
    cells, left_out = cells_of(results)
    return compare(cells), left_out


def test_mean_spread_and_difference(write_run, tmp_path):
    for seed, (scratch, pretrained) in enumerate([(0.60, 0.70), (0.62, 0.74), (0.64, 0.78)]):
        write_run(accuracy=scratch, seed=seed)
        write_run(accuracy=pretrained, seed=seed, pretrain=True)
    (comparison,), left_out = compared(tmp_path)
    (row,) = comparison.rows
    assert comparison.pretraining == Pretraining("masked", 2000)
    assert (row.scratch.mean, row.scratch.std, row.scratch.num_seeds) == pytest.approx((0.62, 0.02, 3))
    assert (row.pretrained.mean, row.pretrained.std, row.pretrained.num_seeds) == pytest.approx((0.74, 0.04, 3))
    assert row.difference.mean == pytest.approx(0.12)
    assert left_out == []


def test_one_seed_has_no_spread_and_one_side_no_difference(write_run, tmp_path):
    write_run()
    (comparison,), _ = compared(tmp_path)
    (row,) = comparison.rows
    assert comparison.pretraining is None
    assert (row.scratch.std, row.pretrained, row.difference) == (None, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"task": "lra_image"},
        {"recipe": "tiny"},
        {"causal": True},
        {"token_budget": {"pretrain": 2000, "finetune": 6000}},
        {"n_test": 100},
        {"task_note": "cut to 512 characters"},
    ],
)
def test_other_conditions_are_not_put_side_by_side(write_run, tmp_path, change):
    write_run(accuracy=0.6)
    write_run(accuracy=0.7, pretrain=True, **change)
    comparisons, _ = compared(tmp_path)
    assert sorted((row.scratch is None, row.pretrained is None) for c in comparisons for row in c.rows) == [
        (False, True),
        (True, False),
    ]


def test_a_scratch_cell_stands_beside_every_pretraining(write_run, tmp_path):
    write_run(accuracy=0.6, causal=True)
    write_run(accuracy=0.7, causal=True, pretrain=True)
    write_run(accuracy=0.8, causal=True, pretrain=True, token_budget={"pretrain": 9000, "finetune": 5000})
    write_run(accuracy=0.9, causal=True, pretrain=True, objective="causal")
    comparisons, _ = compared(tmp_path)
    found = {comparison.pretraining: comparison.rows[0].difference.mean for comparison in comparisons}
    assert found == pytest.approx(
        {Pretraining("causal", 2000): 0.3, Pretraining("masked", 2000): 0.1, Pretraining("masked", 9000): 0.2}
    )
    assert [tuple(comparison.pretraining) for comparison in comparisons] == [
        ("causal", 2000),
        ("masked", 2000),
        ("masked", 9000),
    ]


def test_runs_that_are_no_repetitions_are_not_averaged(write_run, tmp_path):
    first, second = write_run(seed=0), write_run(seed=0)
    kept = write_run(accuracy=0.7, seed=0, pretrain=True)
    (comparison,), left_out = compared(tmp_path)
    (row,) = comparison.rows
    assert row.scratch is None
    assert [result.folder for result in row.pretrained.results] == [kept]
    assert [run.folder for run in left_out] == [first, second]
    assert all("same seed (0): their settings differ" in run.reason for run in left_out)


def test_runs_at_several_learning_rates_are_left_out_with_the_rates(write_run, tmp_path):
    for rate in (3e-3, 1e-3):
        write_run(lr={"pretrain": None, "finetune": rate})
        write_run(pretrain=True, lr={"pretrain": 10 * rate, "finetune": 1e-3})
    comparisons, left_out = compared(tmp_path)
    assert not comparisons
    assert {run.reason.partition("(0): ")[2] for run in left_out} == {
        "learning rates of fine-tuning 0.001, 0.003",
        "learning rates of pretraining 0.01, 0.03",
    }


def test_sizes_do_not_mix(write_run, tmp_path):
    for params, accuracy in ((1_000_000, 0.6), (2_000_000, 0.8)):
        write_run(params=params, accuracy=accuracy)
    write_run(params=2_000_000, accuracy=0.9, pretrain=True)
    (comparison,), left_out = compared(tmp_path)
    assert left_out == []
    assert [(row.size.params, row.scratch.mean, row.pretrained is None) for row in comparison.rows] == [
        (1_000_000, 0.6, True),
        (2_000_000, 0.8, False),
    ]


@pytest.mark.parametrize("other", [{"precision": "bf16"}, {"optimizer": "muon 2"}])
def test_precisions_and_optimizers_do_not_mix(write_run, tmp_path, other):
    ((name, value),) = other.items()
    write_run(accuracy=0.6)
    write_run(accuracy=0.7, pretrain=True)
    write_run(accuracy=0.8, pretrain=True, **other)
    comparisons, left_out = compared(tmp_path)
    assert left_out == []
    found = {getattr(comparison.conditions, name): comparison.rows[0] for comparison in comparisons}
    assert found.pop(value).scratch is None
    (usual,) = found.values()
    assert usual.difference.mean == pytest.approx(0.1)
    report = build_report(comparisons, [])
    titles = {table.title.split("; ")[0] for table in report.tables}
    assert titles == {"lra_text: recipe short", f"lra_text: recipe short, {value}"}
    assert "In fp32 where no precision is named, with AdamW where no optimizer is." in report.notes


@pytest.mark.parametrize("variant", [{"train_fraction": 0.1}, {"tuning": "head"}, {"init": "random"}])
def test_variants_stand_alone_and_last(write_run, tmp_path, variant):
    write_run(accuracy=0.6)
    write_run(accuracy=0.7, pretrain=True, **variant)
    plain, varied = compared(tmp_path)[0]
    assert (plain.conditions.plain, varied.conditions.plain) == (True, False)
    assert (plain.rows[0].pretrained, varied.rows[0].scratch) == (None, None)


def test_scratch_of_the_same_total_stands_beside_the_pretrained(write_run, tmp_path):
    write_run(budgets=(2000, 5000), accuracy=0.7)
    write_run(budgets=(0, 5000), accuracy=0.6)
    write_run(budgets=(0, 7000), accuracy=0.65)
    write_run(budgets=(0, 7000), accuracy=0.1, recipe="tiny")
    short, tiny = compared(tmp_path)[0]
    (row,) = short.rows
    assert (row.scratch.mean, row.matched.mean, row.pretrained.mean) == (0.6, 0.65, 0.7)
    assert (row.difference.mean, row.gain.mean) == pytest.approx((0.1, 0.05))
    assert row.gain.interval.low < 0.05 < row.gain.interval.high
    assert [row.matched for row in tiny.rows] == [None]


def test_order_is_the_benchmarks_then_alphabetical(write_run, tmp_path):
    for task in ("own_task", "lra_pathx", "lra_image", "lra_listops"):
        write_run(task=task, model="lru")
        write_run(task=task, model="gau", token_budget={"finetune": 900})
        write_run(task=task, model="gau")
    comparisons, _ = compared(tmp_path)
    assert [
        (c.conditions.task, c.conditions.finetune_budget, [row.size.model for row in c.rows]) for c in comparisons
    ] == [
        (task, budget, models)
        for task in ("lra_listops", "lra_image", "lra_pathx", "own_task")
        for budget, models in ((900, ["gau"]), (5000, ["gau", "lru"]))
    ]


def configured(folder, **settings):
    """Gives a run a configuration of these sections, of which it takes its seed."""
    seed = json.loads((folder / "result.json").read_text())["seed"]
    lines = [f"seed: {seed}", *(f"{name}: {json.dumps(value)}" for name, value in settings.items())]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_runs_that_differ_in_more_than_the_seed_are_no_cell(write_run, tmp_path, packed):
    usual = {"model": {"dropout": 0.0}, "finetuning": {"lr": 1e-3, "batch_size": 8}, "budget": None}
    for seed, settings in enumerate((usual, {**usual, "finetuning": {"lr": 1e-3, "batch_size": 2}})):
        configured(write_run(seed=seed), **settings)
        configured(write_run(model="lru", seed=seed), **usual)
    place = tmp_path
    if packed:
        place = tmp_path / "study.jsonl"
        pack(sorted((tmp_path / "runs").iterdir()), place)
    (comparison,), left_out = compared(place)
    assert [(row.size.model, row.scratch.num_seeds) for row in comparison.rows] == [("lru", 2)]
    assert [one.reason for one in left_out] == [
        "runs of its cell differ in more than the seed: finetuning.batch_size 2, 8"
    ] * 2


def test_what_does_not_shape_a_run_may_differ_between_seeds(write_run, tmp_path):
    """So may what only one of them has, the other being older, and what would shape a pretraining if there were one."""
    usual = {"finetuning": {"lr": 1e-3}, "tuning": "full", "lora": {"rank": 8}}
    configured(write_run(seed=0), **usual, budget=None, pretraining={"lr": 1e-3}, task={"workers": 0})
    configured(write_run(seed=1), **usual, budget="8h", pretraining={"lr": 2e-3}, task={"workers": 4}, share=0)
    configured(write_run(seed=2), finetuning={"lr": 1e-3, "clip": 1.0}, lora={"rank": 16}, compile=True)
    (comparison,), left_out = compared(tmp_path)
    assert (comparison.rows[0].scratch.num_seeds, left_out) == (3, [])


@pytest.mark.parametrize(
    ("shared", "settings", "reason"),
    [
        ({"objective": "joint", "joint": {"weight": 1.0, "passes": 1}}, {"pixel_loss": "mse"}, "pixel_loss l1, mse"),
        ({"pretrain": True}, {"pretraining": {"lr": 2e-3}}, "pretraining.lr 0.001, 0.002"),
        ({}, {"lr": "search", "search": {"rates": [1e-4]}}, "search.rates [0.0001], [0.001]"),
        ({}, {"joint": {"weight": 2.0}}, None),
        ({}, {"lr": None, "search": {"rates": [1e-4]}}, None),
    ],
)
def test_a_setting_tells_runs_apart_where_it_has_an_effect(write_run, tmp_path, shared, settings, reason):
    usual = {
        **{"pretrain": False, "objective": "masked", "pixel_loss": "l1", "joint": {"weight": 1.0}},
        **{"pretraining": {"lr": 1e-3}, "search": {"rates": [1e-3]}, "lr": settings.get("lr"), **shared},
    }
    for seed, changes in enumerate(({}, settings)):
        configured(write_run(seed=seed, **shared), **{**usual, **changes})
    left_out = compared(tmp_path)[1]
    told = reason and f"runs of its cell differ in more than the seed: {reason}"
    assert [one.reason for one in left_out] == ([told] * 2 if told else [])


@pytest.mark.parametrize("found", [True, False])
def test_fine_tunings_of_unlike_pretrainings_are_no_cell(write_run, tmp_path, found):
    """Where the pretraining's run is not there, its rate, which results have, still tells."""
    for seed, lr in enumerate((1e-3, 2e-3)):
        source = write_run(model="source", pretrain=True, seed=seed)
        configured(source, pretrain=True, pretraining={"lr": lr})
        tuned = write_run(pretrain=True, seed=seed, pretrain_run=source.name, lr={"pretrain": lr, "finetune": 1e-3})
        configured(tuned, pretrain=str(source), pretraining={"lr": 5e-4})
        if not found:
            shutil.rmtree(source)
    reasons = {one.folder.name: one.reason for one in compared(tmp_path)[1]}
    assert reasons[tuned.name] == "runs of its cell differ in more than the seed: pretraining.lr 0.001, 0.002"


def test_runs_on_other_data_are_no_cell(write_run, tmp_path):
    for seed, digest in enumerate(("aaaaaaaa01", "bbbbbbbb01")):
        (configured(write_run(seed=seed)) / "task.json").write_text(json.dumps({"data": {"sha256": digest}}))
    (reason,) = {one.reason for one in compared(tmp_path)[1]}
    assert reason == "runs of its cell differ in more than the seed: data, by SHA-256 aaaaaaaa, bbbbbbbb"


def test_a_gain_names_what_else_its_sides_differ_in(write_run, tmp_path):
    usual = {"objective": "masked", "augment": False, "model": {"dropout": 0.0}}
    for model, lr in (("lru", 1e-3), ("transformer", 1e-2)):
        stage = {"lr": 1e-3, "tokens": 5000}
        configured(write_run(model=model), pretrain=False, finetuning=stage, **usual)
        tuned = configured(write_run(model=model, pretrain=True), pretrain=True, **usual)
        configured(tuned, pretrain=True, finetuning={**stage, "lr": lr, "tokens": 3000}, pretraining={"lr": 2}, **usual)
    (comparison,), _ = compared(tmp_path)
    assert [row.difference.unlike for row in comparison.rows] == [None, "finetuning.lr 0.001, 0.01"]
    report = build_report([comparison], [])
    place = report.tables[0].header.index("difference")
    assert ["§" in row[place] for row in report.tables[0].rows] == [False, True]
    assert "§ The two sides differ in other settings, too. transformer: finetuning.lr 0.001, 0.01." in report.notes


def test_fine_tunings_of_one_pretraining_are_no_seeds_of_it(write_run, tmp_path):
    source = None  # the first has its own
    for seed, accuracy in enumerate((0.70, 0.71, 0.72)):
        run = write_run(pretrain=True, seed=seed, accuracy=accuracy, pretrain_run=source)
        source = source or run.name
        write_run(model="lru", pretrain=True, seed=seed, accuracy=accuracy, pretrain_run=f"source-{seed}")
        write_run(seed=seed, accuracy=accuracy - 0.3)
        write_run(model="lru", seed=seed, accuracy=accuracy - 0.3)
    (comparison,), _ = compared(tmp_path)
    lru, transformer = comparison.rows
    assert (lru.pretrained.interval.kind, lru.difference.interval.kind) == ("t", "t")
    assert (transformer.pretrained.interval.kind, transformer.difference.interval.kind) == ("binomial", "binomial")
    report = build_report([comparison], [])
    assert [row[3] for row in report.tables[0].rows] == ["71.00 ± 1.00 (3)", "71.00 ± 1.00 (3) ‡"]
    assert any(note.startswith("‡ Seeds of fine-tuning alone") for note in report.notes)


def test_precisions_of_two_stages_are_a_setting_of_their_own(write_run, tmp_path):
    write_run(seed=0, pretrain=True)
    write_run(seed=1, pretrain=True, precision="fp32 after bf16")
    comparisons, _ = compared(tmp_path)
    assert [comparison.conditions.setting for comparison in comparisons] == ["short", "short, fp32 after bf16"]


def test_sizes_that_would_look_alike_are_told_apart(write_run, tmp_path):
    for params, accuracy in ((107_394, 0.6), (107_426, 0.7)):
        write_run(params=params, accuracy=accuracy)
        write_run(params=params, accuracy=accuracy, pretrain=True)
    (comparison,), _ = compared(tmp_path)
    assert [row[1] for row in build_report([comparison], []).tables[0].rows] == ["0.107394", "0.107426"]
    cells = [cell for row in comparison.rows for cell in row.cells]
    assert {*map(namer(cells), cells)} == {"transformer 107,394", "transformer 107,426"}
    assert studies.model_size(cells) is None, "some parameters more are no other size"
