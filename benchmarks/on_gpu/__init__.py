"""The rooms of `benchmarks/gpu.py`: what to check and to time, the processes that do it, and what follows from it.

    workers.py  log.py    processes that may die of a task · rows of JSON, on disk before the next one is begun
    card.py               versions, sources, ceilings
    case.py  cases.py     a call whose answer is known · those that are checked
    bounds.py             how far from the answer a right kernel may lie
    checks.py             a case, run and judged
    shapes.py  peers.py   what is timed · other people's kernels
    timing.py  bench.py   how · rows of times
    tables.py  sweep.py   the tables of block sizes · others beside them
    memcheck.py           one call, for a tool to look over
    canary.py             what compilers were wrong about
    summary.py  apply.py  the table · what "auto" goes by from now on

The first two and `summary.py` import no PyTorch.
"""
