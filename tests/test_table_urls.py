"""Tables, lists and images at URLs: the samples and the cache of the same files on a disk, several reads at a time."""

import hashlib
import json
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import tree
from hostile_server import hostile_server
from image_builders import SMALL, write_image
from pipeline_builders import extracted, make_backbone_dir, prepared
from servers import Folder, put_all, s3_endpoint, sftp_server

from h2t.cache.read import asking
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data import url_files
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.datasets import list_file, table

NAMES = ["wren/0.png", "wren/1 of 2.png", "wren/100%.png", "owl/a#b.png", "owl/4.png", "wren/5.png", "owl/6.png"]
SPLITS = ["train"] * 5 + ["test"] * 2


@pytest.fixture
def photos(tmp_path):
    """A folder `photos` with images, the table labels.csv of them, and list files."""
    root = tmp_path / "photos"
    for i, name in enumerate(NAMES):
        write_image(root / "images" / name, i)
    lines = [f"images/{name},{name.split('/')[0]},{split}" for name, split in zip(NAMES, SPLITS, strict=True)]
    (root / "labels.csv").write_text("\n".join(["file,label,part", *lines]) + "\n")
    for part in ("train", "test"):
        listed = [name for name, split in zip(NAMES, SPLITS, strict=True) if split == part]
        (root / f"{part}.txt").write_text("".join(f"{name} {name.split('/')[0]}\n" for name in listed))
    return root


class Web:
    """A web server's folder."""

    def __init__(self, url, handler):
        self.url, self.handler = f"{url}/sound/t", handler

    def put(self, name, data):
        self.handler.files[name] = data

    def remove(self, name):
        del self.handler.files[name]


@pytest.fixture(params=["https", "s3", "sftp"])
def store(request, photos, tmp_path, monkeypatch):
    """The same files at a URL."""
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    if request.param == "https":
        with hostile_server({}) as (url, handler):
            # A browser's %23 and %25 are # and % in the file's name.
            handler.files = {name.replace("%", "%25").replace("#", "%23"): data for name, data in tree(photos).items()}
            yield Web(url, handler)
    elif request.param == "s3":
        with s3_endpoint() as bucket:
            put_all(bucket, photos)
            yield bucket
    else:
        with sftp_server(tmp_path / "home") as port:
            monkeypatch.setenv("HOME", str(tmp_path / "home"))
            folder = Folder(tmp_path / "there", port)
            put_all(folder, photos)
            yield folder


def section(folder, **options):
    named = {"table": f"{folder}/labels.csv", "path": "file", "split": "part", "transform": SMALL}
    return {"dataset": "table", "options": {**named, **options}}


def test_samples_and_cache_are_those_of_a_disk(store, photos, tmp_path):
    make_backbone_dir(tmp_path / "backbone", classes=2)
    caches = []
    for place in (store.url, photos):
        samples, images = prepared(section(place), tmp_path / str(len(caches)) / "samples")
        out = tmp_path / str(len(caches)) / "b"
        caches.append((samples.table, extracted(out, samples, images, tmp_path / "backbone").fingerprint, tree(out)))
    assert caches[0] == caches[1]


def test_the_digest_of_the_table_is_recorded(store, photos, tmp_path):
    samples, _ = prepared(section(store.url), tmp_path / "samples")
    expected = hashlib.sha256((photos / "labels.csv").read_bytes()).hexdigest()
    assert samples.facts["read"] == {f"{store.url}/labels.csv".replace("root@", ""): expected}
    assert "read" not in json.loads(json.dumps(prepared(section(photos), tmp_path / "here")[0].facts))


def test_the_root_may_be_a_url_of_its_own(store, photos, tmp_path):
    (tmp_path / "labels.csv").write_text((photos / "labels.csv").read_text().replace("images/", ""))
    given = section(tmp_path, root=f"{store.url}/images/")
    samples, images = prepared(given, tmp_path / "samples")
    assert set(samples.table["source"].to_pylist()) == set(NAMES)
    assert [images.digest(i) for i in range(len(NAMES))] == samples.table["digest"].to_pylist()
    assert table.inputs(table.Options(**given["options"])) == {"table": str(tmp_path / "labels.csv")}


def test_parquet_tables_with_paths_and_with_images(store, photos, tmp_path):
    columns = {"label": [n.split("/")[0] for n in NAMES], "part": SPLITS}
    paths = pa.table({"file": [f"images/{name}" for name in NAMES], **columns})
    stored = pa.table({"image": [(photos / "images" / name).read_bytes() for name in NAMES], **columns})
    for name, content in (("paths.parquet", paths), ("stored.parquet", stored)):
        pq.write_table(content, photos / name)
        store.put(name, (photos / name).read_bytes())
    for options in ({"table": "{}/paths.parquet"}, {"table": "{}/stored.parquet", "path": None, "bytes": "image"}):
        both = []
        for place in (store.url, photos):
            named = {**options, "table": options["table"].format(place)}
            both.append(prepared(section(place, **named), tmp_path / f"s{len(both)}")[0].table)
        assert both[0] == both[1]


def test_a_list_file_is_read_there_too(store, photos, tmp_path):
    both = []
    for place in (store.url, photos):
        options = {"root": f"{place}/images", "lists": str(place), "train": "train.txt", "test": "test.txt"}
        given = {"dataset": "list_file", "options": {**options, "transform": SMALL}}
        both.append(prepared(given, tmp_path / f"s{len(both)}")[0])
    assert both[0].table == both[1].table
    url = store.url.replace("root@", "")
    assert both[0].facts["read"] == {
        f"{url}/{name}": hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in ("train.txt", "test.txt")
    }
    assert not list_file.inputs(list_file.Options(root=store.url, train="train.txt"))


def test_a_missing_table_is_one_line(store, tmp_path):
    with pytest.raises(UserError, match=r"prepare\.options\.table: .*/gone\.csv: no such file; correct the URL"):
        prepared(section(store.url, table=f"{store.url}/gone.csv"), tmp_path / "samples")


def test_a_missing_image_is_one_line_or_left_out(store, tmp_path):
    store.remove("images/wren/0.png")
    with pytest.raises(UserError, match=r"image 'images/wren/0\.png': is missing; .*bad_images=skip"):
        prepared(section(store.url), tmp_path / "samples")
    samples, _ = prepared({**section(store.url), "bad_images": "skip"}, tmp_path / "skipped")
    assert len(samples.table) == len(NAMES) - 1


def test_a_wrong_root_is_noticed_before_images_are_read(store, tmp_path):
    with pytest.raises(UserError, match=r"row 1: no file .*/nowhere/images/wren/0\.png; set prepare\.options\.root"):
        prepared({**section(store.url, root=f"{store.url}/nowhere"), "bad_images": "skip"}, tmp_path / "samples")


def test_an_image_that_was_replaced_later_is_named(store, photos, tmp_path):
    samples, _ = prepared(section(store.url), tmp_path / "samples")
    store.put("images/owl/4.png", (photos / "images/owl/6.png").read_bytes())
    make_backbone_dir(tmp_path / "backbone", classes=2)
    later = load_samples(tmp_path / "samples").images(section(store.url))
    with pytest.raises(UserError, match=r"image 'images/owl/4\.png': has changed since it was prepared"):
        extracted(tmp_path / "b", samples, later, tmp_path / "backbone")


def test_a_server_that_fails_makes_no_image_a_bad_one(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    with hostile_server(tree(photos)) as (url, handler):
        handler.spoiled["images/owl/4.png"] = "broken"
        given = {**section(f"{url}/sound/t"), "bad_images": "skip"}
        with pytest.raises(UserError, match=r"image 'images/owl/4\.png': .*the store failed 5 times"):
            prepared(given, tmp_path / "samples")


def test_no_credentials_and_no_package_are_one_line(photos, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"prepare\.options\.table: s3://lab/x/labels\.csv: no AWS credentials found"):
        prepared(section("s3://lab/x"), tmp_path / "samples")
    with pytest.raises(UserError, match=r"prepare\.options\.root: s3://lab/x/.*no AWS credentials found"):
        prepared(section(photos, root="s3://lab/x"), tmp_path / "samples")
    for module in ("sshfs", "sshfs.spec"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "ssh", raising=False)
    with pytest.raises(UserError, match=r"ssh://h/x/labels\.csv: .*pip install 'h2t\[ssh\]'"):
        prepared(section("ssh://u:s3cr3t@h/x"), tmp_path / "samples")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd.png", "https://elsewhere/0.png", "a/../../../b.png"])
def test_a_path_that_leads_out_of_the_url_is_refused(store, photos, tmp_path, path):
    store.put("labels.csv", (photos / "labels.csv").read_bytes().replace(b"images/owl/4.png", path.encode()))
    with pytest.raises(UserError, match=r"labels\.csv: row 5: .*must be a path below"):
        prepared(section(store.url), tmp_path / "samples")


def test_urls_of_images_below_the_root_and_other_folders_of_one_server(store, photos, tmp_path):
    text = (photos / "labels.csv").read_text()
    store.put("labels.csv", text.replace("images/owl/4", f"{store.url}/images/owl/4").encode())
    store.put("lists/test.csv", text.replace("images/", "../images/").encode())
    samples, _ = prepared(section(store.url), tmp_path / "one")
    assert set(samples.table["source"].to_pylist()) == {f"images/{name}" for name in NAMES}
    below = {"train": f"{store.url}/labels.csv", "test": f"{store.url}/lists/test.csv"}
    assert table.folder(table.Options(table=below, path="file")) == store.url
    with pytest.raises(UserError, match=r"tables must lie on one server"):
        table.folder(table.Options(table={**below, "test": "https://elsewhere/test.csv"}, path="file"))


def test_images_are_read_side_by_side(photos, tmp_path):
    """Each answer takes 50 ms; a batch waits for several at once, in `prepare` and in extraction."""
    busy, most, lock = 0, 0, threading.Lock()
    for i in range(32):
        write_image(photos / f"images/owl/more{i}.png", 100 + i)
    lines = [f"images/owl/more{i}.png,owl,train\n" for i in range(32)]
    (photos / "labels.csv").write_text((photos / "labels.csv").read_text() + "".join(lines))
    files = {name.replace("%", "%25").replace("#", "%23"): data for name, data in tree(photos).items()}
    with hostile_server(files) as (url, handler):
        answer = handler.do_GET

        def late(self):
            nonlocal busy, most
            with lock:
                busy, most = busy + 1, max(most, busy + 1)
            time.sleep(0.05)
            answer(self)
            with lock:
                busy -= 1

        handler.do_GET = late
        samples, images = prepared(section(f"{url}/sound/t"), tmp_path / "samples")
        assert most > 8
        most = 0
        images.pixels(range(len(samples.table)), [None] * len(samples.table))
        assert 8 < most <= url_files.AT_ONCE
        names = [name for method, name in handler.asked if method == "GET"]
        assert names.count("labels.csv") == 1
        assert names.count("images/owl/more3.png") == 2


@pytest.mark.parametrize(
    ("path", "root", "base", "source"),
    [
        ("https://h/d/a%20b.jpg", "https://h/d", "https://h/d", "a b.jpg"),
        ("https://h/d/%2e%2e/a.jpg", "https://h/d", "https://h/d", None),
        ("https://h/d/a.jpg?sig=S", "https://h/d", "https://h/d", None),
        ("a%20b.jpg", "https://h/d", "https://h/d/my%20set", "my set/a%20b.jpg"),
        ("s3://b/d/a%20b.jpg", "s3://b/d", "s3://b/d", "a%20b.jpg"),
        ("https://other/d/a.jpg", "https://h/d", "https://h/d", None),
    ],
)
def test_a_path_in_a_table_is_plain_text_and_a_url_is_quoted(path, root, base, source):
    assert url_files.relative(path, root, base) == source


def test_a_list_on_the_disk_may_name_images_at_a_url():
    options = list_file.Options(root="s3://lab/x", train="/lists/train.txt")
    assert list_file.inputs(options) == {"train": "/lists/train.txt"}
    assert not url_files.is_url("file:///photos")  # so that links are checked, and DVC watches
