"""Scripts in several processes."""

import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def torchrun(script: str, folder: Path, *arguments: str, processes: int = 2, restarts: int = 0) -> dict[str, Any]:
    """What `subprocess.run` or `Popen` runs `script` in some processes by, which is written into `folder`."""
    path = folder / "script.py"
    path.write_text(script)
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return {
        "args": [sys.executable, "-m", "torch.distributed.run", *options, str(path), *arguments],
        "env": {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
    }
