"""Images come, go and change: what a previous cache gives is taken from it, and the bytes are those of a full run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pipeline_builders
import pytest
from builders import flip, make_cache, make_maps, make_rows, make_spec, tree, write_cache
from image_builders import write_image
from kills import kill_and_restart
from pipeline_builders import accepted, environment, extracted, invoke, make_backbone_dir, silent, write_params

from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.cache.write.carry import Carrier, broken_shards

TRANSFORM = {"size": 8, "resize": 8, "padding": 1, "flip": True, "mean": [0.5] * 3, "std": [0.25] * 3}
COUNTS = {"owl": 9, "cat": 8, "fox": 3}
#: Small shards, so that there are many; several views of rare classes.
SMALL = {"max_views": 3, "view_target": 1.5, "chunk_rows": 1, "shard_bytes": 8192, "batch_size": 16}


def make_images(root: Path) -> Path:
    for j, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            write_image(root / f"train/{name}/{i}.png", 100 * j + i, (12, 10))
        for i in range(2):
            write_image(root / f"test/{name}/{i}.png", 100 * j + 50 + i, (12, 10))
    return root


def section_of(root: Path) -> dict:
    return {"dataset": "image_folder", "options": {"root": str(root), "test": "test", "transform": TRANSFORM}}


def prepared(root: Path, out: Path):
    """(Samples, Images) of the image folder `root` as it is now."""
    return pipeline_builders.prepared(section_of(root), out)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A place with `images`, a `backbone` of two experts and the cache `old` of them."""
    place = tmp_path_factory.mktemp("before")
    make_images(place / "images")
    make_backbone_dir(place / "backbone", classes=3, experts=2)
    extracted(place / "old", *prepared(place / "images", place / "samples"), place / "backbone", **SMALL)
    with open_cache(place / "old") as cache:
        assert cache.spec.shards > 10
        assert len(cache.rows.filter(cache.rows["view"].to_numpy() > 1)) > 5
    return place


@pytest.fixture
def images(before, tmp_path):
    """A copy of the images, to be changed."""
    return Path(shutil.copytree(before / "images", tmp_path / "images"))


def both(place: Path, images: Path, before: Path, *, previous=None, say=silent, **options):
    """Summary of an incremental run, after comparing it, byte for byte, with a full one under the same statistics."""
    given = {**SMALL, "previous": previous or before / "old", **options}
    found = prepared(images, place / "samples")
    full = extracted(place / "full", *found, before / "backbone", anew=True, **given)
    part = extracted(place / "part", *found, before / "backbone", say=say, **given)
    assert full.taken == 0
    assert full.forwarded == full.rows == part.forwarded + part.taken
    assert tree(place / "part") == tree(place / "full")
    assert verify(place / "part") == []
    return part


def rows_of(cache: Path, **wanted) -> int:
    with open_cache(cache) as opened:
        return sum(all(line[k] in v for k, v in wanted.items()) for line in opened.rows.to_pylist())


# --- what changes


def nothing(root: Path) -> list[str]:
    return []


def one_added(root: Path) -> list[str]:
    write_image(root / "train/cat/0a.png", 999, (12, 10))
    return ["train/cat/0a.png"]


def one_changed(root: Path) -> list[str]:
    write_image(root / "train/owl/4.png", 999, (12, 10))
    return ["train/owl/4.png"]


def three_changes(root: Path) -> list[str]:
    """One added, one removed, a test image replaced."""
    (root / "train/owl/4.png").unlink()
    write_image(root / "test/owl/0.png", 998, (12, 10))
    return [*one_added(root), "test/owl/0.png"]


def classes_reordered(root: Path) -> list[str]:
    """Another class becomes the most frequent one: every row is elsewhere, and none is another."""
    for i in range(2):
        (root / f"train/owl/{i}.png").unlink()
    return []


CHANGES = [nothing, one_changed, three_changes, classes_reordered]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_only_what_changed_is_extracted_and_the_bytes_are_those_of_a_full_run(before, images, tmp_path, change):
    touched, said = change(images), []
    summary = both(tmp_path, images, before, say=said.append)
    assert summary.forwarded == rows_of(tmp_path / "full", source=touched)
    count = "1 image is" if len(touched) == 1 else f"{len(touched)} images are"
    more = f" ({count} new or changed)" if touched else ""
    where = f"takes {summary.taken} from {before / 'old'}{more}"
    assert f"b: extracts {summary.forwarded} of {summary.rows} rows, {where}" in said


def test_a_renamed_image_keeps_its_evaluation_view_and_gets_new_augmentations(before, images, tmp_path):
    """Augmentation hangs on the source, the evaluation view on the image alone."""
    (images / "train/fox/2.png").rename(images / "train/fox/0a.png")
    summary = both(tmp_path, images, before)
    assert summary.forwarded == rows_of(tmp_path / "full", source=["train/fox/0a.png"], view=[1, 2]) > 0


def test_an_image_moved_to_another_split_is_the_same_image(before, images, tmp_path):
    (images / "test/cat/1.png").rename(images / "train/cat/9.png")
    summary = both(tmp_path, images, before)
    # As a test image its evaluation view was stored under all statistics but those of instance batches.
    mine = {"source": ["train/cat/9.png"]}
    missing = rows_of(tmp_path / "full", view=[0], statistics=["instance"], **mine)
    assert missing == 1
    assert summary.forwarded == missing + rows_of(tmp_path / "full", view=[1, 2], **mine)


@pytest.mark.parametrize(("codec", "chunk_rows"), [("none", 4), ("zstd", 1), ("pcodec", 4)])
def test_every_codec_and_rows_that_move_within_chunks(before, images, tmp_path, codec, chunk_rows):
    layout = {"codec": codec, "chunk_rows": chunk_rows}
    old = tmp_path / "old"
    extracted(old, *prepared(before / "images", tmp_path / "s"), before / "backbone", **{**SMALL, **layout})
    touched = three_changes(images)
    summary = both(tmp_path, images, before, previous=old, **layout)
    assert summary.forwarded == rows_of(tmp_path / "full", source=touched)


@pytest.mark.parametrize("layout", [{"chunk_rows": 3}, {"shard_bytes": 30000}, {"codec": "blosc-lz4", "chunk_rows": 5}])
def test_another_layout_needs_no_forward_pass(before, tmp_path, layout):
    assert both(tmp_path, before / "images", before, **layout).forwarded == 0


def test_more_views_are_the_only_rows_extracted(before, tmp_path):
    said = []
    summary = both(tmp_path, before / "images", before, max_views=5, view_target=3.0, say=said.append)
    assert summary.forwarded == summary.rows - rows_of(before / "old") > 0
    assert any("view policy: max 3 -> 5, target 1.5 -> 3.0" in line for line in said)


def test_a_chain_of_changes_ends_in_the_same_values_as_one(before, images, tmp_path):
    one_added(images)
    extracted(tmp_path / "1", *prepared(images, tmp_path / "s1"), before / "backbone", previous=before / "old", **SMALL)
    write_image(images / "train/owl/4.png", 998, (12, 10))
    found = prepared(images, tmp_path / "s2")
    last = extracted(tmp_path / "2", *found, before / "backbone", previous=tmp_path / "1", **SMALL)
    extracted(tmp_path / "direct", *found, before / "backbone", previous=before / "old", **SMALL)
    assert last.forwarded == rows_of(tmp_path / "2", source=["train/owl/4.png"])
    chained, direct = tree(tmp_path / "2"), tree(tmp_path / "direct")
    assert json.loads(chained.pop("cache.json"))["fingerprint"] == json.loads(direct.pop("cache.json"))["fingerprint"]
    assert chained == direct


# --- what makes rows others


def fresh(place: Path, found, backbone: Path, **options) -> dict[str, bytes]:
    """The bytes of a run without any previous cache."""
    extracted(place / "fresh", *found, backbone, **{**SMALL, **options})
    return tree(place / "fresh")


def test_other_weights_are_said_and_everything_is_extracted(before, tmp_path):
    make_backbone_dir(tmp_path / "other", seed=1, classes=3, experts=2)
    found, said = prepared(before / "images", tmp_path / "samples"), []
    summary = extracted(
        tmp_path / "part", *found, tmp_path / "other", previous=before / "old", say=said.append, **SMALL
    )
    assert summary.forwarded == summary.rows
    assert said[0].startswith("b: the balanced, instance, mixture statistics are estimated again, not taken from ")
    assert f"{before / 'old'} (weights: weights " in said[0]
    assert said[2].startswith(f"b: extracts {summary.rows} of {summary.rows} rows, takes 0 from ")
    assert f"{before / 'old'} (weights: weights " in said[2]
    assert tree(tmp_path / "part") == fresh(tmp_path, found, tmp_path / "other")


def test_another_transform_keeps_the_statistics_and_extracts_everything(before, tmp_path, monkeypatch):
    monkeypatch.setitem(TRANSFORM, "padding", 2)
    said = []
    summary = both(tmp_path, before / "images", before, say=said.append)
    assert summary.taken == 0
    assert any("(transform: padding 1 -> 2)" in line for line in said)
    with open_cache(before / "old") as old, open_cache(tmp_path / "part") as new:
        assert new.statistics == old.statistics


@pytest.mark.parametrize(
    ("options", "says"),
    [({"batch_size": 8}, "(batch_size 16 -> 8)"), ({"dtype": "float16"}, "(dtype: float32 -> float16)")],
)
def test_what_computes_and_stores_rows_must_be_the_same(before, tmp_path, options, says):
    said = []
    assert both(tmp_path, before / "images", before, say=said.append, **options).taken == 0
    assert any(line.endswith(says) for line in said)


def test_other_passes_estimate_anew_and_rows_under_stage1_are_taken(before, tmp_path):
    found, said = prepared(before / "images", tmp_path / "samples"), []
    summary = extracted(
        tmp_path / "part",
        *found,
        before / "backbone",
        previous=before / "old",
        say=said.append,
        **SMALL,
        batchnorm_passes=3,
    )
    assert summary.taken == rows_of(before / "old", statistics=["stage1"])
    assert "(batch norm: passes 2 -> 3)" in said[0]
    assert "(the balanced, instance, mixture statistics differ)" in said[2]
    assert tree(tmp_path / "part") == fresh(tmp_path, found, before / "backbone", batchnorm_passes=3)


def test_a_recipe_that_the_previous_cache_lacks_is_estimated_and_the_rest_is_taken(before, tmp_path):
    said = []
    summary = both(
        tmp_path, before / "images", before, batchnorm=["stage1", "branchwise", "calibrated"], say=said.append
    )
    assert summary.forwarded == rows_of(tmp_path / "full", statistics=["calibrated"])
    assert said[0].startswith("b: the calibrated statistics are estimated again")
    assert said[0].endswith("(it has none)")


# --- faults


def flipped(cache: Path, shard: int, at: int, expert: int = 0) -> Path:
    path = cache / f"maps.zarr/expert_{expert}/c.{shard}.0.0.0"
    flip(path, at)
    return path


@pytest.mark.parametrize("at", [3, -1], ids=["index", "chunk"])
def test_a_damaged_shard_is_said_and_its_rows_are_extracted(before, tmp_path, at):
    old = Path(shutil.copytree(before / "old", tmp_path / "old"))
    path = flipped(old, 2, at, expert=1)
    with open_cache(old) as cache:
        held = len(cache.spec.shard_range(2))
    said = []
    summary = both(tmp_path, before / "images", before, previous=old, say=said.append)
    assert summary.forwarded == held
    assert f"DAMAGED: {path}: sha256 differs from cache.json, {held} rows not taken" in said[-2]
    extracted(tmp_path / "fresh", *prepared(before / "images", tmp_path / "s"), before / "backbone", **SMALL)
    assert rows_of(tmp_path / "fresh") == summary.rows
    whole, mended = tree(tmp_path / "fresh"), tree(tmp_path / "part")
    assert {k for k in whole if whole[k] != mended[k]} == {"cache.json"}  # says where its statistics come from


def test_exchanged_shards_are_found_although_their_chunks_are_whole(before, tmp_path):
    old = Path(shutil.copytree(before / "old", tmp_path / "old"))
    first, second = (old / f"maps.zarr/expert_0/c.{s}.0.0.0" for s in (1, 2))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    said = []
    summary = both(tmp_path, before / "images", before, previous=old, say=said.append)
    assert "c.1.0.0.0: sha256 differs from cache.json and 1 more shard" in said[-2]
    assert 0 < summary.forwarded < summary.rows / 3


@pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors"])
def test_damaged_tables_of_the_previous_cache_are_refused(before, tmp_path, name):
    old = Path(shutil.copytree(before / "old", tmp_path / "old"))
    flip(old / name, (old / name).stat().st_size // 2)
    found = prepared(before / "images", tmp_path / "samples")
    with pytest.raises(CacheError, match=f"{name}: sha256 differs"):
        extracted(tmp_path / "part", *found, before / "backbone", previous=old, **SMALL)
    assert not (tmp_path / "part").exists()


def carried(tmp_path, **overrides):
    """(source cache, carrier that takes every row of it)."""
    maps = make_cache(tmp_path / "c", **overrides)
    source = open_cache(tmp_path / "c")
    return source, maps, Carrier(source, source.spec, np.arange(source.spec.rows))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_chunk_that_rots_after_the_check_is_not_copied(tmp_path, codec):
    source, maps, carrier = carried(tmp_path, codec=codec)
    assert broken_shards(source, np.arange(11)) == {}
    shard = tmp_path / "c/maps.zarr/expert_0/c.1.0.0.0"
    before = shard.stat()
    flipped(tmp_path / "c", 1, -1)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # rot leaves no trace; a write would be `replaced`
    assert list(broken_shards(source, np.arange(11))) == [1]
    assert list(broken_shards(source, np.arange(4))) == []  # nothing is needed of it
    empty = [m[:0] for m in maps]
    assert carrier.complete(0, empty) == [(tmp_path / "c/maps.zarr/expert_0/c.0.0.0.0").read_bytes()]
    with pytest.raises(CacheError, match=r"c\.1\.0\.0\.0: chunk 3 \(row 7\): crc32c mismatch"):
        carrier.complete(1, empty)


def test_unchanged_chunks_are_neither_decoded_nor_encoded(tmp_path):
    """Chunks that no codec could read pass as they are, as long as their checksums hold."""
    source, maps, carrier = carried(tmp_path, codec="zstd", chunk_rows=2)
    source.read = carrier._codec = None
    for shard in range(source.spec.shards):
        expected = (tmp_path / f"c/maps.zarr/expert_0/c.{shard}.0.0.0").read_bytes()
        assert carrier.complete(shard, [m[:0] for m in maps]) == [expected]


def test_any_mixture_of_rows_is_what_the_writer_writes(tmp_path):
    """Random origins, repeats and new rows, aligned or not."""
    draws = np.random.default_rng(0)
    for number in range(12):
        codec, chunk_rows = ("none", "zstd")[number % 2], (1, 2, 3)[number % 3]
        layout = {"codec": codec, "chunk_rows": chunk_rows, "maps": ((3, 2, 2), (2, 1, 1))}
        place = tmp_path / str(number)
        old = make_cache(place / "old", number, make_rows(17), shard_rows=6, **layout)
        spec = make_spec(rows=23, shard_rows=6, **layout)
        origin = np.where(draws.random(23) < 0.3, -1, (np.arange(23) + draws.integers(-6, 3)).clip(-1, 16))
        new = make_maps(spec, 100 + number)
        maps = [np.where((origin >= 0)[:, None, None, None], o[origin], n) for o, n in zip(old, new, strict=True)]
        write_cache(place / "expected", spec, make_rows(23), maps)
        with open_cache(place / "old") as source:
            carrier = Carrier(source, spec, origin)
            for shard in range(spec.shards):
                span = np.array(spec.shard_range(shard))
                mine = span[origin[span] < 0]
                found = carrier.complete(shard, [m[mine] for m in new])
                for expert, data in enumerate(found):
                    assert data == (place / "expected" / spec.shard_file(expert, shard)).read_bytes()


def test_a_source_of_other_maps_is_refused(tmp_path):
    make_cache(tmp_path / "c")
    with open_cache(tmp_path / "c") as source, pytest.raises(CacheError, match="another shape or dtype"):
        Carrier(source, make_spec(maps=((3, 2, 1),)), np.zeros(11, np.int64))


# --- the command


@pytest.fixture
def command(before, images, tmp_path):
    """Runs `h2t extract b` on the changed images with what is given; returns (exit code, stdout, stderr)."""
    three_changes(images)
    prepared(images, tmp_path / "samples")
    settings = {f"extract__{k}": v for k, v in {**SMALL, "dtype": "float32", "batchnorm_passes": 2}.items()}
    params = write_params(tmp_path / "params.yaml", prepare=section_of(images), **settings)

    def run(out: str, *more: str) -> tuple[int, str, str]:
        places = [tmp_path / "samples", before / "backbone", tmp_path / out, "--params", params, "--device", "cpu"]
        result = invoke("extract", "b", *places, *more)
        return result.exit_code, result.stdout, result.stderr

    return run


def test_statistics_from_names_a_cache_or_a_folder_of_caches(before, tmp_path, command):
    shutil.copytree(before / "old", tmp_path / "kept/b")
    assert command("one", "--set", f"extract.statistics_from={tmp_path}/kept/b")[0] == 0
    code, said, _ = command("two", "--set", f"extract.statistics_from={tmp_path}/kept")
    assert code == 0
    assert f" from {tmp_path}/kept/b" in said
    assert command("three", "--set", f"extract.statistics_from={tmp_path}/kept", "--anew")[0] == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")


def test_what_is_no_extracted_cache_is_one_line(before, tmp_path, command):
    make_cache(tmp_path / "pooled", fingerprint_inputs={"parent": "a" * 64, "pool": "gap"})
    for place, says in (
        ("nowhere", "nowhere; give one outside data/extract"),
        ("pooled", "pooled: is a pooled copy of "),
    ):
        code, _, error = command("out", "--set", f"extract.statistics_from={tmp_path}/{place}")
        assert code == 1
        assert error.startswith("error: extract.statistics_from: ")
        assert says in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_second_run_has_nothing_to_do_and_leaving_the_setting_out_is_another_cache(before, tmp_path, command):
    setting = ("--set", f"extract.statistics_from={before}/old")
    assert command("out", *setting)[0] == 0
    assert "nothing to do" in command("out", *setting)[1]
    code, _, error = command("out")
    assert code == 1
    assert "holds another cache" in error
    assert command("out", "--replace")[0] == 0
    assert command("out")[0] == 0
    code, said, _ = command("out", "--set", f"extract.statistics_from={tmp_path}/out", "--replace")
    assert "nothing to do" in said  # kept from itself


def test_a_cache_can_replace_the_one_that_it_takes_rows_from(before, tmp_path, command):
    shutil.copytree(before / "old", tmp_path / "b")
    assert command("expected", "--set", f"extract.statistics_from={before}/old")[0] == 0
    assert command("b", "--set", f"extract.statistics_from={tmp_path}/b", "--replace")[0] == 0
    assert tree(tmp_path / "b") == tree(tmp_path / "expected")


def test_why_counts_what_extract_then_extracts(before, images, tmp_path, command):
    data = tmp_path / "data"
    shutil.copytree(before / "old", data / "extract/b")
    shutil.copytree(before / "backbone", data / "train_backbone/b")
    prepared(images, data / "prepare")
    setting = ["--set", f"extract.statistics_from={data}/extract"]
    place = str(data / "extract/b")
    asked = ["cache", "why", place, "--params", str(tmp_path / "params.yaml"), "--set", "device=cpu", "--json"]
    result = accepted(*asked, *setting)
    verdict = json.loads(result)
    said = command("out", *setting)[1]
    assert 0 < verdict["rows"] < verdict["of"]
    assert f"b: extracts {verdict['rows']} of {verdict['of']} rows" in said
    without = json.loads(accepted(*asked))
    assert (without["rows"], without["possible"]) == (verdict["of"], verdict["rows"])


@pytest.mark.timeout(600)
def test_a_killed_incremental_run_goes_on_to_the_same_bytes(before, images, tmp_path, command, warm_h2t):
    """All images of two classes are others, so that there is work between the first and the last shard."""
    for j, path in enumerate(sorted((images / "train").glob("[co]*/*.png"))):
        write_image(path, 1000 + j, (12, 10))
    prepared(images, tmp_path / "samples")
    setting = ("--set", f"extract.statistics_from={before}/old")
    assert command("whole", *setting, "--anew")[0] == 0
    with open_cache(tmp_path / "whole") as cache:
        shards = cache.spec.shards
    arguments = ["extract", "b", tmp_path / "samples", before / "backbone", tmp_path / "killed/b"]
    options = ["--params", tmp_path / "params.yaml", "--device", "cpu", *setting]
    run = [*map(str, [warm_h2t, *arguments, *options])]
    kill_and_restart(run, environment(), tmp_path, tmp_path / "killed/b", kills=3, shards=shards, seed=0, pause=0)
    assert tree(tmp_path / "killed/b") == tree(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["b"]
