"""Extraction on several processes: the bytes of one process, also when a worker is killed midway."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest
import torch
from builders import tree
from distributed import Client
from pipeline_builders import extracted, make_extract, python

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.images import BadImage
from h2t.pipeline.extraction import cluster

SMALL = {"batchnorm": ["stage1"], "max_views": 2, "shard_bytes": 65536, "batch_size": 16}


@pytest.fixture(scope="module")
def single(tmp_path_factory, digits, backbone_dir):
    """The cache as one process writes it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("single") / "b"
    summary = extracted(out, *digits, backbone_dir, **SMALL)
    assert summary.shards > 8
    return tree(out)


@pytest.fixture
def after_each(monkeypatch):
    """Calls a function with the number of written shards, whenever the client hears of one."""

    def set_up(strike):
        shards = cluster.shards

        def counted(*arguments):
            for count, shard in enumerate(shards(*arguments), 1):
                strike(count)
                yield shard

        monkeypatch.setattr(cluster, "shards", counted)

    return set_up


def test_two_processes_write_the_same_bytes_also_when_one_is_killed(
    digits, backbone_dir, single, tmp_path, monkeypatch, after_each
):
    killed = []

    def kill_one(count):
        if count == 1:
            workers = [p for p in multiprocessing.active_children() if p.is_alive()]
            assert len(workers) == 2
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    after_each(kill_one)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    extracted(tmp_path / "b", *digits, backbone_dir, cluster="local:2", **SMALL)
    assert killed
    assert tree(tmp_path / "b") == single


def address_in(about):
    """What a scheduler has written so far."""
    with suppress(OSError, ValueError):
        return json.loads(about.read_text())["address"]
    return None


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    """A dask scheduler and two workers as people start them, on the loopback: address, workers, scheduler."""
    about = tmp_path_factory.mktemp("scheduler") / "scheduler.json"

    def dask(*arguments):
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)

    with ExitStack() as stack:

        def start(*arguments):
            process = stack.enter_context(dask(*arguments))
            stack.callback(process.kill)
            return process

        itself = start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(about))
        until = time.monotonic() + 60
        while not (address := address_in(about)) and time.monotonic() < until:
            time.sleep(0.05)
        assert address, "no scheduler"
        workers = [start("worker", address, "--no-nanny", "--nthreads", "1", "--name", n) for n in "01"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=300)
        yield address, workers, itself


def test_a_stopped_worker_is_named_and_going_on_is_enough(
    digits, backbone_dir, single, scheduler, tmp_path, monkeypatch, after_each
):
    address, workers, _ = scheduler
    monkeypatch.setattr("h2t.pipeline.extraction.cluster.QUIET", 12.0)
    monkeypatch.setattr("h2t.pipeline.extraction.cluster.SILENT", 9.0)
    said = []

    def stop_one(count):
        if count == 1:
            workers[1].send_signal(signal.SIGSTOP)

    def say(line):
        said.append(line)
        if "no report for 9 s from worker 1 at tcp://" in line:
            workers[1].send_signal(signal.SIGCONT)

    after_each(stop_one)
    extracted(tmp_path / "b", *digits, backbone_dir, say=say, cluster=address, **SMALL)
    assert any("no shard for " in line and "no report for 9 s from worker 1 at tcp://" in line for line in said), said
    assert not any("worker 0" in line for line in said)
    assert tree(tmp_path / "b") == single


def test_workers_that_stop_after_a_shard_do_not_hold_it_up(
    digits, backbone_dir, single, scheduler, tmp_path, monkeypatch, after_each
):
    address, workers, _ = scheduler
    awaited = cluster._next

    def stopping(*arguments):
        future = awaited(*arguments)
        if not stopped:
            stopped.extend(workers)
            for worker in workers:
                worker.send_signal(signal.SIGSTOP)
        return future

    def resume(count):
        if count == 1:
            for worker in workers:
                worker.send_signal(signal.SIGCONT)

    stopped = []
    monkeypatch.setattr(cluster, "_next", stopping)
    after_each(resume)
    extracted(tmp_path / "b", *digits, backbone_dir, cluster=address, **SMALL)
    assert stopped
    assert tree(tmp_path / "b") == single


def test_no_map_passes_through_the_client_or_the_scheduler(digits, backbone_dir, single, scheduler, tmp_path):
    """What workers send to others is counted by dask: next to nothing, where each shard has 64 KiB and more."""
    address = scheduler[0]

    def sent(dask_worker):
        return dask_worker.transfer_outgoing_bytes_total

    with Client(address, set_as_default=False) as client:
        before = sum(client.run(sent).values())
        summary = extracted(tmp_path / "b", *digits, backbone_dir, cluster=address, **SMALL)
        moved = sum(client.run(sent).values()) - before
        one, other = client.scheduler_info(n_workers=-1)["workers"]
        data = client.submit(bytes, 100_000, workers=[one], pure=False)
        client.submit(len, data, workers=[other], pure=False).result()
        assert sum(client.run(sent).values()) - before - moved > 50_000, "dask no longer counts what workers send"
    assert tree(tmp_path / "b") == single
    assert moved < 100 * summary.shards < summary.value_bytes / 100


def test_workers_take_rows_of_a_previous_cache_too(digits, backbone_dir, scheduler, tmp_path):
    extracted(tmp_path / "one view", *digits, backbone_dir, **{**SMALL, "max_views": 1})
    given = {"previous": tmp_path / "one view", **SMALL}
    extracted(tmp_path / "here", *digits, backbone_dir, **given)
    there = extracted(tmp_path / "there", *digits, backbone_dir, cluster=scheduler[0], **given)
    assert there.taken > there.forwarded > 0
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_workers_of_a_scheduler_write_the_same_bytes_also_when_one_is_killed(
    digits, backbone_dir, single, tmp_path, scheduler, after_each
):
    """The last test that needs both workers."""
    address, workers, _ = scheduler

    def kill_one(count):
        if count == 2:
            workers[0].kill()

    after_each(kill_one)
    extracted(tmp_path / "b", *digits, backbone_dir, cluster=address, **SMALL)
    assert workers[0].wait(60) == -signal.SIGKILL
    assert tree(tmp_path / "b") == single


def test_a_lost_scheduler_is_one_line_and_written_shards_are_kept(
    digits, backbone_dir, single, tmp_path, scheduler, after_each
):
    """The last test of this scheduler."""
    address, _, itself = scheduler

    def kill_it(count):
        if count == 2:
            itself.kill()

    after_each(kill_it)
    with pytest.raises(UserError, match=r"run\.cluster: lost the scheduler .*; written shards are kept"):
        extracted(tmp_path / "b", *digits, backbone_dir, cluster=address, **SMALL)
    assert not (tmp_path / "b").exists()
    for part in ("client", "batched"):  # they would log tracebacks beside the line
        assert not logging.getLogger(f"distributed.{part}").isEnabledFor(logging.ERROR)
    rest = extracted(tmp_path / "b", *digits, backbone_dir, **SMALL)
    assert 2 <= rest.kept_shards < rest.shards
    assert tree(tmp_path / "b") == single


def test_a_bad_image_on_a_worker_is_one_line_here():
    found = pickle.loads(pickle.dumps(BadImage("a.jpg", "is missing")))
    assert (found.source, found.reason) == ("a.jpg", "is missing")
    assert str(found) == str(BadImage("a.jpg", "is missing"))


def test_images_can_be_opened_elsewhere(digits):
    _, images = digits
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.batch([3, 0], [(0, 1), None]), images.batch([3, 0], [(0, 1), None]))


@pytest.mark.parametrize("value", ["local", "local:0", "local:x", "8786", "http://host", "tcp:host"])
def test_an_address_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="must be null, local:N"):
        make_extract(cluster=value)


@pytest.mark.parametrize("value", [None, "local:1", "tcp://10.0.0.1:8786"])
def test_addresses(value):
    assert make_extract(cluster=value).cluster == value


def test_a_scheduler_that_is_not_there_is_one_line(digits, backbone_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("h2t.pipeline.extraction.cluster.SECONDS", 1)
    with pytest.raises(UserError, match=r"run\.cluster: tcp://127\.0\.0\.1:9 .* got no answer"):
        extracted(tmp_path / "b", *digits, backbone_dir, cluster="tcp://127.0.0.1:9", **SMALL)


def test_the_campaign_of_kills_can_be_started(warm_programs):
    assert "--target" in python("tests/faults/cluster.py", "--help", program=warm_programs / "warm_python")
