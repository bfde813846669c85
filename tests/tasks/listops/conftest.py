from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def published(real_data) -> list[tuple[str, int]]:
    """1,000 rows that the published generator drew at its defaults: expression and label."""
    path = real_data("listops/lra_generator_1000.tsv") / "listops" / "lra_generator_1000.tsv"
    return [(row[0], int(row[1])) for row in (line.split("\t") for line in path.read_text().splitlines()[1:])]
