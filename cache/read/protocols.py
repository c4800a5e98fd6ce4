"""What stores differ in: how each is opened, which of them one is, and which of its failures may pass."""

from typing import Any

from h2t.cache.errors import CacheError

CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds
CONNECTIONS = 64

#: HTTP: too early, too slow, too many. Other statuses from 400 to 499 stay what they are, however often one asks.
WORTH_ANOTHER_TRY = (408, 425, 429)
FINAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ImportError, ValueError, TypeError)
FINAL_WORDS = ("credential", "permission", "not trusted", "forbidden", "access denied", "accessdenied", "signature")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it. Timeouts are set, credentials are fsspec's own matter."""
    import fsspec

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        options["client_kwargs"] = {"timeout": timeout}
    elif protocol in ("s3", "s3a"):
        # One place tries again, and that is here.
        tries = {"total_max_attempts": 1}
        options["config_kwargs"] = {
            "max_pool_connections": CONNECTIONS, "retries": tries,
            "connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT,
        }  # fmt: skip
    elif protocol in ("ssh", "sftp"):
        # sshfs alone would talk to any host: an empty tuple means ~/.ssh/known_hosts.
        options |= {"known_hosts": (), "connect_timeout": CONNECT_TIMEOUT, "keepalive_interval": CONNECT_TIMEOUT}
    if protocol not in ("ssh", "sftp"):  # sshfs hands every option on to the connection, and keeps no listings
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
    """Whether `fs` is of a class of `module`, or derived from one: DVC has kinds of its own."""
    return any(f"{kind.__module__}.".startswith(f"{module}.") for kind in type(fs).__mro__)


def behind(error: BaseException) -> BaseException:
    """What went wrong: fsspec's HTTP calls every failure a missing file, and names it as the cause."""
    cause = error.__cause__
    masked = isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) != 404
    http = isinstance(cause, TimeoutError) or type(cause).__module__.startswith("aiohttp")
    return cause if masked and http and cause is not None else error


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    error = behind(error)
    if isinstance(error, (*FINAL, CacheError)) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in WORTH_ANOTHER_TRY
    told = f"{type(error).__name__} {error}".lower()
    return not any(word in told for word in FINAL_WORDS)
