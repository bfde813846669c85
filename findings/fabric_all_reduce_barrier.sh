#!/usr/bin/env bash
# lightning-fabric 2.6.6: Fabric.all_reduce is two collectives, a barrier and then the reduction, in every call.
#
# Expected: one all_reduce. Seen: torch.distributed.barrier is called before each one. Output: "calls: ['barrier',
# 'all_reduce']".
# Why a user minds: a barrier makes the host wait for a GPU, so that a figure reduced at every step stops the training loop
# from running ahead; torch.distributed.all_reduce on the tensor does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 lightning-fabric==2.6.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
fabric = Fabric(accelerator="cpu", devices=1, strategy=DDPStrategy(process_group_backend="gloo"))
fabric.launch()
calls = []
for name in ("barrier", "all_reduce"):
    real = getattr(torch.distributed, name)

    def counted(*arguments, name=name, real=real, **options):
        calls.append(name)
        return real(*arguments, **options)

    setattr(torch.distributed, name, counted)
fabric.all_reduce(torch.ones(1), reduce_op="sum")
print("calls:", calls)
assert calls == ["barrier", "all_reduce"], "a reduction is one collective now"
PYTHON
