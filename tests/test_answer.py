"""What a report says first: best method, share of H2T, certainty, cost, export command; in the terminal and for DVC."""

import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from pipeline_builders import ROOT
from report_builders import make_evaluated

from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting import paper
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.page import render
from h2t.pipeline.reporting.results import ROWS, load_result, of_one_class
from h2t.pipeline.stages import report

GRID = {"ratio": [0.0, 0.1, 0.3, 0.6], "seed": [0, 1, 2]}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answer")
    make_evaluated(folder, "ncm", host="ncm", fitted=True)
    return make_evaluated(folder, "dr", grid=GRID)


def stated(result, **difference):
    """`result` with these differences in its metrics, as (mean, low, high, verdict)."""
    full = {
        f: {**dict(zip(("mean", "low", "high", "verdict"), d, strict=True)), "covers": ["seeds", "images"], "seeds": 3}
        for f, d in difference.items()
    }
    return replace(result, metrics={**result.metrics, "difference": full})


def with_figures(result, **rows):
    """`result` with another top-1 and tail accuracy in rows of its metrics."""
    metrics = dict(result.metrics)
    for row, (top1, tail) in rows.items():
        metrics[row] = {**metrics[row], "top1": top1, "tail": tail}
    return replace(result, metrics=metrics)


@pytest.fixture
def dr(evaluated):
    return load_result("dr", evaluated / "dr")


def test_the_answer_names_the_best_its_share_certainty_cost_and_command(evaluated, dr):
    better = with_figures(dr, without_h2t=(93.6, 88.0), with_h2t=(94.4, 90.6))
    better = stated(better, top1=(0.8, -0.5, 2.1, "too close to tell"), tail=(2.6, 0.4, 4.8, "higher"))
    answer = Answer([better], (), evaluated, {"dr": "b0"})
    best, share, certainty, cost, command = answer.lines()
    ratio = better.metrics["with_h2t"]["ratio"]
    luck = answer.candidates.luck("top1")
    assert luck > 0
    assert best == (
        f"Best top-1: dr with H2T at ratio {ratio:g}; top-1 94.4 %, tail 90.6 %. "
        "It is the best of 2 classifiers on these test images; chosen on nine tenths of them, the best "
        f"has {94.4 - luck:.1f} % on the rest. Not clearly behind it: stage I. "
        "H2T: +0.8 [-0.5, +2.1] too close to tell."
    )
    assert share == ("H2T in dr: top-1 +0.8 [-0.5, +2.1] too close to tell; tail +2.6 [+0.4, +4.8] higher.")
    assert certainty == (
        "Intervals (95 %) cover 3 seeds of stage II and 24 test images; not other trainings of the backbone. "
        "Few test images: 6 in head classes; 6 in tail classes."
    )
    # Nine runs with donors (two passes) and three at ratio 0 (one), each on 75 training images.
    assert cost.startswith("Cost: 12 classifiers on cached maps")
    assert f"{(9 * 2 + 3) * 75:,} through it in every epoch" in cost
    number = int(better.at(ratio).number.iloc[0])
    home = evaluated.parent
    assert command == (
        f"To use it: h2t export {home}/train_classifier/dr {home}/extract/b0 {home}/train_backbone/b0 model "
        f"--head {number}"
    )


def test_the_export_command_names_the_folders_and_one_classifier(evaluated, dr):
    command = Answer([dr], (), evaluated, {"dr": "b0"}).command()
    _, _, heads, cache, backbone, out, _, number = shlex.split(command)
    assert all(Path(p).is_dir() for p in (heads, cache, backbone))
    assert out == "model"
    settings = pd.read_parquet(Path(heads) / "heads.parquet").set_index("number").loc[int(number)]
    row = Answer([dr]).methods[0].best("top1")
    assert settings.ratio == dr.metrics[row]["ratio"]
    assert settings.seed == 0


def test_a_host_on_a_pooled_cache_is_exported_without_images(evaluated, dr):
    about = {**dr.about, "cache": {**dr.about["cache"], "provenance": {"pool": "gap"}}}
    plain, pooled = (Answer([r], (), evaluated, {"dr": "b0"}).command() for r in (dr, replace(dr, about=about)))
    assert pooled == f"{plain} --without-images"


def test_folders_of_hosts_that_were_evaluated_elsewhere_are_left_to_fill_in(dr):
    command = Answer([dr], (), Path("mine"), {"dr": "b0"}).command()
    assert command.startswith("h2t export HEADS CACHE BACKBONE model")


def test_where_h2t_lowers_top1_the_better_classifier_is_the_one_without(dr):
    worse = with_figures(dr, without_h2t=(80.0, 50.0), with_h2t=(78.0, 55.0))
    answer = Answer([stated(worse, top1=(-2.0, -3.0, -1.0, "lower"))])
    assert answer.lines()[0].startswith("Best top-1: dr without H2T; top-1 80.0 %")
    assert answer.lines("tail")[0].startswith("Best tail: dr with H2T at ratio")
    assert answer.lines()[1] == "H2T in dr: top-1 -2.0 [-3.0, -1.0] lower."
    assert "H2T: -2.0 [-3.0, -1.0] lower." in answer.lines()[0]
    assert answer.command() is None  # without the folders there is nothing to copy


def test_of_several_methods_it_says_for_how_many_h2t_is_higher_or_lower(dr):
    verdicts = ["higher", "lower", "lower", "too close to tell", "identical", None]
    hosts = [replace(stated(dr, top1=(0.0, -1.0, 1.0, v)), name=f"h{i}") for i, v in enumerate(verdicts)]
    assert Answer(hosts).share() == "H2T in 6 methods: top-1 higher in 1, lower in 2, identical in 1, undecided in 2."


def test_methods_on_other_backbones_are_not_compared(dr):
    other = replace(dr, name="other", about={**dr.about, "host": {**dr.about["host"], "backbone": "f" * 64}})
    better = with_figures(dr, without_h2t=(99.0, 99.0))
    answer = Answer([other, better])
    ranking = answer.rankings["top1"]
    assert [m.name for m in ranking.methods] == ["dr", "other"]
    assert ranking.others == ["other"]
    assert ranking.ties == []
    assert "On another backbone, so not compared: other." in answer.lines()[0]


def test_ties_share_the_first_place(dr):
    again = replace(dr, name="again")
    ranking = Answer([dr, again]).rankings["top1"]
    assert set(ranking.places.values()) == {1}
    assert re.search("Not clearly behind it: .*again\\.", Answer([dr, again]).lines()[0])


def test_a_stage_one_that_is_clearly_better_is_said(dr):
    """Swapped, so that stage I has the predictions of the trained heads, and these have those of stage I."""
    predictions = dr.tables["predictions"]
    wrong = predictions.assign(
        predicted=predictions.predicted.where(predictions.number < 0, (predictions.label + 1) % 4)
    )
    right = wrong.assign(predicted=wrong.predicted.where(wrong.number >= 0, wrong.label))
    worse = with_figures(dr, stage1=(100.0, 100.0), without_h2t=(0.0, 0.0), with_h2t=(0.0, 0.0))
    worse = replace(worse, tables={**dr.tables, "predictions": right})
    assert "But stage I, the network as it was before, has top-1 100.0 %, tail 100.0 %." in Answer([worse]).lines()[0]
    named = Answer([worse], evaluated=Path("data/evaluate"), backbones={"dr": "ce"}).lines()[0]
    assert "To use that: h2t export data/train_backbone/ce data/extract/ce data/train_backbone/ce model" in named
    assert "stage I" not in Answer([with_figures(dr, stage1=(0.0, 0.0))]).best("top1")[0]


def test_groups_and_classes_with_few_test_images_are_named(dr):
    predictions = dr.tables["predictions"]
    last = predictions.label.max()
    fewer = replace(dr, tables={**dr.tables, "predictions": predictions[predictions.label != last]})
    name = dr.about["classes"][last]
    assert (
        Answer([fewer]).certainty().endswith(f" Few test images: 6 in head classes; 0 in tail classes; none of {name}.")
    )


def test_a_table_for_a_paper_holds_every_classifier_and_what_h2t_changes(dr):
    special = replace(dr, name="dr_50%")
    data = paper.table([special])
    assert list(data.classifier) == ["stage I", "without H2T", "with H2T"]
    assert data[["top1", "tail"]].to_numpy().tolist() == [[dr.metrics[r]["top1"], dr.metrics[r]["tail"]] for r in ROWS]
    change = Difference(**dr.metrics["difference"]["top1"])
    assert data.top1_change[2] == pytest.approx(change.mean)
    assert (data.top1_low[2], data.top1_verdict[2]) == (pytest.approx(change.low), change.verdict)
    text = paper.latex([special], "Covers.")
    assert r"dr\_50\% & stage I & – & " in text
    interval = f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]".replace("-", "$-$")
    assert change.low < 0  # a sign that LaTeX does not know it leaves out
    assert set(text) - set(map(chr, range(128))) == {"±", "–"}
    assert rf"dr\_50\% & difference &  & {interval} & " in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 5
    assert {line.count("&") - line.count(r"\&") for line in rows} == {6}


def test_what_was_chosen_at_the_edge_of_the_grid_is_remarked(dr):
    assert Answer([dr]).methods[0].tuned == {}  # without validation images nothing was chosen
    chosen = {
        "by": "validation images",
        "values": {"lr": 0.1, "ratio": 0.6, "tau": 1.0},
        "tried": {"lr": [0.1, 1.0], "ratio": [0.1, 0.3, 0.6], "tau": [0.5, 1.0, 2.0]},
        "at_edge": ["lr", "ratio"],
        "left_out": [],
    }
    metrics = {**dr.metrics, "with_h2t": {**dr.metrics["with_h2t"], "ratio": 0.6, "chosen": chosen}}
    answer = Answer([replace(dr, metrics=metrics)])
    assert answer.methods[0].tuned == {"lr": "0.1, smallest tried", "ratio": "0.6, largest tried", "tau": "1"}
    text = re.sub(r"<[^>]+>", " ", render("T", answer).split("<tbody>")[1].split("</tbody>")[0])
    assert " ".join(text.split()).endswith("0.6 lr 0.1, smallest tried largest tried tau 1")


def test_the_terminal_shows_the_answer_and_a_table_of_100_columns(evaluated, tmp_path):
    said: list[str] = []
    hosts = ["dr", "ncm"]
    backbones = dict.fromkeys(hosts, "b0")
    report.run(report.Params(), Run("report", tmp_path / "r", say=said.append), hosts, evaluated, None, backbones)
    lines = said[-1].splitlines()
    assert lines.index("") == 5
    assert lines[0].startswith("Best top-1: ")
    assert lines[4].startswith("To use it: h2t export ")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(hosts)
    assert max(len(line) for line in lines[5:]) <= 100
    assert len({len(line) for line in table}) == 1  # aligned
    text = (tmp_path / "r" / "results.md").read_text(encoding="utf-8")
    assert all(line in text for line in table)
    assert text.index("Best top-1") < text.index(table[0]) < text.index("## All figures")


def test_classifiers_that_call_everything_one_class_are_named(evaluated, dr):
    ncm = load_result("ncm", evaluated / "ncm")
    assert "One class" not in " ".join(Answer([dr, ncm]).lines())
    for result, row in ((dr, "with_h2t"), (ncm, "without_h2t")):
        confusion = result.tables["confusion"].copy()
        numbers = result.numbers(row)
        assert numbers
        confusion.loc[confusion.number == numbers[0], "predicted"] = 2
        confusion.loc[confusion.number.isin(numbers[1:]), "predicted"] = 1
        result.tables["confusion"] = confusion
    said = "One class for all test images, so not to be used: dr with H2T, ncm."
    assert said in Answer([dr, ncm]).lines()
    confusion.loc[confusion.index[confusion.number == numbers[0]][0], "predicted"] = 0
    assert "One class for all test images, so not to be used: dr with H2T." in Answer([dr, ncm]).lines()
    dr.tables["confusion"]["true"] = 1  # of a test split of one class nothing can be said
    assert of_one_class([dr], {}) == ""


def test_stage_i_of_one_class_is_named_by_its_backbone_where_there_are_several(evaluated, dr):
    dr.tables["confusion"].loc[dr.tables["confusion"].number == -1, "predicted"] = 2
    said = "One class for all test images, so not to be used: {}."
    assert of_one_class([dr], {"dr": "b0"}) == said.format("stage I")
    ncm = load_result("ncm", evaluated / "ncm")
    ncm.about["host"]["backbone"] = "that of other weights"
    assert of_one_class([dr, ncm], {"dr": "b0", "ncm": "b1"}) == said.format("stage I of b0")
    assert of_one_class([dr, ncm], {}) == said.format("stage I of the backbone of dr")


def test_a_long_name_does_not_widen_the_table(dr):
    long = replace(dr, name="a" * 200)
    assert max(map(len, Answer([long]).overview())) <= 100


def test_seconds_are_printed_and_not_written(evaluated, tmp_path):
    """Equal results give equal bytes, whatever the time they took."""
    about = json.loads((evaluated / "dr" / "about.json").read_text())
    runs = evaluated.parent / "runs"
    records = {
        "train_classifier/dr": {
            "seconds": 7.0,
            "cpu": 7.0,
            "steps": 20,
            "batch_size": 32,
            "resumed_steps": 0,
            "heads": 12,
        },
        "extract/b": {
            **{"seconds": 9.0, "cpu": 9.0, "fingerprint": about["host"]["cache"], "kept_shards": 0, "taken": 0},
            **{"forward_images": 128, "forward_seconds": 1.28, "forward_cpu": 1.28},
        },
    }
    said: list[str] = []
    written = []
    for _ in "ab":
        report.run(report.Params(), Run("report", tmp_path / "r", say=said.append), ["dr"], evaluated)
        written.append([p.read_bytes() for p in sorted((tmp_path / "r").rglob("*.*"))])
        for name, facts in records.items():
            (runs / name).parent.mkdir(parents=True, exist_ok=True)
            (runs / f"{name}.json").write_text(json.dumps({**facts, "machine": {}}))
    for path in runs.glob("*/*.json"):
        path.unlink()
    assert written[0] == written[1]
    images = (9 * 2 + 3) * 20 * 32
    first, second = (text for text in said if "Cost: " in text)
    assert f"trained in 7.0 s; the published way takes about {images / 100 / 60:.1f} min (estimated)." in second
    assert " in 7.0 s" not in first
    assert all("Cost: 12 classifiers on cached maps, " in text for text in (first, second))  # the same count in both


def test_dvc_shows_at_most_five_figures_a_host(evaluated, tmp_path):
    report.run(report.Params(), Run("report", tmp_path / "r"), ["dr", "ncm"], evaluated)
    table = json.loads((tmp_path / "r" / "summary.json").read_text())
    metrics = json.loads((evaluated / "dr" / "metrics.json").read_text())
    assert list(table) == ["dr", "ncm"]
    assert all(len(figures) <= 5 for figures in table.values())
    assert table["dr"]["top1_with"] == pytest.approx(metrics["with_h2t"]["top1"], abs=0.0051)
    assert table["dr"]["tail_without"] == pytest.approx(metrics["without_h2t"]["tail"], abs=0.0051)
    assert table["dr"]["h2t"] in ("higher", "lower", "too close to tell", "identical")
    assert set(table["ncm"]) == {"top1_without", "tail_without"}


def test_the_sentences_of_results_md_are_those_of_the_answer(evaluated, tmp_path, dr):
    report.run(report.Params(), Run("report", tmp_path / "r"), ["dr"], evaluated)
    text = (tmp_path / "r" / "results.md").read_text(encoding="utf-8")
    assert re.findall(r"^- (.*)$", text, re.MULTILINE)[:4] == Answer([dr]).lines()


def test_make_repro_ends_with_the_answer_and_the_short_table(evaluated, tmp_path, dr):
    """The tables below are wider than a terminal, and the answer scrolled out of sight."""
    report.run(report.Params(), Run("report", tmp_path / "r"), ["dr"], evaluated)
    typed = ["make", "--silent", f"--eval=show: ; @$(ANSWER) {tmp_path / 'r/results.md'}", "show"]
    text = subprocess.run(typed, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout
    assert all(line in text for line in Answer([dr]).lines())
    assert "| dr" in text
    assert text.endswith("better top-1.\n\n")
