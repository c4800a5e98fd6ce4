"""Tables of docs/results.md from a small cache, their numbers recomputed another way; --compare and --runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pipeline_builders import ROOT, accepted, refused, write_params
from report_builders import make_evaluated
from scipy.stats import ttest_rel

from benchmarks import analyses, online_results, results_200, tables
from benchmarks.results import grid_now, online_tables, peers_text
from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.inspection import settings
from h2t.pipeline.reporting import comparison, files
from h2t.pipeline.reporting.results import FIGURES, load_result, rows_apart
from h2t.pipeline.stages import report, train_classifier

GRID = {"donor": ["instance", "balanced"], "selection": ["random", "first"]}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return make_evaluated(tmp_path_factory.mktemp("results"), grid=GRID)


def recomputed(folder: Path) -> pd.DataFrame:
    heads = pd.read_parquet(folder / "dr" / "heads.parquet")
    return heads[(heads.split == "test") & (heads.statistics == "mixture")]


def test_table_of_donors_from_a_small_cache(evaluated):
    text = tables.variant_table(load_result("dr", evaluated / "dr"), 0.3, {}, "")
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    heads = recomputed(evaluated)
    usual = heads[(heads.ratio == 0.3) & (heads.donor == "instance") & (heads.selection == "random")]
    assert [line[0] for line in lines] == [
        "without H2T", "instance, random", "balanced, first", "balanced, random", "instance, first",
    ]  # fmt: skip
    for label, *figures, apart in lines[1:]:
        donor, selection = label.split(", ")
        mine = heads[(heads.ratio == 0.3) & (heads.donor == donor) & (heads.selection == selection)]
        for figure, cell in zip(("top1", "head", "medium", "tail"), figures, strict=True):
            assert cell == f"{np.mean(mine[figure]):.2f} ± {np.std(mine[figure], ddof=1):.2f}"
        if label != "instance, random":
            found = [float(n) for n in re.findall(r"[+-]\d+\.\d+", apart)]
            each = mine.top1.to_numpy() - usual.top1.to_numpy()
            interval = ttest_rel(mine.top1.to_numpy(), usual.top1.to_numpy()).confidence_interval(0.95)
            assert found[0] == pytest.approx(each.mean(), abs=0.0051)
            assert found[1] < found[0] < found[2]
            if each.std():  # over seeds and images, so not narrower than over seeds
                assert found[2] - found[1] > 0.5 * (interval.high - interval.low)
            assert apart.endswith("too close to tell") == (found[1] <= 0 <= found[2])


def test_a_report_has_the_same_lines_of_other_donors(evaluated):
    result = load_result("dr", evaluated / "dr")
    ours, docs = (cells_of(t) for t in (files.variants_table([result]), tables.variant_table(result, 0.3, {}, "")))
    assert result.metrics["with_h2t"]["ratio"] == 0.3
    assert [[f"{line[1]}, {line[2]}", *line[4:8], line[9]] for line in ours] == docs[2:]
    assert files.variants_table([replace(result, tables={**result.tables, "heads": result.heads[:3]})]) is None


def test_ratio_table_has_every_ratio(evaluated):
    lines = tables.ratio_table(load_result("dr", evaluated / "dr")).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["0", "0.3", "0.6"]
    assert lines[0].count("–") == 2


def test_an_analysis_runs_by_one_command_and_again_to_the_same_table(tmp_path, evaluated):
    record = evaluated.parent / "runs" / "extract" / "b0.json"
    record.parent.mkdir(parents=True)
    about = json.loads((evaluated / "dr" / "about.json").read_text())
    passes = {"forward_images": 100, "forward_seconds": 2.0, "forward_cpu": 3.0, "kept_shards": 0, "taken": 0}
    record.write_text(json.dumps({"seconds": 4.0, "fingerprint": about["host"]["cache"], **passes}))
    values = {
        "device": "cpu",
        "hosts": {
            "only": {
                "host": "dr",
                "backbone": "b0",
                "optimiser": {"epochs": 1, "batch_size": 16},
                "grid": {"ratio": [0.0, 0.5], "seed": [0, 1]},
            }
        },
    }
    found_tables = []
    for name in ("a", "b"):
        analyses.analyse(values, evaluated.parent, tmp_path / name)
        found = tables.load_analysis(tmp_path / name)
        assert found.runs["only"]["heads"] == 4
        assert "4 heads" in found.made
        assert f"load average up to {found.runs['only']['load']:g}" in found.made
        assert "2 different runs with donors" in (tmp_path / name / "report" / "index.html").read_text()
        found_tables.append(
            (tables.ratio_table(found["only"]), (tmp_path / name / "report" / "results.md").read_bytes())
        )
    assert found_tables[0] == found_tables[1]


@pytest.mark.parametrize("path", sorted((ROOT / "presets" / "analyses").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_analysis_is_complete(path):
    for name, host in settings.complete(params.load(path), "hosts").items():
        made = params.build(train_classifier.Params, f"hosts.{name}", host)
        assert len(made.grid.seed) == 5 or plugins.load("hosts", made.host).Host.fitted


def test_grid_has_660_heads():
    host = settings.complete(params.load(ROOT / "presets" / "analyses" / "grid.yaml"), "hosts")["grid"]
    assert len(train_classifier.heads_of(params.build(train_classifier.Params, "hosts.grid", host).grid)) == 660


def cells_of(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_table_of_guesses_from_the_predictions(evaluated):
    lines = cells_of(tables.guesses_table({"r": load_result("dr", evaluated / "dr")}))
    assert [line[1] for line in lines] == ["stage I", "without H2T", "with H2T"]
    heads = recomputed(evaluated)
    numbers = {
        "stage I": [-1],
        "without H2T": list(heads[heads.ratio == 0].drop_duplicates("seed").number),
        "with H2T": list(
            heads[(heads.ratio == 0.3) & (heads.donor == "instance") & (heads.selection == "random")].number
        ),
    }
    predictions = pd.read_parquet(evaluated / "dr" / "predictions.parquet")
    for _, row, *shares in lines:
        mine = predictions[predictions.number.isin(numbers[row]) & (predictions.label == 3)].predicted.to_numpy()
        expected = [100 * np.mean(mine == j) for j in range(4)]
        assert [float(s) for s in shares[3:]] == pytest.approx(expected, abs=0.051)
        groups = [expected[0], expected[1] + expected[2], expected[3]]
        assert [float(s) for s in shares[:3]] == pytest.approx(groups, abs=0.051)


def test_recipes_across_and_what_fusion_adds(evaluated):
    result = load_result("dr", evaluated / "dr")
    heads = recomputed(evaluated)
    usual = heads[((heads.donor == "instance") & (heads.selection == "random")) | (heads.ratio == 0)]
    means = usual.groupby("ratio").top1.mean()
    lines = cells_of(tables.ratios_table({"a": result, "b": result}, "top1"))
    assert [line[0] for line in lines] == ["0", "0.3", "0.6"]
    assert [float(line[1].split(" ")[0]) for line in lines] == pytest.approx(list(means), abs=0.0051)
    assert all(line[1] == line[2] for line in lines)
    [line] = cells_of(tables.fusion_table({"a": result}))
    assert float(line[1].split(" ")[0]) == pytest.approx(means[0.3] - means[0.0], abs=0.0051)
    assert float(line[3]) == means.idxmax()


def test_what_part_is_fusion_and_what_other_seeds_change(evaluated):
    result = load_result("dr", evaluated / "dr")
    both = [replace(result, name=name) for name in ("branchwise", "other_seeds")]
    analysis = tables.Analysis("ratio", both, {})
    heads = pd.read_parquet(evaluated / "dr" / "heads.parquet")
    balanced = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    means = [balanced.top1.mean(), *(result.at(r).top1.mean() for r in (0.0, 0.3))]
    lines = cells_of(tables.parts_table(analysis))
    assert [float(line[1].split(" ")[0]) for line in lines] == pytest.approx(means, abs=0.0051)
    steps = [float(line[5].split(" ")[0]) for line in lines[1:]]
    assert steps == pytest.approx([means[1] - means[0], means[2] - means[1]], abs=0.0051)
    for line in cells_of(tables.seeds_table(analysis)):
        assert line[1] == "+0.00 [+0.00, +0.00] too close to tell"


def online_of(result, by: float, seeds=(0, 1, 2)) -> online_results.Online:
    """Online runs whose top-1 lies `by` and, seed by seed, a little more below ours."""
    runs = []
    for seed in seeds:
        head = result.at(0.3).set_index("seed").loc[seed]
        figures = {f: float(head[f]) - by - 0.01 * seed for f in FIGURES}
        spent = {"seconds": 700.0 + seed, "cpu": 600.0 + seed, "parts": {"cpu": {"backbone": 540.0, "evaluation": 9}}}
        runs.append(
            {"seed": seed, "figures": figures, "commit": "c", "machine": {"cores": 2, "processor": "x"}, **spent}
        )
    return online_results.Online(0.3, runs)


@pytest.mark.parametrize(
    ("by", "expected"), [(0.1, "within"), (0.28, "partly outside, its mean within"), (0.4, "around a mean outside")]
)
def test_ours_beside_online_runs(evaluated, by, expected):
    result = load_result("dr", evaluated / "dr")
    online, ours = online_of(result, by), result.at(0.3)
    lines = online_results.bounds_table(online, ours)
    assert [line[0] for line in lines] == ["top1", "head", "medium", "tail"]
    each = [by, by + 0.01, by + 0.02]
    interval = ttest_rel(each, [0.0] * 3).confidence_interval(0.95)
    found = [float(n) for n in re.findall(r"[+-]\d+\.\d+", lines[0][3])]
    assert found == pytest.approx([np.mean(each), interval.low, interval.high], abs=0.0051)
    assert lines[0][5] == expected
    body = online_results.record(online, {"dr": ours})
    assert body["ours"]["dr"]["minus_online"]["top1"]["mean"] == pytest.approx(np.mean(each))
    assert [head["seed"] for head in body["ours"]["dr"]["heads"]] == [0, 1, 2]
    assert online.median("cpu") == 601
    assert "601 s of processor time (701 s by the clock" in online.made
    apart = re.findall(r"[+-]\d+\.\d+", online_results.recipes_lines(online, {"r": ours})[0][1])
    assert [float(n) for n in apart] == found


@pytest.mark.parametrize("name", ["results.md", "results-200.md"])
def test_the_page_of_results_is_its_template_with_the_places_filled(name):
    """Nothing in these pages was written or changed by hand."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    parts = re.split(r"{{.*?}}", (ROOT / "benchmarks" / name).read_text(encoding="utf-8"))
    assert re.fullmatch("(.+?)".join(map(re.escape, parts)), text, re.DOTALL)


def test_tables_of_the_results_come_from_the_committed_record():
    """Those beside the published way, from benchmarks/results/online.json alone."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    body = json.loads((ROOT / "benchmarks" / "results" / "online.json").read_text(encoding="utf-8"))
    online = online_results.Online(body["ratio"], body["runs"])
    labels = [f"{recipe}, {words}" for words in tables.VIEWS for recipe in tables.RECIPES]
    found = online_tables(online, {label: pd.DataFrame(body["ours"][label]["heads"]) for label in labels})
    assert len(found) == 4
    for place, made in found.items():
        assert made in text, place


def test_hosts_and_samplers_of_the_second_page(evaluated):
    result = load_result("dr", evaluated / "dr")
    [line] = cells_of(results_200.hosts_table(tables.Analysis("hosts", [result], {})))
    for place, figure in ((2, "top1"), (5, "tail")):
        without, with_h2t = (result.at(ratio)[figure].mean() for ratio in (0.0, 0.3))
        assert [float(c.split(" ")[0]) for c in line[place : place + 2]] == pytest.approx(
            [without, with_h2t], abs=0.0051
        )
        stated = result.metrics["difference"][figure]
        assert line[place + 2].startswith(f"{stated['mean']:+.2f} [{stated['low']:+.2f}, {stated['high']:+.2f}]")
    same = results_200.against_table(replace(result, name="cyclic"), result)
    assert [cells[1] for cells in same] == ["without", "with"]
    assert all(cell == "+0.00 identical" for cells in same for cell in cells[2:])


def test_online_beside_ours_without_and_with_h2t(evaluated):
    result = load_result("dr", evaluated / "dr")
    runs = online_of(result, 0.1)
    for run in runs.runs:
        run["device"] = "a GPU"
    text = results_200.online_text(tables.Analysis("hosts", [result], {}), runs, replace(runs, ratio=0.0))
    assert "a seed takes 701 s on a GPU" in text
    heads = pd.read_parquet(evaluated / "dr" / "heads.parquet")
    balanced = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    for label, mean in (("DR + H2T", result.at(0.3).top1.mean()), ("DR as published", balanced.top1.mean())):
        block = text[text.index(f"{label}:") :].split("\n\n")[1]
        assert float(cells_of(block)[0][2].split(" ")[0]) == pytest.approx(mean, abs=0.0051)


def test_seconds_of_peers_are_shown_with_their_ratio_to_ours():
    ours = {"cpu": 4.0, "seconds": 2.0, "mean_top1": 70.0, "best_top1": 71.5}
    loop = {"cpu": 10.0, "seconds": 9.0, "mean_top1": 70.25, "best_top1": 71.0}
    body = {
        "machine": {"cores": 2, "load_before": 0.2},
        "load_after": 1.1,
        "samples": 12406,
        "channels": 64,
        "contestants": {"ours": ours, "loop": loop},
        "grid": {"cpu": 20.0, "classifiers": 660, "twice": 555, "once": 5},
    }
    text = peers_text(body)
    assert "| loop | 10.0 | 2.5 | 9.0 | 4.5 | 70.25 | 71.00 |" in text
    online = online_results.Online(0.3, [{"cpu": 600.0}])
    assert "**16,725 times**" in grid_now(body["grid"], online)


def test_no_online_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="online_h2t"):
        online_results.load_online(tmp_path, 0.3)


def test_a_host_whose_rows_the_cache_lacks_is_left_out(tmp_path, evaluated, capsys):
    short = {"host": "dr", "backbone": "b0", "optimiser": {"epochs": 1, "batch_size": 16}}
    grid = {"ratio": [0.0, 0.3], "donor": ["reverse"], "seed": [0]}
    values = {"device": "cpu", "hosts": {"only": short, "reverse": {**short, "grid": grid}}}
    analyses.analyse(values, evaluated.parent, tmp_path / "a")
    assert "note: reverse: left out, the cache has no rows under reverse" in capsys.readouterr().out
    found = tables.load_analysis(tmp_path / "a")
    assert [r.name for r in found.results] == ["only"]
    with pytest.raises(UserError, match="left out"):
        found["reverse"]
    with pytest.raises(UserError, match="no host is left"):
        analyses.analyse({**values, "hosts": {"reverse": {**short, "grid": grid}}}, evaluated.parent, tmp_path / "b")


def test_an_unfinished_analysis_is_one_line(tmp_path):
    with pytest.raises(UserError, match="make -C tests analysis-donors"):
        tables.load_analysis(tmp_path / "donors")


def test_an_analysis_without_its_cache_says_where_the_cache_is_described(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["analyses", "views", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"ce_mixup_views8: .*presets/analyses/views\.yaml say which caches it needs"):
        analyses.main()


def test_hosts_of_one_backbone_are_compared_image_by_image(tmp_path):
    folder = make_evaluated(tmp_path)
    for name in ("ncm", "tau_norm"):
        make_evaluated(tmp_path, name, host=name, fitted=True)
    dr, ncm, tau_norm = (load_result(name, folder / name) for name in ("dr", "ncm", "tau_norm"))
    # A fit without seeds is compared with every seed of the other host.
    for row in ("without_h2t", "with_h2t"):
        apart = rows_apart(dr, row, ncm, "without_h2t")
        for figure in FIGURES:
            assert apart[figure].mean == pytest.approx(dr.metrics[row][figure] - ncm.metrics["without_h2t"][figure])
        assert (apart["top1"].covers, apart["top1"].seeds) == (("seeds", "images"), 3)
        assert apart["top1"].verdict is not None
    assert rows_apart(dr, "with_h2t", dr, "without_h2t")["tail"].as_dict() == dr.metrics["difference"]["tail"]
    both = rows_apart(tau_norm, "without_h2t", ncm, "without_h2t")["top1"]
    assert (both.covers, both.seeds) == (("images",), 1)
    assert both.verdict is not None
    assert rows_apart(dr, "stage1", ncm, "stage1")["top1"].verdict == "identical"
    assert rows_apart(ncm, "with_h2t", dr, "with_h2t") is None


def test_backbones_that_were_trained_once_get_no_verdict(tmp_path, evaluated):
    other = load_result("dr", make_evaluated(tmp_path, seed=1) / "dr")
    dr = load_result("dr", evaluated / "dr")
    apart = rows_apart(other, "with_h2t", dr, "with_h2t")
    assert {d.verdict for d in apart.values()} == {None}
    assert apart["top1"].covers == ("seeds", "images")
    assert apart["top1"].low < apart["top1"].mean < apart["top1"].high


def test_other_test_images_have_no_interval(evaluated):
    dr = load_result("dr", evaluated / "dr")
    moved = dr.tables["predictions"].assign(sample=dr.tables["predictions"]["sample"] + 1)
    other = replace(dr, tables={**dr.tables, "predictions": moved})
    apart = rows_apart(other, "with_h2t", dr, "without_h2t")
    assert apart["top1"].mean == pytest.approx(dr.metrics["with_h2t"]["top1"] - dr.metrics["without_h2t"]["top1"])
    assert (apart["top1"].low, apart["top1"].verdict, apart["top1"].covers) == (None, None, ())


def test_compare_without_a_shared_host(tmp_path, evaluated):
    with pytest.raises(UserError, match="no host is in both"):
        comparison.compare(evaluated, tmp_path, None, print)


def test_command_line(tmp_path, monkeypatch, evaluated):
    write_params(tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    done = accepted("report", "--compare", evaluated, evaluated)
    assert "B - A" in done
    line = refused("report", evaluated, code=2)
    assert "--compare" in line


def test_run_records_are_shown_on_request_only(tmp_path, evaluated):
    runs = tmp_path / "runs" / "extract"
    runs.mkdir(parents=True)
    (runs / "b.json").write_text('{"seconds": 12.5, "rows": 77, "commit": "abcdef", "machine": {"cores": 2}}')
    pages = []
    for given in (None, tmp_path / "runs"):
        report.run(report.Params(), Run("report", tmp_path / "out"), ["dr"], evaluated, given)
        pages.append((tmp_path / "out" / "index.html").read_text())
    assert ["abcdef" in p for p in pages] == [False, True]
    (runs / "b.json").write_text("{")
    with pytest.raises(UserError, match="not a run record"):
        files.run_records(tmp_path / "runs")
