"""The benchmark of streaming from S3 runs tiny: the figures are there, and the heads are those from the disk."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_remote_benchmark(tmp_path, capsys):
    from benchmarks.bench_remote import LOCAL, WARM, main

    main(["--tiny", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "result.json")])
    body = json.loads((tmp_path / "result.json").read_text())
    assert str(tmp_path) not in json.dumps(body)
    assert body["promises"]["same_weights"]
    assert set(body["promises"]["warm_over_local"]) == {"median", "p10", "p90"}
    results = body["results"]
    assert results[LOCAL]["requests"] == 0
    assert 0 < results[WARM]["bytes_sent"] < results["S3, blocks kept, first epoch"]["bytes_sent"]
    assert all(line["bytes_used"] > 0 for line in results.values())
    assert "sent / used" in capsys.readouterr().out
