import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import own_data
import pytest
from kills import struck
from pipeline_builders import python, refused, write_params

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import check_place, fresh_directory, write_json, write_run_record
from h2t.pipeline.models import prediction_files


def filled(out, names=("a", "b")):
    with fresh_directory(out) as into:
        for name in names:
            (into / name).write_text(name)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_output_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with fresh_directory(out) as into:
        (into / "a").write_text("x")
        assert not out.exists()
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


def test_an_error_leaves_the_old_output_and_no_remains(tmp_path):
    filled(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), fresh_directory(tmp_path / "out") as into:
        (into / "a").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert names(tmp_path) == ["out"]


def test_an_old_output_is_replaced_also_by_more(tmp_path):
    filled(tmp_path / "out", ["a"])
    filled(tmp_path / "out", ["a", "b"])
    assert names(tmp_path / "out") == ["a", "b"]


def test_a_directory_with_anything_else_is_refused(tmp_path):
    (tmp_path / "out" / "precious").mkdir(parents=True)
    with pytest.raises(UserError, match="must hold outputs of this stage only; got 'precious'"):
        filled(tmp_path / "out")
    assert names(tmp_path / "out") == ["precious"]
    assert names(tmp_path) == ["out"]


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "params.yaml").write_text("x")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError, match=r"must hold outputs of this stage only; got 'params\.yaml'"):
        filled(".")
    assert names(tmp_path) == ["work"]


def test_remains_of_killed_runs_go_even_with_our_process_number(tmp_path):
    """In a container the next run often has the number of the one before."""
    for pid in (os.getpid(), 2**22 + 1):
        (tmp_path / f".out.partial-{pid}").mkdir()
        (tmp_path / f".out.partial-{pid}" / "half").write_text("x")
    check_place(tmp_path / "out")
    filled(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "b"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    filled(tmp_path / "out")
    assert (tmp_path / "target" / "a").read_text() == "old"
    assert not (tmp_path / "out").is_symlink()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("mine")
    with pytest.raises(UserError, match="must be a directory; got a file"):
        filled(tmp_path / "params.yaml")
    assert (tmp_path / "params.yaml").read_text() == "mine"
    assert names(tmp_path) == ["params.yaml"]


def test_what_is_only_called_like_our_remains_stays(tmp_path):
    for name in (".out.partial-backup", ".out.replaced-by-hand"):
        (tmp_path / name).mkdir()
    filled(tmp_path / "out")
    assert names(tmp_path) == [".out.partial-backup", ".out.replaced-by-hand", "out"]


def test_a_place_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be created"):
        filled(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be created"):
        filled(tmp_path / ("x" * 300))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no place in which nothing can be made")
@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("watch photos /proc/x", "/proc/x"),
        ("cache import /proc/x --train nowhere.npz", "/proc/x"),
        ("init /proc/x --data photos --check headers", "/proc/x"),
        ("plan --images 9 --backbone resnet20 --place /proc", "/proc"),
        ("predict model photos --out /proc/x.csv", "/proc/x.csv"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_one_line(tmp_path, monkeypatch, command, names):
    monkeypatch.chdir(tmp_path)
    own_data.sort(tmp_path / "photos", {"a": 9, "b": 6})
    Path("params.yaml").write_text("inputs: {photos: photos}")
    line = refused(*command.split(), code=1)
    assert line.splitlines()[-1].startswith(f"error: {names}: cannot be created (")


WORK = (
    "prepare",
    "train-backbone b nowhere",
    "train-classifier dr nowhere nowhere",
    "evaluate dr nowhere nowhere nowhere",
    "probe b nowhere",
    "report nowhere",
    "report --compare nowhere nowhere",
    "export nowhere nowhere nowhere",
)


@pytest.mark.parametrize("command", WORK)
def test_a_place_where_nothing_can_be_made_is_known_before_anything_is_read(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    images = {"dataset": "image_folder", "options": {"root": "nowhere"}}
    backbone = {"arch": "resnet20", "objective": "ce"}
    write_params(
        Path("params.yaml"), prepare=images, backbones={"b": backbone}, hosts={"dr": {"host": "dr", "backbone": "b"}}
    )
    Path("file").write_text("x")
    for out in ["file/out", *(["/proc/x"] if Path("/proc/self").exists() else [])]:
        line = refused(*command.split(), out, code=1).splitlines()[-1]
        assert line.startswith(f"error: {Path(out).absolute()}: cannot be created (")
    assert refused(*command.split(), "file", code=1).splitlines()[-1].endswith("give another path or remove the file")
    assert refused(*command.split(), "new/out", code=1)
    assert names(tmp_path) == ["file", "params.yaml"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_known_first(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); fix the permissions"):
        check_place(tmp_path / "new/out")


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A pipe here; of root's it could be /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_run_record(pipe, {})
    assert pipe.is_fifo()
    with pytest.raises(UserError, match="pipe: must be a directory; got a file"):
        filled(pipe)


def test_a_record_at_a_place_that_cannot_be_looked_at_is_left_out(tmp_path):
    write_run_record(tmp_path / f"{'x' * 300}.json", {})
    assert names(tmp_path) == []


def test_a_second_prediction_into_a_file_leaves_the_first_one_alone(tmp_path):
    line = {"image": "a.png", "rank": 1, "class": "owl", "confidence": 0.5}
    with prediction_files.as_file(tmp_path / "p.csv") as write:
        write([line])
        prediction_files.check(tmp_path / "p.csv")
    assert "a.png,1,owl,0.5" in (tmp_path / "p.csv").read_text()
    assert names(tmp_path) == ["p.csv"]


def test_predictions_of_two_processes_do_not_mix(tmp_path):
    """The one that ends later wins; both are whole."""
    line = {"image": "a.png", "rank": 1, "class": "owl", "confidence": 0.5}

    def other():
        with prediction_files.as_file(tmp_path / "p.csv") as write:
            write([line])

    with prediction_files.as_file(tmp_path / "p.csv") as write:
        write([line] * 3)
        assert struck(other, 100) == 0
        assert (tmp_path / "p.csv").read_text().count("owl") == 1
    assert (tmp_path / "p.csv").read_text().count("owl") == 3
    assert names(tmp_path) == ["p.csv"]


def test_what_killed_predictions_left_is_removed(tmp_path):
    line = {"image": "a.png", "rank": 1, "class": "owl", "confidence": 0.5}

    def predict():
        prediction_files.check(tmp_path / "p.csv")
        with prediction_files.as_file(tmp_path / "p.csv") as write:
            write([line])

    assert [struck(predict, step) for step in (0, 2)] == [-signal.SIGKILL] * 2
    left = names(tmp_path)
    assert len(left) == 1
    assert left[0].startswith(".p.csv.partial-")  # the second one has removed the trial of the first
    (tmp_path / f".p.csv.partial-{os.getppid()}").touch()  # of a process that is at work
    predict()
    assert names(tmp_path) == [f".p.csv.partial-{os.getppid()}", "p.csv"]


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"a": float("nan")})


def renewed(out):
    """Writes the output anew."""
    with fresh_directory(out) as into:
        for name in "abc":
            (into / name).write_text("new")


OLD, NEW = {n: n for n in "abc"}, dict.fromkeys("abc", "new")


def contents(out):
    return {p.name: p.read_text() for p in out.iterdir()}


def test_killed_at_any_step_the_output_is_the_old_or_the_new_one(tmp_path):
    """Between two renames it is away, and back when the next run begins; it is never there in part."""
    ends = []
    for step in range(40):
        out = tmp_path / str(step) / "out"
        filled(out, "abc")
        code = struck(partial(renewed, out), step)
        assert code in (0, -signal.SIGKILL)
        if not out.exists():
            with pytest.raises(ZeroDivisionError), fresh_directory(out):
                raise ZeroDivisionError
        ends.append(contents(out))
        if code == 0:
            break
    assert all(end in (OLD, NEW) for end in ends), ends
    assert ends[-1] == NEW
    assert len(ends) > 5


def test_killed_at_any_step_a_link_as_output_is_the_old_or_the_new_one(tmp_path):
    """The run that comes next puts the link back if it was away; what it leads to stays."""
    filled(tmp_path / "target", "abc")
    ends = []
    for step in range(40):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        out.symlink_to(tmp_path / "target")
        code = struck(partial(renewed, out), step)
        with pytest.raises(ZeroDivisionError), fresh_directory(out):
            raise ZeroDivisionError
        assert names(out.parent) == ["out"]
        ends.append(contents(out))
        if code == 0:
            break
    assert all(end in (OLD, NEW) for end in ends), ends
    assert OLD in ends
    assert ends[-1] == NEW
    assert contents(tmp_path / "target") == OLD


def interrupted():
    raise KeyboardInterrupt


def test_ctrl_c_between_the_renames_puts_the_old_output_back(tmp_path):
    out = tmp_path / "out"
    filled(out, "abc")
    ends = []
    for step in range(40):
        code = struck(partial(renewed, out), step, interrupted)
        ends.append(contents(out))
        if code == 0 or ends[-1]["a"] == "new":
            break
        assert names(tmp_path) == ["out"]
    assert all(end == OLD for end in ends[:-1]), ends
    assert ends[-1] == NEW
    assert len(ends) > 2


def test_two_processes_may_write_the_same_output(tmp_path):
    many = "import sys; from pathlib import Path; from h2t.pipeline.base.outputs import fresh_directory\n"
    many += "for i in range(200):\n with fresh_directory(Path(sys.argv[1])) as into:\n"
    many += "  (into / 'a').write_text('a'); (into / 'b').write_text('b')\n"
    command = [sys.executable, "-c", many, str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"a": "a", "b": "b"}
    assert names(tmp_path) == ["out"]


def test_a_record_that_finds_no_room_is_not_left_in_part(tmp_path):
    record = "import resource, signal, sys; from pathlib import Path\n"
    record += "from h2t.pipeline.base.outputs import write_run_record\n"
    record += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    record += "write_run_record(Path(sys.argv[1]), {'seconds': 1.0})"
    python("-B", "-c", record, tmp_path / "record.json", cwd=tmp_path)
    assert names(tmp_path) == []
