from __future__ import annotations

from pathlib import Path

from seqzoo.training.run_folder import read_config, run_name

RESULTS = Path(__file__).resolve().parents[2] / "results"


def test_measured_runs_keep_their_names():
    folders = [path.parent for path in RESULTS.rglob("config.yaml")]
    assert len(folders) > 100
    for folder in folders:
        assert run_name(read_config(folder)) == folder.name
