"""Ctrl-C ends a command soon, wherever it meets it. What is left then is what a kill would leave."""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

STOPPED = 130  # the usual exit code after Ctrl-C
LINE = "interrupted; run the same command again to resume\n"
PATIENCE = 2.0  # seconds for an orderly end; threads that wait for a silent store would take 30 and more


@contextmanager
def interrupts_end_it() -> Iterator[None]:
    """While this lasts, Ctrl-C raises KeyboardInterrupt; `PATIENCE` later it ends the process with exit code 130.

    Python must be reached for that: a running computation of torch is finished first. The second holds where no one
    else handles SIGINT (nohup ignores it) or uses the timer behind SIGALRM.
    """
    with _interrupts_are_heard():
        ours = threading.current_thread() is threading.main_thread()
        heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not ours or not heard or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGALRM, _too_late)  # before SIGINT and removed after it: without it the alarm kills
        signal.signal(signal.SIGINT, _interrupted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


def say_so() -> None:
    """Prints the line of an orderly end, which came in time; another Ctrl-C is ignored from here on."""
    if signal.getsignal(signal.SIGALRM) is _too_late:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
    click.echo(LINE, nl=False, err=True)


def end() -> None:
    """Ends the process without waiting for its threads: one that Python lost would never end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(STOPPED)


def _interrupted(number: int, frame: Any) -> None:
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    signal.default_int_handler(number, frame)


def _too_late(_number: int, _frame: Any) -> None:
    with suppress(OSError):  # no stderr
        os.write(2, LINE.encode())
    end()


@contextmanager
def _interrupts_are_heard() -> Iterator[None]:
    """Repeats a Ctrl-C that hits a callback, because there Python prints the exception and goes on."""
    others = sys.unraisablehook

    def once_more() -> None:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # also wakes the main thread from a sleep

    def hook(met: Any) -> None:
        if met.exc_type is KeyboardInterrupt:
            _thread.start_new_thread(once_more, ())
        else:
            others(met)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others
