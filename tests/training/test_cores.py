import time

import pytest

from seqzoo.training import cores
from seqzoo.training.cores import Cores, cpu_share


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """Writes what the scheduler has counted of each thread, in nanoseconds."""
    monkeypatch.setattr(cores, "TASKS", tmp_path)

    def write(**counts):
        for name, (ran, waited) in counts.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "schedstat").write_text(f"{ran} {waited} 7\n")

    return write


def test_what_threads_ran_and_waited_is_summed(threads):
    threads(one=(5 * 10**9, 10**9), two=(0, 0))
    clock = Cores()
    threads(one=(7 * 10**9, 2 * 10**9), two=(10**9, 0), three=(5 * 10**8, 0))
    assert clock.lap() == (3.5, 1.0)
    assert clock.lap() == (0.0, 0.0)


def test_a_thread_that_has_ended_counts_no_more(threads, tmp_path):
    threads(one=(10**9, 0), two=(10**9, 10**9))
    clock = Cores()
    (tmp_path / "two" / "schedstat").unlink()
    threads(one=(2 * 10**9, 0))
    assert clock.lap() == (1.0, 0.0)


def test_nobody_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "TASKS", tmp_path / "nowhere")
    assert cpu_share(*Cores().lap()) is None


def test_the_share():
    assert cpu_share(3.0, 1.0) == 0.75
    assert cpu_share(2.0, 0.0) == 1.0


def test_work_of_this_process_is_seen():
    clock = Cores()
    if not clock.before:
        pytest.skip("this kernel does not count how long threads run")
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    ran, waited = clock.lap()
    assert ran >= 0.03
    assert waited >= 0
