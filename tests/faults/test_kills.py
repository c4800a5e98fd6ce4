"""A few seeded kills of the hundreds that `make -C tests faults` does; a writer that is stopped or terminated."""

import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the scripts beside this file are no package

from kill import contents, kills, start, undisturbed
from writing import SHARDS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [1, 2])
def test_kills_lose_one_shard_at_most_and_never_a_byte(tmp_path, seed):
    for outcome in kills(tmp_path, 2, seed):
        assert outcome.identical
        assert outcome.lost <= 1
        assert outcome.litter == ()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_writer_that_is_asked_to_end_goes_on_later(tmp_path, how):
    undisturbed(tmp_path / "whole")
    process, _ = start(tmp_path / "c", "--step")
    process.stdin.write(4 * "\n")
    process.stdin.flush()
    for _ in range(2 * 4):  # four shards' begin and end; the fifth waits for its line
        process.stdout.readline()
    process.send_signal(how)
    process.communicate()
    assert process.returncode != 0
    process, pending = start(tmp_path / "c")
    assert len(pending) <= SHARDS - 4
    process.communicate()
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_writer_that_is_stopped_keeps_its_lock_and_goes_on(tmp_path):
    undisturbed(tmp_path / "whole")
    process, _ = start(tmp_path / "c", "--step")
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    second, _ = start(tmp_path / "c")
    _, errors = second.communicate()
    assert second.returncode != 0
    assert "another process is writing this cache" in errors
    process.send_signal(signal.SIGCONT)
    process.communicate(SHARDS * "\n")
    assert process.returncode == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")
