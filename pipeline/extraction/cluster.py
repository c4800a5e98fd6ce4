"""Extracts shards in several processes or on several machines, with dask.distributed.

Each worker opens the job once, and writes its shards itself: no map passes through the scheduler or the client. If a
worker is lost, others extract its shards again. All workers must see the same files under the same paths.
"""

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, Protocol

import pydantic

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted

TASKS = 3  # for each worker: one shard is computed, one written, one waits; this bounds the memory of a worker
SECONDS = 60  # time limit for connecting to a scheduler and its first worker
QUIET = 60.0  # seconds without a shard until a line names the workers waited for; the next follows after 2x, 4x, 8x
ANSWER = 10.0  # seconds within which a scheduler must answer
SILENT = 20.0  # seconds at the end of each wait, in which a live worker reports at least once, even if it is busy


class Job(Protocol):
    """The description of the work that is sent to each worker. It must be picklable."""

    def open(self, number: int) -> Callable[[int], Callable[[], Any]]:
        """The function with which worker `number` computes a shard; it returns the one that writes it.

        Raises UserError if the worker is unsuitable.
        """


def _check(value: str | None) -> str | None:
    if value is None or value.startswith(("tcp://", "tls://", "ucx://", "inproc://")):
        return value
    kind, _, count = value.partition(":")
    if kind != "local" or not count.isdigit() or int(count) < 1:
        raise ValueError("must be null, local:N for N processes here, or tcp://HOST:PORT of a dask scheduler")
    return value


#: pydantic validator: null, local:N or the address of a scheduler.
ADDRESS = pydantic.AfterValidator(_check)


def shards(address: str, job: Job, pending: Sequence[int], say: Say) -> Iterator[int]:
    """Every shard in `pending` as soon as it is written, in the order of completion.

    `say` gets a line that names the workers waited for when no shard has come for `QUIET` seconds. Raises UserError if
    the cluster does not answer, kills its workers, or has an unsuitable worker.
    """
    try:
        from distributed import Client, KilledWorker, LocalCluster, WorkerPlugin
    except ImportError:
        raise UserError("run.cluster: dask.distributed is not installed; pip install 'h2t[cluster]'") from None

    class Opened(WorkerPlugin):
        """Sends the job to every worker, including those that join later or replace a lost one."""

        name = "h2t"

        def setup(self, worker: Any) -> None:
            worker.h2t_job, worker.h2t_compute = job, None

    with _cluster(address, LocalCluster) as at, _connected(Client, at, address) as client, _loss_is_one_line(client):
        client.register_plugin(Opened())
        todo = iter(pending)
        running: dict[Any, int] = {}  # future -> shard; dask cancels the work of a future that is not referenced
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def submit() -> None:
            """Gives work to the workers that are there now: others may have joined."""
            workers = len(_workers(client) or ())
            for shard in islice(todo, max(0, TASKS * max(1, workers) - len(running))):
                running[future := client.submit(_extract, shard, pure=False)] = shard
                future.add_done_callback(done.put)

        submit()
        while running:
            future = _next(done, client, say)
            shard = running.pop(future)
            try:
                # The shard is written. Its result is not asked for: a worker that has stopped since would not answer.
                if future.status != "finished":
                    future.result()
            except KilledWorker as error:
                raise UserError(
                    f"run.cluster: {error.task} killed {counted(error.allowed_failures + 1, 'worker')}, probably out "
                    "of memory; lower extract.batch_size or extract.shard_bytes"
                ) from None
            submit()
            yield shard


@contextmanager
def _loss_is_one_line(client: Any) -> Iterator[None]:
    """Turns what happens when the scheduler is lost into UserError."""
    from distributed.comm.core import CommClosedError

    try:
        yield
    except (CancelledError, CommClosedError):
        raise UserError(
            f"run.cluster: lost the scheduler {client.scheduler.address}; written shards are kept: start it and its "
            "workers, then run the same command again"
        ) from None


def _cluster(address: str, local: Any) -> Any:
    """A context manager: gives `address`, or for local:N a cluster of this machine, without memory limits."""
    from contextlib import nullcontext

    if not address.startswith("local:"):
        return nullcontext(address)
    return local(
        n_workers=int(address.partition(":")[2]),
        threads_per_worker=1,
        dashboard_address=None,
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    )


def _connected(client: Any, at: Any, address: str) -> Any:
    """A client of the cluster `at`, which has at least one worker. Raises UserError if nothing answers in time."""
    try:
        for part in ("client", "batched"):  # a lost scheduler is said in one line, without their tracebacks
            logging.getLogger(f"distributed.{part}").setLevel(logging.CRITICAL)
        connected = client(at, timeout=SECONDS, set_as_default=False)
        connected.wait_for_workers(1, timeout=SECONDS)
    except (OSError, TimeoutError) as error:
        raise UserError(
            f"run.cluster: {address} and one of its workers must answer within {SECONDS} s; got no answer ({error}); "
            "start the scheduler and its workers, or use local:N"
        ) from None
    return connected


def _next(done: "queue.SimpleQueue[Any]", client: Any, say: Say) -> Any:
    """The next finished future. Names the workers waited for after `QUIET` seconds, then at growing intervals."""
    started, wait = time.monotonic(), QUIET
    while True:
        with suppress(queue.Empty):
            return done.get(timeout=wait - SILENT)
        before = _workers(client)
        with suppress(queue.Empty):
            return done.get(timeout=SILENT)
        waited = time.monotonic() - started
        say(f"run.cluster: no shard for {waited:.0f} s; {_awaited(client, before, _workers(client))}")
        wait = waited  # so the total doubles until the next line


def _workers(client: Any) -> dict[str, Any] | None:
    """The scheduler's facts on each worker, by address; None if it does not answer."""
    try:
        facts: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER)["workers"]
    except (OSError, TimeoutError):
        return None
    return facts


def _awaited(client: Any, before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """A sentence: which workers did not report between `before` and `now`, or else all workers, and what to do."""
    scheduler = client.scheduler.address
    if before is None or now is None:
        return f"the scheduler {scheduler} does not answer; resume its process, or interrupt this command"
    if not now:
        return f"the scheduler {scheduler} has no workers; start some, or interrupt this command"
    # Compared with an earlier report of the same worker, as the scheduler's clock may differ from ours.
    silent = [a for a, w in now.items() if a in before and w["last_seen"] == before[a]["last_seen"]]
    named = ", ".join(f"{now[a]['name']} at {a}" for a in silent or now)
    if silent:
        return (
            f"no report for {SILENT:.0f} s from worker {named}; resume its process, or end it, and other workers "
            "compute its shards"
        )
    return f"all workers report ({named}); if a shard takes too long, lower extract.shard_bytes"


def _extract(shard: int) -> None:
    from distributed import get_worker, secede

    worker: Any = get_worker()
    if worker.h2t_compute is None:
        number = str(worker.name)  # set by `local:N`, or by `dask worker --name N`
        worker.h2t_compute = worker.h2t_job.open(int(number) if number.isdecimal() else 0)
    write = worker.h2t_compute(shard)
    secede()  # lets the worker's thread compute the next shard while this one is written
    write()
