"""Whether this machine can be trusted with training: `python -m seqzoo.doctor`.

What a faulty driver or compiler would take down with it is asked of processes of their own, so that there is an answer.
"""

from __future__ import annotations
