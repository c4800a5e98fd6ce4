"""Images in Parquet files at URLs: the samples of the same files on a disk, read by ranges."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_server import hostile_server
from image_builders import SMALL, write_image
from pipeline_builders import prepared
from servers import put_all, s3_endpoint

from h2t.cache.read import asking
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data import url_files
from h2t.pipeline.data.samples import load_samples

ROWS = {"train-0.parquet": 7, "train-1.parquet": 5, "test.parquet": 4}


@pytest.fixture
def files(tmp_path):
    """Name -> bytes of small Parquet files of images, two row groups each; they lie in the folder `files` too."""
    number, made = 0, {}
    (tmp_path / "files").mkdir()
    for name, rows in ROWS.items():
        images = [write_image(tmp_path / "image.png", number + i).read_bytes() for i in range(rows)]
        number += rows
        table = pa.table({"image": [{"bytes": b, "path": ""} for b in images], "label": np.arange(rows) % 2})
        pq.write_table(table, tmp_path / "files" / name, row_group_size=4)
        made[name] = (tmp_path / "files" / name).read_bytes()
    return made


@pytest.fixture(params=["https", "s3"])
def there(request, files, tmp_path):
    """(the URL of a folder with the files, a function that puts a file there)."""
    if request.param == "https":
        with hostile_server(dict(files)) as (url, handler):
            yield f"{url}/sound/t", lambda name, data: handler.files.update({name: data})
    else:
        with s3_endpoint() as bucket:
            put_all(bucket, tmp_path / "files")
            yield bucket.url, bucket.put


def section(folder, train=("train-0.parquet", "train-1.parquet")):
    options = {"train": [f"{folder}/{t}" for t in train], "test": [f"{folder}/test.parquet"], "transform": SMALL}
    return {"dataset": "parquet", "options": options}


class Store:
    """What a store lists, without its protocol."""

    def glob(self, path):
        return ["/data/a.parquet", "/data/b.parquet"]


def test_a_pattern_keeps_login_and_host(monkeypatch):
    monkeypatch.setattr("h2t.cache.read.protocols.file_system", lambda url: (Store(), "/data/*.parquet"))
    assert url_files.found("k", "ssh://u@h:22/data/*.parquet") == [
        "ssh://u@h:22/data/a.parquet",
        "ssh://u@h:22/data/b.parquet",
    ]


def test_a_question_mark_is_no_wildcard_at_a_url():
    with pytest.raises(UserError, match=r"a pattern at a URL takes \* and \[\], as \? begins a query"):
        url_files.found("k", "s3://b/*-????.parquet")


def test_the_samples_are_those_of_a_disk(there, tmp_path):
    url, _ = there
    samples, images = prepared(section(url), tmp_path / "there")
    expected, here = prepared(section(tmp_path / "files"), tmp_path / "here")
    assert samples.table == expected.table  # the digests of all images among it
    assert all((images.array(i) == here.array(i)).all() for i in range(len(samples.table)))


def test_a_file_that_changed_later_is_noticed_by_the_digest_of_its_images(there, files, tmp_path):
    url, put = there
    prepared(section(url), tmp_path / "there")
    put("train-0.parquet", files["train-1.parquet"])
    samples = load_samples(tmp_path / "there")
    changed = samples.images(section(url))
    with pytest.raises(UserError, match=r"train-0\.parquet:00000000\d"):
        for i in range(len(samples.table)):
            changed.array(i)


def test_a_file_that_changes_while_it_is_read_is_one_line(there, files, tmp_path):
    url, put = there
    samples, images = prepared(section(url), tmp_path / "there")
    put("test.parquet", files["train-1.parquet"])
    with pytest.raises(UserError, match=r"test\.parquet: changed at its URL after it was opened"):
        for i in range(len(samples.table)):
            images.array(i)


def test_a_pattern_names_files_of_a_bucket_and_is_refused_on_a_web_server(there, tmp_path):
    url, _ = there
    if url.startswith("http"):
        with pytest.raises(UserError, match="web servers list no files, so name each one"):
            prepared(section(url, ["train-*.parquet"]), tmp_path / "there")
        return
    samples, _ = prepared(section(url, ["train-*.parquet"]), tmp_path / "there")
    assert samples.counts == [7, 5]
    with pytest.raises(UserError, match="no file matches s3://lab/x/none"):
        prepared(section(url, ["none-*.parquet"]), tmp_path / "none")


def test_what_is_missing_or_unknown_is_one_line_without_a_secret(there, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    url, _ = there
    for place in (
        f"{url}/gone.parquet",
        "nosuch://u:s3cr3t@h/x.parquet",
        "http://u:s3cr3t@127.0.0.1:1/x.parquet?k=s3cr3t",
    ):
        options = {"train": [place], "transform": SMALL}
        with pytest.raises(UserError, match=r"prepare\.options\.train: ") as error:
            prepared({"dataset": "parquet", "options": options}, tmp_path / "none")
        assert "s3cr3t" not in str(error.value)
        assert len(str(error.value).splitlines()) == 1
