"""Publishing, pulling, doctor: on a small repository of its own with real git, real DVC and a remote that is a path."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from builders import make_cache, tree
from click.testing import CliRunner
from dvc.repo import Repo
from dvc.rwlock import SCHEMA as RWLOCK_AS_DVC_READS_IT
from pipeline_builders import ROOT, make_backbone_dir, make_params, write_params
from repositories import dvc, git, start_repository

from cache import dvc_files
from cache.dvc_files import split_revision
from cache.errors import CacheError
from cache.reader import open_cache
from cache.redaction import redacted
from cache.verify import verify
from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.sharing import doctor, publish, repository

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


def h2t(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def server(lab: Path) -> str:
    """A bare clone, as on a server: git's files only, so the data comes from the remote."""
    git("clone", "--quiet", "--bare", str(lab / "a"), str(lab / "lab.git"), where=lab)
    return f"file://{lab / 'lab.git'}"


def objects(lab: Path) -> list[Path]:
    return sorted(p for p in (lab / "store/files").rglob("*") if p.is_file())


def test_publish_and_pull_give_the_same_bytes(lab, monkeypatch):
    done = h2t("cache", "publish")
    assert done.exit_code == 0, done.output
    assert "set verify = true" in done.stdout
    assert "remote store holds all" in done.stdout
    assert "verify = true" in (lab / "a/.dvc/config").read_text()
    git("commit", "--quiet", "--all", "--message=verify", where=lab / "a")
    url = server(lab)
    monkeypatch.chdir(lab)
    done = h2t("cache", "pull", url, "--rev", "main", "--into", lab / "b")
    assert done.exit_code == 0, done.output
    assert tree(lab / "b/extract/b") == tree(lab / "a/data/extract/b")
    assert tree(lab / "b/train_backbone/b") == tree(lab / "a/data/train_backbone/b")
    with open_cache(lab / "b/extract/b") as cache:
        assert cache.read([3, 1]).shape == (2, 3, 2, 2)
    done = h2t("cache", "pull", f"{url}@main", "--pooled", "--into", lab / "c")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (lab / "c").iterdir()) == ["pool", "train_backbone"]
    done = h2t("cache", "pull", url, "--into", lab / "b")
    assert done.exit_code == 1
    assert "is there already" in done.stderr
    done = h2t("cache", "pull", url, "--name", "x", "--into", lab / "d")
    assert "no 'x' in data/extract; choose by --name: b" in done.stderr


def test_a_published_cache_is_read_from_the_remote_without_a_copy(lab, monkeypatch):
    assert h2t("cache", "publish").exit_code == 0
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
    done = h2t("cache", "info", f"dvc+{url}@v1#data/pool/b")
    assert done.exit_code == 0, done.output
    assert objects(lab) == before
    for wrong, reason, says in (
        (f"dvc+{url}@v2#data/extract/b", "unreachable", "v2"),
        (f"dvc+{url}@v1#data/extract/x", "missing", "there are: data/extract/b"),
        (f"dvc+file://{lab}/nowhere.git@v1#data/extract/b", "unreachable", "nowhere"),
    ):
        with pytest.raises(CacheError) as error:
            open_cache(wrong)
        assert error.value.reason == reason, error.value
        assert says in error.value.detail
        assert "\n" not in error.value.detail
    with pytest.raises(ValueError, match="#PATH expected"):
        open_cache(f"dvc+{url}@v1")


def test_a_remote_that_lies_about_a_published_cache_is_caught(lab, monkeypatch):
    assert h2t("cache", "publish").exit_code == 0
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
    with monkeypatch.context() as small, pytest.raises(CacheError, match="longer than the 10 bytes"):
        small.setattr(dvc_files, "MAX_LISTING_BYTES", 10)
        open_cache(address)
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes().replace(b"cache.json", b"cache.jso_"))
    with pytest.raises(CacheError, match="not the one recorded"):
        open_cache(address)
    listing.unlink()
    with pytest.raises(CacheError, match="h2t cache publish"):
        open_cache(address)


def test_publish_proves_what_the_remote_holds(lab):
    assert h2t("cache", "publish").exit_code == 0
    cut, gone, *_ = objects(lab)
    for path in (cut, gone):
        path.chmod(0o644)
    os.truncate(cut, max(0, cut.stat().st_size - 1))
    gone.unlink()
    with Repo(str(lab / "a")) as repo:
        proof = publish.prove(repo, "store", repository.outs(lab / "a"))
    assert len(proof.faults) == 2
    assert any("missing" in f for f in proof.faults)
    assert any(f"has {cut.stat().st_size} of {cut.stat().st_size + 1} bytes" in f for f in proof.faults)
    done = h2t("cache", "publish")  # DVC sends what is missing and trusts what is there
    assert done.exit_code == 1
    assert "1 of" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_publish_compares_content(lab):
    assert h2t("cache", "publish").exit_code == 0
    path = max(objects(lab), key=lambda p: p.stat().st_size)
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = h2t("cache", "publish")
    assert done.exit_code == 1
    assert "holds something else" in done.stderr
    done = h2t("cache", "publish", "--quick")  # lengths alone do not tell
    assert done.exit_code == 0, done.output
    assert "each of full length" in done.stdout


def test_publish_keeps_the_comments_of_the_configuration(lab):
    config = lab / "a/.dvc/config"
    before = config.read_text()
    assert h2t("cache", "publish").exit_code == 0
    with_it = config.read_text()
    assert "    verify = true\n" in with_it
    assert with_it.replace("    verify = true\n", "") == before
    assert repository.config_of(lab / "a")["remote"]["store"]["verify"] is True


def test_pull_refuses_what_is_damaged_and_leaves_nothing(lab, monkeypatch):
    assert h2t("cache", "publish").exit_code == 0
    dvc("remote", "modify", "store", "verify", "false", where=lab / "a")
    git("commit", "--quiet", "--all", "--message=careless", where=lab / "a")
    shard = (lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0").read_bytes()
    (path,) = [p for p in objects(lab) if p.read_bytes() == shard]
    path.chmod(0o644)
    path.write_bytes(shard[:-1] + bytes([shard[-1] ^ 1]))
    url = server(lab)
    monkeypatch.chdir(lab)
    done = h2t("cache", "pull", url, "--into", lab / "b")
    assert done.exit_code == 1
    assert "what came is damaged" in done.stderr
    assert [p for p in (lab / "b").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: (root / "params.yaml").write_text("seed: 1\n"), "params.yaml: not committed"),
        (lambda root: shutil.rmtree(root / "data/extract/b"), "not up to date"),
        (lambda root: (root / "dvc.lock").unlink(), "nothing was run yet"),
        (lambda root: (root / "dvc.lock").write_text("stages: 3"), "not a lock file"),
        (lambda root: dvc("remote", "remove", "store", where=root), "dvc remote add"),
        (lambda root: shutil.rmtree(root / ".dvc"), "not inside a DVC repository"),
    ],
)
def test_what_cannot_be_published_is_one_line(lab, change, says):
    change(lab / "a")
    done = h2t("cache", "publish")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert says in line
    assert objects(lab) == []


def test_a_damaged_cache_is_not_published(lab):
    shard = lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-3])
    dvc("commit", "--force", where=lab / "a")
    git("commit", "--quiet", "--all", "--message=damaged", where=lab / "a")
    done = h2t("cache", "publish")
    assert done.exit_code == 1
    assert "is damaged" in done.stderr


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


def test_secrets_are_cut_from_messages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert redacted("https://user:secret@host/x s3://key@b/y") == "https://host/x s3://b/y"
    done = h2t("cache", "pull", "https://user:secret@localhost:1/x.git")
    assert done.exit_code == 1
    assert "secret" not in done.output
    assert len(done.stderr.splitlines()) == 1


def test_gc_removes_what_nobody_works_on(lab):
    data = lab / "a/data/extract"
    for name in (".old.staging", ".busy.staging"):
        (data / name / "cache").mkdir(parents=True)
        (data / name / "lock").touch()
        (data / name / "cache/x").write_bytes(b"0" * 1000)
    with (data / ".busy.staging/lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = h2t("cache", "gc")
        assert done.exit_code == 0, done.output
        assert "would remove data/extract/.old.staging" in done.stdout
        assert "busy" not in done.stdout
        assert (data / ".old.staging").exists()
        assert h2t("cache", "gc", "--apply").exit_code == 0
    assert not (data / ".old.staging").exists()
    assert (data / ".busy.staging").exists()
    dvc("checkout", "--force", where=lab / "a")  # what is in use is still there


# doctor: each of the faults that can be planted is named, and nothing else is


def faults(lab, **more) -> dict[str, str]:
    return {f.check: str(f) for f in doctor.examine(lab / "a", lab / "a/params.yaml", **more) if f.state == "fault"}


@pytest.fixture
def healthy(lab):
    dvc("remote", "modify", "store", "verify", "true", where=lab / "a")
    return lab


def test_a_healthy_place_has_no_fault(healthy):
    assert faults(healthy) == {}
    done = h2t("doctor")
    assert done.exit_code == 0, done.output
    assert all(line.startswith(("ok", "note")) for line in done.stdout.splitlines())


def test_who_works_alone_has_no_fault(healthy):
    dvc("remote", "remove", "store", where=healthy / "a")
    assert faults(healthy) == {}
    (told,) = [f for f in doctor.examine(healthy / "a", healthy / "a/params.yaml") if f.check == "remote"]
    assert told.state == "note"
    assert "type: dvc remote add" in str(told)


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
    patch.setattr(doctor, "LOW_DISK", 10**18)


def plant_old_version(lab, patch):
    patch.setattr(doctor, "requires", lambda name: ["zarr>=99", "nosuchpackage>=1"])


def plant_device(lab, patch):
    write_params(lab / "a/params.yaml", device="cuda:7")


def plant_missing_data(lab, patch):
    shutil.rmtree(lab / "a/data/pool/b")


def plant_damage(lab, patch):
    shard = lab / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0"
    shard.unlink()
    shard.write_bytes(b"short")


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
    found = {section: set() for section in doctor.NAMED_BY_DVC}
    for stage in stages:
        if "foreach" in stage:
            found[stage["foreach"].strip("${}")] |= set(re.findall(r"\$\{item\.(\w+)\}", json.dumps(stage["do"])))
    assert found == {section: set(keys) for section, keys in doctor.NAMED_BY_DVC.items()}


@pytest.mark.parametrize(
    ("plant", "check", "says"),
    [
        (plant_entry_that_dvc_cannot_fill, "params", "backbones.mine: dvc.yaml needs objective in every entry"),
        (plant_no_default, "remote", "remote: none is set; type: dvc remote add --default"),
        (plant_remote_gone, "remote", "is it mounted?"),
        (plant_no_verify, "verify", "type: dvc remote modify store verify true"),
        (plant_no_credentials, "credentials", "Unable to locate credentials; type:"),
        (plant_copies, "links", "type: dvc config cache.type"),
        (plant_full_disk, "disk", "type: h2t cache gc"),
        (plant_old_version, "versions", "needed >=99; nosuchpackage is missing; type: pip install"),
        (plant_device, "device", "cuda:7"),
        (plant_missing_data, "data", "data/pool/b not here; type: dvc repro --pull"),
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
    assert h2t("doctor").exit_code == 1


def test_full_examination_finds_a_flipped_bit(healthy):
    shard = healthy / "a/data/extract/b/maps.zarr/expert_0/c.1.0.0.0"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "cache" not in faults(healthy)
    assert "crc32c" in faults(healthy, full=True)["cache"]


def test_outside_of_a_repository(tmp_path):
    found = [f for f in doctor.examine(tmp_path, tmp_path / "params.yaml") if f.state == "fault"]
    assert [f.check for f in found] == ["params", "repository"]


def test_no_such_remote():
    with pytest.raises(UserError, match="not configured"):
        repository.remote_name({"remote": {"a": {}}}, "b")
