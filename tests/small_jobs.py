"""Jobs for other processes, which import this file and so not torch."""

import os
import signal
import threading
import time

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.progress import progress


def forever():
    time.sleep(600)


def forever_aloud():
    print(os.getpid(), flush=True)  # noqa: T201
    forever()


def fails():
    raise UserError("x: must be 1; got 2; set it to 1")


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def breaks():
    raise Unsendable("a", "b")


def bug():
    return {}["key"]


def holds_interrupts():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def is_killed_with_a_bar():
    for _ in progress(range(3), "bar", unit="step"):
        os.kill(os.getpid(), signal.SIGKILL)


def loses_a_thread():
    threading.Thread(target=bytearray, args=(2**62,)).start()
    forever()


def uses_a_plugin():
    plugins.load("pools", "mine").f()
