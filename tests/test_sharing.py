"""Publishing, pulling, doctor: on a small repository of its own with real git, real DVC and a remote that is a path."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from builders import make_cache, raises, tree
from dvc.repo import Repo
from dvc.rwlock import SCHEMA as RWLOCK_AS_DVC_READS_IT
from pipeline_builders import ROOT, accepted, invoke, make_backbone_dir, make_params, refused, write_params
from repositories import dvc, git, start_repository

from h2t.cache.errors import CacheError
from h2t.cache.read import dvc_files
from h2t.cache.read.dvc_files import split_revision
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.inspection import doctor, setting_up
from h2t.pipeline.sharing import publish, repository

DVC_YAML = """
stages:
  train_backbone:
    foreach: [b]
    do:
      cmd: cp -r made/backbone data/train_backbone/${item}
      outs: [data/train_backbone/b]
  extract:
    foreach: [b]
    do:
      cmd: cp -r made/cache data/extract/${item}
      deps: [made/cache/cache.json]
      outs: [data/extract/b]
  pool:
    foreach: [b]
    do:
      cmd: cp -r made/pooled data/pool/${item}
      outs: [data/pool/b]
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A repository whose stages are done and committed, with an empty remote."""
    home = tmp_path_factory.mktemp("lab")
    root = start_repository(home, DVC_YAML, ["train_backbone", "extract", "pool"])
    make_cache(root / "made/cache")
    make_cache(root / "made/pooled", maps=((3, 1, 1),), dtype="float32")
    make_backbone_dir(root / "made/backbone")
    dvc("repro", where=root)
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=one", where=root)
    return home


@pytest.fixture
def lab(original, tmp_path, monkeypatch):
    """A copy of that repository with a remote of its own, as the working directory."""
    shutil.copytree(original / "a", tmp_path / "a", symlinks=True)
    config = tmp_path / "a/.dvc/config"
    config.write_text(
        "# kept for the reader\n" + config.read_text().replace(str(original / "store"), str(tmp_path / "store"))
    )
    git("commit", "--quiet", "--all", "--message=remote", where=tmp_path / "a")
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return tmp_path


def server(lab: Path) -> str:
    """A bare clone, as on a server: git's files only, so the data comes from the remote."""
    git("clone", "--quiet", "--bare", str(lab / "a"), str(lab / "lab.git"), where=lab)
    return f"file://{lab / 'lab.git'}"


def objects(lab: Path) -> list[Path]:
    return sorted(p for p in (lab / "store/files").rglob("*") if p.is_file())


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Other content in the workspace alone: its files may be links to DVC's objects."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(change(data))


def last_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_publish_and_pull_give_the_same_bytes(lab, monkeypatch):
    done = accepted("cache", "publish")
    assert "set verify = true" in done
    assert "remote store holds all" in done
    assert "verify = true" in (lab / "a/.dvc/config").read_text()
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    url = server(lab)
    monkeypatch.chdir(lab)
    accepted("cache", "pull", url, "--rev", "main", "--into", lab / "b")
    assert tree(lab / "b/extract/b") == tree(lab / "a/data/extract/b")
    assert tree(lab / "b/train_backbone/b") == tree(lab / "a/data/train_backbone/b")
    with open_cache(lab / "b/extract/b") as cache:
        assert cache.read([3, 1]).shape == (2, 3, 2, 2)
    accepted("cache", "pull", f"{url}@main", "--pooled", "--into", lab / "c")
    assert sorted(p.name for p in (lab / "c").iterdir()) == ["pool", "train_backbone"]
    done = accepted("cache", "pull", url, "--into", lab / "b")
    assert done.count("already here") == 2
    assert "pulled 0 B in " in done
    (lab / "b/extract/b/README.md").write_text("mine")
    line = refused("cache", "pull", url, "--into", lab / "b", code=1)
    assert "extract/b: exists and holds something else" in line
    assert (lab / "b/extract/b/README.md").read_text() == "mine"
    line = refused("cache", "pull", url, "--name", "x", "--into", lab / "d")
    assert "no 'x' in data/extract; choose by --name: b" in line


def test_a_published_cache_is_read_from_the_remote_without_a_copy(lab, monkeypatch):
    accepted("cache", "publish")
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    git("tag", "v1", where=lab / "a")
    url = server(lab)
    shutil.rmtree(lab / "a")
    monkeypatch.chdir(lab)
    maps = make_cache(lab / "made")
    before = objects(lab)
    for address in (f"dvc+{url}@v1#data/extract/b", f"dvc+{url}#data/extract/b/"):
        with open_cache(address) as cache:
            assert cache.read([7, 1, 7]).tobytes() == maps[0][[7, 1, 7]].tobytes()
            assert len(cache.rows) == 11
        assert verify(address) == []
    accepted("cache", "info", f"dvc+{url}@v1#data/pool/b")
    assert objects(lab) == before
    for wrong, reason, says in (
        (f"dvc+{url}@v2#data/extract/b", "unreachable", "v2"),
        (f"dvc+{url}@v1#data/extract/x", "missing", "its outputs: data/extract/b"),
        (f"dvc+file://{lab}/nowhere.git@v1#data/extract/b", "unreachable", "nowhere"),
    ):
        with raises(reason) as error:
            open_cache(wrong)
        assert says in error.value.detail
        assert "\n" not in error.value.detail
    with pytest.raises(ValueError, match="#PATH expected"):
        open_cache(f"dvc+{url}@v1")


def test_a_remote_that_lies_about_a_published_cache_is_caught(lab, monkeypatch):
    accepted("cache", "publish")
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    address = f"dvc+{server(lab)}#data/extract/b"
    made = {path.read_bytes(): path for path in objects(lab)}
    with open_cache(address) as cache:
        cache.read([5])
    digest = next(out.digest for out in repository.outs(lab / "a") if out.path == "data/extract/b")
    listing = lab / "store/files/md5" / digest[:2] / digest[2:]
    shard = made[(lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0").read_bytes()]
    whole = shard.read_bytes()
    shard.chmod(0o644)
    shutil.rmtree(os.environ["H2T_BLOCK_CACHE"])  # what was read before is known to be right
    shard.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with open_cache(address) as cache, pytest.raises(CacheError, match="another object is there"):
        cache.read([7])
    shard.unlink()
    with open_cache(address) as cache, pytest.raises(CacheError, match="is missing"):
        cache.read([7])
    with monkeypatch.context() as small, pytest.raises(CacheError, match="must be at most 10 bytes"):
        small.setattr(dvc_files, "MAX_LISTING_BYTES", 10)
        open_cache(address)
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes().replace(b"cache.json", b"cache.jso_"))
    with pytest.raises(CacheError, match="not the one recorded"):
        open_cache(address)
    listing.unlink()
    with pytest.raises(CacheError, match="h2t cache publish"):
        open_cache(address)


def test_plug_ins_outside_the_repository_are_not_published(lab, monkeypatch):
    params = lab / "a/params.yaml"
    params.write_text(params.read_text().replace("\nhosts:", "\nhosts:\n  mine: {backbone: b}", 1))
    git("commit", "--quiet", "--all", "--message=host", where=lab / "a")
    (lab / "own/hosts").mkdir(parents=True)
    (lab / "own/hosts/mine.py").write_text("")
    monkeypatch.setenv("H2T_PLUGINS", str(lab / "own"))
    line = refused("cache", "publish", code=1)
    assert (
        "own/hosts/mine.py: lies outside this repository, so nobody else can get it; copy it into plugins/hosts" in line
    )
    assert not objects(lab)
    (lab / "own/hosts/mine.py").rename(lab / "own/hosts/other.py")
    accepted("cache", "publish")


def test_publish_proves_what_the_remote_holds(lab):
    accepted("cache", "publish")
    cut, gone, *_ = (p for p in objects(lab) if p.suffix != ".dir")
    for path in (cut, gone):
        path.chmod(0o644)
    os.truncate(cut, max(0, cut.stat().st_size - 1))
    gone.unlink()
    with Repo(str(lab / "a")) as repo:
        proof = publish.prove(repo, "store", repository.outs(lab / "a"))
    assert len(proof.faults) == 2
    assert any("missing" in f for f in proof.faults.values())
    assert any(f"has {cut.stat().st_size} of {cut.stat().st_size + 1} bytes" in f for f in proof.faults.values())
    line = refused("cache", "publish", code=1)  # DVC finds the lists of folders there and asks for nothing in them
    assert "2 of" in line
    assert "type: h2t cache publish --repair" in line
    assert objects(lab) != []
    done = accepted("cache", "publish", "--repair")
    assert "2 objects missing or damaged there" in done
    assert "holds all outputs" in done
    accepted("cache", "publish")


def test_outputs_of_a_host_that_was_removed_are_no_fault(lab, monkeypatch):
    """dvc.lock keeps their lines, but DVC neither pushes nor pulls them."""
    (lab / "a/dvc.yaml").write_text(DVC_YAML.partition("  pool:")[0])
    git("commit", "--quiet", "--all", "--message=without pool", where=lab / "a")
    assert "pushing 2 outputs" in accepted("cache", "publish")
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    git("clone", "--quiet", server(lab), "b", where=lab)
    monkeypatch.chdir(lab / "b")
    dvc("pull", where=lab / "b")
    assert "pool" not in (told := accepted("doctor"))
    assert "2 outputs with" in told
    shutil.copytree(lab / "a/made", lab / "b/made")
    assert "published" in accepted("cache", "publish")


def test_publish_compares_content(lab):
    accepted("cache", "publish")
    path = max(objects(lab), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(last_bit_flipped(data))
    line = refused("cache", "publish", code=1)
    assert "has other content" in line
    done = accepted("cache", "publish", "--quick")  # lengths alone do not tell
    assert "lengths compared" in done
    accepted("cache", "publish", "--repair")
    assert path.read_bytes() == data


def test_what_is_damaged_here_is_not_sent(lab):
    accepted("cache", "publish")
    digest = max(repository.outs(lab / "a"), key=lambda out: out.path == "data/extract/b").digest
    far, here = (lab / home / digest[:2] / digest[2:] for home in ("store/files/md5", "a/.dvc/cache/files/md5"))
    for path in (far, here):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes().replace(b"}]", b"}\n]").replace(b", ", b",", 1))
    refused("cache", "publish", "--repair", code=1)


def test_pull_goes_on_where_it_failed(lab, monkeypatch):
    """In its second part; test_pull_hostile.py has the first."""
    of = "data/train_backbone/b"
    accepted("cache", "publish")
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    url = server(lab)
    monkeypatch.chdir(lab)
    wanted = {part: tree(lab / "a/data" / part) for part in ("extract/b", "train_backbone/b")}
    largest = max(tree(lab / "a" / of).values(), key=len)
    (gone,) = [path for path in objects(lab) if path.read_bytes() == largest]
    gone.rename(lab / "gone")
    line = refused("cache", "pull", url, "--into", lab / "b", code=1)
    (missing,) = [name for name, content in wanted[of.removeprefix("data/")].items() if content == largest]
    assert f"1 file missing at the remote ({missing})" in line
    assert "h2t cache publish" in line
    target = lab / "b" / of.removeprefix("data/")
    assert not target.exists()
    staging = target.parent / ".b.staging/cache"
    came = {p.relative_to(staging).as_posix(): p.stat().st_ino for p in staging.rglob("*") if p.is_file()}
    assert set(came) == set(wanted[of.removeprefix("data/")]) - {missing}  # a missing file stops no other one
    (lab / "gone").rename(gone)
    accepted("cache", "pull", url, "--into", lab / "b")
    assert {part: tree(lab / "b" / part) for part in wanted} == wanted
    assert list((lab / "b").rglob(".*")) == []
    assert {name: (target / name).stat().st_ino for name in came} == came  # not fetched again


def test_publish_keeps_the_comments_of_the_configuration(lab):
    config = lab / "a/.dvc/config"
    before = config.read_text()
    accepted("cache", "publish")
    with_it = config.read_text()
    assert "    verify = true\n" in with_it
    assert with_it.replace("    verify = true\n", "") == before
    assert repository.config_of(lab / "a")["remote"]["store"]["verify"] is True


def test_pull_says_that_no_git_repository_is_there(tmp_path):
    line = refused("cache", "pull", tmp_path / "nowhere", "--into", tmp_path / "b", code=1)
    assert line.startswith(f"error: {tmp_path}/nowhere: no git repository can be read there")


def watch_the_seed(root: Path) -> None:
    """Commits a parameter that the stage extract depends on and was not run with."""
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("deps: [made", "params: [seed]\n      deps: [made"))
    (root / "params.yaml").write_text("seed: 1\n")
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=seed", where=root)


def add_a_plugin(root: Path) -> None:
    """Adds a file beside one that is committed."""
    (root / "plugins/hosts").mkdir(parents=True)
    (root / "plugins/hosts/.gitkeep").touch()
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=plugins", where=root)
    (root / "plugins/hosts/mine.py").touch()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "params.yaml").write_text("seed: 1\n"), "params.yaml: not committed"),
        (lambda root: (root / "stages.yaml").write_text("extract: 1\n"), "stages.yaml: not committed"),
        (add_a_plugin, "plugins/hosts/mine.py: not committed"),
        (lambda root: shutil.rmtree(root / "data/extract/b"), "not up to date"),
        (watch_the_seed, "1 stage not up to date (extract@b); type: dvc repro"),
        (lambda root: (root / "dvc.lock").unlink(), "nothing was run yet"),
        (lambda root: (root / "dvc.lock").write_text("stages: 3"), "not a lock file"),
        (lambda root: dvc("remote", "remove", "store", where=root), "dvc remote add"),
        (lambda root: shutil.rmtree(root / ".dvc"), "not inside a DVC repository"),
    ],
)
def test_what_cannot_be_published_is_one_line(lab, change, says):
    change(lab / "a")
    line = refused("cache", "publish", code=1)
    assert says in line
    assert objects(lab) == []


def test_a_damaged_cache_is_not_published(lab):
    rewrite(lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0", lambda data: data[:-3])
    dvc("commit", "--force", where=lab / "a")
    git("commit", "--quiet", "--all", "--message=damaged", where=lab / "a")
    line = refused("cache", "publish", code=1)
    assert "damaged (" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("git@github.com:lab/x.git", ("git@github.com:lab/x.git", None)),
        ("git@github.com:lab/x.git@v1", ("git@github.com:lab/x.git", "v1")),
        ("https://token@host/lab/x", ("https://token@host/lab/x", None)),
        ("https://token@host/lab/x@abc123", ("https://token@host/lab/x", "abc123")),
        ("../x@main", ("../x", "main")),
    ],
)
def test_revisions_in_urls(text, expected):
    assert split_revision(text) == expected


def test_gc_removes_what_nobody_works_on(lab):
    data = lab / "a/data/extract"
    for name in (".old.staging", ".busy.staging"):
        (data / name / "cache").mkdir(parents=True)
        (data / name / "lock").touch()
        (data / name / "cache/x").write_bytes(b"0" * 1000)
    with (data / ".busy.staging/lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = accepted("cache", "gc")
        assert "would remove data/extract/.old.staging" in done
        assert "busy" not in done
        assert (data / ".old.staging").exists()
        accepted("cache", "gc", "--apply")
        assert not (data / ".old.staging").exists()
        for command in (["cache", "gc"], ["cache", "gc", "--apply"]):  # what is in use is not mentioned
            assert accepted(*command) == "nothing to remove\n"
    assert (data / ".busy.staging").exists()
    dvc("checkout", "--force", where=lab / "a")  # what is in use is still there


# gc: what others use stays


def second_version(root: Path) -> None:
    """Another cache in the place of the first, committed: the objects of the first are unused from now on."""
    shutil.rmtree(root / "made/cache")
    make_cache(root / "made/cache", seed=1)
    dvc("repro", where=root)
    git("commit", "--quiet", "--all", "--message=two", where=root)


def dvc_objects(cache: Path) -> dict[str, bytes]:
    return tree(cache / "files")


@pytest.fixture(params=["symlink", "hardlink"])
def two_clones(lab, request):
    """Clones `a` and `b` on one DVC cache, as docs/sharing.md says; `b` has another cache than `a`, uncommitted."""
    config = lab / "a/.dvc/config"
    config.write_text(re.sub("type = .*", f"type = {request.param}", config.read_text()))
    git("commit", "--quiet", "--all", "--message=links", where=lab / "a")
    git("clone", "--quiet", str(lab / "a"), str(lab / "b"), where=lab)
    shutil.move(lab / "a/.dvc/cache", lab / "shared")
    shutil.copytree(lab / "a/made", lab / "b/made")
    for clone in ("a", "b"):
        dvc("cache", "dir", "--local", str(lab / "shared"), where=lab / clone)
        dvc("config", "--local", "cache.shared", "group", where=lab / clone)
        dvc("checkout", "--relink", "--force", where=lab / clone)
    second_version(lab / "b")
    return lab


def test_gc_in_one_clone_leaves_the_other_ones_bytes(two_clones):
    lab = two_clones
    before, objects_before = tree(lab / "b/data"), dvc_objects(lab / "shared")
    done = invoke("cache", "gc")
    assert done.exit_code == 0, done.output
    assert "would not remove" in done.stdout
    assert "Remov" not in done.output
    line = refused("cache", "gc", "--apply", code=1)
    assert "cache.shared is set" in line
    assert "--alone" in line
    assert dvc_objects(lab / "shared") == objects_before
    dvc("checkout", "--relink", "--force", where=lab / "b")
    assert tree(lab / "b/data") == before
    assert verify(str(lab / "b/data/extract/b")) == []


def share_by_local_directory(lab, patch):
    shutil.move(lab / "a/.dvc/cache", lab / "shared")
    dvc("cache", "dir", "--local", str(lab / "shared"), where=lab / "a")
    return "lies outside this repository"


def share_by_system_setting(lab, patch):
    patch.setenv("DVC_SYSTEM_CONFIG_DIR", str(lab / "system"))
    (lab / "system").mkdir()
    (lab / "system/config").write_text("[cache]\n    shared = group\n")
    return "cache.shared is set"


def share_by_link(lab, patch):
    shutil.move(lab / "a/.dvc/cache", lab / "shared")
    (lab / "a/.dvc/cache").symlink_to(lab / "shared")
    return "lies outside this repository"


def share_by_hard_links(lab, patch):
    """Another clone's cache.dir is this repository's cache: nothing in our configuration says so."""
    git("clone", "--quiet", str(lab / "a"), str(lab / "b"), where=lab)
    dvc("cache", "dir", "--local", str(lab / "a/.dvc/cache"), where=lab / "b")
    dvc("config", "--local", "cache.type", "hardlink", where=lab / "b")
    dvc("checkout", where=lab / "b")
    return "hard links outside this repository"


def share_with_a_repository_inside(lab, patch):
    """Its files are inside this repository, but DVC's index of this one leaves them out."""
    (lab / "a/inner").mkdir()
    dvc("init", "--subdir", where=lab / "a/inner")
    return "inner is a DVC repository of its own"


@pytest.mark.parametrize(
    "share",
    [
        share_by_local_directory,
        share_by_system_setting,
        share_by_link,
        share_by_hard_links,
        share_with_a_repository_inside,
    ],
)
def test_gc_leaves_a_dvc_cache_that_others_may_use(lab, monkeypatch, share):
    says = share(lab, monkeypatch)
    second_version(lab / "a")
    shared = lab / "shared" if (lab / "shared").exists() else lab / "a/.dvc/cache"
    before = dvc_objects(shared)
    line = refused("cache", "gc", "--apply", code=1)
    assert says in line
    assert dvc_objects(shared) == before
    accepted("cache", "gc", "--apply", "--alone")
    assert 0 < len(dvc_objects(shared)) < len(before)


@pytest.mark.parametrize("links", ["hardlink", "copy"])
def test_gc_says_what_would_go_and_removes_just_that(lab, links):
    root = lab / "a"
    dvc("config", "--local", "cache.type", links, where=root)
    before = set(dvc_objects(root / ".dvc/cache"))
    second_version(root)
    everything = dvc_objects(root / ".dvc/cache")
    done = invoke("cache", "gc")
    assert done.exit_code == 0, done.output
    assert "Remov" not in done.output
    assert dvc_objects(root / ".dvc/cache") == everything
    number = int(re.search(r"would remove (\d+) objects? of DVC's cache", done.stdout)[1])
    done = accepted("cache", "gc", "--apply")
    left = dvc_objects(root / ".dvc/cache")
    gone = set(everything) - set(left)
    assert f"removed {number} objects of DVC's cache" in done
    assert len(gone) == number
    assert gone < before
    assert "no branch" not in accepted("cache", "gc")
    dvc("checkout", "--relink", "--force", where=root)


def test_gc_puts_back_a_cache_that_a_stopped_writer_had_set_aside(lab):
    """A writer that is killed between its two renames leaves the only copy of the old cache in its staging."""
    data = lab / "a/data/extract"
    before = tree(data / "b")
    (data / ".b.staging").mkdir()
    (data / "b").rename(data / ".b.staging/replaced")
    assert "would put back data/extract/b" in accepted("cache", "gc")
    assert not (data / "b").exists()
    accepted("cache", "gc", "--apply")
    assert tree(data / "b") == before
    assert not (data / ".b.staging").exists()


@pytest.mark.parametrize("place", ["tmpabc", "standalone/tmpabc"])
def test_gc_waits_for_a_running_experiment(lab, place):
    """What it has made so far is named by no commit yet."""
    second_version(lab / "a")
    (lab / "a/.dvc/tmp/exps" / place).mkdir(parents=True)
    before = dvc_objects(lab / "a/.dvc/cache")
    line = refused("cache", "gc", "--apply", "--alone", code=1)
    assert f".dvc/tmp/exps/{place}" in line
    assert dvc_objects(lab / "a/.dvc/cache") == before


def test_gc_removes_no_directory_of_somebody_else(lab):
    data = lab / "a/data/extract"
    (lab / "mine").mkdir()
    (lab / "mine/notes").write_text("x")
    (data / ".x.staging").symlink_to(lab / "mine")
    (data / ".x.partial-backup").mkdir()
    done = accepted("cache", "gc", "--apply")
    assert "unfinished" not in done
    assert (lab / "mine/notes").exists()
    assert (data / ".x.partial-backup").exists()


def test_gc_clears_no_data_folder_outside_of_the_repository(lab):
    shutil.move(lab / "a/data", lab / "elsewhere")
    (lab / "a/data").symlink_to(lab / "elsewhere")
    (lab / "elsewhere/extract/.x.partial-999999999").mkdir()
    assert "leads out of this repository" in accepted("cache", "gc", "--apply")
    assert (lab / "elsewhere/extract/.x.partial-999999999").exists()


def test_a_repository_of_another_user_is_one_line(two_clones, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch
    line = refused("cache", "gc", code=1)
    assert line.endswith(f"type: git config --global --add safe.directory {Path.cwd()}\n")
    words = "/x/.git/: repository path '/x y' is not owned by current user"  # those of libgit2, which DVC asks
    says = r"^git: /x y belongs .* safe\.directory '/x y'$"
    with pytest.raises(UserError, match=says), repository.in_one_line("dvc"):
        raise OSError(words)


# doctor: each of the faults that can be planted is named, and nothing else is


def faults(lab, **more) -> dict[str, str]:
    return {f.check: str(f) for f in doctor.examine(lab / "a", lab / "a/params.yaml", **more) if f.state == "fault"}


@pytest.fixture
def healthy(lab):
    dvc("remote", "modify", "store", "verify", "true", where=lab / "a")
    return lab


def test_a_healthy_place_has_no_fault(healthy):
    assert faults(healthy) == {}
    done = accepted("doctor")
    assert all(line.startswith(("ok", "note")) for line in done.splitlines())


def test_who_works_alone_has_no_fault(healthy):
    dvc("remote", "remove", "store", where=healthy / "a")
    assert faults(healthy) == {}
    (told,) = [f for f in doctor.examine(healthy / "a", healthy / "a/params.yaml") if f.check == "remote"]
    assert told.state == "note"
    assert "type: dvc remote add" in str(told)


@pytest.fixture
def below(healthy, monkeypatch):
    """A project of its own below another one of the same repository, whose dvc.lock is not there."""
    place = healthy / "a/examples/small"
    (place / "data/extract").mkdir(parents=True)
    write_params(place / "params.yaml")
    (place / "dvc.yaml").write_text(
        "stages: {extract: {cmd: cp -r ../../made/cache data/extract/b, outs: [data/extract/b]}}"
    )
    (healthy / "a/dvc.lock").unlink()
    monkeypatch.chdir(place)
    return place


def test_doctor_looks_at_the_project_it_stands_in(below):
    line = next(line for line in invoke("doctor").output.splitlines() if "dvc.lock" in line)
    assert f"{below / 'dvc.lock'}: missing" in line
    dvc("repro", "extract", where=below)
    done = accepted("doctor")
    assert "1 output with" in done
    assert "data/extract/b is sound" in done
    shutil.rmtree(below / "data/extract/b")
    assert "missing here: data/extract/b" in invoke("doctor").output


def test_publish_asks_for_that_project_alone(below):
    dvc("repro", "extract", where=below)
    with Repo(str(below)) as repo:
        publish._check_workspace(repo, below)  # that of the root was never run
        (below / "dvc.yaml").write_text((below / "dvc.yaml").read_text().replace("cp -r", "cp -a -r"))
    with Repo(str(below)) as repo, pytest.raises(UserError, match=r"1 stage not up to date \(extract\)"):
        publish._check_workspace(repo, below)


def test_a_project_in_a_folder_is_published_with_the_others_and_read_by_its_path(below, monkeypatch):
    """As DVC's records of runs are those of all projects; both commands say so."""
    top = below.parents[1]
    (top / "dvc.yaml").write_text("stages: {other: {cmd: echo > other, outs: [other]}}")
    dvc("repro", "extract", where=below)
    dvc("repro", "other", where=top)
    git("add", ".", where=top)
    git("commit", "--quiet", "--message=below", where=top)
    assert "note: dvc push takes what other projects of this repository have here" in accepted("cache", "publish")
    line = refused("cache", "pull", top, "--into", top / "pulled", code=1)
    assert f"read that of a folder as dvc+{top}#examples/small/data/extract/b, or clone" in line
    with open_cache(f"dvc+{top}#examples/small/data/extract/b") as cache:
        assert len(cache.read([0])) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stages:\n  a:\n    cmd: x\n    dep: [x]\n", "line 4: extra keys not allowed in stages.a.dep; correct it"),
        ("stages:\n  a:\n    bar: x\n    foo: 1\n", ", and 2 other faults; correct it"),
        ("stages:\n  a:\n    deps: [x]\n", "line 2: required key not provided in stages.a.cmd; correct it"),
        ("- a\n", "dvc.yaml: expected a dictionary; correct it"),
        ("stages:\n  a: [\n", "line 3: not YAML (expected the node content, but found '<stream end>'); correct it"),
        ("stages:\n<<<<<<< HEAD\n  a: {}\n", "dvc.yaml: holds marks of a merge (<<<<<<<); settle it"),
    ],
)
def test_a_fault_in_dvc_yaml_is_told_with_its_line(below, text, line):
    (below / "dvc.yaml").write_text(text)
    said = refused("upgrade")
    assert "dvc.yaml: " in said
    assert said.endswith(line + "\n")


def test_a_cache_that_cannot_be_made_is_not_taken_for_a_project_that_cannot_be_written(healthy):
    dvc("config", "--local", "cache.dir", "/proc/nothing/here", where=healthy / "a")
    assert "DVC's cache cannot be written" in faults(healthy)["links"]


def test_gc_removes_what_doctor_finds_unfinished_there(below):
    staging = below / "data/extract/.c.staging"
    staging.mkdir()
    (staging / "lock").touch()
    assert "note  lock         data/extract/.c.staging: unfinished" in invoke("doctor").output
    accepted("cache", "gc", "--apply")
    assert not staging.exists()


def plant_no_default(lab, patch):
    dvc("config", "core.remote", "--unset", where=lab / "a")


def plant_no_verify(lab, patch):
    dvc("remote", "modify", "store", "verify", "false", where=lab / "a")


def plant_no_credentials(lab, patch):
    def refuse(*_):
        raise RuntimeError("Unable to locate credentials")

    patch.setattr("dvc.data_cloud.DataCloud.get_remote_odb", refuse)


def plant_remote_gone(lab, patch):
    dvc("remote", "modify", "store", "url", "/nowhere/at/all/store", where=lab / "a")


def plant_copies(lab, patch):
    dvc("config", "cache.type", "copy", where=lab / "a")


def plant_full_disk(lab, patch):
    patch.setattr(setting_up, "LOW_DISK", 10**18)


def plant_old_version(lab, patch):
    patch.setattr(setting_up, "requires", lambda name: ["zarr>=99", "nosuchpackage>=1"])


def plant_device(lab, patch):
    write_params(lab / "a/params.yaml", device="cuda:7")


def plant_missing_data(lab, patch):
    shutil.rmtree(lab / "a/data/pool/b")


def plant_damage(lab, patch):
    rewrite(lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0", lambda data: b"short")


def plant_wrong_params(lab, patch):
    write_params(lab / "a/params.yaml", hosts__dr__grid__ratio=[1.3])


def plant_writer(lab, patch):
    staging = lab / "a/data/extract/.b.staging"
    staging.mkdir()
    file = (staging / "lock").open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    patch.setattr(doctor, "_open_for_the_test", file, raising=False)


def plant_running_stage(lab, patch):
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}
    info = {
        "write": {str(lab / "a/data/extract/b"): holder},
        "read": {str(lab / "a/cache/card.py"): [holder], str(lab / "a/cache/rows.py"): [holder]},
    }
    (lab / "a/.dvc/tmp").mkdir(exist_ok=True)
    (lab / "a/.dvc/tmp/rwlock").write_text(json.dumps(RWLOCK_AS_DVC_READS_IT(info)))


def plant_entry_that_dvc_cannot_fill(lab, patch):
    values = make_params()
    values["backbones"]["mine"] = {"arch": "resnet20"}
    (lab / "a/params.yaml").write_text(yaml.safe_dump(values))


def test_doctor_knows_which_keys_dvc_names():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    found = {section: set() for section in setting_up.NAMED_BY_DVC}
    for stage in stages:
        if "foreach" in stage:
            found.setdefault(stage["foreach"].strip("${}"), set()).update(
                re.findall(r"\$\{item\.(\w+)\}", json.dumps(stage["do"]))
            )
    assert found == {"inputs": set(), **{section: set(keys) for section, keys in setting_up.NAMED_BY_DVC.items()}}


def plant_missing_file(lab, patch):
    (lab / "a/data/pool/b/README.md").unlink()


def plant_dangling_link(lab, patch):
    file = lab / "a/data/train_backbone/b/head.safetensors"
    file.unlink()
    file.symlink_to(lab / "gone")


def plant_other_size(lab, patch):
    rewrite(lab / "a/data/train_backbone/b/head.safetensors", lambda data: data[:-1])


def object_of(lab, path: str) -> Path:
    """The DVC object behind a file of an output; no other name is linked to it any more."""
    digest = hashlib.md5((lab / "a" / path).read_bytes()).hexdigest()
    return lab / "a/.dvc/cache/files/md5" / digest[:2] / digest[2:]


def plant_missing_object(lab, patch):
    object_of(lab, "data/train_backbone/b/head.safetensors").unlink()


def plant_cut_object(lab, patch):
    """Where files are hard links, the workspace is cut with it."""
    dvc("config", "--local", "cache.type", "hardlink", where=lab / "a")
    dvc("checkout", "--relink", where=lab / "a")
    path = object_of(lab, "data/train_backbone/b/head.safetensors")
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size - 1)


def plant_missing_listing(lab, patch):
    (digest,) = (o.digest for o in repository.outs(lab / "a") if o.path == "data/train_backbone/b")
    (lab / "a/.dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()


def plant_other_owner(lab, patch):
    patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch


@pytest.mark.parametrize(
    ("plant", "check", "says"),
    [
        (plant_other_owner, "owner", "type: git config --global --add safe.directory"),
        (plant_missing_file, "cache", "README.md"),
        (plant_dangling_link, "data", "head.safetensors is a link to"),
        (plant_other_size, "data", "type: dvc checkout data/train_backbone/b"),
        (plant_missing_object, "data", "the DVC object of head.safetensors is missing; type: dvc commit"),
        (plant_cut_object, "data", "in dvc.lock"),
        (plant_missing_listing, "data", "its list of files is missing in DVC's cache; type: dvc commit"),
        (plant_entry_that_dvc_cannot_fill, "params", "backbones.mine: dvc.yaml needs objective in every entry"),
        (plant_no_default, "remote", "remote: none is set; type: dvc remote add --default"),
        (plant_remote_gone, "remote", "is it mounted?"),
        (plant_no_verify, "verify", "type: dvc remote modify store verify true"),
        (plant_no_credentials, "credentials", "Unable to locate credentials; type:"),
        (plant_copies, "links", "type: dvc config cache.type"),
        (plant_full_disk, "disk", "type: h2t cache gc"),
        (plant_old_version, "versions", "needed >=99; nosuchpackage is missing; type: pip install"),
        (plant_device, "device", "cuda:7"),
        (plant_missing_data, "data", "missing here: data/pool/b; type: dvc repro --pull"),
        (plant_damage, "cache", "data/extract/b: maps.zarr/expert_0/c.1.0.0.0"),
        (plant_wrong_params, "params", "must lie in [0, 1]; got 1.3"),
        (plant_writer, "lock", "a cache is being written"),
        (plant_running_stage, "lock", "data/extract/b is in use by dvc, process"),
    ],
)
def test_doctor_names_a_planted_fault_and_nothing_else(healthy, monkeypatch, plant, check, says):
    if plant is plant_device:
        import torch

        if torch.cuda.is_available():
            pytest.skip("the fault is that there is no such device")
    plant(healthy, monkeypatch)
    found = faults(healthy)
    assert list(found) == [check], found
    assert says in found[check]
    assert len(found[check].splitlines()) == 1
    assert invoke("doctor").exit_code == 1


def test_doctor_knows_that_dvc_needs_a_name_of_the_user(healthy, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    assert faults(healthy)["owner"].endswith("type: export USER=NAME")
    assert "type: export USER=NAME" in refused("cache", "publish", code=1)


def test_full_examination_finds_a_flipped_bit(healthy):
    rewrite(healthy / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0", last_bit_flipped)
    assert "cache" not in faults(healthy)
    assert "crc32c" in faults(healthy, full=True)["cache"]


def test_full_examination_finds_a_changed_byte_outside_of_caches(healthy):
    rewrite(healthy / "a/data/train_backbone/b/head.safetensors", last_bit_flipped)
    assert faults(healthy) == {}
    assert "head.safetensors has other content" in faults(healthy, full=True)["data"]


def test_doctor_finds_what_another_project_removed_from_a_shared_cache(two_clones, monkeypatch):
    """Both clones know why; the other clone's links lead nowhere, or its objects are gone."""
    lab = two_clones
    dvc("remote", "modify", "store", "verify", "true", where=lab / "a")
    accepted("cache", "gc", "--apply", "--alone")
    monkeypatch.chdir(lab / "b")
    found = [f for f in doctor.examine(lab / "b", lab / "b/params.yaml") if f.check in ("data", "cache")]
    assert any(f.state == "fault" and "data/extract/b" in f.detail for f in found), found


def notes_of_the_queue(root: Path) -> list[str]:
    return [f.detail for f in doctor.examine(root, root / "params.yaml") if f.check == "queue" and f.state == "note"]


def test_doctor_knows_what_an_experiment_queue_will_not_find(lab):
    root = lab / "a"
    for folder in ("tracked", "by_dvc", "images"):
        (root / folder).mkdir()
        (root / folder / "x").write_text("x")
    options = {"root": "images", "train": "."}  # of which `train` starts from `root`
    starts = {"start": "tracked", "weights": "by_dvc"}
    write_params(root / "params.yaml", prepare__options=options, backbones__ce_mixup=starts)
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/images/\n")
    git("add", "tracked", where=root)
    dvc("add", "by_dvc", where=root)
    (note,) = notes_of_the_queue(root)
    assert "prepare.options.root: images is relative and not in git" in note
    assert str(root / "images") in note


def test_doctor_knows_that_an_experiment_queue_needs_an_ascii_path(lab):
    shutil.move(lab / "a", lab / "prüf")
    (note,) = notes_of_the_queue(lab / "prüf")
    assert "ASCII" in note


def test_garbage_without_a_commit_is_one_line_with_a_way_out(lab):
    shutil.rmtree(lab / "a/.git")
    git("init", "--quiet", where=lab / "a")
    line = refused("cache", "gc", code=1)
    assert "has no commit yet" in line
    assert "git add . && git commit" in line


def test_outside_of_a_repository(tmp_path):
    (found,) = [f for f in doctor.examine(tmp_path, tmp_path / "params.yaml") if f.state == "fault"]
    assert str(found).endswith(f"none in {tmp_path}; type: h2t init DIR --data IMAGES, or change to one")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    found = [f for f in doctor.examine(tmp_path, tmp_path / "params.yaml") if f.state == "fault"]
    assert [f.check for f in found] == ["params", "repository"]


def test_pull_from_a_repository_without_a_remote_says_what_to_type_there(lab):
    dvc("remote", "remove", "store", where=lab / "a")
    line = refused("cache", "pull", lab / "a", "--into", lab / "b", code=1)
    assert "has no default DVC remote to fetch from; there, type: dvc remote default NAME, or dvc remote add" in line


def test_no_such_remote():
    with pytest.raises(UserError, match="not configured"):
        repository.remote_name({"remote": {"a": {}}}, "b")
