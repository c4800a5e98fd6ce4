"""Classifiers of a host divided among processes: the same classifiers, and no process outlives the command."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small_jobs
import torch
from kills import heard
from pipeline_builders import ROOT, distance, environment, fitted, make_host, write_params

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.side_by_side import side_by_side
from h2t.pipeline.heads import training
from h2t.pipeline.heads.host_entry import Grid, heads_of
from h2t.pipeline.heads.parts import shares_of
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.spread import devices_of, share_of
from h2t.pipeline.heads.task import Task, train_task
from h2t.pipeline.stages import train_classifier

pytestmark = pytest.mark.timeout(900)

HEADS = {"ratio": [0.0, 0.3, 0.7], "donor": ["instance", "balanced"], "seed": [0, 1, 2]}
LONG = {"epochs": 100_000, "batch_size": 16}  # ends only when it is killed


@pytest.mark.parametrize("count", [1, 2, 3, 4, 17, 18, 99])
def test_every_head_is_in_one_share_and_seeds_stay_together(count):
    heads = heads_of(Grid(**HEADS))
    shares = shares_of(heads, count)
    assert sorted(number for share in shares for number in share) == list(range(len(heads)))
    assert all(share == sorted(share) for share in shares)
    sizes = {len(share) for share in shares}
    assert len(shares) == min(count, len(heads))
    assert max(sizes) - min(sizes) <= 1
    if count == 3:
        assert [{heads[number].seed for number in share} for share in shares] == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("residency", "settings"),
    [
        ({}, {"grid": {**HEADS, "lr": [0.01, 0.1], "loss": {"tau": [0.5, 2.0]}}, "host": "balanced_softmax"}),
        ({"residency": "stream", "memory_bytes": 50_000}, {"optimiser": {"epochs": 1}, "folds": 2}),
    ],
    ids=["memory, constants", "streamed, folds"],
)
def test_two_processes_train_the_classifiers_of_one(tmp_path, plain_cache, backbone_dir, residency, settings):
    said = []
    expected = fitted(tmp_path / "one", plain_cache, backbone_dir, residency=residency, **settings)
    more = {**residency, "processes": 2}
    found = fitted(tmp_path / "two", plain_cache, backbone_dir, residency=more, say=said.append, **settings)
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in expected) <= 1e-5
    tables = [pq.read_table(tmp_path / run / "heads.parquet") for run in ("one", "two")]
    assert tables[0].equals(tables[1], check_metadata=True)
    losses = [pq.read_table(tmp_path / run / "history.parquet") for run in ("one", "two")]
    assert losses[0].drop_columns("loss").equals(losses[1].drop_columns("loss"))
    assert losses[0]["loss"].to_pylist() == pytest.approx(losses[1]["loss"].to_pylist(), rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    assert any("in 2 processes" in line for line in said)


def test_a_share_resumes_from_its_saved_step(tmp_path, plain_cache, backbone_dir, monkeypatch):
    """What a killed run leaves behind is a saved step of each share."""
    params = make_host(grid=HEADS)
    shares = shares_of(heads_of(params.grid), 2)
    heads = [heads_of(params.grid)[number] for number in shares[1]]
    place = share_of(tmp_path / "dr", 1, 2)
    with open_cache(plain_cache) as cache, monkeypatch.context() as saving:
        saving.setattr(training, "Checkpoint", partial(training.Checkpoint, seconds=0))
        train_task(Task(params, Run("dr", place), Residency(), cache, backbone_dir, heads))
    assert list(tmp_path.rglob("state-0.safetensors"))
    with open_cache(plain_cache) as cache:
        two = Residency(processes=2)
        summary = train_classifier.run(params, Run("dr", tmp_path / "dr"), two, cache, backbone_dir)
    assert summary.resumed_steps == summary.steps > 0
    assert [p.name for p in tmp_path.iterdir()] == ["dr"]


def side_by_side_of(job, count):
    """A process that runs a job of small_jobs.py so many times."""
    code = "import small_jobs; from h2t.pipeline.base.side_by_side import side_by_side as run\n"
    code += f"if __name__ == '__main__': run([small_jobs.{job}] * {count}, 'x')"
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.Popen(command, env=environment(PYTHONPATH=str(ROOT / "tests")), **how)


@pytest.fixture
def waiting():
    """A process that waits for two jobs, and the processes of these jobs."""
    with side_by_side_of("forever_aloud", 2) as process:
        yield process, [int(process.stdout.readline()) for _ in range(2)]


def _gone(pids):
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_a_process_that_is_killed_ends_the_others(waiting):
    process, jobs = waiting
    os.kill(jobs[1], signal.SIGKILL)
    assert "x: one of 2 processes was killed" in process.communicate(timeout=300)[1].splitlines()[-1]
    assert _gone(jobs)


def test_processes_end_with_a_command_that_was_killed(waiting):
    process, jobs = waiting
    process.kill()
    process.wait()
    assert _gone(jobs)


def test_ctrl_c_leaves_no_process(tmp_path, plain_cache, backbone_dir):
    params = write_params(
        tmp_path / "params.yaml", hosts__dr__optimiser=LONG, train_classifier={"processes": 2}, device="cpu"
    )
    command = [sys.executable, "-m", "h2t.pipeline", "train-classifier", "dr", plain_cache, backbone_dir]
    with subprocess.Popen(
        [*map(str, command), str(tmp_path / "data" / "dr"), "--params", str(params)],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
        start_new_session=True,
    ) as process:
        children = _children(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in errors
    assert _gone(children)


def _children(process):
    """The two children of `process` that compute, when both have used three seconds of a processor."""
    for _ in range(1500):
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        fields = {int(pid): Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in tasks}
        ticks = 3 * os.sysconf("SC_CLK_TCK")
        busy = [pid for pid, of in fields.items() if int(of[11]) + int(of[12]) > ticks]
        if len(busy) == 2:
            return busy
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    raise AssertionError("no children that compute")


def test_an_error_in_one_process_is_the_error_of_the_command(tmp_path, plain_cache, backbone_dir):
    with pytest.raises(UserError, match=r"hosts\.dr: training diverged: .* lower hosts\.dr\.optimiser\.lr"):
        fitted(
            tmp_path / "dr",
            plain_cache,
            backbone_dir,
            residency={"processes": 2},
            optimiser={"lr": 1e6, "epochs": 30, "weight_decay": 1.0},
        )
    assert not list(tmp_path.iterdir())  # nor a saved step of the other process, which may have diverged as well


def test_an_error_that_is_no_users_error_comes_with_its_traceback():
    with pytest.raises(KeyError) as bug:
        side_by_side([small_jobs.bug, small_jobs.bug], "x")
    assert "in bug" in bug.value.__notes__[0]
    with pytest.raises(RuntimeError, match="in breaks"):
        side_by_side([small_jobs.breaks, small_jobs.breaks], "x")


def test_one_that_fails_does_not_wait_for_the_others():
    began = time.monotonic()
    with pytest.raises(UserError, match="x: must be 1"):
        side_by_side([small_jobs.forever, small_jobs.fails], "x")
    assert time.monotonic() - began < 300


def test_a_killed_process_leaves_nothing_that_python_warns_of():
    """Python warns when the command has ended, below its last line."""
    with side_by_side_of("is_killed_with_a_bar", 1) as process:
        errors = process.communicate()[1]
    assert "1 processes was killed" in errors
    assert "leaked" not in errors


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of(torch.device("cuda"), 2) == ["cuda:0", "cuda:1"]
    assert devices_of(torch.device("cpu"), 3) == ["cpu"] * 3
    for device in ("cuda:0", "cuda"):
        with pytest.raises(UserError, match=r"train_classifier\.processes: must be at most"):
            devices_of(torch.device(device), 3)


def test_no_process_hears_ctrl_c_not_even_the_first():
    assert side_by_side([small_jobs.holds_interrupts] * 3, "x") == [True] * 3
    assert not small_jobs.holds_interrupts()
