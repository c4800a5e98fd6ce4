"""Background reads: order, bound, errors at the right step, a clean end."""

import threading
import time
from functools import partial

import pytest

from h2t.cache.read.prefetch import Meter, in_background


def value(k):
    return k


def test_no_jobs():
    assert list(in_background([])) == []


def test_results_come_in_order():
    def slow(k):
        time.sleep(0.002 * (k % 3))
        return k

    assert list(in_background(partial(slow, k) for k in range(20))) == list(range(20))


def test_at_most_two_results_exist():
    started, used = [], []

    def job(k):
        started.append(k)
        return k

    for k in in_background(partial(job, k) for k in range(10)):
        time.sleep(0.005)  # time enough for a job too many to start
        used.append(k)
        assert len(started) <= len(used) + 1


def test_an_error_is_raised_in_place_of_its_result():
    def job(k):
        if k == 2:
            raise OSError("disk gone")
        return k

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for k in in_background(partial(job, k) for k in range(5)):
            seen.append(k)  # noqa: PERF402 - what was seen before the error is the point
    assert seen == [0, 1]


def test_closing_early_leaves_no_thread_and_starts_nothing_more():
    before = threading.active_count()
    started = []

    def job(k):
        started.append(k)
        return k

    results = in_background(partial(job, k) for k in range(100))
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
    assert len(started) <= 2


def test_an_interrupt_in_the_loop_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        for _ in in_background(partial(value, k) for k in range(10)):
            raise KeyboardInterrupt
    assert threading.active_count() == before


def test_the_meter_tells_waiting_from_working():
    def late():
        time.sleep(0.05)

    waiting = Meter()
    list(in_background([late, late], meter=waiting))
    assert waiting.waited > 0.08
    assert waiting.stall > 0.5

    working, first = Meter(), 0.0
    for _ in in_background([partial(value, k) for k in range(3)], meter=working):
        first = first or working.waited  # until the thread had started, as long as that takes on a busy machine
        time.sleep(0.02 + first)
    assert working.worked > 0.05 + 3 * first
    assert working.stall < 0.5


def test_a_fresh_meter_has_nothing_to_say():
    assert Meter().stall == 0
    assert Meter().hit_rate is None
    assert Meter(draws=4, hits=1).hit_rate == 0.25
