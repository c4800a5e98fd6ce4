"""A thread that is lost ends its process, as whoever waits for what it computes would wait forever.

Python raises what a thread raised where its result is asked for. It cannot if memory ends in the first steps of a
thread, or while the result is handed over: then it prints a traceback, and the others wait.
"""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

LINE = "error: memory: a thread found none and was lost; raise the limit or close other programs, then run again\n"


@contextmanager
def lost_threads_end_it() -> Iterator[None]:
    """While this lasts, a lost thread ends the process with one line and exit code 1, and leaves what a kill would."""
    unraisable, raised = sys.unraisablehook, threading.excepthook
    pools = logging.getLogger("concurrent.futures")

    def at_its_start(met: Any) -> None:
        if "_bootstrap" in getattr(met.object, "__name__", "") or "thread started by" in (met.err_msg or ""):
            _end(met.exc_value)
        unraisable(met)

    def in_a_pool(record: logging.LogRecord) -> bool:
        if record.msg == "Exception in worker" and record.exc_info:  # beside its task, whose errors are raised
            _end(record.exc_info[1])
        return True

    def in_another(met: Any) -> None:
        if issubclass(met.exc_type, MemoryError):
            _end(met.exc_value)
        raised(met)

    sys.unraisablehook, threading.excepthook = at_its_start, in_another
    pools.addFilter(in_a_pool)
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = unraisable, raised
        pools.removeFilter(in_a_pool)


def _end(error: BaseException | None) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    cause = error
    while cause is not None and not isinstance(cause, MemoryError):
        cause = cause.__context__
    if cause is None:  # a bug
        traceback.print_exception(error)
    else:
        os.write(2, LINE.encode())
    os._exit(1)  # an orderly end would wait for the threads that wait for the lost one
