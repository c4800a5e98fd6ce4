import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from builders import raises, tree
from kills import struck

from h2t.cache.write.staging import Staging, write_durably

HOLD = """
import sys, time
from h2t.cache.write.staging import Staging
with Staging(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def finished(staging: Staging, content: bytes = b"new") -> Staging:
    staging.cache.mkdir(parents=True)
    (staging.cache / "file").write_bytes(content)
    return staging


def test_a_second_owner_is_refused_until_the_first_leaves(cache_dir):
    with Staging(cache_dir), raises("busy"):
        Staging(cache_dir).__enter__()
    with Staging(cache_dir):
        pass


def test_a_killed_process_leaves_no_lock(cache_dir):
    command = [sys.executable, "-c", HOLD, str(cache_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as holder:
        assert holder.stdout.readline() == b"held\n"
        with raises("busy"):
            Staging(cache_dir).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Staging(cache_dir):
        pass


def test_kept_files_outlive_an_attempt_and_a_discarded_cache(cache_dir):
    with Staging(cache_dir) as staging:
        assert staging.kept("statistics") is None
        staging.keep("statistics", b"1")
        staging.keep("statistics", b"22")
        finished(staging)
    with Staging(cache_dir) as staging:
        staging.discard_cache()
        assert staging.kept("statistics") == b"22"
        assert not staging.cache.exists()


@pytest.mark.parametrize("target", ["absent", "empty"])
def test_publish_renames_and_leaves_nothing_behind(cache_dir, target):
    if target == "empty":
        cache_dir.mkdir()
    with Staging(cache_dir) as staging:
        finished(staging).publish(replace=False)
    assert tree(cache_dir) == {"file": b"new"}
    assert list(cache_dir.parent.iterdir()) == [cache_dir]


def test_publish_replaces_only_when_told_to(cache_dir):
    cache_dir.mkdir()
    (cache_dir / "file").write_bytes(b"old")
    with Staging(cache_dir) as staging:
        finished(staging)
        with raises("exists"):
            staging.publish(replace=False)
        assert tree(cache_dir) == {"file": b"old"}
        staging.publish(replace=True)
    assert tree(cache_dir) == {"file": b"new"}
    assert list(cache_dir.parent.iterdir()) == [cache_dir]


def replaced(target):
    with Staging(target) as staging:
        staging.publish(replace=True)


def test_a_replaced_cache_is_there_again_after_a_kill_at_any_step(tmp_path):
    """At every step of a replacement the target is the old or the new content, at the latest when staging opens."""
    ends = []
    for step in range(40):
        target = tmp_path / str(step) / "cache"
        target.mkdir(parents=True)
        (target / "file").write_bytes(b"old")
        with Staging(target) as staging:
            finished(staging)
        code = struck(partial(replaced, target), step)
        with Staging(target):
            ends.append(tree(target)["file"])
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert ends[:2] == [b"old", b"old"]
    assert ends[-1] == b"new"
    assert len(ends) > 4


def test_a_durable_write_replaces_in_one_step(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"one")
    with path.open("rb") as reader:
        write_durably(path, b"other")
        assert reader.read() == b"one"
    assert tree(tmp_path) == {"file": b"other"}


def test_a_failed_write_leaves_the_old_content_alone(tmp_path):
    path = tmp_path / "file"
    write_durably(path, b"one")
    limit = "import resource, signal, sys; from pathlib import Path; from h2t.cache.write.staging import write_durably;"
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
    limit += "write_durably(Path(sys.argv[1]), bytes(100))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", limit, str(path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert b"File too large" in done.stderr
    assert tree(tmp_path) == {"file": b"one"}


@pytest.mark.parametrize("step", ["before it is renamed", "before it is removed"])
def test_what_a_kill_just_after_publishing_leaves_goes_with_the_next_run(cache_dir, step):
    with Staging(cache_dir) as staging:
        finished(staging).cache.rename(cache_dir)
        if step == "before it is removed":
            staging.root.rename(staging.root.with_name(f"{staging.root.name}.done"))
    assert len(list(cache_dir.parent.iterdir())) == 2
    Staging(cache_dir).clear_remains()
    assert list(cache_dir.parent.iterdir()) == [cache_dir]
    assert tree(cache_dir) == {"file": b"new"}


def test_what_another_process_works_in_stays(cache_dir):
    with Staging(cache_dir) as staging:
        staging.keep("statistics", b"1")
        Staging(cache_dir).clear_remains()
        assert staging.kept("statistics") == b"1"


def test_another_user_of_the_group_can_go_on(cache_dir):
    """Who writes next opens the lock files for writing, so they have the permissions that the umask leaves."""
    before = os.umask(0o002)
    try:
        with Staging(cache_dir, shared=True) as staging, staging.holding("part-1-of-2"):
            modes = {path.name: oct(path.stat().st_mode & 0o777) for path in staging.root.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"lock": "0o664", "part-1-of-2": "0o664"}
