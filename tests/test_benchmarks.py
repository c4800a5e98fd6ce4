"""Each benchmark runs tiny, and its JSON has the fields that its README promises. Nothing here looks at speed.

Streaming holds its bound of memory on a smaller cache.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

TIMING = {"median_s", "p10_s", "p90_s", "cpu_s", "rounds"}
RATIO = {"median", "p10", "p90", "cpu"}


def run(main: Callable[[list[str]], None], tmp_path: Path) -> dict:
    out = tmp_path / "result.json"
    main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(out)])
    body = json.loads(out.read_text())
    assert body["tiny"] is True
    assert {"cpu", "cores", "memory_gib", "system", "versions"} <= set(body["machine"])
    assert str(tmp_path) not in out.read_text()
    return body


def test_read_benchmark(tmp_path, capsys):
    pytest.importorskip("tensorstore")
    pytest.importorskip("h5py")
    from benchmarks.bench_read import main

    body = run(main, tmp_path)
    assert [r["gather"] for r in body["results"]] == ["iid", "window"]
    for result in body["results"]:
        assert {"case", "rows", "distinct_rows", "useful_bytes"} <= set(result)
        for timing in result["contestants"].values():
            assert set(timing) >= {*TIMING, "useful_gb_per_s"}
        peers = set(result["contestants"])
        assert {"ours", "raw", "h5py", "NumPy memmap"} <= peers
        assert {"TensorStore gather", "TensorStore async slices", "zarr-python slices"} <= peers
        assert set(result["useful_bytes_vs_raw"]) == set(result["time_vs_raw"]) == RATIO
        assert set(result["ours_times_faster_than"]) == peers - {"ours"}
    assert "zarr-python oindex" in capsys.readouterr().out


def test_synthetic_cache_is_the_same_every_time(tmp_path):
    from benchmarks.synthetic import main
    from h2t.cache.reader import open_cache

    settings = ["--rows", "60", "--map", "16,4,4", "--classes", "5", "--imbalance", "8", "--experts", "2"]
    for name in ("a", "b"):
        main([str(tmp_path / name), *settings, "--shard-bytes", "40000"])
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with open_cache(tmp_path / "a") as cache:
        maps = cache.read(range(60))
        assert 0.4 < (maps == 0).mean() < 0.6
        assert (maps >= 0).all()
        assert not np.array_equal(maps, cache.read(range(60), expert=1))
        assert set(cache.rows["statistics"].to_pylist()) == {"stage1"}
        assert set(cache.rows["split"].to_pylist()) == {"train", "test"}


def test_class_counts_are_exponential_and_complete():
    from benchmarks.synthetic import class_counts

    counts = class_counts(10_000, 10, 100)
    assert counts.sum() == 10_000
    assert (np.diff(counts) < 0).all()
    assert 80 < counts[0] / counts[-1] <= 100
    assert class_counts(4, 4, 100).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="at least one per class"):
        class_counts(3, 4, 1)


def test_window_draws_are_balanced_over_classes():
    from benchmarks.bench_read import DONORS, RECEIVERS, window_rows

    labels = np.repeat([0, 1, 2], [900, 90, 10])
    rows = window_rows(labels, 40, np.random.default_rng(0)).reshape(40, RECEIVERS + DONORS)
    shares = np.bincount(labels[rows[:, :RECEIVERS]].ravel()) / (40 * RECEIVERS)
    assert np.abs(shares - 1 / 3).max() < 0.03
    donors = rows[:, RECEIVERS:].ravel()
    assert len(np.unique(donors[: len(labels)])) == len(labels)


def test_results_have_one_record_a_line():
    from benchmarks.measure import RESULTS, records

    body = {"b": [1, 2], "a": [{"x": 1}, {"x": "y" * 300}], "empty": [], "none": None}
    assert records(body).splitlines() == [
        "{",
        ' "a": [',
        '  {"x": 1},',
        f'  {{"x": "{"y" * 300}"}}',
        " ],",
        ' "b": [1, 2],',
        ' "empty": [],',
        ' "none": null',
        "}",
    ]
    for path in RESULTS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert text == records(json.loads(text)) + "\n", path.name


def test_evaluate_benchmark(tmp_path, capsys, starts_warm):
    from benchmarks.bench_evaluate import STEPS, main

    body = run(main, tmp_path)
    assert body["steps"].keys() == {"write", *STEPS}
    assert all(step["peak_bytes"] > 0 and step["cpu_s"] > 0 for step in body["steps"].values())
    assert body["page_bytes"] > 0
    assert list((tmp_path / "data").iterdir()) == []
    assert "| evaluate" in capsys.readouterr().out


def test_growth_benchmark(tmp_path, capsys, starts_warm):
    from benchmarks import bench_growth

    out = tmp_path / "growth.json"
    bench_growth.main(["--tiny", "--axis", "heads", "--out", str(out)])
    points = json.loads(out.read_text())["axes"]["heads"]["points"]
    assert [p["heads"] for p in points] == list(bench_growth.AXES["heads"][:2])
    assert all(p["cpu_ms"] > 0 and p["step_bytes"] > 0 for p in points)
    assert "heads" in capsys.readouterr().out
    assert out.with_suffix(".svg").read_text().startswith("<")


@pytest.mark.parametrize("point", [{"heads": 300, "channels": 512}, {"heads": 100, "classes": 300}])
def test_what_is_planned_for_a_step_is_above_its_peak_and_not_far(tmp_path, point):
    """Fusion folded into the weights, and with many classes not; logits in one block, and in several."""
    from benchmarks import bench_growth

    asked = {**bench_growth.BASE, "rows": 1000, **point}
    bench_growth.features(asked["channels"], asked["classes"], asked["rows"], tmp_path)
    command = [sys.executable, "-m", "benchmarks.bench_growth", "--data", str(tmp_path), "--point", json.dumps(asked)]
    found = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parent.parent).stdout
    )
    assert found["step_bytes"] < found["planned_bytes"] < 2.5 * found["step_bytes"]


def test_peers_benchmark(tmp_path, capsys):
    from benchmarks import bench_peers
    from benchmarks.synthetic import write_synthetic

    write_synthetic(tmp_path / "cache", 400, (8, 1, 1), classes=4)
    bench_peers.main(["--tiny", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "peers.json")])
    body = json.loads((tmp_path / "peers.json").read_text())
    found = body["contestants"]
    assert found.keys() == {"ours", "PyTorch loop", "scikit-learn loop", "scikit-learn joblib"}
    assert all(c["classifiers"] == 4 and c["cpu"] > 0 for c in found.values())
    assert found["scikit-learn loop"]["mean_top1"] == found["scikit-learn joblib"]["mean_top1"]
    assert body["grid"]["classifiers"] == 2 * 2 * 2 * 2
    assert (body["grid"]["twice"], body["grid"]["once"]) == (8, 2)
    assert "PyTorch loop" in capsys.readouterr().out


def test_streaming_a_cache_ten_times_the_budget_does_not_hold_it(tmp_path, starts_warm):
    """384 MiB of maps, a budget of 38 MiB: the whole cache in memory would break the bound."""
    from benchmarks.bench_scale import step
    from benchmarks.synthetic import write_synthetic

    rows, size = 49_152, 49_152 * 8192
    write_synthetic(tmp_path / "c", rows, (64, 8, 8))
    given = ["--budget", str(size // 10), "--steps", "80"]
    found = json.loads(step(["benchmarks.epoch_run", "stream", str(tmp_path / "c"), *given], size, {})[1])
    assert found["peak_beyond_baseline_bytes"] < size // 10 + 150 * 2**20
    assert found["bytes_read"] < found["bytes_used"]
    assert found["hit_rate"] == pytest.approx(found["expected_hit_rate"], abs=0.02)


def test_scale_benchmark(tmp_path, capsys, starts_warm):
    from benchmarks.bench_scale import main

    body = run(main, tmp_path)
    steps = body["steps"]
    ways = {"read", "read from S3", "read from S3 again", "stream", "stream from S3", "stream from S3 again"}
    assert set(steps) == {"write", "verify", "pool", "bare read", *ways}
    assert all(step["seconds"] > 0 and step["peak_bytes"] > 0 for step in steps.values())
    assert body["promises"]["memory_within_bound"]
    assert body["promises"]["same_weights"]
    assert steps["stream"]["requests"] == steps["read"]["requests"] == 0
    assert body["stream"]["bare read"]["bytes_read"] >= body["case"]["bytes"]
    assert body["stream"]["read"]["bytes_read"] == body["stream"]["stream"]["bytes_read"]
    assert 0 < steps["stream from S3 again"]["bytes_sent"] < steps["stream from S3"]["bytes_sent"]
    assert list((tmp_path / "data").iterdir()) == []
    assert "| verify " in capsys.readouterr().out


def test_remote_benchmark(tmp_path, capsys):
    from benchmarks.bench_remote import WAYS, main

    main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")])
    body = json.loads((tmp_path / "result.json").read_text())
    turns = {turn["way"]: turn for turn in body["turns"]}
    assert set(turns) == set(WAYS)
    assert turns["s3"]["bytes"] == turns["local"]["bytes"] < turns["bare"]["bytes"]  # which fetches checksums, too
    assert list((tmp_path / "data").iterdir()) == []
    assert "| s3 " in capsys.readouterr().out
