"""The command `h2t`, which `python -m h2t.pipeline` is too."""

import atexit
import gc
import os
import signal
import sys

#: Importing torch makes half a million objects that stay. Looking for garbage among them after every 700 new ones, and
#: through all of them at the end, takes half a second of every command.
OBJECTS = 50_000
STOPPED = 128 + signal.SIGINT  # the usual exit code after Ctrl-C


def run() -> None:
    """Runs the command line of this process. Ctrl-C while it is still being imported ends it without a word."""
    heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup ignores it
    if heard:
        signal.signal(signal.SIGINT, _ended)
    from h2t.cache.machine import may_open_many_files
    from h2t.pipeline.command_line.main import main  # here, so that Ctrl-C meets no import outside; and not in workers

    # Threads of torch that wait for work sleep. By default they spin, which on a busy machine multiplies the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _open_closed_streams()
    may_open_many_files()
    gc.set_threshold(OBJECTS)
    atexit.register(gc.freeze)
    try:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which `main` looks for, to take its place
        main()
    except KeyboardInterrupt:  # just before or after `main` hears it
        os._exit(STOPPED)


def _ended(_number: int, _frame: object) -> None:
    os._exit(STOPPED)


def _open_closed_streams() -> None:
    """Opens standard streams that are closed (`>&-`). Else the next file that is opened, a shard for example, gets the
    number of the stream, and what a library prints goes into that file. Child processes get the open stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: PTH123, SIM115 - stays open
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


if __name__ == "__main__":  # worker processes import this module too
    run()
