"""The arena: every method on one cache, tuned alike, one table; a method of one's own takes part."""

import json

import pytest
import yaml
from pipeline_builders import ROOT, make_backbone_dir, make_stage2_cache, one_line, pooled_copy
from test_docs_adding import install

from benchmarks import arena, results
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError

TINY = [
    "device=cpu",
    "host_defaults.folds=2",
    "host_defaults.optimiser.epochs=1",
    "host_defaults.grid.lr=[0.02, 0.2]",
    "host_defaults.grid.seed=[0, 1, 2]",
]
METHODS = ["dr", "smote", "pair_mixup", "tau_norm"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with classes that its features tell apart, and its backbone."""
    folder = tmp_path_factory.mktemp("arena")

    def apart(maps, rows):
        for row, label in enumerate(rows["label"].to_pylist()):
            maps[0][row, label] += 1

    digest = make_backbone_dir(folder / "backbone", classes=3)
    counts = {"counts": (30, 9, 4), "val": 0, "test": 20}
    cache = make_stage2_cache(folder / "cache", shape=(64, 2, 2), backbone=digest, change=apart, **counts)
    return cache, folder / "backbone"


def test_a_method_of_ones_own_appears_beside_the_others(tmp_path, made, monkeypatch, capsys):
    """Written by docs/adding-a-host.md; tuned, trained and ranked like any other."""
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path / "plugins"))
    monkeypatch.setattr(arena, "STEP_EPOCHS", (1, 1, 50))  # three epochs of so few images are lost in noise
    _, name = install(ROOT / "docs" / "adding-a-host.md", tmp_path / "plugins")
    assert name in arena.parameters()["hosts"]
    values = arena.parameters([*METHODS, name], TINY)
    values["hosts"]["reslt"] = {"host": "reslt", "backbone": "ce_mixup", "pool": "moments"}  # not for this backbone
    lines = arena.Arena(values, *made, tmp_path / "out").run()
    assert "reslt: left out: hosts.reslt: classifier: must be of the same kind" in capsys.readouterr().out
    assert {(line["method"], line["h2t"]) for line in lines} == {
        *((method, words) for method in ("dr", "smote", "pair_mixup", name) for words in ("without", "with")),
        ("tau_norm", "without"),
    }
    assert [line["top1"] for line in lines] == sorted((line["top1"] for line in lines), reverse=True)
    assert lines[0]["rank"] == 1
    by_name = {(line["method"], line["h2t"]): line for line in lines}
    assert by_name["dr", "without"]["difference"] is None
    assert by_name[name, "with"]["difference"]["covers"] == ["seeds", "images"]
    assert by_name["dr", "with"]["chosen"]["lr"] in (0.02, 0.2)
    assert by_name["tau_norm", "without"]["chosen"]["loss.tau"] in (0.25, 0.5, 0.75, 1.0)
    assert by_name["smote", "with"]["needs"] == "training features"
    assert by_name["pair_mixup", "with"]["needs"] == "a second sampler (instance)"
    for method in METHODS[:3]:
        metrics = json.loads((tmp_path / "out/evaluate" / method / "metrics.json").read_text())
        assert by_name[method, "with"]["gain"] == metrics["difference"]["top1"]
        assert by_name[method, "without"]["gain"] is None
        assert by_name[method, "with"]["step_ms"] == by_name[method, "without"]["step_ms"] > 0
    assert by_name["tau_norm", "without"]["step_ms"] is None
    assert json.loads((tmp_path / "out/arena.json").read_text())["left_out"].keys() == {"reslt"}
    text = (tmp_path / "out/arena.md").read_text()
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
    assert {row[header.index("step / dr's")] for row in rows if row[2] == "dr"} == {"1.0"}
    assert len(text.splitlines()) == 2 + len(lines)
    assert f"| {name} " in text
    assert arena.Arena(values, *made, tmp_path / "out").run() == lines
    assert capsys.readouterr().out.count("finished before") == 5


def test_every_built_in_method_of_one_backbone_is_in_the_preset():
    entries = yaml.safe_load((ROOT / "presets/arena.yaml").read_text(encoding="utf-8"))["hosts"].values()
    needs_its_own_stage_one = {"ride", "reslt"}
    assert {entry["host"] for entry in entries} == set(plugins.names("hosts")) - needs_its_own_stage_one
    assert {entry["receiver"] for entry in entries if "receiver" in entry} == set(plugins.names("samplers"))


def test_a_method_whose_step_cannot_be_measured_is_left_out(tmp_path, made, monkeypatch):
    def fails(*_):
        raise UserError("hosts.dr: diverged")

    monkeypatch.setattr(arena.Arena, "_step", fails)
    assert not arena.Arena(arena.parameters(["dr"], TINY), made[0], made[1], tmp_path / "out").run()
    assert json.loads((tmp_path / "out/arena.json").read_text())["left_out"] == {"dr": "hosts.dr: diverged"}


def test_an_unknown_method_is_one_line():
    with one_line(match="--only drr: must be one of dr, crt"):
        arena.parameters(["drr"])


def test_a_method_that_the_cache_cannot_serve_is_named_without_a_path(tmp_path, made):
    pooled_copy(tmp_path / "pooled", made[0])
    assert not arena.Arena(arena.parameters(["cam_split"], TINY), tmp_path / "pooled", made[1], tmp_path / "out").run()
    left_out = json.loads((tmp_path / "out/arena.json").read_text())["left_out"]
    assert left_out["cam_split"].startswith("hosts.cam_split: CACHE: host cam_split needs whole maps")
    assert str(tmp_path) not in left_out["cam_split"]


def test_every_record_has_a_table():
    assert sorted(results.ARENAS) == sorted(path.stem for path in (ROOT / "benchmarks/results").glob("arena*.json"))


@pytest.mark.parametrize("record", results.ARENAS)
def test_the_tables_of_the_results_come_from_the_committed_record(record):
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert results.arena_text(results.recorded(record)) in text


@pytest.mark.parametrize("record", ["arena.json", "arena-imagenet-96.json"])
def test_the_widest_gains_hold_the_paired_ones(record):
    """These records have both: paired gains, and all differences from DR."""
    lines = json.loads((ROOT / "benchmarks/results" / record).read_text())["lines"]
    widest = arena.widest_gains(lines)
    paired = {line["method"]: line["gain"] for line in lines if line["gain"]}
    assert widest.keys() == paired.keys()
    for method, gain in paired.items():
        assert widest[method]["mean"] == pytest.approx(gain["mean"]), method
        assert widest[method]["low"] <= gain["low"] + 1e-9, method
        assert widest[method]["high"] >= gain["high"] - 1e-9, method
    assert widest["dr"]["low"] == pytest.approx(paired["dr"]["low"])  # DR's gain is its difference: nothing is added


def test_a_record_without_paired_gains_shows_the_widest_ones():
    lines = json.loads((ROOT / "benchmarks/results/arena.json").read_text())["lines"]
    text = arena.table([{**line, "gain": None} for line in lines])
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
    found = {(row[2], row[3]): row[header.index("H2T's gain, at the widest")] for row in rows}
    assert found["oltr", "with"] == "+2.36 [+1.52, +3.20]"
    assert found["oltr", "without"] == found["ncm", "without"] == "–"
    assert "at the widest" not in arena.table(lines)
