"""A table of the paper by one command: complete parameters, what is finished is left alone, one entry a row."""

import json

import pytest
from pipeline_builders import ROOT, one_line
from small_cifar import write_images

from benchmarks import gpu, paper
from h2t.pipeline.base import params
from h2t.pipeline.inspection import settings

TINY = [
    "device=cpu",
    "prepare.imbalance.ratio=12.0",
    "backbones.ce_mixup.arch=resnet20",
    "backbones.ce_mixup.epochs=1",
    "extract.batchnorm_passes=2",
    "hosts.dr.optimiser.epochs=1",
    "hosts.mislas.optimiser.epochs=1",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train.parquet", 12, 0)
    write_images(folder / "test.parquet", 3, 1)
    return [str(folder / "train.parquet"), str(folder / "test.parquet")]


@pytest.mark.parametrize("table", paper.PUBLISHED)
def test_every_table_has_complete_parameters_and_its_published_rows(table):
    values = paper.parameters(table)
    hosts = values["hosts"]
    for name, host in hosts.items():
        assert host["grid"] == {"ratio": [0.0] if name == "ldam_drw" else [0.0, 0.3], "seed": [0, 1, 2, 3, 4]}
    rows = {r for h in hosts if h in paper.ROWS for r in (paper.ROWS[h], f"{paper.ROWS[h]} + H2T")}
    rows |= {paper.STAGE_ONE_ROWS[h] for h in hosts if h in paper.STAGE_ONE_ROWS}
    assert set(paper.PUBLISHED[table]) <= rows
    text = (ROOT / "presets" / f"{paper.TABLES[table]}.yaml").read_text(encoding="utf-8")
    assert f"DR {paper.PUBLISHED[table]['DR']:.2f}" in " ".join(text.split())  # as the preset's header has it


def test_other_objectives_have_a_line_for_stage_one_of_each(tmp_path, files):
    tiny = [*TINY, "backbones.focal.arch=resnet20", "backbones.focal.epochs=1", "hosts.focal.optimiser.epochs=1"]
    tiny = [line for line in tiny if "ce_mixup" not in line and "hosts.dr" not in line and "hosts.mislas" not in line]
    values = paper.parameters("objectives", ["focal"], parquet=files, overrides=tiny)
    place = tmp_path / "objectives"
    entries = paper.Reproduction("objectives", values, place, {"focal": 1}).run(tmp_path / "paper.json")
    assert [e["row"] for e in entries] == ["focal, stage I", "focal", "focal, statistics as with H2T", "focal + H2T"]
    stage1 = json.loads((place / "evaluate/focal/metrics.json").read_text())["stage1"]
    assert entries[0]["top1"] == round(stage1["top1"], 2)


def test_a_table_from_images_to_figures_and_again(tmp_path, files, capsys):
    values = paper.parameters("6-100", ["ce_mixup"], parquet=files, overrides=TINY)
    results, place = tmp_path / "paper.json", tmp_path / "data/paper/6-100"
    entries = paper.Reproduction("6-100", values, place, {"ce_mixup": 1}).run(results)
    rows = ["CE", "DR", "DR, statistics as with H2T", "DR + H2T", "MiSLAS", "MiSLAS + H2T"]
    assert [e["row"] for e in entries] == rows
    assert [e["published"] for e in entries] == [70.70, 79.15, None, 82.87, 82.12, 83.23]
    assert all(0 <= e["top1"] <= 100 and e["device"] == "cpu" and e["backbone_epochs"] == 1 for e in entries)
    for host, with_h2t in (("dr", entries[3]), ("mislas", entries[5])):
        stated = json.loads((place / "evaluate" / host / "metrics.json").read_text())["difference"]
        assert with_h2t["gain"] == {k: stated[k] for k in ("top1", "head", "medium", "tail")}
        told, of_top1 = paper.gains([with_h2t]).splitlines()[-1], stated["top1"]
        same = of_top1["verdict"] == "identical"
        assert ("| +0.00 identical |" if same else f"[{of_top1['low']:+.2f}, {of_top1['high']:+.2f}]") in told
    assert [e["row"] for e in entries if "gain" in e] == ["DR + H2T", "MiSLAS + H2T"]
    assert paper.gains(entries).splitlines()[-1].endswith("| +1.11 |")  # 83.23 - 82.12
    assert entries[0]["seeds"] == []
    assert entries[1]["seeds"] == [0, 1, 2, 3, 4]
    kept = json.loads(results.read_text())
    assert paper.gains([e for e in kept if e["row"] == "DR + H2T"]) == paper.gains([entries[3]])
    assert sorted(e["row"] for e in kept) == sorted(rows)
    assert params.load(place / "params.yaml") == values
    capsys.readouterr()
    made = {p: p.stat().st_mtime_ns for p in place.rglob("*.safetensors")}
    assert paper.Reproduction("6-100", values, place, {"ce_mixup": 1}).run(results) == entries
    said = capsys.readouterr().out
    assert said.count("finished before") == 6  # prepare, stage I, and twice the heads and their evaluation
    assert "already holds this cache" in said
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert json.loads(results.read_text()) == kept
    assert "| DR + H2T | 1 |" in paper.shown(entries)
    assert "| mislas | with H2T |" in (place / "report/results.md").read_text(encoding="utf-8")
    # The same table as a piece of `make gpu`, for which all is finished, too.
    options = ["--only", "ce_mixup", "--parquet", *files, *(word for line in TINY for word in ("--set", line))]
    given = ["table6", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--data", str(tmp_path / "data")]
    gpu.main([*given, "--paper", *options])
    body = json.loads((tmp_path / "gpu-table6.json").read_text())
    assert "error" not in body
    assert sorted(row["row"] for row in body["rows"]) == sorted(rows)
    assert str(tmp_path) not in json.dumps(body)
    assert {p: p.stat().st_mtime_ns for p in made} == made


def test_the_digits_keep_the_grids_of_their_preset():
    values = paper.parameters("digits")
    assert set(values["hosts"]) == {*paper.ROWS} - {"ride"}  # it comes in two forms
    preset = settings.complete(params.load(ROOT / "presets/digits.yaml"), "hosts")
    assert {n: h["grid"] for n, h in values["hosts"].items()} == {n: h["grid"] for n, h in preset.items()}


def test_other_settings_are_not_taken_for_finished(tmp_path):
    calls = []

    def work():
        calls.append(1)
        (tmp_path / "out").touch()

    for about in ({"lr": 0.1}, {"lr": 0.1}, {"lr": 0.2}):
        paper.unless_done(tmp_path / "runs/record.json", tmp_path / "out", about, work)
    assert len(calls) == 2
    (tmp_path / "out").unlink()
    paper.unless_done(tmp_path / "runs/record.json", tmp_path / "out", {"lr": 0.2}, work)
    assert len(calls) == 3


def test_a_finished_stage_one_can_be_given():
    files, epochs = paper.weights_of(["ce_mixup=a@b/x.safetensors@100", "gcl=y.safetensors"])
    assert files == {"ce_mixup": "a@b/x.safetensors", "gcl": "y.safetensors"}
    assert epochs == {"ce_mixup": 100, "gcl": None}
    values = paper.parameters("6-100", ["ce_mixup"], weights=files)
    assert values["backbones"] == {"ce_mixup": {"arch": "resnet32", "objective": "ce", "weights": files["ce_mixup"]}}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: paper.parameters("5"), "table: must be one of 1-200"),
        (lambda: paper.parameters("6-100", ["ce"]), "backbone: must be one of ce_mixup"),
        (lambda: paper.weights_of(["ce_mixup"]), "--weights ce_mixup: must read NAME=FILE"),
        (lambda: paper.parameters("6-100", overrides=["prepare.x.y=1"]), "no section 'prepare.x'"),
    ],
)
def test_what_does_not_fit_is_one_line(call, text):
    with one_line(text):
        call()


def test_the_page_of_table_6_has_every_row_of_the_record():
    page = (ROOT / "docs" / "table6.md").read_text(encoding="utf-8")
    rows = [e for e in json.loads(paper.RESULTS.read_text(encoding="utf-8")) if e["table"].startswith("6-")]
    assert len(rows) >= 23
    for entry in rows:
        section = page.split(f"## Imbalance ratio {entry['table'][2:]}\n")[1].split("\n## ")[0]
        starts = (f"| {entry['row']} |", f"| {entry['row']} (")
        [line] = [line for line in section.splitlines() if line.startswith(starts)]
        figures, published = [entry[k] for k in paper.FIGURES], entry["published"]
        if published is not None:
            figures += [published, entry["top1"] - published]
        assert [float(c) for c in line.split("|")[2 : 2 + len(figures)]] == pytest.approx(figures, abs=0.0051)
    with_h2t = [entry for entry in rows if "gain" in entry]
    assert len(with_h2t) == 12
    for entry in with_h2t:
        assert paper.gains([entry]).splitlines()[-1] in page
