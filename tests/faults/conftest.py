from __future__ import annotations

from tiny_runs import one_thread as one_thread
from tiny_runs import task as task
