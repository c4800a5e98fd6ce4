"""A `python` that starts at once, for tests that start programs many times.

Importing torch takes seconds of processor time in every new process. Here one process imports everything and forks for
each program: `-m MODULE` or a file. The fork gets the caller's arguments, folder, environment and standard streams;
SIGINT and SIGTERM are passed on to it, and a caller that is killed takes it along. tests/test_pipeline.py runs every
stage in a new interpreter.
"""

import fcntl
import os
import runpy
import signal
import socket
import sys
from contextlib import suppress

STREAMS = (0, 1, 2)
IMPORTED = (
    *("torch", "torch._dynamo", "torchvision", "sklearn.manifold", "pandas", "zarr", "distributed", "fsspec", "s3fs"),
    *("dvc.cli", "dvc.commands.repro", "dvc.repo", "dvc.analytics", "dvc.compare", "dvc.data_cloud", "dvc.lock"),
    *("dvc.rwlock", "dvc.scm", "dvc.dirs", "dvc.daemon", "dulwich.ignore", "dulwich.index", "configobj", "ruamel.yaml"),
    *("networkx", "shtab", "encodings.idna"),
)
ROOMS = ("stages", "command_line", "extraction", "heads", "evaluation", "reporting", "models", "sharing", "inspection")


def ask(place: str, arguments: list[str]) -> int:
    """The client: has the server at the socket `place` run `python ARGUMENTS`; returns the exit code."""
    here = os.getcwd()  # noqa: PTH109 - importing pathlib takes longer than all of this
    words = [here, str(len(arguments)), *arguments, *(f"{k}={v}" for k, v in os.environ.items())]
    body = os.fsencode("\0".join(words))
    with socket.socket(socket.AF_UNIX) as at:
        at.connect(place)
        socket.send_fds(at, [_number(len(body))], STREAMS)
        at.sendall(body)
        fork = int.from_bytes(at.recv(8), "little")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(fork, number))
        return int.from_bytes(at.recv(8) or b"\x46", "little")  # 70: it ended without a word


def serve(place: str) -> None:
    """The server: prints a line when it is ready; ends when its standard input is closed."""
    import gc
    import pkgutil
    import select
    from importlib import import_module

    for name in IMPORTED:
        import_module(name)
    for package in (import_module(f"h2t.pipeline.{room}") for room in ROOMS):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            import_module(found.name)
    gc.freeze()  # forks share what is never looked at
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as at:
        at.bind(place)
        at.listen()
        print("ready", flush=True)  # noqa: T201
        while sys.stdin not in select.select([at, sys.stdin], [], [])[0]:
            caller, _ = at.accept()
            if os.fork() == 0:
                answer(caller)
            caller.close()


def _reap(*_: object) -> None:
    """Waits for the forks that have ended, so that their processor time is counted."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def answer(caller: socket.socket) -> None:
    """In the fork: becomes the program, tells the exit code, and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    head, streams, _, _ = socket.recv_fds(caller, 8, len(STREAMS))
    body, size = b"", int.from_bytes(head, "little")
    while len(body) < size:
        body += caller.recv(size - len(body))
    if hasattr(fcntl, "F_SETSIG"):  # Linux
        _end_with(caller)
    caller.sendall(_number(os.getpid()))
    folder, count, *words = os.fsdecode(body).split("\0")
    for standard, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, standard)
        os.close(given)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(line.split("=", 1) for line in words[int(count) :])
    sys.argv = words[: int(count)]
    try:
        if sys.argv[0] == "-m":
            sys.argv.pop(0)
            sys.path[0] = folder
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(sys.argv[0])  # noqa: PTH120
            runpy.run_path(sys.argv[0], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)  # noqa: T201
    except BaseException:  # noqa: BLE001 - what a new interpreter prints
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(_number(code if isinstance(code, int) else 1))
    os._exit(0)


def _end_with(caller: socket.socket) -> None:
    """Has the kernel kill this process when the caller is gone."""
    for what, value in ((fcntl.F_SETSIG, signal.SIGKILL), (fcntl.F_SETOWN, os.getpid()), (fcntl.F_SETFL, os.O_ASYNC)):
        fcntl.fcntl(caller, what, value)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
