import json
import shutil

import pytest

from seqzoo.report import load_results, read_result
from seqzoo.study import pack


def test_reads_every_field(write_run):
    result = read_result(write_run(accuracy=0.75, pretrain=True, seed=3, task_note="cut"))
    assert (result.model, result.task, result.recipe, result.seed) == ("transformer", "lra_text", "short", 3)
    assert (result.pretraining, result.finetune_budget) == (("masked", 2000), 5000)
    assert (result.score, result.majority, result.n_test, result.task_note) == (0.75, 0.5, 400, "cut")


def test_language_modelling_is_scored_in_bits(write_run):
    result = read_result(write_run(accuracy=0.4, bits=2.5))
    assert (result.metric, result.score) == ("bits_per_character", 2.5)
    assert read_result(write_run()).metric == "accuracy"


def test_a_scratch_run_has_no_pretraining(write_run):
    result = read_result(write_run(objective="causal", causal=True))
    assert result.pretraining is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2; this version reads schema 1"),
        ({"seed": "0"}, "seed is '0', not int"),
        ({"seed": True}, "seed is True, not int"),
        ({"objective": "both"}, "objective is 'both'"),
        ({"test": {"loss": 1.0}}, "no test.accuracy"),
        ({"test": None}, "no test.accuracy"),
        ({"test": {"accuracy": 61.2}}, "test.accuracy is 61.2, outside"),
        ({"test": {"accuracy": float("nan")}}, "test.accuracy is nan, not float or int"),
        ({"test": {"bits_per_character": float("nan")}}, "bits_per_character is nan, not float or int"),
        ({"train_fraction": 5}, "train_fraction is 5, outside"),
        ({"train_fraction": 0}, "train_fraction is 0, outside"),
        ({"n_test": 0}, "n_test is 0, not 1 or more"),
        ({"tuning": None}, "tuning is None, not str"),
        ({"mfu": {"finetune": "fast"}}, "mfu.finetune is 'fast', not float or int or null"),
        ({"token_budget": {"finetune": 1.5}}, "token_budget.finetune is 1.5, not int"),
    ],
)
def test_says_what_is_wrong(tmp_path, record, change, message):
    (tmp_path / "result.json").write_text(json.dumps(record(**change)))
    with pytest.raises(ValueError, match=message):
        read_result(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_says_that_it_cannot_be_read(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"result\.json"):
        read_result(tmp_path)


def test_one_bad_run_does_not_cost_the_others(tmp_path, write_run):
    good = write_run()
    runs = good.parent
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    (runs / "unfinished" / "finetune").mkdir(parents=True)
    (runs / "unfinished" / "config.yaml").write_text("")
    (runs / "empty").mkdir()
    results, left_out = load_results([tmp_path])
    assert [result.folder for result in results] == [good]
    assert [(run.folder.name, run.reason.split(":")[0]) for run in left_out] == [
        ("broken", "result.json cannot be read"),
        ("empty", "no result.json"),
        ("unfinished", "no result.json"),
    ]


def test_an_older_file_is_of_the_plain_variant(write_run):
    result = read_result(write_run())
    assert (result.train_fraction, result.tuning, result.init) == (1.0, "full", "structured")
    assert (result.trained_params, result.speed, result.utilisation) == (result.params, None, None)


def test_reads_what_newer_files_have(write_run):
    result = read_result(
        write_run(
            train_fraction=0.05,
            tuning="lora",
            init="random",
            trained_params=900,
            mfu={"pretrain": None, "finetune": 0.25},
            tokens_per_second={"pretrain": 0.0, "finetune": 1234.5},
            budgets=(3000, 5000),
        )
    )
    assert (result.train_fraction, result.tuning, result.init) == (0.05, "lora", "random")
    assert (result.trained_params, result.speed, result.utilisation) == (900, 1234.5, 0.25)
    assert (result.total_budget, result.pretrain_tokens, result.epochs) == (8000, 3000, ())


def test_precision_is_that_of_the_configuration_where_the_result_has_none(write_run):
    assert read_result(write_run(precision="bf16")).precision == "bf16"
    older = write_run()
    assert read_result(older).precision == "fp32"
    (older / "config.yaml").write_text("recipe: short\nprecision: bf16\n")
    assert read_result(older).precision == "bf16"
    (older / "config.yaml").write_text("!!tag of: another\n")
    assert read_result(older).precision == "fp32"


def test_the_share_of_cores_of_each_stage(write_run):
    older, newer = write_run(), write_run(pretrain=True, cpu_share={"pretrain": 0.85, "finetune": 0.99})
    on_a_gpu = write_run(cpu_share={"pretrain": None, "finetune": None})
    assert read_result(newer).cpu_shares == {"pretrain": 0.85, "finetune": 0.99}
    assert read_result(newer).undisturbed("finetune")
    assert not read_result(newer).undisturbed("pretrain", "finetune")
    assert read_result(older).cpu_shares == read_result(on_a_gpu).cpu_shares == {}
    assert read_result(older).undisturbed("finetune")


def test_a_run_given_twice_counts_once(write_run):
    folder = write_run()
    results, left_out = load_results([folder, folder.parent, folder.parent / ".." / "runs"])
    assert [result.folder for result in results] == [folder]
    assert left_out == []


def test_a_run_and_its_copies_count_once(write_run, tmp_path):
    folder = write_run()
    study = tmp_path / "study.jsonl"
    pack([folder], study)
    copies = shutil.copytree(tmp_path / "runs", tmp_path / "copies")
    results, left_out = load_results([study, folder, copies])
    assert ([result.folder for result in results], left_out) == ([folder], [])
    changed = json.loads((copies / folder.name / "result.json").read_text()) | {"seed": 1}
    (copies / folder.name / "result.json").write_text(json.dumps(changed))
    assert [result.seed for result in load_results([study, copies])[0]] == [0, 1], "another run of that name"


def test_links_to_folders_above_are_not_followed(write_run):
    folder = write_run()
    for name in ("here", "there"):
        (folder.parent / name).symlink_to(".", target_is_directory=True)
    results, left_out = load_results([folder.parent])
    assert ([result.folder for result in results], left_out) == ([folder], [])
