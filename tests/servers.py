"""Real servers on the loopback for tests: an S3 endpoint, an SFTP server, and OpenSSH's own where it is installed."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

from builders import tree

S3_KEY, S3_SECRET = "AKIDOFTHETEST", "secretofthetest"


@contextmanager
def _bucket(port: int) -> Iterator["Bucket"]:
    """A new bucket of the S3 endpoint at `port`, which is in the environment meanwhile."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with patch.dict(os.environ, settings):
        yield Bucket(settings)


@cache
def _s3_application() -> Callable[..., Any]:
    """moto's S3 service alone: its usual server looks for the service of every request among all of them.

    From now on botocore reads its descriptions of services once a process: every new client takes 0.1 s for them.
    """
    import botocore.loaders
    import botocore.session
    from moto.moto_server.werkzeug_app import create_backend_app

    botocore.session.create_loader = cache(botocore.loaders.create_loader)
    return create_backend_app("s3")


@contextmanager
def s3_endpoint(*, conditional: bool = True) -> Iterator["Bucket"]:
    """A bucket of an S3 endpoint (moto's) on the loopback; it forgets everything at the end.

    One that is not `conditional` ignores If-None-Match, as some stores do.
    """
    from moto.moto_api._internal import moto_api_backend
    from moto.moto_server.werkzeug_app import MotoRequestHandler
    from werkzeug.serving import make_server

    service = _s3_application()

    class Handler(MotoRequestHandler):
        def log_request(self, *_: object) -> None:
            """Writes nothing: a line for every request costs as much as the answer."""

    def application(asked: dict[str, Any], start: Any) -> Any:
        if not conditional:
            asked.pop("HTTP_IF_NONE_MATCH", None)
        return service(asked, start)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with _bucket(server.server_port) as bucket:
            yield bucket
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        moto_api_backend.reset()  # its objects belong to the process, not to the server


class Bucket:
    """A new bucket of the S3 endpoint in the environment, looked at with boto3; caches go below `url`."""

    url = "s3://lab/x"

    def __init__(self, environment: dict[str, str]) -> None:
        import boto3

        self.environment = environment
        self.s3 = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
        self.s3.create_bucket(Bucket="lab")

    def names(self) -> list[str]:
        """Every object below the URL, by its path relative to it."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix="x/")
        return [entry["Key"][2:] for page in pages for entry in page.get("Contents", [])]

    def files(self) -> dict[str, bytes]:
        """The bytes of every object."""
        return {name: self.s3.get_object(Bucket="lab", Key=f"x/{name}")["Body"].read() for name in self.names()}

    def put(self, name: str, data: bytes) -> None:
        self.s3.put_object(Bucket="lab", Key=f"x/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.s3.delete_object(Bucket="lab", Key=f"x/{name}")

    def clear(self) -> None:
        for name in self.names():
            self.remove(name)


@contextmanager
def s3_process() -> Iterator[Bucket]:
    """A bucket of an S3 endpoint in a process of its own, which has a core to itself and no forks."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _answers(port)
        with _bucket(port) as bucket:
            yield bucket
    finally:
        process.kill()
        process.wait()


def _answers(port: int, log: Path | None = None) -> None:
    """Returns once a server, which writes to the file `log`, listens at `port`."""
    end = time.monotonic() + 60
    while True:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end, log.read_text() if log else "the server did not start"
        time.sleep(0.05)


def make_keys(home: Path) -> tuple[Path, Path]:
    """(host key, authorized keys) of a server, and a home directory whose user it lets in."""
    import asyncssh

    ssh = home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    host, user = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    host.write_private_key(home / "host_key")
    user.write_private_key(ssh / "id_ed25519")
    user.write_public_key(ssh / "authorized_keys")
    for path in (home / "host_key", ssh / "id_ed25519", ssh / "authorized_keys"):
        path.chmod(0o600)
    return home / "host_key", ssh / "authorized_keys"


def know(home: Path, port: int) -> None:
    """Has the user of `home` trust the server's host key at `port`."""
    import asyncssh

    key = asyncssh.read_private_key(home / "host_key").export_public_key().decode().strip()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}\n")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def sftp_server(home: Path) -> Iterator[int]:
    """The port of an SFTP server that is Python's own (asyncssh); `home` becomes the home of a user it lets in."""
    import asyncssh

    host_key, authorized = make_keys(home)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start():
        return await asyncssh.listen(
            "127.0.0.1", 0, server_host_keys=[str(host_key)], authorized_client_keys=str(authorized),
            sftp_factory=True, allow_scp=False,
        )  # fmt: skip

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    know(home, server.get_port())
    try:
        yield server.get_port()
    finally:
        loop.call_soon_threadsafe(server.close)  # clients keep their connections, which is not waited for
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def sshd_program() -> str | None:
    """OpenSSH's server, if it is installed."""
    return shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd",) if os.access(p, os.X_OK)), None)


class Folder:
    """The folder `root`, as an SSH server at `port` gives it if there is one; caches go below `url`."""

    def __init__(self, root: Path, port: int | None = None) -> None:
        self.root = root
        self.url = f"ssh://{os.environ.get('USER', 'root')}@127.0.0.1:{port}{root}" if port else str(root)

    def names(self) -> list[str]:
        """Every file below the URL, by its path relative to it."""
        return [f"{at}/{name}"[len(str(self.root)) + 1 :] for at, _, names in os.walk(self.root) for name in names]

    def files(self) -> dict[str, bytes]:
        """The bytes of every file."""
        return {name: (self.root / name).read_bytes() for name in self.names()}

    def put(self, name: str, data: bytes) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()

    def clear(self) -> None:
        shutil.rmtree(self.root)


@contextmanager
def openssh_server(home: Path) -> Iterator[int]:
    """The port of a real sshd on the loopback, run by this user for this user."""
    program = sshd_program()
    assert program, "sshd is not installed"
    port = free_port()
    host_key, authorized = make_keys(home)
    know(home, port)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd keeps its unprivileged half, if root starts it
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": host_key, "AuthorizedKeysFile": authorized,
        "PidFile": "none", "UsePAM": "no", "StrictModes": "no", "PasswordAuthentication": "no",
        "PermitRootLogin": "yes", "Subsystem": "sftp internal-sftp", "MaxSessions": 64, "MaxStartups": 100,
    }  # fmt: skip
    (home / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    command = [program, "-D", "-e", "-f", str(home / "sshd_config")]
    with (home / "sshd.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            _answers(port, home / "sshd.log")
            yield port
        finally:
            process.terminate()
            process.wait(10)


def ssh_server(home: Path) -> AbstractContextManager[int]:
    """The port of an SSH server: OpenSSH's, which users have; Python's own where that is not installed."""
    return openssh_server(home) if sshd_program() else sftp_server(home)


@contextmanager
def store_of(kind: str, root: Path) -> Iterator[Bucket | Folder]:
    """An empty place below `root`: a `folder`, or a server's that lets this process in (`s3`, `ssh`)."""
    if kind == "folder":
        yield Folder(root / "there")
    elif kind == "s3":
        with s3_endpoint() as bucket:
            yield bucket
    else:
        with ssh_server(root / "home") as port, patch.dict(os.environ, HOME=str(root / "home")):
            yield Folder(root / "there", port)


def put_all(store: Bucket | Folder, root: Path, below: str = "") -> None:
    """Copies every file below `root` to the store, below the name `below`."""
    for name, data in tree(root).items():
        store.put(str(PurePosixPath(below, name)), data)
