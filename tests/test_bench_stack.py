"""The stack benchmark runs tiny, and its JSON has what docs and README quote. Nothing here looks at speed."""

import json


def test_stack_benchmark(tmp_path, capsys):
    from benchmarks.bench_stack import main

    main(["--tiny", "--channels", "8", "--classes", "4", "--out", str(tmp_path / "stack.json")])
    body = json.loads((tmp_path / "stack.json").read_text())
    assert body["tiny"] is True
    assert set(body["contestants"]) == {"stack", "singles", "one head"}
    assert {"median", "p10", "p90", "cpu"} <= set(body["stack_over_singles"])
    assert body["distance_to_heads_alone"] <= 1e-5
    assert "stack_over_singles" in capsys.readouterr().out
