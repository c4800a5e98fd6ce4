"""Secrets out of what people read: URLs without logins and without queries, in any text."""

import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit

_LOGIN = re.compile(r"(\w+://)[^/@\s'\"]+@")
_QUERY = re.compile(r"(\w+://[^\s'\"?#]+)\?[^\s'\"#)>\]]*")


def redacted(text: str) -> str:
    """`text` without what stands before an @ or behind a ? in its URLs: passwords, tokens, signatures."""
    return _QUERY.sub(r"\1", _LOGIN.sub(r"\1", text))


def secrets_in(url: str) -> set[str]:
    """What in `url` must not be repeated, however a library words it: password, token, values of the query."""
    parts = urlsplit(url.removeprefix("dvc+"))
    found = {value for _, value in parse_qsl(parts.query)}
    if parts.password:
        found.add(parts.password)
    elif parts.username and parts.scheme.startswith("http"):  # a token in place of a name
        found.add(parts.username)
    return {form for secret in found if secret for form in (secret, unquote(secret), quote(secret, safe=""))}


def without(text: str, secrets: set[str]) -> str:
    """`text`, redacted, and without `secrets` wherever they stand."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return redacted(text)
