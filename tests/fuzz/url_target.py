"""Texts with URLs, whose secrets nobody may read: JSON with the parts of a URL, its secret, and the text around it."""

import json
import re
from pathlib import Path
from random import Random
from urllib.parse import quote

from fuzz import mutation
from fuzz.oracle import REFUSALS, Finding
from fuzz.target import Parse, Target

from h2t.cache import redaction
from h2t.cache.read import dvc_files
from h2t.cache.reader import open_cache

SECRET = "Xk7SECRETq9"
SIGNS = [
    ":",
    "@",
    "/",
    "?",
    "#",
    "&",
    "=",
    "%",
    "%40",
    "%2F",
    "'",
    '"',
    ")",
    "]",
    ">",
    "<",
    ",",
    ";",
    "+",
    "*",
    "$",
    "!",
]
SCHEMES = ["https", "http", "s3", "ssh", "sftp", "dvc+https", "dvc+ssh", "git", "ftp", "gs", "azure", "webdavs", "file"]
AROUND = [
    "{}",
    "({})",
    "'{}'",
    '"{}"',
    "{}: failed",
    "<{}>",
    "[{}]",
    "a@b {} c@d",
    "{}, {}",
    "{}\n{}",
    "b'{}'",
    "url={}",
]


def url_of(parts: dict[str, str], secret: str) -> str:
    """The URL of `parts`; its password and its query hold `secret`."""
    login = (
        f"{parts['user']}:{secret}@"
        if parts["login"] == "password"
        else f"{secret}@"
        if parts["login"] == "token"
        else ""
    )
    query = f"?{parts['query']}{secret}" if parts["query"] else ""
    return f"{parts['scheme']}://{login}{parts['host']}/{parts['path']}{query}"


def _url_seeds() -> list[bytes]:
    base = {"scheme": "https", "user": "ann", "login": "password", "secret": SECRET, "host": "example.org",
            "path": "lab/cache", "query": "", "around": "{}: failed"}  # fmt: skip
    more = [
        {},
        {"login": "token"},
        {"login": "", "query": "X-Amz-Signature="},
        {"scheme": "dvc+https", "path": "r.git@v1#data"},
    ]
    return [mutation.as_json({**base, **m}) for m in more]


def _mutated_url(data: bytes, random: Random) -> bytes:
    parts = json.loads(data)
    kind = random.random()
    if kind < 0.5:
        sign, at = random.choice(SIGNS), random.choice(["front", "behind", "inside"])
        parts["secret"] = {"front": sign + SECRET, "behind": SECRET + sign, "inside": f"{SECRET}{sign}{SECRET}"}[at]
    elif kind < 0.6:
        parts["scheme"] = random.choice(SCHEMES)
    elif kind < 0.7:
        parts["around"] = random.choice(AROUND)
    elif kind < 0.8:
        parts["login"] = random.choice(["password", "token", ""])
    elif kind < 0.9:
        parts["query"] = random.choice(["", "token=", "a=1&sig=", "access_token=", "x"])
    else:
        key = random.choice(["user", "host", "path"])
        parts[key] = mutation.lines(parts[key], random, ["a", "b.c", "127.0.0.1:80", "[::1]"], "/")
    return mutation.as_json(parts)


def _open_url(folder: Path) -> Parse:
    fields = ("scheme", "user", "login", "secret", "host", "path", "query", "around")

    def parse(data: bytes) -> object:
        given = mutation.from_json(data)
        if not isinstance(given, dict) or not all(isinstance(given.get(k), str) for k in fields):
            return redaction.redacted(data.decode("latin-1"))
        if given["login"] not in ("password", "token", "") or not re.fullmatch(r"[a-z0-9+]+", given["scheme"]):
            return None
        if SECRET not in given["secret"]:
            return None
        if given["login"] == "token" and re.search("[/?#]", given["secret"]):  # looks like a host and a path
            return None
        if any(SECRET in given[k] for k in fields if k != "secret") or re.search(
            r"[\s\0]", "".join(given[k] for k in fields if k != "around")
        ):
            return None
        url = url_of(given, given["secret"])
        text = given["around"].replace("{}", url)
        if SECRET in redaction.redacted(text):
            raise Finding(f"{text!r} became {redaction.redacted(text)!r}")
        try:
            secrets = redaction.secrets_in(url)
        except ValueError:  # no URL to anybody
            secrets = set()
        # A library may say the parts of a well-formed URL in any words.
        well_formed = given["secret"] == quote(given["secret"], safe="") and given["user"].isalnum()
        well_formed = well_formed and bool(re.fullmatch(r"[a-z0-9.:-]+", given["host"]))
        told = given["login"] == "password" or (
            given["scheme"].removeprefix("dvc+").startswith("http") if given["login"] else given["query"].endswith("=")
        )
        if well_formed and told:
            said = redaction.without(f"no access with {given['secret']} here", secrets)
            if SECRET in said:
                raise Finding(f"{url!r}: {said!r}")
        try:
            dvc_files.parse_address(f"{dvc_files.PREFIX}{url}")
        except ValueError:
            return None
        for place in (f"nothing+{url}", str(folder / "none")):
            try:
                open_cache(place)
            except (ValueError, ImportError) as error:  # no such protocol: the command line says it, redacted
                if SECRET in redaction.redacted(str(error)):
                    raise Finding(f"{place!r}: {error}") from None
            except REFUSALS as error:
                if SECRET in str(error):
                    raise Finding(f"{place!r}: {error}") from None
        return text

    return parse


TARGETS = [
    Target(
        "urls",
        "cache/redaction.py, dvc_files.py, remote.py, stores.py",
        _open_url,
        _url_seeds,
        mutation.mostly(_mutated_url, 0.95),
    )
]
