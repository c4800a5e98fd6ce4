"""`backbones.NAME.cache`: hosts read a finished cache at a path or URL; nothing is extracted, pooled or copied."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from builders import raises, tree
from pipeline_builders import accepted, make_backbone_dir, make_params, make_samples, make_stage2_cache, refused
from repositories import start_project
from servers import put_all, s3_endpoint
from test_watch import make_images, values_of

from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

ROWS = {"train": ("balanced", "instance", "stage1"), "shape": (64, 2, 2), "shard_rows": 16}
STAGES = ("train-backbone", "extract", "pool", "probe", "train-classifier", "evaluate")


def write(url, fingerprint, **backbone):
    """params.yaml with one backbone, whose cache is at `url`; without `url` it is extracted here."""
    values = make_params(device="cpu", replicates=[0])
    entry = {"arch": "resnet20", "head": "probe", **backbone}
    values["backbones"] = {"b": {**entry, "cache": {"url": str(url), "fingerprint": fingerprint}}}
    values["hosts"]["dr"]["backbone"] = "b"
    Path("params.yaml").write_text(yaml.safe_dump(values))


def run(*stages):
    """Runs the stages as dvc.yaml does; returns what they said."""
    backbone, cache, heads = "data/train_backbone/b", "data/extract/b", "data/train_classifier/dr"
    lines = {
        "train-backbone": ("b", "data/prepare", backbone),
        "extract": ("b", "data/prepare", backbone, cache),
        "pool": ("b", cache, "data/pool/b"),
        "probe": ("b", cache, "data/probe/b"),
        "train-classifier": ("dr", cache, backbone, heads),
        "evaluate": ("dr", cache, heads, backbone, "data/evaluate/dr"),
    }
    return "".join(accepted(stage, *lines[stage]) for stage in stages)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with prepared samples, and the fingerprint of a cache that lies at `published`, outside of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path / "blocks"))
    make_samples(tmp_path / "data/prepare")
    make_stage2_cache(tmp_path / "published", **ROWS)
    with open_cache(tmp_path / "published") as cache:
        return tmp_path, cache.spec.fingerprint


def results(root):
    """The bytes that the hosts of a project come to, without what names the machine or the day."""
    found = {**tree(root / "data/probe"), **tree(root / "data/train_classifier"), **tree(root / "data/evaluate")}
    return {name: data for name, data in found.items() if not name.endswith("about.json")}


@pytest.fixture(params=["directory", "S3"])
def url(request, project):
    """Where the published cache lies."""
    if request.param == "S3":
        with s3_endpoint() as bucket:
            put_all(bucket, project[0] / "published", "b")
            yield f"{bucket.url}/b"
    else:
        yield project[0] / "published"


def test_hosts_give_the_results_of_a_copy_and_no_maps_are_stored(project, url):
    root, fingerprint = project
    write(url, fingerprint)
    said = run(*STAGES)
    assert "nothing is trained" in said
    assert "nothing is extracted" in said
    assert "nothing is pooled" in said
    assert [list(tree(root / "data" / stage)) for stage in ("extract", "pool")] == [["b/elsewhere.json"]] * 2
    assert "dr" in accepted("sweep", "dr", "--ratio", "0.2", "--seed", "0")
    assert fingerprint in accepted("cache", "info", "data/extract/b")
    with open_cache("data/extract/b") as there, open_cache("published") as copy:
        assert there.rows == copy.rows
    assert verify("data/extract/b") == []
    streamed = results(root)

    shutil.rmtree("data/extract/b")
    shutil.copytree("published", "data/extract/b")
    run("probe", "train-classifier", "evaluate")
    assert results(root) == streamed


def test_a_wrong_fingerprint_is_refused_before_anything_is_written(project):
    root, fingerprint = project
    write(root / "published", "0" * 64)
    backbone = root / "data/train_backbone/b"
    line = refused("train-backbone", "b", "data/prepare", backbone, leaves=backbone)
    assert "must be the cache with fingerprint 000000000000; got one with " + fingerprint in line
    write(root / "published", fingerprint)
    run("train-backbone")
    write(root / "published", "0" * 64)
    cache = root / "data/extract/b"
    assert fingerprint in refused("extract", "b", "data/prepare", backbone, cache, leaves=cache)


def test_a_cache_that_another_took_the_place_of_is_refused(project):
    root, fingerprint = project
    write(root / "published", fingerprint)
    run("train-backbone", "extract")
    shutil.rmtree("published")
    make_stage2_cache(root / "published", **{**ROWS, "fingerprint_inputs": {"backbone": {"weights": "b" * 64}, "n": 2}})
    heads = root / "data/train_classifier/dr"
    line = refused("train-classifier", "dr", "data/extract/b", "data/train_backbone/b", heads, leaves=heads)
    assert f"must be the cache with fingerprint {fingerprint[:12]}; got one with" in line
    assert [str(fault) for fault in verify("data/extract/b")]
    with raises("mismatch", fingerprint[:12]):
        open_cache("data/extract/b")


def test_a_cache_that_moved_needs_its_new_url_alone(project):
    """DVC watches the directory in data/extract, and that stays; so no host is trained again."""
    root, fingerprint = project
    write(root / "published", fingerprint)
    run("train-backbone", "extract")
    before = tree(root / "data")
    shutil.move("published", "moved")
    write(root / "moved", fingerprint)
    run("train-backbone")
    assert tree(root / "data") == before  # DVC stops here, as extract depends on these files
    run("probe", "train-classifier")


def test_parameters_of_another_cache_than_the_stage_wrote_are_refused(project):
    root, fingerprint = project
    write(root / "published", fingerprint)
    run("train-backbone", "extract")
    before = tree(root / "data/train_backbone")
    inputs = {"backbone": {"weights": "b" * 64}, "n": 2}
    make_stage2_cache(root / "other", **{**ROWS, "fingerprint_inputs": inputs})
    with open_cache("other") as cache:
        write(root / "other", cache.spec.fingerprint)
    assert "run h2t extract b again" in refused(
        "train-classifier", "dr", "data/extract/b", "data/train_backbone/b", "o"
    )
    run("train-backbone")
    assert tree(root / "data/train_backbone") != before  # so DVC runs extract again


def test_weights_are_loaded_if_they_are_those_of_the_cache(project):
    root, fingerprint = project
    digest = make_backbone_dir(root / "of the publisher")
    make_stage2_cache(root / "right", **ROWS, backbone=digest)
    with open_cache("right") as cache:
        write(root / "right", cache.spec.fingerprint, weights="of the publisher/backbone.safetensors")
    run(*STAGES)
    write(root / "published", fingerprint, weights="of the publisher/backbone.safetensors")
    run("train-backbone")
    out = root / "another"
    line = refused("extract", "b", "data/prepare", "data/train_backbone/b", out, leaves=out)
    assert "extracted by a backbone with weights bbbbbbbbbbbb" in line


def test_a_trained_head_needs_the_weights(project):
    root, fingerprint = project
    write(root / "published", fingerprint, head="trained")
    line = refused("train-backbone", "b", "data/prepare", "out", leaves=root / "out")
    assert "backbones.b.head: with a cache elsewhere, it must be probe or none" in line


def test_without_weights_an_export_says_what_it_needs(project):
    root, fingerprint = project
    write(root / "published", fingerprint)
    run("train-backbone", "extract", "train-classifier")
    line = refused("export", "data/train_classifier/dr", "data/extract/b", "data/train_backbone/b", "m", "--head", "0")
    assert "holds no weights" in line
    assert "set weights of this backbone" in line
    assert "which extract never computes" in refused("cache", "why", "data/extract/b")
    assert not (root / "m").exists()


def test_no_secret_of_the_url_is_written(project):
    from h2t.pipeline.extraction.elsewhere import stand_in

    stand_in(project[0] / "b", "https://me:secret@host/b?token=secret", project[1])
    assert b"secret" not in (project[0] / "b/elsewhere.json").read_bytes()


@pytest.mark.parametrize("text", ["", "[]", '{"url": 3, "fingerprint": "a"}', "[" * 10_000, '{"url": "/x"}'])
def test_a_damaged_directory_is_one_line(tmp_path, text):
    (tmp_path / "elsewhere.json").write_text(text)
    with raises("damaged", "must name the URL and fingerprint of a cache"):
        open_cache(tmp_path)


def test_one_that_leads_to_itself_ends(tmp_path):
    (tmp_path / "elsewhere.json").write_text(json.dumps({"url": str(tmp_path), "fingerprint": "a" * 64}))
    with pytest.raises(CacheError, match="not a finished cache"):
        open_cache(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dvc_watches_the_fingerprint_and_neither_the_maps_nor_the_url(tmp_path, warm_h2t):
    values = values_of("photos")
    values["backbones"] = {"b": {"arch": "resnet20", "objective": "ce", "head": "probe"}}
    values["hosts"]["dr"]["backbone"] = "b"

    def publish(place, **inputs):
        make_stage2_cache(tmp_path / place, **ROWS, fingerprint_inputs={"backbone": {"weights": "b" * 64}, **inputs})
        with open_cache(tmp_path / place) as cache:
            return cache.spec.fingerprint

    def name(place, fingerprint):
        values["backbones"]["b"]["cache"] = {"url": str(tmp_path / place), "fingerprint": fingerprint}
        (project.root / "params.yaml").write_text(yaml.safe_dump(values))

    project = start_project(tmp_path / "a", values, warm_h2t, "photos")
    make_images(project.root / "photos")
    one = publish("one")
    name("one", one)
    assert {"extract@b", "pool", "probe", "train-classifier", "evaluate", "report"} <= set(project.ran())
    assert list(tree(project.root / "data/extract")) == ["b/elsewhere.json"]
    assert project.ran() == []
    (tmp_path / "one").rename(tmp_path / "moved")
    name("moved", one)
    moved = set(project.ran())
    assert "train-backbone@b" in moved
    assert not {"extract@b", "train-classifier", "evaluate", "report"} & moved
    name("two", publish("two", n=2))
    assert {"extract@b", "train-classifier", "evaluate"} <= set(project.ran())


def test_a_stand_in_beside_a_cache_is_refused(project):
    root, fingerprint = project
    (root / "published/elsewhere.json").write_text(json.dumps({"url": "s3://b/c", "fingerprint": fingerprint}))
    with pytest.raises(CacheError, match=r"holds both cache\.json and elsewhere\.json; remove"):
        open_cache(root / "published")
    assert "holds both cache.json and elsewhere.json" in str(verify(root / "published")[0])


def test_parameters_and_the_cache_in_place_must_agree(project):
    """A cache that was extracted here does not pass for the one that the parameters name, nor the other way round."""
    root, fingerprint = project
    write(root / "published", fingerprint)
    run("train-backbone", "extract")
    command = ("train-classifier", "dr", "data/extract/b", "data/train_backbone/b", "data/train_classifier/dr")
    values = yaml.safe_load(Path("params.yaml").read_text())
    del values["backbones"]["b"]["cache"]
    Path("other.yaml").write_text(yaml.safe_dump(values))
    assert "backbones.b.cache names none; run h2t extract b again" in refused(*command, "--params", "other.yaml")
    shutil.rmtree("data/extract/b")
    make_stage2_cache(root / "data/extract/b", backbone="c" * 64, **ROWS)
    assert "must be the cache that backbones.b.cache names, or a pooled copy of it" in refused(*command)
