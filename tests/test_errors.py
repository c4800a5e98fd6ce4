"""What the machine lacks is one line; a bug stays a traceback."""

import errno
import getpass
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from pipeline_builders import environment, invoke, make_samples, write_params
from platformdirs import user_config_dir

from h2t.pipeline.base.errors import first_line, of_the_machine

LACKS = {
    "room": (OSError(errno.ENOSPC, "", "data/x"), "data/x: No space left on device; free some space"),
    "a writable disk": (OSError(errno.EROFS, "", "data/x"), "data/x: Read-only file system; make the disk writable"),
    "a sound disk": (OSError(errno.EIO, ""), "disk: Input/output error; "),
    "a short name": (OSError(errno.ENAMETOOLONG, "", "data/x"), "data/x: File name too long; give a shorter name"),
    "a folder": (OSError(errno.ENOTDIR, "", "file/x"), "file/x: Not a directory; give another path"),
    "memory": (MemoryError(), "memory: not enough; raise the limit"),
    "memory, in numpy's words": (MemoryError("Unable to allocate 1. GiB"), "memory: Unable to allocate 1. GiB; raise"),
    "memory for a process": (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory: [Errno 12] Cannot allocate"),
    "memory for a library": (
        ImportError("libx.so: failed to map segment from shared object"),
        "memory: libx.so: failed to map segment from shared object; raise",
    ),
    "memory for a thread": (RuntimeError("can't start new thread"), "memory: can't start new thread; raise"),
}


@pytest.mark.parametrize(("error", "line"), LACKS.values(), ids=LACKS)
def test_what_the_machine_lacks_is_one_line(error, line):
    assert str(of_the_machine(error)).startswith(line)


def test_a_user_whom_the_system_does_not_know_is_told_what_to_set(monkeypatch, tmp_path):
    """As in a container that runs under a number of a user that it does not know."""
    for name in ("HOME", "XDG_CONFIG_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    for ask in (Path.home, lambda: user_config_dir("dvc")):
        with pytest.raises(RuntimeError) as error:
            ask()
        assert str(of_the_machine(error.value)).startswith("HOME: must name your home folder")
    with pytest.raises((KeyError, OSError)) as error:
        getpass.getuser()
    assert str(of_the_machine(error.value)).startswith("USER: must be set")


def test_who_has_no_folder_for_temporary_files_is_told_what_to_set(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    with pytest.raises(FileNotFoundError) as error:
        tempfile.gettempdir()
    assert str(of_the_machine(error.value)).startswith("TMPDIR: must name a folder that can be written")


def test_torch_names_the_memory_that_it_does_not_get():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert str(of_the_machine(error.value)).startswith("memory: ")


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "", "x"), ValueError("memory")])
def test_a_bug_is_not_the_machines_fault(bug):
    assert of_the_machine(bug) is None


@pytest.mark.parametrize(("said", "line"), [("", "ValueError"), ("\n one\ntwo", "one"), ("one", "one")])
def test_the_first_line_of_an_error_is_never_empty(said, line):
    assert first_line(ValueError(said)) == line


def test_the_command_line_says_it(tmp_path):
    """A limit on the size of files stands for a full disk: the unfinished training cannot be saved."""
    make_samples(tmp_path / "samples")
    params = write_params(tmp_path / "p.yaml")
    out = tmp_path / "b" / "out"
    command = ["train-backbone", "ce_mixup", tmp_path / "samples", out, "--params", params, "--device", "cpu"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        result = invoke(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.exit_code, result.stderr) == (
        1,
        "error: disk: File too large; raise the limit on the size of files (ulimit -f), then run again\n",
    )
    assert not out.exists()


@pytest.mark.parametrize("words", ["--help", "list hosts"])
def test_an_answer_that_a_full_disk_does_not_take_is_one_line(warm_h2t, words):
    command = f"{warm_h2t} {words} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: disk: No space left on device; free some space, then run again\n",
    )


AFTER_A_COMMAND = """
import subprocess, sys
from h2t.pipeline.__main__ import run
place, sys.argv = sys.argv[1], ["h2t", "--version"]
try:
    run()
finally:
    code = "with open(__import__('sys').argv[1], 'a') as file: print(file.fileno(), file=file)"
    exec(code.replace("__import__('sys').argv[1]", "place"))
    subprocess.run([sys.executable, "-c", code, place], check=True)
"""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    """What a library prints would go into that file, here and in child processes."""
    words = ["bash", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, AFTER_A_COMMAND, tmp_path / "number"]
    subprocess.run(words, env=environment(), capture_output=True, check=True)
    here, child = map(int, (tmp_path / "number").read_text().split())
    assert min(here, child) > 2


DURING_THE_IMPORTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background has it ignored
class Meeting:
    def find_spec(self, name, path, target=None):
        if name == "h2t.pipeline.command_line.main":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Meeting())
from h2t.pipeline.__main__ import run
sys.argv = ["h2t", "--version"]
run()
"""


def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback():
    words = [sys.executable, "-c", DURING_THE_IMPORTS]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


LOST = """
import os, signal, threading, time
import click
from concurrent.futures import ThreadPoolExecutor, wait
from h2t.pipeline.command_line.main import main
class Closing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
class Option(click.ParamType):
    name = "option"
    def convert(self, value, param, ctx):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
main.params.append(click.Option(["--option"], type=Option(), expose_value=False))
@main.command("thread")
def thread():
    threading.Thread(target=threading.Event().wait).start()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
@main.command("callback")
def callback():
    Closing()
    time.sleep(2)
@main.command("store")
def store():
    tasks = [ThreadPoolExecutor(1).submit(threading.Event().wait)]
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        wait(tasks)
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.parametrize("met", ["thread", "callback", "store", "--option=x"])
def test_ctrl_c_ends_a_command_wherever_it_meets_it(tmp_path, met):
    """While a pool starts a thread, which Python then waits for in vain; in a callback, where Python forgets it; or
    while a reader waits for its threads, which wait for a store that is silent; or while options are parsed.
    """
    command = [sys.executable, "-c", LOST, met]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command again to resume\n")
