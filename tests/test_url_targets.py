"""Caches written to URLs, an S3 endpoint and SSH servers on the loopback, and what holds in a directory as well."""

import json
import time

import pytest
import torch
from builders import (
    TOKEN,
    make_cache,
    make_maps,
    make_rows,
    make_spec,
    make_statistics,
    raises,
    tree,
    write_cache,
    write_part,
)
from pipeline_builders import extracted
from servers import s3_endpoint, store_of

from h2t.cache.errors import CacheError, CacheWarning
from h2t.cache.reader import open_cache
from h2t.cache.tools.copied import copied
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import verify
from h2t.cache.write import lease
from h2t.cache.write.parts import Part
from h2t.cache.write.remote import RemoteCacheWriter, RemoteStaging
from h2t.cache.write.target import target_at

SMALL = {"batchnorm": ["branchwise"], "max_views": 2, "shard_bytes": 98304, "batch_size": 16}


@pytest.fixture(params=["s3", "ssh"])
def store(request, tmp_path):
    """An empty place on a server."""
    with store_of(request.param, tmp_path) as place:
        yield place


def below(store, name: str) -> dict[str, bytes]:
    return {path[len(name) + 1 :]: data for path, data in store.files().items() if path.startswith(f"{name}/")}


@pytest.fixture
def spec():
    return make_spec(rows=32, shard_rows=8, maps=((3, 2, 2), (2, 1, 1)))


def written(store, spec, **options):
    """Writes the cache `c` as one process; returns the shards that it had to write."""
    target, maps = target_at(f"{store.url}/c"), make_maps(spec)
    with target.staging() as staging:
        writer = target.writer(staging, spec, make_rows(spec.rows), TOKEN, read=False)  # as extract commits
        pending = writer.pending
        for shard in pending:
            held = spec.shard_range(shard)
            writer.write(shard, [m[held.start : held.stop] for m in maps])
        writer.take_over(read=False)
        writer.commit(make_statistics(), b"# A cache\n", **options)
    return pending


anywhere = pytest.mark.parametrize("store", ["folder", "s3", "ssh"], indirect=True)


class TestOfShards:
    def test_the_bytes_of_a_directory_and_nothing_else(self, store, spec, tmp_path):
        write_cache(tmp_path / "one", spec, make_rows(spec.rows), make_maps(spec))
        written(store, spec)
        assert store.files() == {f"c/{name}": data for name, data in tree(tmp_path / "one").items()}
        assert verify(f"{store.url}/c") == []

    @anywhere
    def test_parts_in_any_order_make_the_cache_of_one_process(self, store, spec, tmp_path):
        write_cache(tmp_path / "one", spec, make_rows(spec.rows), make_maps(spec))
        for k in (3, 1, 2):
            write_part(f"{store.url}/c", spec, Part(k, 3))
            assert below(store, "c") == {}
        assert written(store, spec) == []
        assert store.files() == {f"c/{name}": data for name, data in tree(tmp_path / "one").items()}

    @anywhere
    def test_of_two_that_computed_other_bits_one_is_taken_whole(self, store, spec):
        """On GPUs a shard that is computed twice may round differently. One of both is taken, with its digest."""
        write_part(f"{store.url}/c", spec, Part(1, 1))
        write_part(f"{store.url}/c", spec, Part(1, 1), seed=1, shards=[0, 2])
        assert written(store, spec) == []
        assert verify(f"{store.url}/c") == []

    def test_a_shard_that_was_cut_is_written_again(self, store, spec):
        shards = write_part(f"{store.url}/c", spec, Part(2, 2))
        victim = next(name for name in store.files() if f"/0.{shards[1]}." in name)
        store.put(victim, store.files()[victim][:-1])
        assert write_part(f"{store.url}/c", spec, Part(2, 2)) == [shards[1]]

    @anywhere
    def test_one_part_twice_is_refused_and_so_is_the_whole_meanwhile(self, store, spec):
        target = target_at(f"{store.url}/c")
        who = r" \(process \d+ on" if "://" in store.url else ""
        with target.staging(shared=True) as staging, staging.holding("part-1-of-2"):
            with raises("busy", f"another process is writing this part{who}"):
                write_part(f"{store.url}/c", spec, Part(1, 2))
            with raises("busy", "another process is writing this cache"):
                written(store, spec)
            assert write_part(f"{store.url}/c", spec, Part(2, 2))
        with target.staging(), raises("busy", "another process is writing this cache"):
            write_part(f"{store.url}/c", spec, Part(1, 2))

    @anywhere
    def test_other_settings_are_named_and_cost_no_finished_shard(self, store, spec):
        write_part(f"{store.url}/c", spec, Part(1, 2))
        before = store.files()
        other, target = {**TOKEN, "threads": 8}, target_at(f"{store.url}/c")
        with raises("mismatch", r"other settings \(.*threads None -> 8\)"):
            write_part(f"{store.url}/c", spec, Part(2, 2), token=other)
        with target.staging() as staging, raises("mismatch", "threads None -> 8"):
            target.writer(staging, spec, make_rows(spec.rows), other)
        assert {k: v for k, v in store.files().items() if "part-2" not in k} == before

    def test_one_process_with_other_settings_starts_anew(self, store, spec):
        with RemoteStaging(f"{store.url}/c") as staging:
            writer = RemoteCacheWriter(staging, spec, make_rows(spec.rows), {"threads": 8})
            writer.write(0, [m[:8] for m in make_maps(spec, 1)])
        assert written(store, spec) == list(range(spec.shards))
        assert verify(f"{store.url}/c") == []

    def test_another_cache_is_replaced_only_on_demand(self, store, spec):
        longer = make_spec(rows=48, shard_rows=8)
        written(store, longer)
        with raises("exists", "holds another cache; remove it or pass --replace"):
            written(store, spec)
        with open_cache(f"{store.url}/c") as opened:
            assert opened.spec.rows == 48
        assert written(store, spec, replace=True) == []
        assert verify(f"{store.url}/c") == []

    def test_what_is_no_cache_is_not_overwritten(self, store, spec):
        store.put("c/thesis.tex", b"years of work")
        for replace in (False, True):
            with raises("exists", r"holds thesis\.tex, which is no part of a cache"):
                written(store, spec, replace=replace)
        assert below(store, "c") == {"thesis.tex": b"years of work"}

    def test_a_commit_that_was_cut_off_is_no_cache_and_goes_on(self, store, spec, tmp_path):
        """Some objects have their final names, and there is no record yet."""
        write_cache(tmp_path / "one", spec, make_rows(spec.rows), make_maps(spec))
        expected = tree(tmp_path / "one")
        write_part(f"{store.url}/c", spec, Part(1, 1))
        for name in ("maps.zarr/expert_0/c.0.0.0.0", "maps.zarr/expert_0/c.7.0.0.0", "rows.parquet"):
            store.put(f"c/{name}", expected.get(name, b"of an earlier cache")[:-1])
        with raises("uncommitted", r"is unfinished: no cache.json yet; .*run the same command again"):
            open_cache(f"{store.url}/c")
        assert written(store, spec) == []
        assert below(store, "c") == expected

    def test_two_commits_at_once_copy_the_same_shards(self, store, spec):
        """The second has lost its lock; a worker that was given up adds other bits of two shards between them."""
        write_part(f"{store.url}/c", spec, Part(1, 1), seed=1)
        late = RemoteStaging(f"{store.url}/c")
        with RemoteStaging(f"{store.url}/c") as staging:
            first = RemoteCacheWriter(staging, spec, make_rows(spec.rows), TOKEN)
            chosen = first.chosen()
            first.write(0, [m[:8] for m in make_maps(spec, 0)])
            first.write(3, [m[24:32] for m in make_maps(spec, 2)])
            second = RemoteCacheWriter(late, spec, make_rows(spec.rows), TOKEN)
            assert second.chosen() == chosen

            def published(*args, **options):
                first.commit(make_statistics(), b"# A cache\n")
                RemoteStaging.publish(late, *args, **options)  # finds its sources gone and the same cache there

            late.publish = published
            second.commit(make_statistics(), b"# A cache\n")
        assert verify(f"{store.url}/c") == []


class TestOfLocks:
    def held_by(self, store, **changes):
        """The lock of another process, as it was found."""
        with RemoteStaging(f"{store.url}/c"):
            content = json.loads(below(store, ".c.staging")["lock"])
        store.put(".c.staging/lock", json.dumps({**content, "nonce": "other", **changes}).encode())

    def test_of_a_process_that_has_ended_on_this_machine_is_taken_at_once(self, store, spec):
        self.held_by(store, pid=2**22 + 1, started="1")
        assert written(store, spec)

    def test_of_a_number_that_another_process_has_now_too(self, store, spec):
        self.held_by(store, started="1")
        assert written(store, spec)

    def test_of_another_machine_is_respected_until_it_expires(self, store, spec, monkeypatch):
        self.held_by(store, host="elsewhere")
        with raises("busy", r"process \d+ on elsewhere.* its lock ends after 120 s"):
            written(store, spec)
        monkeypatch.setattr(lease, "EXPIRES", 0.0)
        assert written(store, spec)

    def test_content_that_is_no_lock_expires_as_well(self, store, spec, monkeypatch):
        store.put(".c.staging/lock", b"[1, 2")
        with pytest.raises(CacheError, match="another process is writing this cache; wait"):
            written(store, spec)
        monkeypatch.setattr(lease, "EXPIRES", 0.0)
        assert written(store, spec)

    def test_a_process_that_lost_its_lock_does_not_commit(self, store, spec, monkeypatch):
        monkeypatch.setattr(lease, "RENEWED", 0.05)
        with RemoteStaging(f"{store.url}/c") as staging:
            writer = RemoteCacheWriter(staging, spec, make_rows(spec.rows), TOKEN)
            for shard in writer.pending:
                held = spec.shard_range(shard)
                writer.write(shard, [m[held.start : held.stop] for m in make_maps(spec)])
            while staging._leases[0]._thread.is_alive():  # until it was not written over by a renewal in progress
                store.put(".c.staging/lock", b"{}")
                time.sleep(0.1)
            writer.take_over(read=False)
            with raises("busy", "another process is writing this cache"):
                writer.commit(make_statistics(), b"# A cache\n")
        assert below(store, "c") == {}
        assert store.files()[".c.staging/lock"] == b"{}"  # not ours, so not removed

    def test_a_lock_is_renewed(self, store, monkeypatch):
        """Others see a later time of its object, which is what they judge it by."""
        monkeypatch.setattr(lease, "RENEWED", 0.05)
        with RemoteStaging(f"{store.url}/c") as staging:

            def written():
                return staging.objects.below(".c.staging")["lock"].modified

            taken, end = written(), time.monotonic() + 60
            while written() == taken:
                assert time.monotonic() < end
                time.sleep(0.1)


def test_a_store_that_ignores_the_condition_is_used_with_a_warning(spec):
    with s3_endpoint(conditional=False) as store:
        with pytest.warns(CacheWarning, match="ignores If-None-Match, so no second writer is refused"):
            assert written(store, spec)
        assert verify(f"{store.url}/c") == []


@pytest.fixture(scope="module")
def single(tmp_path_factory, few_digits, backbone_dir):
    """The cache as one process writes it to a directory."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("single") / "b"
    assert extracted(out, *few_digits, backbone_dir, **SMALL).shards > 4
    return tree(out)


def test_extraction_ends_in_the_bytes_of_a_directory(store, few_digits, backbone_dir, single, tmp_path):
    said = []
    extracted(tmp_path / "b", *few_digits, backbone_dir, to=f"{store.url}/b", say=said.append, **SMALL)
    assert below(store, "b") == single
    assert " free" not in said[0]
    assert said[-1].endswith("/b")
    again = extracted(tmp_path / "b", *few_digits, backbone_dir, to=f"{store.url}/b", say=said.append, **SMALL)
    assert (again.forwarded, again.kept_shards) == (0, again.shards)
    assert "nothing to do" in said[-1]
    assert store.files().keys() == {f"b/{name}" for name in single}


def test_parts_and_a_commit_end_in_the_same_bytes(store, few_digits, backbone_dir, single, tmp_path):
    given = {"to": f"{store.url}/b", **SMALL}
    for k in (3, 1):
        extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(k, 3), **given)
    with pytest.raises(CacheError, match=r"of 1 part \(2/3\); run these with --part"):
        extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **given)
    extracted(tmp_path / "b", *few_digits, backbone_dir, part=Part(2, 3), **given)
    assert extracted(tmp_path / "b", *few_digits, backbone_dir, commit=True, **given).forwarded == 0
    assert store.files() == {f"b/{name}": data for name, data in single.items()}


@pytest.mark.slow
@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_workers_of_a_cluster_write_there_themselves(store, few_digits, backbone_dir, single, tmp_path):
    extracted(tmp_path / "b", *few_digits, backbone_dir, to=f"{store.url}/b", cluster="local:2", **SMALL)
    assert store.files() == {f"b/{name}": data for name, data in single.items()}


def test_a_pooled_copy_has_the_bytes_of_a_directory(store, tmp_path):
    make_cache(tmp_path / "c")
    with open_cache(tmp_path / "c") as cache:
        for out in (tmp_path / "p", f"{store.url}/p"):
            pooled(cache, out, lambda maps: maps.mean((2, 3)), "gap", shard_bytes=64)
    assert store.files() == {f"p/{name}": data for name, data in tree(tmp_path / "p").items()}


def test_a_copy_has_every_byte_and_is_resumed(store, tmp_path):
    make_cache(tmp_path / "c", rows=make_rows(40), shard_rows=8)
    victim = tmp_path / "c/maps.zarr/expert_0/c.4.0.0.0"
    sound = victim.read_bytes()
    victim.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with (
        open_cache(tmp_path / "c") as cache,
        raises("damaged", r"c\.4\.0\.0\.0: sha256 differs"),
    ):
        copied(cache, f"{store.url}/d")
    assert below(store, "d") == {}
    victim.write_bytes(sound)
    with open_cache(tmp_path / "c") as cache:
        assert copied(cache, f"{store.url}/d") == 1
        assert copied(cache, f"{store.url}/d") == 0
    assert store.files() == {f"d/{name}": data for name, data in tree(tmp_path / "c").items()}
    make_cache(tmp_path / "e", seed=1)
    with open_cache(tmp_path / "e") as cache, pytest.raises(CacheError, match="holds another cache"):
        copied(cache, f"{store.url}/d")


def test_a_url_that_caches_cannot_be_written_to_is_one_line(few_digits, backbone_dir, tmp_path):
    with pytest.raises(CacheError, match="written to directories and to s3:// and ssh:// only") as error:
        extracted(tmp_path / "b", *few_digits, backbone_dir, to="https://u:s3cr3t@h/b", **SMALL)
    assert "s3cr3t" not in error.value.detail
