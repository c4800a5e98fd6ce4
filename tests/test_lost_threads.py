"""A thread that Python loses for want of memory ends the command with one line, in place of a wait without end."""

from textwrap import dedent

import pytest
import small_jobs
from pipeline_builders import h2t, make_params, write_params

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.lost_threads import LINE
from h2t.pipeline.base.side_by_side import side_by_side

DIGITS = '''
    """Digits, read by threads that are lost."""
    import threading
    from concurrent.futures.thread import _WorkItem
    from h2t.pipeline.datasets.digits import Options, decode, load, reader, transform

    def without_memory(self):
        raise MemoryError
'''
LOST = {
    "while a result is handed over": "_WorkItem.run = without_memory",
    "in its first steps": "threading.Thread._set_ident = without_memory",
    "outside of a pool": """
    def load(options):
        threading.Thread(target=bytearray, args=(2**62,)).start()
        threading.Event().wait()
    """,
}


@pytest.mark.parametrize("fault", LOST.values(), ids=LOST)
def test_a_lost_thread_ends_the_command_with_one_line(tmp_path, fault):
    (tmp_path / "plugins" / "datasets").mkdir(parents=True)
    (tmp_path / "plugins" / "datasets" / "losing.py").write_text(dedent(DIGITS) + dedent(fault))
    write_params(tmp_path / "params.yaml", prepare={**make_params()["prepare"], "dataset": "losing"})
    done = h2t("prepare", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, LINE)
    assert not (tmp_path / "out").exists()


def test_one_of_several_processes_that_lost_a_thread_counts_as_killed():
    with pytest.raises(UserError, match="processes was killed, perhaps for lack of memory"):
        side_by_side([small_jobs.loses_a_thread, small_jobs.forever], "x")
