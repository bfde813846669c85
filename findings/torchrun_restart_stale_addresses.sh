#!/usr/bin/env bash
# torch 2.13.0: processes that torchrun starts anew find the addresses of the attempt before in its store.
#
# Expected: after a worker fails, --max-restarts starts all workers again and they meet each other. Seen: torchrun shares
# its own TCPStore with them in every attempt, without a prefix; a worker that is there before its peer reads where the
# peer of the attempt before listened, and its init_process_group fails after 5 seconds. Output: "attempt 1: Connection
# refused", and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "attempt 1: connected".
# Why a user minds: restarts are used up by chance, more of them the slower a machine starts its processes. A store of
# one's own, PrefixStore(TORCHELASTIC_RESTART_COUNT, store), or that variable, is what helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/worker.py" <<'PYTHON'
import os
import time

import torch.distributed as dist

attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
if attempt == 1 and rank == 0:
    time.sleep(4)
try:
    dist.init_process_group("gloo")
except RuntimeError as error:
    print(f"attempt {attempt}: {'Connection refused' if 'Connection refused' in str(error) else error}", flush=True)
    os._exit(1)
dist.barrier()
if attempt == 0:
    os._exit(1)
if rank == 0:
    print(f"attempt {attempt}: connected", flush=True)
PYTHON
cd "$folder"
run() { "$folder/venv/bin/torchrun" --standalone --nproc-per-node=2 --max-restarts=2 worker.py 2>/dev/null; }
shared=$(run)
own=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run)
printf '%s\n' "shared:" "$shared" "its own:" "$own"
grep -q "attempt 1: Connection refused" <<<"$shared"
grep -q "attempt 1: connected" <<<"$own"
