"""Every piece of `make gpu` at tiny size on the CPU: its JSON has what it promises. Nothing looks at speed."""

import json

import pytest
from test_paper import TINY, files  # noqa: F401

from benchmarks import gpu

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("piece", [p for p in gpu.PIECES if p != "tests"])
def test_a_piece_runs_in_small(tmp_path, piece, files):  # noqa: F811
    """All but `tests`, whose tests would be skipped."""
    paper = ["--paper", "--only", "ce_mixup", "--parquet", *files, *(a for s in TINY for a in ("--set", s))]
    gpu.main([piece, "--tiny", "--device", "cpu", "--out", str(tmp_path), "--data", str(tmp_path / "data"), *paper])
    body = json.loads((tmp_path / f"gpu-{piece}.json").read_text())
    assert (body["piece"], body["device"], body["tiny"]) == (piece, "cpu", True)
    assert "error" not in body
    assert str(tmp_path) not in json.dumps(body)
    expected = {
        "extract": {"of_bare", "bound", "holds"},
        "stack": {"stack_over_one_head", "bandwidth", "bound", "holds"},
        "stage2": {"seconds", "steps", "finite", "bound", "holds"},
        "maps": {"seconds", "pool", "finite"},
        "table6": {"rows"},
    }
    assert expected[piece] <= set(body)
    if piece == "table6":
        assert {"DR", "DR + H2T"} <= {row["row"] for row in body["rows"]}


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDS", {"stack": ("no_such_module",)})
    with pytest.raises(SystemExit, match=r"error: packages are missing: stack needs no_such_module; run make"):
        gpu.main(["stack", "--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_piece_that_fails_is_told_and_the_others_run(tmp_path, monkeypatch, capsys):
    def fails(at):
        raise gpu.UserError("failed: it")

    monkeypatch.setattr(gpu, "PIECES", {"one": fails, "two": lambda at: {"fine": True}})
    with pytest.raises(SystemExit, match="failed, or missed its bound: one"):
        gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu-one.json").read_text())["error"] == "failed: it"
    assert json.loads((tmp_path / "gpu-two.json").read_text())["fine"] is True
    assert "two: done: yes" in capsys.readouterr().out
