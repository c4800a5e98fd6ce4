"""Shards spread over processes or machines by dask.distributed.

Every worker opens the job once; shards come back in the order in which they are done. A worker that is lost has its
shards computed again by the others. Workers must see the same files under the same paths.
"""

import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import pydantic

from h2t.pipeline.base.errors import UserError

SECONDS = 60  # to find a scheduler and its first worker
QUIET = 60.0  # seconds without a shard after which a line says whom the extraction waits for; again after 2, 4, 8 times
ANSWER = 10.0  # seconds within which a scheduler answers
SILENT = 20.0  # of these, seconds in which a worker at work reports, even if it is busy


class Job(Protocol):
    """What is sent to the workers; it can be pickled."""

    def open(self, number: int) -> Callable[[int], list[np.ndarray]]:
        """What computes a shard on worker `number`. Raises UserError on a worker that does not fit."""


def _check(value: str | None) -> str | None:
    if value is None or value.startswith(("tcp://", "tls://", "ucx://", "inproc://")):
        return value
    kind, _, count = value.partition(":")
    if kind != "local" or not count.isdigit() or int(count) < 1:
        raise ValueError("must be null, local:N for N processes here, or tcp://HOST:PORT of a dask scheduler")
    return value


#: A validator: null, local:N or an address of a scheduler.
ADDRESS = pydantic.AfterValidator(_check)


def shards(
    address: str, job: Job, pending: Sequence[int], say: Callable[[str], None]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, arrays) of every shard of `pending`, in the order of completion. Raises UserError.

    `say` is told whom the extraction waits for when no shard has come for `QUIET` seconds.
    """
    try:
        from distributed import Client, KilledWorker, LocalCluster, WorkerPlugin
    except ImportError:
        raise UserError("run.cluster: dask.distributed is not installed; pip install 'h2t[cluster]'") from None

    class Opened(WorkerPlugin):
        """Puts the job on every worker, also on those that join later or take the place of a lost one."""

        name = "h2t"

        def setup(self, worker: Any) -> None:
            worker.h2t_job, worker.h2t_compute = job, None

    with _cluster(address, LocalCluster) as at, _connected(Client, at, address) as client:
        client.register_plugin(Opened())
        todo = iter(pending)
        running: set[Any] = set()  # dask forgets the work of a future that nobody holds
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def submit() -> None:
            if (shard := next(todo, None)) is not None:
                running.add(future := client.submit(_compute, shard, pure=False))
                future.add_done_callback(done.put)

        for _ in range(2 * len(client.scheduler_info(n_workers=-1)["workers"])):  # one at work and one waiting, each
            submit()
        while running:
            future = _next(done, client, say)
            running.remove(future)
            try:
                shard, maps = future.result()
            except KilledWorker as error:
                raise UserError(
                    f"run.cluster: {error.task} ended {error.allowed_failures + 1} workers, probably by its need "
                    "of memory; lower extract.batch_size or extract.shard_bytes"
                ) from None
            submit()
            yield shard, maps


def _cluster(address: str, local: Any) -> Any:
    """The address in a context, or a cluster of this machine's own, without a dashboard and without memory limits."""
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
    """A client with at least one worker. Raises UserError."""
    try:
        found = client(at, timeout=SECONDS, set_as_default=False)
        found.wait_for_workers(1, timeout=SECONDS)
    except (OSError, TimeoutError) as error:
        raise UserError(
            f"run.cluster: no answer from {address} or none of its workers within {SECONDS} s ({error}); "
            "start the scheduler and its workers, or use local:N"
        ) from None
    return found


def _next(done: "queue.SimpleQueue[Any]", client: Any, say: Callable[[str], None]) -> Any:
    """The next future that is done; says whom it waits for after `QUIET` seconds, and then ever more rarely."""
    started, wait = time.monotonic(), QUIET
    while True:
        with suppress(queue.Empty):
            return done.get(timeout=wait - SILENT)
        before = _workers(client)
        with suppress(queue.Empty):
            return done.get(timeout=SILENT)
        waited = time.monotonic() - started
        say(f"run.cluster: no shard for {waited:.0f} s; {_awaited(client, before, _workers(client))}")
        wait = waited  # the next line comes after twice the time, then four times


def _workers(client: Any) -> dict[str, Any] | None:
    """What the scheduler knows of each worker, by address; None if it does not answer."""
    try:
        found: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER)["workers"]
    except (OSError, TimeoutError):
        return None
    return found


def _awaited(client: Any, before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Which workers have not reported between `before` and `now`, or else have a shard, and what to do about it."""
    scheduler = client.scheduler.address
    if before is None or now is None:
        return f"the scheduler {scheduler} does not answer; continue its process, or stop this command"
    if not now:
        return f"the scheduler {scheduler} has no workers; start some, or stop this command"
    # Compared with itself, as the scheduler's clock may not be ours.
    silent = [a for a, w in now.items() if a in before and w["last_seen"] == before[a]["last_seen"]]
    named = ", ".join(f"{now[a]['name']} at {a}" for a in silent or now)
    if silent:
        return (
            f"no report for {SILENT:.0f} s from worker {named}; continue its process, or end it: others then compute "
            "its shards"
        )
    return f"every worker still reports ({named}); if this is too long, lower extract.shard_bytes"


def _compute(shard: int) -> tuple[int, list[np.ndarray]]:
    from distributed import get_worker

    worker: Any = get_worker()
    if worker.h2t_compute is None:
        number = str(worker.name)  # from `local:N`, or `dask worker --name N`
        worker.h2t_compute = worker.h2t_job.open(int(number) if number.isdecimal() else 0)
    return shard, worker.h2t_compute(shard)
