"""The benchmark of a frozen pretrained network, in small: every method has its line, and what was done is kept."""

import json

import pytest
import timm
import torch
from pipeline_builders import ROOT
from small_cifar import write_images

from benchmarks import frozen, frozen_results, results
from h2t.pipeline.base.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """Its results in small, from weights under other names, as packages have them."""
    folder = tmp_path_factory.mktemp("frozen")
    write_images(folder / "train.parquet", 14, 0)
    write_images(folder / "test.parquet", 4, 1)
    state = timm.create_model("test_efficientnet").state_dict()
    other = {f"_net.{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    torch.save(other, folder / "weights.pth")
    files = ["--weights", folder / "weights.pth", "--parquet", folder / "train.parquet", folder / "test.parquet"]
    frozen.main([*map(str, files), "--tiny", "--device", "cpu", "--threads", "1", "--out", str(folder / "o.json")])
    text = (folder / "o.json").read_text(encoding="utf-8")
    assert str(folder) not in text
    return json.loads(text)


def test_every_host_of_one_expert_has_a_line_without_and_with_h2t(body):
    without, with_h2t = ({line["host"] for line in body["table"] if line["with_h2t"] == way} for way in (False, True))
    on_maps = {step.partition(" ")[0] for step, why in body["failed"].items() if "needs whole maps" in why}
    assert {"probe", "scikit-learn", "scikit-learn, balanced", *frozen.one_expert_hosts()} - on_maps <= without
    assert set(frozen.JOURNEY) <= with_h2t
    assert not {"ride", "reslt"} & without
    assert {step.partition(" ")[0] for step in body["failed"]} == on_maps
    for line in body["table"]:
        assert 0 <= line["top1"] <= 100
        assert line["with_h2t"] == (line["ratio"] > 0) == ("differences" in line)
    text = frozen_results.shown(body)
    assert "| dr + H2T " in text
    assert text.endswith(frozen_results.journey(body).partition("\n\n")[2])
    assert "| h2t " in frozen_results.journey(body)


def test_the_constant_of_a_line_is_the_best_on_validation_images(body):
    tried = [t for t in body["tried"] if t["method"] == "dr" and t["ratio"] > 0]
    assert {t["value"] for t in tried} == {0.02, 0.1}
    chosen = next(line for line in body["table"] if line["host"] == "dr" and line["with_h2t"])
    assert chosen["validation_top1"] == pytest.approx(max(sum(t["val"]) / len(t["val"]) for t in tried))


def test_the_difference_of_a_line_is_that_of_its_figures(body):
    lines = {(line["host"], line["with_h2t"]): line for line in body["table"]}
    for host in frozen.JOURNEY:
        with_h2t, without = lines[host, True], lines[host, False]
        for figure in ("top1", "tail"):
            found = with_h2t["differences"][figure]["mean"]
            assert found == pytest.approx(with_h2t[figure] - without[figure], abs=1e-3)
            assert set(with_h2t["differences"][figure]["covers"]) <= {"seeds", "images"}


def test_the_plain_script_computes_the_features_of_the_cache(body):
    assert body["plain"]["features_apart"] < 2e-3  # the cache holds float16
    assert body["journey"]["heads"] == body["plain"]["fits"]["wanted"] == 6 * 2 * 2
    assert body["cache"]["bytes_per_row"]["maps"] > 0


def test_weights_of_another_network_are_refused():
    one, two = (timm.create_model(name).state_dict() for name in ("test_efficientnet", "test_resnet"))
    with pytest.raises(UserError, match="--weights: must hold"):
        frozen.renamed(one, two)


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path):
    journal = frozen.Journal(tmp_path / "o.json", {"costs": {}}, ends=0)
    with journal.step("one"):
        pass
    with pytest.raises(KeyboardInterrupt), journal.step("two"):
        raise KeyboardInterrupt
    assert set(json.loads((tmp_path / "o.json").read_text())["costs"]) == {"one"}
    assert journal.late


def test_the_table_of_the_results_comes_from_the_committed_record():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert frozen_results.shown(results.recorded("frozen")) in text
