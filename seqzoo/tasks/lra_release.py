"""Long Range Arena as it was released: one archive, `lra_release.gz`, of which every task reads a folder.

The archive holds some folders twice, `lra_release/pathfinder128` and `lra_release/lra_release/pathfinder128`; the outer
ones are stale (google-research/long-range-arena, issue 38) and are not read.
"""

from __future__ import annotations

from pathlib import Path


def released_folder(folder: str, data_dir: Path | None, cache_dir: Path) -> Path | None:
    """Where `folder` of the release is, such as "tsv_data" or "pathfinder32/curv_contour_length_14"; None if nowhere.

    Under `data_dir`, on its own or where the archive unpacks to.
    """
    if data_dir is None:
        return None
    for place in (data_dir, data_dir / "lra_release" / "lra_release"):
        if (place / folder).is_dir():
            return place / folder
    return None
