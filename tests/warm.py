"""An `h2t` that starts at once, for tests in which DVC or a shell starts it a dozen times.

Importing torch takes seconds of processor time in every new process. Here one process imports everything and forks for
each command, which gets the caller's arguments, folder, environment and standard streams. tests/test_pipeline.py runs
every stage in a new interpreter.
"""

import os
import socket
import sys

STREAMS = (0, 1, 2)
IMPORTED = ("torch", "torch._dynamo", "torchvision", "sklearn.manifold", "pandas", "dvc.repo")
ROOMS = ("stages", "command_line", "extraction", "heads", "evaluation", "reporting", "models", "sharing", "inspection")


def ask(place: str, arguments: list[str]) -> int:
    """The client: has the server at the socket `place` run `h2t ARGUMENTS`; returns the exit code."""
    here = os.getcwd()  # noqa: PTH109 - importing pathlib takes longer than all of this
    words = [here, str(len(arguments)), *arguments, *(f"{k}={v}" for k, v in os.environ.items())]
    body = os.fsencode("\0".join(words))
    with socket.socket(socket.AF_UNIX) as at:
        at.connect(place)
        socket.send_fds(at, [len(body).to_bytes(8, "little")], STREAMS)
        at.sendall(body)
        return int(at.recv(8) or b"70")  # 70: it ended without a word


def serve(place: str) -> None:
    """The server: prints a line when it is ready; ends when its standard input is closed."""
    import gc
    import pkgutil
    import select
    import signal
    from importlib import import_module

    for name in IMPORTED:
        import_module(name)
    for package in (import_module(f"h2t.pipeline.{room}") for room in ROOMS):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            import_module(found.name)
    gc.freeze()  # forks share what is never looked at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as at:
        at.bind(place)
        at.listen()
        print("ready", flush=True)  # noqa: T201
        while sys.stdin not in select.select([at, sys.stdin], [], [])[0]:
            caller, _ = at.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(caller)
            caller.close()


def answer(caller: socket.socket) -> None:
    """In the fork: becomes the command, tells the exit code, and ends."""
    head, streams, _, _ = socket.recv_fds(caller, 8, len(STREAMS))
    body, size = b"", int.from_bytes(head, "little")
    while len(body) < size:
        body += caller.recv(size - len(body))
    folder, count, *words = os.fsdecode(body).split("\0")
    for standard, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, standard)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(line.split("=", 1) for line in words[int(count) :])
    sys.argv = ["h2t", *words[: int(count)]]
    try:
        from h2t.pipeline.command_line.main import main

        main()
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
    caller.sendall(str(code if isinstance(code, int) else 1).encode())
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
