"""What people may read: no secret of a URL, and no character that a terminal takes for more than a character."""

import html
import re
from urllib.parse import parse_qsl, quote, unquote, urlsplit

LONGEST = 2000  # characters of a message; what it says stands at its front, and the way out at its end

_SCHEME = re.compile(r"\w+\Z")
_CLOSING = re.compile(r"['\")\]}>.,:;]*\Z")  # of the text around a URL, where it ends
_LONGEST_SCHEME = 20


def redacted(text: str) -> str:
    """`text` without what stands before an @ or behind a ? in its URLs: passwords, tokens, signatures.

    In doubt too much goes: where a password with a slash in it may stand, nothing of the URL is left.
    """
    before, *urls = text.split("://")  # by hand: an expression for all of it takes time that grows with the square
    found = [before]
    for number, url in enumerate(urls, 1):
        rest, blank, after = url, "", ""
        if space := re.search(r"\s", url):
            rest, blank, after = url[: space.start()], space[0], url[space.end() :]
        elif number < len(urls) and not set(url) & set("?=") and (scheme := _SCHEME.search(url[-_LONGEST_SCHEME:])):
            # What follows without a blank is the next URL's scheme, unless it may be the end of a secret.
            rest, after = url[: len(url) - len(scheme[0])], scheme[0]
        found.append(_without_secrets(rest) + blank + after)
    return "://".join(found)


def _without_secrets(rest: str) -> str:
    """What follows the :// of a URL."""
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
    """Login, host and port."""
    return re.split(r"[/?#]", rest, maxsplit=1)[0]


def printable(text: str) -> str:
    """`text` with whatever does not print as itself escaped: line breaks, control characters, changes of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_markdown(text: str) -> str:
    """`text` as it can stand in a line or a cell of a Markdown table without being more than text."""
    return html.escape(printable(text), quote=False).replace("|", "\\|").replace("`", "&#96;")


def one_line(text: str) -> str:
    """`text` as a message: printable, and where it is very long without its middle."""
    text = printable(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text


def secrets_in(url: str) -> set[str]:
    """What in `url` must not be repeated, however a library words it: password, token, values of the query."""
    try:
        parts = urlsplit(url.removeprefix("dvc+"))
    except ValueError:  # whose own words quote what stands in brackets, which may be a password
        raise ValueError(f"{redacted(url)}: not a URL; write [ and ] of a login as %5B and %5D") from None
    texts = (parts.query, parts.fragment, parts.fragment.partition("?")[2])
    found = {value for text in texts for _, value in parse_qsl(text)}
    if parts.password:
        found.add(parts.password)
    elif parts.username and parts.scheme.startswith("http"):  # a token in place of a name
        found.add(parts.username)
    return {
        form
        for secret in found
        if secret
        for form in (secret, unquote(secret), quote(secret, "", errors="surrogatepass"))
    }


def without(text: str, secrets: set[str]) -> str:
    """`text`, redacted, and without `secrets` wherever they stand."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return redacted(text)
