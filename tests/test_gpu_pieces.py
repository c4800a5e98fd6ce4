"""Every piece of `make gpu` at tiny size on the CPU: its JSON has what it promises. Nothing looks at speed."""

import json

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.slow


EXPECTED = {
    "extract": {"networks", "bound", "holds"},
    "stack": {"contestants", "stack_over_singles", "stack_over_one_head", "bandwidth", "bound", "holds"},
    "stage2": {"seconds", "steps", "finite", "bound", "holds"},
    "maps": {"seconds", "pool", "finite"},
}


@pytest.mark.parametrize("piece", EXPECTED)
def test_a_piece_runs_in_small(tmp_path, piece, starts_warm):
    """All but `tests`, whose tests would be skipped, and `table6`, which test_paper.py runs."""
    data = tmp_path / "data"
    gpu.main([piece, "--tiny", "--device", "cpu", "--out", str(tmp_path), "--data", str(data)])
    body = json.loads((tmp_path / f"gpu-{piece}.json").read_text())
    assert (body["piece"], body["device"], body["tiny"]) == (piece, "cpu", True)
    assert "error" not in body
    assert str(tmp_path) not in json.dumps(body)
    assert EXPECTED[piece] <= set(body)
    if piece == "extract":
        for found in body["networks"].values():
            assert set(found["seconds"]) == {"bare", "ours", "start"}
            assert set(found["of_bare"]) == {"median", "p10", "p90", "cpu"}
        assert set(body["networks"]) == {"ResNet-50", "ViT-B/16"}
        assert [p.name for p in (data / "bench_extract").iterdir()] == ["backbone"]
    if piece == "stack":
        assert set(body["contestants"]) == {"stack", "singles", "one head"}
        assert {"median", "p10", "p90", "cpu"} <= set(body["stack_over_singles"])
        assert body["distance_to_heads_alone"] <= 1e-5


def test_every_piece_is_run():
    assert set(gpu.PIECES) == {*EXPECTED, "tests", "table6"}


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
