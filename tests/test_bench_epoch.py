"""The benchmark of a large cache runs tiny; streaming holds its memory bound on a smaller cache."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_streaming_a_cache_ten_times_the_budget_does_not_hold_it(tmp_path, starts_warm):
    """384 MiB of maps, a budget of 38 MiB: the whole cache in memory would break the bound."""
    from benchmarks.synthetic import write_synthetic

    rows, size = 49_152, 49_152 * 8192
    write_synthetic(tmp_path / "c", rows, (64, 8, 8))
    command = ["stream", str(tmp_path / "c"), "--budget", str(size // 10), "--steps", "80"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.epoch_run", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["peak_beyond_baseline_bytes"] < size // 10 + 200 * 2**20
    assert found["bytes_read"] < found["bytes_used"]
    assert found["hit_rate"] == pytest.approx(found["expected_hit_rate"], abs=0.02)


def test_scale_benchmark(tmp_path, capsys, starts_warm):
    from benchmarks.bench_scale import main

    main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")])
    body = json.loads((tmp_path / "result.json").read_text())
    assert str(tmp_path) not in json.dumps(body)
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
