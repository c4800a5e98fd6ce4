"""What the machine lacks is one line; a bug stays a traceback."""

import errno
import resource

import pytest
import torch
from click.testing import CliRunner
from pipeline_builders import make_samples, write_params

from pipeline.cli import main
from pipeline.errors import of_the_machine

LACKS = {
    "room": (OSError(errno.ENOSPC, "", "data/x"), "data/x: No space left on device; make room"),
    "a writable disk": (OSError(errno.EROFS, "", "data/x"), "data/x: Read-only file system; make room"),
    "a sound disk": (OSError(errno.EIO, ""), "disk: Input/output error; "),
    "memory": (MemoryError(), "memory: there is not enough; raise the limit"),
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


def test_torch_names_the_memory_that_it_does_not_get():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert str(of_the_machine(error.value)).startswith("memory: ")


@pytest.mark.parametrize("bug", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "", "x"), ValueError("memory")])
def test_a_bug_is_not_the_machines_fault(bug):
    assert of_the_machine(bug) is None


def test_the_command_line_says_it(tmp_path):
    """A limit on the size of files stands for a full disk: the unfinished training cannot be saved."""
    make_samples(tmp_path / "samples")
    params = write_params(tmp_path / "p.yaml")
    out = tmp_path / "b" / "out"
    command = ["train-backbone", "ce_mixup", tmp_path / "samples", out, "--params", params, "--device", "cpu"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        result = CliRunner().invoke(main, [str(word) for word in command])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (result.exit_code, result.stderr) == (
        1,
        "error: disk: File too large; make room or change its owner, and run again\n",
    )
    assert not out.exists()
