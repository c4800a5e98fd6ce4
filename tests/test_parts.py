"""Extraction in parts without a scheduler: `--part K/N` on any machines, then `--commit`; the bytes of one process."""

import pickle
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from builders import TOKEN, make_cache, make_maps, make_rows, make_spec, make_statistics, raises, tree, write_part
from kills import heard
from pipeline_builders import (
    accepted,
    environment,
    extracted,
    make_backbone_dir,
    make_samples,
    make_stage2_cache,
    refused,
    write_params,
)

from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import verify
from h2t.cache.write.parts import Part
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter
from h2t.pipeline.base.errors import UserError

SMALL = {"batchnorm": ["branchwise"], "max_views": 2, "shard_bytes": 65536, "batch_size": 16}


@pytest.fixture(scope="module")
def single(tmp_path_factory, few_digits, backbone_dir):
    """The cache as one process writes it."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("single") / "b"
    assert extracted(out, *few_digits, backbone_dir, **SMALL).shards > 8
    return tree(out)


def staging_of(out):
    return out.parent / f".{out.name}.staging"


class TestOfShards:
    """The folder in which processes write shards beside each other, without a network."""

    @pytest.fixture
    def spec(self):
        return make_spec(rows=40, shard_rows=8)

    def commit(self, target, spec):
        with Staging(target) as staging:
            writer = CacheWriter(staging, spec, make_rows(spec.rows), TOKEN, read=False)
            writer.commit(make_statistics(), b"# A cache\n")

    @pytest.mark.parametrize("of", [1, 2, 3, 5, 9])
    def test_parts_have_every_shard_once(self, spec, of):
        shards = [s for k in range(1, of + 1) for s in Part(k, of).shards(spec)]
        assert shards == list(range(spec.shards))
        assert len({len(Part(k, of).shards(spec)) for k in range(1, of + 1)}) <= 2

    @pytest.mark.parametrize("harm", ["cut", "flipped"])
    def test_a_repeated_part_writes_a_damaged_shard_again(self, tmp_path, spec, harm):
        part = Part(2, 2)
        shards = write_part(tmp_path / "c", spec, part)
        folder = next(staging_of(tmp_path / "c").glob("parts.*"))
        victim = next(p for p in folder.iterdir() if p.name.startswith(f"0.{shards[1]}."))
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data if harm == "flipped" else data[:-1])
        assert write_part(tmp_path / "c", spec, part) == [shards[1]]

    def test_a_shard_that_was_cut_is_missing_to_the_commit(self, tmp_path, spec):
        write_part(tmp_path / "c", spec, Part(1, 1))
        folder = next(staging_of(tmp_path / "c").glob("parts.*"))
        victim = next(p for p in folder.iterdir() if p.name.startswith("0.3."))
        victim.write_bytes(victim.read_bytes()[:-1])
        with raises("incomplete"):
            self.commit(tmp_path / "c", spec)

    def test_the_unfinished_file_of_a_killed_part_is_removed_by_its_next_run_alone(self, tmp_path, spec):
        write_part(tmp_path / "c", spec, Part(1, 2))
        folder = next(staging_of(tmp_path / "c").glob("parts.*"))
        for label in ("part-1-of-2", "part-2-of-2"):
            (folder / f"0.4.9.{'a' * 64}.{label}.partial").write_bytes(b"half")
        write_part(tmp_path / "c", spec, Part(1, 2))
        assert [p.name.split(".")[-2] for p in folder.glob("*.partial")] == ["part-2-of-2"]
        write_part(tmp_path / "c", spec, Part(2, 2))
        assert not list(folder.glob("*.partial"))

    def test_a_token_that_cannot_be_read_is_one_line(self, tmp_path, spec):
        write_part(tmp_path / "c", spec, Part(1, 2))
        (staging_of(tmp_path / "c") / "token.json").write_bytes(b"[1, 2")
        with pytest.raises(CacheError, match=r"token\.json cannot be read"):
            write_part(tmp_path / "c", spec, Part(2, 2))

    def test_a_writer_whose_folder_is_gone_says_so_in_one_line(self, tmp_path, spec):
        with Staging(tmp_path / "c") as staging:
            worker = CacheWriter(staging, spec, make_rows(spec.rows), TOKEN).beside()
            staging.discard()
        with pytest.raises(CacheError, match="was removed while it was written") as error:
            worker.write(0, [m[:8] for m in make_maps(spec)])
        sent = pickle.loads(pickle.dumps(error.value))
        assert (sent.reason, sent.detail) == ("busy", error.value.detail)

    def test_what_a_process_left_over_writes_for_another_token_is_never_taken(self, tmp_path, spec):
        """A worker that outlived its run may finish a shard after another run has begun."""
        with Staging(tmp_path / "c") as staging:
            left_over = CacheWriter(staging, spec, make_rows(spec.rows), {"threads": 8}).beside()
        with Staging(tmp_path / "c") as staging:
            writer = CacheWriter(staging, spec, make_rows(spec.rows), TOKEN)
            left_over.write(0, [m[:8] for m in make_maps(spec, 1)])
            writer.take_over(read=False)
            assert writer.pending == list(range(spec.shards))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts_end_in_the_bytes_of_one_process(few_digits, backbone_dir, single, tmp_path, order):
    for k in order:
        extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(k, 3), **SMALL)
        assert not (tmp_path / "b").exists()
    summary = extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL)
    assert (summary.forwarded, summary.kept_shards) == (0, summary.shards)
    assert tree(tmp_path / "b") == single
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_part_after_the_commit_has_nothing_to_do_and_leaves_nothing(few_digits, backbone_dir, tmp_path):
    said = []
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(1, 1), **SMALL)
    extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL)
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(1, 1), say=said.append, **SMALL)
    assert "nothing to do" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_commit_names_the_missing_parts_and_keeps_the_others(few_digits, backbone_dir, single, tmp_path):
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(2, 4), **SMALL)
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(3, 4), **SMALL)
    with raises("incomplete", r"of 2 parts \(1/4, 4/4\); run these with --part"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL)
    # Another number of parts, or none, goes on from the same shards.
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(1, 2), **SMALL)
    rest = extracted(tmp_path / "b", *few_digits, backbone_dir, **SMALL)
    assert 0 < rest.shards - rest.kept_shards < rest.shards / 2
    assert tree(tmp_path / "b") == single


def test_a_commit_of_nothing_and_one_with_other_parameters_are_one_line(few_digits, backbone_dir, tmp_path):
    with pytest.raises(CacheError, match="--commit needs parts written with the same parameters; got none"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL)
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(1, 1), **SMALL)
    with pytest.raises(UserError, match=r"extract\.batch_size: must be 16, .* got 32"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **{**SMALL, "batch_size": 32})
    with pytest.raises(CacheError, match="--commit needs parts"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **{**SMALL, "max_views": 1})
    with pytest.raises(CacheError, match="codec none -> zstd"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL, codec="zstd")
    assert extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL).kept_shards > 8


def test_a_commit_needs_not_the_threads_of_the_parts(few_digits, backbone_dir, single, tmp_path):
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(1, 1), **SMALL)
    torch.set_num_threads(2)
    extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **SMALL)
    assert tree(tmp_path / "b") == single


def test_parts_take_rows_of_a_previous_cache_too(few_digits, backbone_dir, tmp_path):
    extracted(tmp_path / "one view", *few_digits, backbone_dir, **{**SMALL, "max_views": 1})
    given = {"previous": tmp_path / "one view", **SMALL}
    extracted(tmp_path / "here", *few_digits, backbone_dir, **given)
    taken = [extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(k, 2), **given).taken for k in (1, 2)]
    extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **given)
    assert all(taken)
    assert tree(tmp_path / "b") == tree(tmp_path / "here")


@pytest.mark.timeout(900)
def test_parts_at_once_killed_and_repeated_end_in_the_same_bytes(tmp_path, warm_h2t):
    """The command as a batch system runs it: three jobs at once, killed at random moments and queued again."""
    make_samples(tmp_path / "samples", test_per_class=40, validation_per_class=14)
    options = {"extract__batchnorm_passes": 2, "extract__chunk_rows": 32, "extract__shard_bytes": 16384}
    params = write_params(tmp_path / "params.yaml", **options)
    make_backbone_dir(tmp_path / "backbone")
    command = [warm_h2t, "extract", "b", tmp_path / "samples", tmp_path / "backbone"]
    end = ["--params", params, "--device", "cpu"]
    env, draws, kills = environment(), random.Random(7), 0

    def start(out, *more):
        line = [*map(str, [*command, out, *end, *more])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, env=env, cwd=tmp_path, preexec_fn=heard, **pipes)

    whole = start(tmp_path / "whole/b")
    assert whole.wait(600) == 0, whole.stderr.read()
    shards, out = len(list((tmp_path / "whole/b/maps.zarr/expert_0").glob("c.*"))), tmp_path / "parts/b"
    left = {1, 2, 3}
    while left:
        running = {k: start(out, "--part", f"{k}/3") for k in left}
        victim = draws.choice(sorted(left))
        enough = draws.randrange(1, 4) + written(out)
        while kills < 6 and running[victim].poll() is None and written(out) < min(enough, shards - 1):
            time.sleep(0.002)
        if kills < 6:
            time.sleep(draws.uniform(0, 0.05))
            running[victim].send_signal(signal.SIGKILL)
        for k, process in running.items():
            errors = process.communicate(timeout=600)[1]
            if process.returncode == 0:
                left.discard(k)
            else:
                assert process.returncode == -signal.SIGKILL, errors
                kills += 1
        if not left and kills < 2:  # on a busy machine they may end before they are killed: all of them once more
            shutil.rmtree(staging_of(out))
            left, kills = {1, 2, 3}, 0
    committed = start(out, "--commit")
    assert committed.wait(600) == 0, committed.stderr.read()
    assert kills > 1
    assert tree(out) == tree(tmp_path / "whole/b")
    assert [p.name for p in out.parent.iterdir()] == ["b"]


def written(out):
    """Finished files of parts."""
    return sum(p.suffix != ".partial" for p in staging_of(out).glob("parts.*/*"))


class TestOfPooledCopies:
    """`h2t pool` in parts: shards are small here, so that each part has some."""

    @pytest.fixture
    def parent(self, tmp_path):
        make_cache(tmp_path / "a", rows=make_rows(500), maps=((700, 2, 2),), shard_rows=64)
        with open_cache(tmp_path / "a") as cache:
            yield cache

    def copied(self, parent, target, **given):
        return pooled(parent, target, lambda maps: maps.mean((2, 3)), "gap", shard_bytes=100_000, **given)

    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
    def test_parts_end_in_the_bytes_of_one_process(self, parent, tmp_path, order):
        assert self.copied(parent, tmp_path / "one").shards > 10
        for k in order:
            self.copied(parent, tmp_path / "b", part=Part(k, 3))
            assert not (tmp_path / "b").exists()
        copied = []
        self.copied(parent, tmp_path / "b", commit=True, progress=copied.append)
        assert copied == []
        assert tree(tmp_path / "b") == tree(tmp_path / "one")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "one"]

    def test_a_part_that_failed_goes_on_and_a_commit_names_what_is_missing(self, parent, tmp_path, monkeypatch):
        monkeypatch.setattr("h2t.cache.tools.pooled.WORKERS", 1)
        self.copied(parent, tmp_path / "one")
        with pytest.raises(CacheError, match="--commit needs parts") as none:
            self.copied(parent, tmp_path / "b", commit=True)
        done = []

        def stop(rows):
            done.append(rows)
            if len(done) == 2:
                raise RuntimeError("the power went")
            if len(done) > 2:
                time.sleep(1)  # the next shard had begun; in this time those after it are given up

        self.copied(parent, tmp_path / "b", part=Part(3, 3))
        with pytest.raises(RuntimeError):
            self.copied(parent, tmp_path / "b", part=Part(1, 3), progress=stop)
        with pytest.raises(CacheError, match=r"of 2 parts \(1/3, 2/3\)") as some:
            self.copied(parent, tmp_path / "b", commit=True)
        assert {none.value.reason, some.value.reason} == {"incomplete"}
        again = []
        for k in (1, 2):
            self.copied(parent, tmp_path / "b", part=Part(k, 3), progress=again.append)
        self.copied(parent, tmp_path / "b", commit=True)
        assert sum(again) < 500 * 2 / 3
        assert tree(tmp_path / "b") == tree(tmp_path / "one")

    def test_a_part_of_another_version_is_refused_by_name(self, parent, tmp_path):
        self.copied(parent, tmp_path / "b", part=Part(1, 2), token={"torch": "1"})
        with pytest.raises(CacheError, match="torch 1 -> 2"):
            self.copied(parent, tmp_path / "b", part=Part(2, 2), token={"torch": "2"})
        self.copied(parent, tmp_path / "b", part=Part(2, 2), token={"torch": "1"})
        self.copied(parent, tmp_path / "b", commit=True, token={"torch": "2"})  # a commit pools nothing
        assert verify(tmp_path / "b") == []

    @pytest.mark.parametrize("command", [["pool", "b"], ["cache", "pool"]], ids=" ".join)
    def test_the_commands(self, tmp_path, command):
        make_stage2_cache(tmp_path / "b")
        end = ["--params", str(write_params(tmp_path / "p.yaml"))] if command == ["pool", "b"] else []

        def pool(out, *more):
            return accepted(*command, tmp_path / "b", tmp_path / out / "b", *more, *end)

        pool("whole")
        assert "part 1/2" in pool("parts", "--part", "1/2")
        pool("parts", "--part", "2/2")
        pool("parts", "--commit")
        assert tree(tmp_path / "parts/b") == tree(tmp_path / "whole/b")


@pytest.mark.parametrize("value", ["0/4", "5/4", "1", "1/x", "/", "-1/4", "1/0"])
def test_a_part_that_is_none_is_refused(value):
    assert "must be K/N with K from 1 to N" in refused("extract", "b", "s", "w", "o", "--part", value, code=2)


def test_part_and_commit_exclude_each_other(tmp_path):
    params = write_params(tmp_path / "p.yaml")
    line = ["extract", "ce_mixup", "s", "w", "o", "--params", params, "--part", "1/2", "--commit"]
    assert "exclude each other" in refused(*line, code=2)
