import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from builders import make_cache, make_rows, tree
from click.testing import CliRunner

from h2t.cache.reader import open_cache
from h2t.cache.sizes import sized
from h2t.pipeline.command_line.caches import cache

ROOT = Path(__file__).parents[1]
COMMANDS = ["info", "verify", "stats"]


def run(*arguments):
    return CliRunner().invoke(cache, [str(a) for a in arguments])


def lines(*arguments) -> list[str]:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_info(cache_dir):
    make_cache(cache_dir, maps=((3, 2, 2), (5, 1, 1)), codec="zstd")
    text = "\n".join(lines("info", cache_dir))
    with open_cache(cache_dir) as found:
        fingerprint = found.spec.fingerprint
    for part in (
        "11 of 6 samples, 2 views",
        "9 train rows with stage1 statistics",
        "2 test rows with stage1 statistics",
        "2: 3 x 2 x 2, 5 x 1 x 1, float16",
        "codec zstd, 1 row per chunk, 4 per shard",
        "in 6 shards",
        fingerprint,
        'views: {"max": 2, "seed": 0}',
        "numpy: 2.0",
    ):
        assert part in text


def test_info_cuts_what_thousands_of_classes_are_called(cache_dir):
    names = [f"class {number}" for number in range(8142)]
    make_cache(cache_dir, provenance={"classes": names})
    (shown,) = [line for line in lines("info", cache_dir) if "class 7" in line]
    assert len(shown) < 1100
    assert shown.endswith(f"... (--json shows all {len(json.dumps(names)):,} characters)")
    assert json.loads("".join(lines("info", "--json", cache_dir)))["provenance"]["classes"] == names


def test_info_json(cache_dir):
    make_cache(cache_dir)
    about = json.loads("".join(lines("info", "--json", cache_dir)))
    assert about["rows"] == 11
    assert about["bytes"] == sum(map(len, tree(cache_dir).values()))
    keys = {"experts", "dtype", "codec", "chunk_rows", "shard_rows", "shards", "splits", "classes", "views"}
    assert keys | {"fingerprint", "provenance"} <= set(about)


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_verify_of_a_sound_cache_is_one_line(cache_dir, quick):
    make_cache(cache_dir)
    (line,) = lines("verify", *quick, cache_dir)
    assert line.startswith("sound: 11 rows, 9 files")


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_verify_prints_each_fault_on_its_line_and_exits_1(cache_dir, quick):
    make_cache(cache_dir)
    (cache_dir / "maps.zarr/expert_0/c.1.0.0.0").unlink()
    os.truncate(cache_dir / "README.md", 1)
    result = run("verify", *quick, cache_dir)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "README.md: 1 bytes, cache.json says 10",
        "maps.zarr/expert_0/c.1.0.0.0: chunks 0 to 3 (rows 4 to 7): file is missing",
    ]
    assert result.stderr == ""


def test_stats(cache_dir):
    maps = make_cache(cache_dir, maps=((3, 2, 2), (5, 1, 1)))
    first, norms, second, _ = lines("stats", cache_dir)
    assert first.startswith("expert 0: 132 values, ")
    assert f"max {maps[0].max():.4g}" in first
    assert "0 NaN, 0 Inf" in first
    assert "mean L2 norm by class" in norms
    assert second.startswith("expert 1: 55 values")
    table = json.loads("".join(lines("stats", "--json", cache_dir)))
    assert table[0]["sparsity"] == (maps[0] == 0).mean()


def test_a_url(cache_dir):
    make_cache(cache_dir)
    fs = fsspec.filesystem("memory")
    fs.put(str(cache_dir), "/commanded", recursive=True)
    for command in COMMANDS:
        assert lines(command, "memory://commanded")
    fs.rm("/commanded", recursive=True)


@pytest.mark.parametrize("command", ["info", "stats"])
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nothing", "no cache.json"),
        ("newer", "format 7"),
        ("cut", "cache.json"),
        ("zz://x", "zz"),
        ("memory://x", "no cache.json"),
    ],
)
def test_what_is_no_cache_is_one_line_on_stderr(tmp_path, monkeypatch, command, place, says):
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "newer")
    make_cache(tmp_path / "cut")
    (tmp_path / "newer/cache.json").write_bytes(b'{"format":7}')
    os.truncate(tmp_path / "cut/cache.json", 99)
    result = run(command, place)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert says in line
    assert isinstance(result.exception, SystemExit)


def test_a_shard_that_is_gone_is_one_line_too(cache_dir):
    make_cache(cache_dir)
    (cache_dir / "maps.zarr/expert_0/c.1.0.0.0").unlink()
    result = run("stats", cache_dir)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "c.1.0.0.0" in result.stderr


def test_wrong_use_exits_2(cache_dir):
    assert run("info").exit_code == 2
    assert run("nothing", cache_dir).exit_code == 2


def test_info_opens_no_shard(cache_dir):
    """The cost of a glance does not grow with the maps: only the record and the row table are opened."""
    make_cache(cache_dir, rows=make_rows(200), shard_rows=1)
    script = (
        "import sys, h2t.cache.tools.audit\n"
        "from h2t.pipeline.command_line.caches import cache\n"
        "opened = []\n"
        "def hook(event, args):\n"
        f"    if event == 'open' and {str(cache_dir)!r} in str(args[0]): opened.append(str(args[0]))\n"
        "sys.addaudithook(hook)\n"
        f"cache(['info', {str(cache_dir)!r}], standalone_mode=False)\n"
        "print(sorted(name.rsplit('/', 1)[1] for name in opened))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "['cache.json', 'rows.parquet']"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1 kB"), (49_949, "49.9 kB"), (999_499, "999 kB"), (999_500, "1 MB")),
        *((2.35e10, "23.5 GB"), (999.6e9, "1 TB"), (5e15, "5,000 TB")),
    ],
)
def test_sizes_for_people(size, text):
    assert sized(size) == text


def test_rows_of_numpy_integers_are_json(cache_dir):
    make_cache(cache_dir, rows=make_rows(3, label=np.array([0, 1, 2], np.int32)))
    for command in ("info", "stats"):
        json.loads("".join(lines(command, "--json", cache_dir)))


def test_the_parts_of_verify_find_together_what_one_run_finds(cache_dir):
    make_cache(cache_dir, rows=make_rows(40), maps=((3, 2, 2), (5, 1, 1)))
    for part in range(1, 5):
        (line,) = lines("verify", cache_dir, "--part", f"{part}/4")
        assert line == f"sound: part {part} of 4; checked every byte of it"
    (cache_dir / "maps.zarr/expert_1/c.1.0.0.0").unlink()
    os.truncate(cache_dir / "maps.zarr/expert_0/c.9.0.0.0", 1)
    os.truncate(cache_dir / "README.md", 1)
    whole = run("verify", cache_dir)
    parts = [run("verify", cache_dir, "--part", f"{part}/4") for part in range(1, 5)]
    found = [line for part in parts for line in part.stdout.splitlines() if not line.startswith("sound: ")]
    assert sorted(found) == sorted(whole.stdout.splitlines())
    assert [part.exit_code for part in parts] == [1, 0, 0, 1]


def test_more_parts_than_shards(cache_dir):
    make_cache(cache_dir)
    assert [run("verify", cache_dir, "--part", f"{part}/7").exit_code for part in range(1, 8)] == [0] * 7
    assert run("verify", cache_dir, "--part", "8/7").exit_code == 2


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_statistics_merge(cache_dir, tmp_path, parts):
    make_cache(cache_dir, rows=make_rows(40), maps=((3, 2, 2), (5, 1, 1)))
    files = [tmp_path / f"{part}.json" for part in range(1, parts + 1)]
    for part, path in enumerate(files, 1):
        path.write_text("\n".join(lines("stats", cache_dir, "--part", f"{part}/{parts}")))
    merging = [argument for path in reversed(files) for argument in ("--merge", path)]
    together = json.loads("".join(lines("stats", cache_dir, "--json", *merging)))
    whole = json.loads("".join(lines("stats", cache_dir, "--json")))
    for ours, theirs in zip(together, whole, strict=True):
        for name in ("mean", "classes"):
            found, expected = ours.pop(name), theirs.pop(name)
            if name == "mean":
                assert found == pytest.approx(expected, rel=1e-12)
                continue
            for a, b in zip(found, expected, strict=True):
                assert (a["label"], a["rows"]) == (b["label"], b["rows"])
                assert a["mean_l2"] == pytest.approx(b["mean_l2"], rel=1e-12)
        assert ours == theirs
    assert run("stats", cache_dir, *merging, "--merge", files[0]).exit_code == 1
    files[0].write_text("{}")
    assert run("stats", cache_dir, *merging).exit_code == 1
