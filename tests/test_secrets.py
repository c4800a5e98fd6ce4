"""No login, token or query of a URL in what people read or keep: messages, records of runs, provenance, reports."""

import click
import pytest
import yaml
from builders import tree
from hostile_server import hostile_server
from pipeline_builders import invoke, make_params, make_stage2_cache
from repositories import dvc, git, start_repository

from h2t.cache import redaction
from h2t.cache.errors import CacheError
from h2t.cache.read import asking
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.command_line.caches import previous

SECRET = "Xk7SECRETq9"

#: Ways that a secret stands in a URL to nowhere; `h2t` asks at most the loopback.
URLS = [
    f"http://ann:{SECRET}@127.0.0.1:1/c",
    f"http://ann:a@{SECRET}@127.0.0.1:1/c",
    f"http://ann:a/{SECRET}@127.0.0.1:1/c",
    f"http://{SECRET}@127.0.0.1:1/c",
    f"http://127.0.0.1:1/c?token={SECRET}",
    f"http://127.0.0.1:1/c?a=1&X-Amz-Signature=({SECRET})",
    f"nosuch://ann:{SECRET}@host/c?token={SECRET}",
    f"nosuch://host/c?sig='{SECRET}'",
    f"http://ann[{SECRET}:x]y@127.0.0.1:1/c",
    f"dvc+http://ann:{SECRET}@127.0.0.1:1/lab.git@v1#data/extract/b",
    f"dvc+nosuch://127.0.0.1:1/lab.git?token={SECRET}#data/extract/b",
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0)
    monkeypatch.setattr(asking, "TRIES", 2)


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump(make_params()))
    return path


COMMANDS = {
    "info": lambda url, out, params: ["cache", "info", url],
    "verify": lambda url, out, params: ["cache", "verify", "--quick", url],
    "pool": lambda url, out, params: ["pool", "b", url, out, "--params", params],
    "train": lambda url, out, params: ["train-classifier", "dr", url, "none", out, "--params", params],
    "evaluate": lambda url, out, params: ["evaluate", "dr", url, out, "none", out, "--params", params],
    "why": lambda url, out, params: ["cache", "why", out, "--params", params, "--set", f"extract.codec={url}"],
    "set": lambda url, out, params: ["prepare", out, "--params", params, "--set", f"extract.nothing={url}"],
    "not yaml": lambda url, out, params: ["prepare", out, "--params", params, "--set", f"extract=[{url}"],
    "misuse": lambda url, out, params: ["cache", "info", out, url],
    "no option": lambda url, out, params: ["cache", "info", f"--{url}"],
    "pull": lambda url, out, params: ["cache", "pull", url.removeprefix("dvc+").partition("#")[0], "--into", out],
}  # fmt: skip


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "pull"])
def test_no_command_says_it(tmp_path, params, command, url):
    result = invoke(*COMMANDS[command](url, tmp_path / "out", params))
    assert result.exit_code in (1, 2), (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert SECRET not in result.output
    assert result.output.strip()


@pytest.mark.parametrize("url", [URLS[0], URLS[4], URLS[6]])
def test_pull_does_not_say_it(tmp_path, params, url):
    result = invoke(*COMMANDS["pull"](url, tmp_path / "out", params))
    assert result.exit_code == 1
    assert SECRET not in result.output


@pytest.mark.parametrize("url", URLS)
def test_a_previous_cache_at_a_url_does_not_say_it(url):
    """`extract.statistics_from`."""
    with pytest.raises((UserError, CacheError, click.ClickException)) as error, previous(url, "b"):
        pass
    assert SECRET not in f"{error.value}{error.value.args}"


@pytest.mark.parametrize("url", URLS)
def test_no_error_holds_it(url):
    for error in (UserError(f"x {url}: y"), CacheError("missing", f"{url}/name: y"), UserError(f"{url!r}")):
        assert SECRET not in f"{error}{error!r}{error.args}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:secret@host/x s3://key@b/y", "https://host/x s3://b/y"),
        ("(https://h/x?a=b)", "(https://h/x)"),
        ("'https://h/x?sig=a'b', 'x'", "'https://h/x', 'x'"),
        ("dvc+https://u:p@h/r.git@v1#data/x: bad", "dvc+https://h/r.git@v1#data/x: bad"),
        ("https://h:80/lab.git@v1", "https://h:80/lab.git@v1"),
        ("https://[::1]:80/x@v1", "https://[::1]:80/x@v1"),
        ("git@h:x/y", "git@h:x/y"),
        ("https://u:p/s@h/x, and more", "https://***, and more"),
        ("https://proxy/https://u:p@h/x", "https://proxy/https://h/x"),
        ("x://h/p#access_token=S", "x://h/p"),
        ("no url at all: a@b, c?d", "no url at all: a@b, c?d"),
    ],
)
def test_what_is_left_of_a_url(text, expected):
    assert redaction.redacted(text) == expected
    assert redaction.redacted(expected) == expected


def test_redacting_takes_time_that_grows_with_the_text_only():
    text = "A" * 10**6 + "://" + "a:" * 10**6 + "@" * 10**6 + "?" * 10**6 + "://" * 10**4
    assert len(redaction.redacted(text)) < len(text)
    assert len(redaction.one_line(text)) < 2100


@pytest.fixture
def web(tmp_path):
    """URL, with a token, of a cache of stage II behind a web server."""
    cache = make_stage2_cache(tmp_path / "c", backbone="none", train=("stage1",), evaluation=("stage1",))
    with hostile_server(tree(cache)) as (url, _):
        yield f"{url}/as/is?token={SECRET}"


def test_nothing_that_is_kept_holds_it(tmp_path, web):
    """Heads, metrics, a pooled copy, records of runs and the report of a cache at a URL with a token."""
    values = make_params()
    values["hosts"] = {"ncm": {"host": "ncm", "backbone": "ce_mixup", "batchnorm": "stage1"}}
    values["train_classifier"] = {"residency": "memory"}
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(values))
    out, common = tmp_path / "data", ["--params", params, "--device", "cpu"]
    for stage, arguments in {
        "train_classifier": ["train-classifier", "ncm", web, "none", out / "train_classifier" / "ncm"],
        "evaluate": ["evaluate", "ncm", web, out / "train_classifier" / "ncm", "none", out / "evaluate" / "ncm"],
        "pool": ["pool", "ncm", web, out / "pool" / "ncm"],
        "report": ["report", out / "evaluate", out / "report", "--runs", out / "runs"],
    }.items():
        record = ["--record", out / "runs" / stage / "ncm.json"]
        result = invoke(*arguments, *common, *record)
        assert result.exit_code == 0, (stage, result.output, result.exception)
        assert SECRET not in result.output
    kept = tree(out)
    assert {"runs/pool/ncm.json", "pool/ncm/cache.json", "report/index.html", "report/results.md"} <= set(kept)
    assert [name for name, data in kept.items() if SECRET.encode() in data] == []


def test_publish_and_doctor_do_not_say_the_login_of_a_remote(tmp_path, monkeypatch):
    root = start_repository(tmp_path, "stages: {}\n", [])
    git("add", "-A", where=root)
    git("commit", "-qm", "x", where=root)
    (root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    monkeypatch.chdir(root)
    for url in (f"http://ann:{SECRET}@127.0.0.1:1/store", f"http://127.0.0.1:1/store?token={SECRET}"):
        dvc("remote", "add", "--force", "--default", "store", url, where=root)
        for command in (["cache", "publish", "--uncommitted"], ["doctor"], ["doctor", "--json"]):
            result = invoke(*command)
            assert SECRET not in result.output, command
            assert isinstance(result.exception, (SystemExit, type(None))), result.exception
