"""A cache that is replaced under an open reader: the old values, or CacheError `replaced`; never a mixture."""

import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import make_cache, make_maps, make_rows, make_spec, make_statistics, raises, tree, write_cache

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.read.files import LocalFiles
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

ROWS = 24


@pytest.fixture
def pair(tmp_path, layout):
    """Directories of two caches of one shape and size, and their maps: the one that is opened, and another."""
    return make_pair(tmp_path, **layout)


def make_pair(folder: Path, **layout):
    spec = make_spec(rows=ROWS, **layout)
    # Binary noise, which every codec stores in the same number of bytes: sizes tell nothing.
    rng = np.random.default_rng(5)
    maps = [rng.integers(0, 2**16, (ROWS, *spec.maps[0]), np.uint16).view("<f2") for _ in range(2)]
    places = folder / "cache", folder / "other"
    for place, values in zip(places, maps, strict=True):
        write_cache(place, spec, make_rows(ROWS), [values])
    return places, maps


def moved_away(here: Path, other: Path) -> None:
    """As `--replace` does."""
    here.rename(here.with_name("old"))
    other.rename(here)


def moved_away_and_deleted(here: Path, other: Path) -> None:
    moved_away(here, other)
    shutil.rmtree(here.with_name("old"))


def deleted(here: Path, other: Path) -> None:
    shutil.rmtree(here)


def checked_out(here: Path, other: Path) -> None:
    """As DVC does: files that differ go first, then others come to their names."""
    names = [name for name, data in tree(other).items() if (here / name).read_bytes() != data]
    for name in names:
        (here / name).unlink()
    for name in names:
        shutil.copyfile(other / name, here / name)


def linked(link):
    def replace(here: Path, other: Path) -> None:
        names = list(tree(here))
        for name in names:
            (here / name).unlink()
            link(other / name, here / name)

    return replace


def one_shard(here: Path, other: Path) -> None:
    name = "maps.zarr/expert_0/c.3.0.0.0"
    (other / name).replace(here / name)


def one_shard_in_place(here: Path, other: Path) -> None:
    name = "maps.zarr/expert_0/c.3.0.0.0"
    shutil.copyfile(other / name, here / name)


REPLACEMENTS = {
    "moved away": moved_away,
    "moved away and deleted": moved_away_and_deleted,
    "deleted": deleted,
    "checked out": checked_out,
    "symlinks": linked(lambda there, here: here.symlink_to(there)),
    "hard links": linked(os.link),
    "one shard": one_shard,
    "one shard in place": one_shard_in_place,
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
@pytest.mark.parametrize("before", [0, 5, ROWS])
def test_old_values_or_an_error(pair, replace, before):
    (here, other), (old, _) = pair
    changed = set(range(12, 16)) if replace in (one_shard, one_shard_in_place) else set(range(ROWS))
    opened = set(range(-(-before // 4) * 4)) if replace is not one_shard_in_place else set()
    with open_cache(here) as cache:
        cache.read(np.arange(before))
        replace(here, other)
        for rows in (*np.arange(ROWS).reshape(-1, 1), np.arange(before), np.arange(ROWS)):
            assert is_old(cache, rows, old) == (opened | set(range(ROWS)) - changed).issuperset(rows.tolist())


def is_old(cache, rows, old) -> bool:
    """Whether `cache` still has the old values of `rows`; else it must have said that it was replaced."""
    try:
        found = cache.read(rows)
    except CacheError as error:
        if error.reason == "replaced" and "open the cache again" in error.detail:
            return False
        raise
    assert found.tobytes() == old[rows].tobytes()
    return True


@pytest.mark.parametrize("name", ["rows", "statistics"])
@pytest.mark.parametrize(
    "replace", [moved_away, moved_away_and_deleted, deleted, checked_out], ids=lambda f: f.__name__
)
def test_row_table_and_statistics(tmp_path, replace, name):
    here, other = tmp_path / "cache", tmp_path / "other"
    make_cache(here)
    make_cache(other, rows=make_rows(label=(np.arange(11) // 2 % 2).astype(np.int32)))
    with open_cache(here) as cache:
        replace(here, other)
        try:
            assert getattr(cache, name) == {"rows": make_rows(), "statistics": make_statistics()}[name]
        except CacheError as error:
            assert error.reason == "replaced"  # noqa: PT017 - either is right
        else:
            assert name == "statistics"  # equal bytes, so the same file
            assert replace is not deleted


def _read(cache, rows, answers) -> None:
    try:
        answers.put(cache.read(rows).tobytes())
    except CacheError as error:
        answers.put(error.reason)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("replace", [moved_away, one_shard], ids=lambda f: f.__name__)
def test_another_process_is_held_to_what_was_opened(tmp_path, start, replace):
    (here, other), (old, _) = make_pair(tmp_path)
    context = multiprocessing.get_context(start)
    answers = context.SimpleQueue()
    with open_cache(here) as cache:
        cache.read([0])
        replace(here, other)
        children = [context.Process(target=_read, args=(cache, rows, answers)) for rows in ([0, 1], [12, 13])]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
    found = [answers.get() for _ in children]
    may_be_old = start == "fork" or replace is one_shard
    assert "replaced" in found
    assert set(found) <= {"replaced", old[[0, 1]].tobytes()}
    assert len(set(found)) == 1 + may_be_old


def test_unpickled_after_the_replacement(pair):
    (here, other), _ = pair
    with open_cache(here) as cache:
        pickled = pickle.dumps(cache)
    moved_away_and_deleted(here, other)
    with pickle.loads(pickled) as again, raises("replaced"):
        again.read([0])


def test_the_same_bytes_in_another_file_are_the_same_cache(pair):
    """DVC links an output anew, or another machine has a copy of its own."""
    (here, _), (old, _) = pair
    with open_cache(here) as cache:
        pickled = pickle.dumps(cache)
        for name in tree(here):
            shutil.copyfile(here / name, here / f"{name}.new")
            (here / f"{name}.new").replace(here / name)
        assert cache.read(np.arange(ROWS)).tobytes() == old.tobytes()
        assert cache.rows == make_rows(ROWS)
        with pickle.loads(pickled) as again:
            assert again.read(np.arange(ROWS)).tobytes() == old.tobytes()


def test_chmod_and_links_change_nothing(pair):
    """DVC protects the files of an output and links them into its cache."""
    (here, _), (old, _) = pair
    with open_cache(here) as cache:
        cache.read([0])
        for name in tree(here):
            os.link(here / name, here / f"{name}.link")
            (here / name).chmod(0o444)
        assert cache.read(np.arange(ROWS)).tobytes() == old.tobytes()


def test_replaced_while_it_is_opened(tmp_path, monkeypatch):
    """The record of one cache and the files of another: sizes agree, or not."""
    for other_rows in (11, 12):
        folder = tmp_path / str(other_rows)
        folder.mkdir()
        make_cache(folder / "cache")
        make_cache(folder / "other", seed=1, rows=make_rows(other_rows))
        sizes = LocalFiles.known_sizes

        def late(self, names, folder=folder, sizes=sizes):
            moved_away(folder / "cache", folder / "other")
            return sizes(self, names)

        with monkeypatch.context() as patch:
            patch.setattr(LocalFiles, "known_sizes", late)
            with raises("replaced") as error:
                open_cache(folder / "cache")
        assert RECORD in error.value.detail


def test_replaced_while_it_is_verified(tmp_path, monkeypatch):
    """Not a list of faults that neither cache has."""
    make_cache(tmp_path / "cache")
    make_cache(tmp_path / "other", seed=1)
    read = LocalFiles.read_all

    def late(self, name):
        data = read(self, name)
        if name == RECORD:
            moved_away(tmp_path / "cache", tmp_path / "other")
        return data

    monkeypatch.setattr(LocalFiles, "read_all", late)
    (fault,) = verify(tmp_path / "cache")
    assert fault.file == RECORD
    assert "replaced" in fault.what


def test_the_maps_of_this_file_tell_two_caches_apart(pair):
    (here, other), (old, new) = pair
    assert old.tobytes() != new.tobytes() != make_maps(make_spec(rows=ROWS))[0].tobytes()
    sizes = [{name: len(data) for name, data in tree(place).items() if "/c." in name} for place in (here, other)]
    assert sizes[0] == sizes[1]
