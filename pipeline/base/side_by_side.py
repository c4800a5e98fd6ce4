"""Runs jobs side by side on this machine, each in a new process."""

import copy
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.lost_threads import lost_threads_end_it

T = TypeVar("T")


def side_by_side(jobs: Sequence[Callable[[], T]], setting: str) -> list[T]:
    """The results of `jobs`, in order. Jobs and results are pickled, so large results should go through files.

    If a job raises an exception, the others are killed and it is raised here. The same holds for Ctrl-C, which only
    this process hears. If a process is killed, UserError names `setting`, the parameter that asks for them. No process
    outlives this one, however it ends.
    """
    # Not a ProcessPoolExecutor: it may miss that a process was killed which it started after others.
    context = get_context("spawn")
    children: list[BaseProcess] = []
    running: dict[Any, int] = {}  # the end of a pipe where the result of a job arrives -> the job's number
    results: dict[int, T] = {}
    try:
        for number, job in enumerate(jobs):
            answer, to_answer = context.Pipe(duplex=False)
            child = context.Process(target=_work, args=(job, to_answer))
            with _interrupts_held():
                child.start()
                children.append(child)
            to_answer.close()  # now its other end is closed once the process has ended
            running[answer] = number
        while running:
            for ready in wait(list(running)):
                results[running.pop(ready)] = _received(ready, len(jobs), setting)
        return [results[number] for number in range(len(jobs))]
    finally:
        for started in children:
            started.kill()
        for started in children:
            started.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block. Processes that are started in it never hear it."""
    resource_tracker.ensure_running()  # it would start with the first process, and then let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _received(answer: Any, processes: int, setting: str) -> Any:
    """The result that a process sends. Raises what its job raised, or UserError if it was killed."""
    try:
        result, error = answer.recv()
    except EOFError:
        raise UserError(
            f"{setting}: one of {processes} processes was killed, perhaps for lack of memory; run the same command "
            f"again to resume, or lower {setting}"
        ) from None
    if error is not None:
        raise error
    return result


def _work(job: Callable[[], Any], answer: Connection) -> None:
    """What a new process does. It ends as soon as its parent has ended."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        with lost_threads_end_it():
            answer.send((job(), None))
    except Exception as error:  # noqa: BLE001 - raised again in the parent
        answer.send((None, _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note; in words if it cannot be pickled.

    What one line can say is said here, as the frames that tell a plug-in's errors are not sent.
    """
    error = plugins.for_people(error) or error
    error.add_note(traceback.format_exc())
    try:
        pickle.dumps(error)
        copy.copy(error)  # made anew from its arguments, as the parent will make it
    except Exception:  # noqa: BLE001
        return RuntimeError(traceback.format_exc())
    return error
