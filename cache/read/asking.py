"""Asks a store a question, again if the failure may be temporary; a final failure becomes a CacheError in one line."""

from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.read.protocols import behind, may_pass
from h2t.cache.read.transfer import Pace, Patience, TooSlow, Unasked
from h2t.cache.redaction import without

T = TypeVar("T")

TRIES = 5
FIRST_WAIT, LONGEST_WAIT = 0.4, 10.0  # seconds before a retry: at most the first, doubling up to the second


def ask(
    where: str,
    question: Callable[[Patience], T],
    pace: Pace,
    secrets: set[str],
    reconnect: Callable[[], None],
) -> T:
    """The answer of a store to `question`, with up to `TRIES` tries, as long as the store is fast enough.

    `where` names the file in messages, which contain none of `secrets`. `reconnect` is called before each retry. Raises
    CacheError `missing`, `damaged` or `unreachable`.
    """
    tries = Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(FIRST_WAIT, LONGEST_WAIT),
        retry=retry_if_exception(may_pass),
        before_sleep=lambda _: reconnect(),
        reraise=True,
    )
    patience = Patience(pace)
    try:
        return tries(lambda: question(patience))
    except Exception as raised:  # every store raises its own exceptions
        error = behind(raised)
        if isinstance(error, CacheError):
            raise
        if isinstance(error, Unasked):
            raise CacheError("damaged", f"{where}: {error}") from None
        if isinstance(error, TooSlow):
            raise CacheError(
                "unreachable",
                f"{where}: the store is too slow ({error}); try again later, or copy the cache closer",
            ) from None
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise CacheError(
                "missing", f"{where}: file is missing; check the address, or publish the cache again"
            ) from None
        if getattr(error, "status", None) == 416:  # HTTP: the range is beyond the end of the file
            raise CacheError("damaged", f"{where}: is shorter than its index or {RECORD} says") from None
        said = without(" ".join(str(error).split()), secrets) or type(error).__name__
        if may_pass(error):
            problem = f"the store failed {TRIES} times ({said}); try again later"
        elif "unable to locate credentials" in said.lower():  # the words of botocore
            problem = "no AWS credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID"
        else:
            problem = f"the store refused ({said}); check the address and your access"
        raise CacheError("unreachable", f"{where}: {problem}") from None
