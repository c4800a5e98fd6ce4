"""Makes text safe to print: no secrets from URLs, no characters that control a terminal."""

import html
import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LONGEST = 2000  # characters of a message; a longer one loses its middle: the problem comes first, the way out last

_SCHEME = re.compile(r"\w+\Z")
_CLOSING = re.compile(r"['\")\]}>.,:;]*\Z")  # closing punctuation that follows a URL and is not part of it
_LONGEST_SCHEME = 20


def redacted(text: str) -> str:
    """`text` with the login (before @) and the query (after ?) of its URLs removed: passwords, tokens, signatures.

    When in doubt, remove more: if a URL may hold a password with a slash in it, all of the URL goes.
    """
    before, *urls = text.split("://")  # not one regular expression: that would take quadratic time
    kept = [before]
    for number, url in enumerate(urls, 1):
        rest, blank, after = url, "", ""
        if space := re.search(r"\s", url):
            rest, blank, after = url[: space.start()], space[0], url[space.end() :]
        elif number < len(urls) and not set(url) & set("?=") and (scheme := _SCHEME.search(url[-_LONGEST_SCHEME:])):
            # Text that runs straight into the next :// is that URL's scheme, unless it may be the end of a secret.
            rest, after = url[: len(url) - len(scheme[0])], scheme[0]
        kept.append(_without_secrets(rest) + blank + after)
    return "://".join(kept)


def _without_secrets(rest: str) -> str:
    """The part of a URL after ://, redacted."""
    closing = _CLOSING.search(rest[-_LONGEST_SCHEME:])
    after = closing[0] if closing else ""
    rest = rest[_place(rest).rfind("@") + 1 :]
    place = _place(rest)
    _, colon, port = re.sub(r"\[[^\]]*\]", "", place).rpartition(":")
    if "@" in rest and ((colon and not port.isdecimal()) or re.search(":.*@", rest[len(place) :])):
        return f"***{after}"  # a login with a / ? or # in it
    kept, sign, _ = rest.partition("?")
    path, _, fragment = kept.partition("#")
    if "=" in fragment:
        return path + after
    return kept + after if sign else kept


def _place(rest: str) -> str:
    """Login, host and port: everything before the first slash, ? or #."""
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def printable(text: str) -> str:
    """`text` with non-printable characters escaped: line breaks, control characters, text direction marks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_markdown(text: str) -> str:
    """`text` escaped so that it stays plain text in a line or a table cell of Markdown."""
    return html.escape(printable(text), quote=False).replace("|", "\\|").replace("`", "&#96;")


def one_line(text: str) -> str:
    """`text` as a message: printable, and shortened in the middle if longer than `LONGEST` characters."""
    text = printable(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text


def secrets_in(url: str) -> set[str]:
    """The secrets in `url`, raw and percent-encoded: password, token, values of the query.

    They are removed from messages of other libraries, which may quote the URL in any form. Raises ValueError for an
    invalid URL.
    """
    try:
        parts = urlsplit(url.removeprefix("dvc+"))
    except ValueError:  # its message quotes the text in brackets, which may be a password
        raise ValueError(f"{redacted(url)}: not a valid URL; write [ and ] in a login as %5B and %5D") from None
    texts = (parts.query, parts.fragment, parts.fragment.partition("?")[2])
    secrets = {value for text in texts for _, value in parse_qsl(text)}
    if parts.password:
        secrets.add(parts.password)
    elif parts.username and parts.scheme.startswith("http"):  # a token in place of a user name
        secrets.add(parts.username)
    return {
        form
        for secret in secrets
        if secret
        for form in (secret, unquote(secret), quote(secret, "", errors="surrogatepass"))
    }


def without(text: str, secrets: set[str]) -> str:
    """`text`, redacted, with every occurrence of `secrets` replaced by ***."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return redacted(text)
