"""The command `h2t`, which `python -m h2t.pipeline` is too."""

import atexit
import gc
import os

from h2t.pipeline.command_line.main import main

#: Importing torch makes half a million objects that stay. Looking for garbage among them after every 700 new ones, and
#: through all of them at the end, takes half a second of every command.
OBJECTS = 50_000


def run() -> None:
    """Runs the command line of this process."""
    # Threads of torch that wait for work sleep. By default they spin, which on a busy machine multiplies the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.set_threshold(OBJECTS)
    atexit.register(gc.freeze)
    main()


if __name__ == "__main__":  # worker processes import this module too
    run()
