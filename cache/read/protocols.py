"""Differences between stores: how each is opened, how to recognise it, and which of its failures may be temporary."""

from typing import Any

from h2t.cache.errors import CacheError

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds
CONNECTIONS = 64

HOSTED = ("http", "https", "s3", "s3a", "ssh", "sftp")

#: HTTP statuses request timeout, too early, too many requests. A retry does not help with others from 400 to 499.
WORTH_ANOTHER_TRY = (408, 425, 429)
FINAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ImportError, ValueError, TypeError)
FINAL_WORDS = ("credential", "permission", "not trusted", "forbidden", "access denied", "accessdenied", "signature")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it, with timeouts; fsspec finds the credentials.

    Raises ValueError for an unknown protocol or an address without a host, ImportError if a package is not installed.
    """
    import fsspec

    protocol, _, place = url.partition("://")
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise ValueError(
            f"unknown protocol {protocol!r}; write a path, s3://, ssh://, https:// or another of fsspec"
        ) from None
    except ImportError as error:
        raise ImportError(
            f"{protocol}:// needs a package that is not installed ({error}); install it beside h2t"
        ) from None
    if protocol in HOSTED and not place.partition("/")[0]:
        raise ValueError(f"must name a host or bucket; write {protocol}://HOST/PATH")
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout}
    elif protocol in ("s3", "s3a"):
        # No retries by botocore: `RemoteFiles` retries.
        tries = {"total_max_attempts": 1}
        options["config_kwargs"] = {
            "max_pool_connections": CONNECTIONS, "retries": tries,
            "connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT,
        }  # fmt: skip
    elif protocol in ("ssh", "sftp"):
        # By default sshfs accepts any host; an empty tuple makes it check ~/.ssh/known_hosts.
        options |= {"known_hosts": (), "connect_timeout": CONNECT_TIMEOUT, "keepalive_interval": CONNECT_TIMEOUT}
    if protocol not in ("ssh", "sftp"):  # sshfs passes every option to the connection, and caches no listings
        options["use_listings_cache"] = False
    fs, root = fsspec.core.url_to_fs(url, **options)
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, root


def is_http(fs: Any) -> bool:
    return _from(fs, "fsspec.implementations.http")


def is_s3(fs: Any) -> bool:
    return _from(fs, "s3fs")


def is_sshfs(fs: Any) -> bool:
    return _from(fs, "sshfs")


def _from(fs: Any, module: str) -> bool:
    """True if the class of `fs` is from `module` or derived from one that is: DVC has its own subclasses."""
    return any(f"{kind.__module__}.".startswith(f"{module}.") for kind in type(fs).__mro__)


def behind(error: BaseException) -> BaseException:
    """The real error: fsspec's HTTP raises FileNotFoundError for every failure, with the real error as its cause."""
    cause = error.__cause__
    masked = isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) != 404
    http = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if masked and http and cause is not None else error


def may_pass(error: BaseException) -> bool:
    """True if a retry may help."""
    error = behind(error)
    if isinstance(error, (*FINAL, CacheError)) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in WORTH_ANOTHER_TRY
    told = f"{type(error).__name__} {error}".lower()
    return not any(word in told for word in FINAL_WORDS)
