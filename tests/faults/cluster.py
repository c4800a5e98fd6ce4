"""SIGKILL at random moments to the scheduler, a worker or the client of an extraction on a dask cluster.

    python tests/faults/cluster.py --kills 40 --workers 2 --seed 1
    python tests/faults/cluster.py --kills 40 --workers 2 --target s3
    python tests/faults/cluster.py --kills 40 --workers 2 --target ssh     # needs OpenSSH's server
    python tests/faults/cluster.py --kills 40 --workers 0 --target s3      # one process, no cluster

After each kill, what was killed is started again: the client by the same command, the others by the same address.
Every extraction must end in the bytes of one process, and leave nothing behind. Exit 1 if one does not.
"""

import argparse
import gc
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from distributed.cli import dask_scheduler, dask_worker

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from builders import tree  # noqa: E402
from pipeline_builders import make_backbone_dir, make_samples, write_params  # noqa: E402
from servers import Bucket, Folder, openssh_server, s3_process  # noqa: E402

from h2t.pipeline.command_line import main  # noqa: E402

MANY = {"extract__batchnorm_passes": 2, "extract__chunk_rows": 32, "extract__shard_bytes": 16384}


def forked(work: Callable[[], None], errors: Path | None = None) -> BaseProcess:
    """A started fork of this process, where everything is imported. Its output goes to the file `errors`."""

    def child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with (errors or Path(os.devnull)).open("w") as out:
            for stream in (1, 2):
                os.dup2(out.fileno(), stream)
            work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


class Cluster:
    """A scheduler at a fixed address, and its workers, if any. `revive` starts those that have ended."""

    def __init__(self, workers: int) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = str(taken.getsockname()[1])
        self.address = f"tcp://127.0.0.1:{port}"
        scheduler = ["--host", "127.0.0.1", "--port", port, "--no-dashboard"]
        self.work = {"scheduler": partial(dask_scheduler.main.main, scheduler)} if workers else {}
        for number in map(str, range(workers)):
            options = ["--no-nanny", "--nthreads", "1", "--name", number, "--no-dashboard"]
            self.work[f"worker {number}"] = partial(dask_worker.main, [self.address, *options])
        self.running: dict[str, BaseProcess] = {}

    def revive(self) -> None:
        for name, work in self.work.items():
            if name not in self.running or not self.running[name].is_alive():
                self.running[name] = forked(work)

    def kill(self, name: str) -> None:
        kill(self.running[name])
        if name == "scheduler":  # its workers would wait for it for a while
            for other in self.running:
                kill(self.running[other])

    def end(self) -> None:
        for process in self.running.values():
            kill(process)


class Directory:
    """The target of the extractions: `out`, in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.out = str(folder / "many/b")
        self._folder = folder / "many"

    def written(self) -> int:
        return sum(p.suffix != ".partial" for p in self._folder.glob(".b.staging/parts.*/*"))

    def most(self, shards: int) -> int:
        """What is written at the last moment for a kill: the commit is one rename."""
        return shards - 1

    def found(self) -> dict[str, bytes]:
        return tree(self._folder)

    def clear(self) -> None:
        shutil.rmtree(self._folder)


class Remote:
    """A bucket or an SSH server on the loopback, where a commit copies every shard: kills strike it as well."""

    def __init__(self, store: Bucket | Folder) -> None:
        self._store = store
        self.out = f"{store.url}/b"

    def written(self) -> int:
        names = self._store.names()
        return sum(n.startswith((".b.staging/parts.", "b/")) and not n.endswith(".partial") for n in names)

    def most(self, shards: int) -> int:
        return 2 * shards

    def found(self) -> dict[str, bytes]:
        return self._store.files()

    def clear(self) -> None:
        self._store.clear()


@contextmanager
def place_of(target: str, folder: Path) -> Iterator[Directory | Remote]:
    """The place that `--target` names, in `folder` or on a server that runs for the block."""
    if target == "s3":
        with s3_process() as bucket:
            yield Remote(bucket)
    elif target == "ssh":
        with openssh_server(folder / "home") as port:
            os.environ["HOME"] = str(folder / "home")
            yield Remote(Folder(folder / "many", port))
    else:
        yield Directory(folder)


def struck_extraction(
    command: list[str], place: Directory | Remote, errors: Path, cluster: Cluster, most: int, draws: random.Random
) -> Counter:
    """Runs `h2t COMMAND` until it succeeds, with kills after a few further shards. Returns who was killed how often."""
    killed: Counter = Counter()
    while True:
        cluster.revive()
        client = forked(partial(main.main.main, command), errors)
        while client.is_alive():
            at = place.written() + draws.randrange(1, 6)
            while client.is_alive() and place.written() < min(at, most):
                time.sleep(0.005)
                cluster.revive()
            client.join(draws.uniform(0, 0.2))
            if client.is_alive() and 0 < (written := place.written()) < most:
                name = draws.choice(["client", *cluster.work])
                if name == "client":
                    kill(client)
                else:
                    cluster.kill(name)
                killed[name.split()[0]] += 1
                say(f"killed after {written} files: {name}")
            else:
                client.join(1)
        said = errors.read_text()
        assert "Traceback" not in said, said
        if client.exitcode == 0:
            return killed
        assert client.exitcode in (1, -signal.SIGKILL), said


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def campaign(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--target", choices=["directory", "s3", "ssh"], default="directory")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args(arguments)
    say(f"seed {given.seed}")
    torch.set_num_threads(1)
    gc.freeze()  # forks share what is never looked at
    draws, killed, wrong, runs = random.Random(given.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as temporary, place_of(given.target, Path(temporary)) as place:
        folder = Path(temporary)
        make_samples(folder / "samples", test_per_class=40, validation_per_class=14)
        make_backbone_dir(folder / "backbone")
        params = write_params(folder / "params.yaml", **MANY)
        command = ["extract", "b", str(folder / "samples"), str(folder / "backbone")]
        end = ["--params", str(params), "--device", "cpu", "--quiet"]
        one = forked(partial(main.main.main, [*command, str(folder / "one/b"), *end]))
        one.join()
        expected = tree(folder / "one")
        shards = sum("/c." in name for name in expected)
        cluster = Cluster(given.workers)
        try:
            while killed.total() < given.kills:
                by = ["--set", f"extract.cluster={cluster.address}"] if given.workers else []
                there = [*command, place.out, *end, *by]
                killed += struck_extraction(there, place, folder / "errors", cluster, place.most(shards), draws)
                runs += 1
                wrong += place.found() != expected
                say(f"{dict(killed)} in {runs} extractions of {shards} shards, {wrong} wrong")
                place.clear()
        finally:
            cluster.end()
    if wrong:
        raise SystemExit("a kill did harm")


if __name__ == "__main__":
    campaign()
