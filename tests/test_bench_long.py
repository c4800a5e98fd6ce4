"""The benchmark of long runs, tiny: what it counts stays the same, and its judge sees what grows."""

import json

import pytest

from benchmarks.bench_long import SAMPLES, Sample, judged, main


def test_long_benchmark(tmp_path, capsys):
    main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "long.json")])
    body = json.loads((tmp_path / "long.json").read_text())
    assert str(tmp_path) not in json.dumps(body)
    run = body["long_run"]
    assert run["residency"] == "stream"
    assert run["steps"] == 16 * run["epochs"]
    assert [s["epoch"] for s in run["samples"]] == list(range(run["epochs"]))
    assert run["expected_hit_rate"] > 0.1
    assert run["hit_rate"] == pytest.approx(run["expected_hit_rate"], abs=0.05)
    assert run["promises"]["files_do_not_grow"]
    assert run["promises"]["threads_do_not_grow"]
    assert body["many_shards"]["shards"] == 50
    assert body["many_shards"]["median_s"].keys() == {"info", "open_cache"}
    assert "50 shards: info" in capsys.readouterr().out


def samples(*, per_epoch=0.0, at_once=0, files=0.0, threads=0.0) -> list[Sample]:
    """1,000 epochs in which something grows: bytes each epoch, or `at_once` from the middle on."""
    found = []
    for i in range(SAMPLES):
        noise = (i * 37 % 11) * 100_000  # an allocator's, 1 MB
        warm = 50_000_000 * min(1, i / 5)
        resident = 400_000_000 + warm + noise + per_epoch * 10 * i + (at_once if i > SAMPLES // 2 else 0)
        found.append(Sample(10 * i, float(i), int(resident), 12 + int(files * i), 9 + int(threads * i)))
    return found


@pytest.mark.parametrize(
    ("growing", "broken"),
    [
        ({}, set()),
        ({"per_epoch": 1_000}, set()),
        ({"per_epoch": 64 * 64 * 4}, {"memory_does_not_grow"}),  # one batch of vectors kept each epoch
        ({"at_once": 10 * 2**20}, {"memory_does_not_grow"}),
        ({"files": 0.05}, {"files_do_not_grow"}),
        ({"threads": 0.011}, {"threads_do_not_grow"}),  # one, late
        ({"threads": 0.1}, {"threads_do_not_grow"}),  # one every 100 epochs
    ],
)
def test_what_grows_is_seen(growing, broken):
    promises = judged(samples(**growing))["promises"]
    assert {name for name, held in promises.items() if not held} == broken
