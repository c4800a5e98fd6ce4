"""Locks at a store that has none: an object that its holder renews, and that others may take once it does not.

A process that is killed cannot remove its lock. On the same machine others see that it has ended and take the lock at
once (on Linux; macOS has no /proc to ask); elsewhere they wait until it was not renewed for `EXPIRES` seconds. So a
process that was suspended for longer may lose its lock and run beside another. It looks at its lock before it commits,
and again before the commit record. Two commits of different caches between such looks may still mix; readers notice
that by the digests in the record.
"""

import json
import os
import socket
import threading
import uuid
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from h2t.cache.errors import CacheError, CacheWarning
from h2t.cache.machine import alive
from h2t.cache.write.objects import Objects

RENEWED, EXPIRES = 20.0, 120.0  # seconds
HIDDEN = "hidden"  # the start of a process that is there, of which the system says no more


class Lease:
    """Holds the lock object `name` from `take` to `release`, and renews it meanwhile."""

    def __init__(self, objects: Objects, name: str, what: str) -> None:
        self._objects, self._name, self._what = objects, name, what
        self._content = json.dumps({**_process(os.getpid()), "nonce": uuid.uuid4().hex}).encode()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._lost = False

    def take(self) -> None:
        """Raises CacheError `busy` if another process holds the lock."""
        while (have := self._objects.claim(self._name, self._content)) != self._content:
            if live(self._objects, self._name, have):
                raise self._busy(have)
            if self._objects.get(self._name) == have:
                self._objects.remove([self._name])
        if self._objects.claim(self._name, b"") == b"":  # stored, although there is an object
            self._objects.put(self._name, self._content)
            warnings.warn(
                f"{self._objects}: the store ignores If-None-Match, so no second writer is refused; run one at a time",
                CacheWarning,
                stacklevel=3,
            )
        self._thread.start()

    def check(self) -> None:
        """Raises CacheError `busy` if another process has taken the lock, as this one did not renew it in time."""
        have = self._objects.get(self._name)
        if self._lost or have != self._content:
            raise self._busy(have or b"")

    def release(self) -> None:
        """Stops renewing and removes the lock, unless another process has it."""
        self.leave()
        with suppress(CacheError):  # it expires
            if self._objects.get(self._name) == self._content:
                self._objects.remove([self._name])

    def leave(self) -> None:
        """Stops renewing."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with suppress(CacheError):  # unreachable for a while: the next time may do
                if self._objects.get(self._name) != self._content:
                    self._lost = True
                    return
                self._objects.put(self._name, self._content)

    def _busy(self, have: bytes) -> CacheError:
        return busy(self._objects, self._name, have, self._what)


def busy(objects: Objects, name: str, have: bytes, what: str) -> CacheError:
    """The error for a lock `name` with content `have` that another process holds."""
    holder = _parsed(have)
    who = f" (process {holder['pid']} on {holder['host']})" if holder.keys() >= {"pid", "host"} else ""
    return CacheError(
        "busy",
        f"{objects}/{name}: another process is writing this {what}{who}; wait until it ends, or stop it; if it was "
        f"killed on another machine, its lock ends after {EXPIRES:.0f} s",
    )


def live(objects: Objects, name: str, have: bytes) -> bool:
    """Whether the holder of the lock `name` with content `have` is still there, as far as can be known from here."""
    holder = _parsed(have)
    here = _process(os.getpid())
    if all(holder.get(key) == here[key] for key in ("host", "boot", "space")) and here["boot"]:
        there = _process(holder.get("pid"))
        if there["started"] != HIDDEN:
            return bool(there == {k: holder[k] for k in here})
    clock = f"{name}.{uuid.uuid4().hex}.clock"  # an object written now tells the server's time
    objects.put(clock, b"")
    folder, _, last = name.rpartition("/")
    found = objects.below(folder)
    objects.remove([clock])
    now, renewed = (found.get(n) for n in (clock.rpartition("/")[2], last))
    return renewed is not None and (now is None or now.modified - renewed.modified < EXPIRES)


def _parsed(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(parsed := json.loads(content), dict):
            return parsed
    return {}


def _process(pid: Any) -> dict[str, Any]:
    """Identifies process `pid` of this machine: machine, boot, namespace, number and start; start None if it ended.

    Where the system does not tell (macOS has no /proc), `boot` is empty.
    """
    boot, space, started = "", "", None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    with suppress(IndexError, ValueError, TypeError, OverflowError):
        try:
            text = Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace")
            about = text.rpartition(")")[2].split()
            started = about[19] if about[0] not in "ZX" else None
        except OSError:  # it has ended, or /proc hides what is another user's
            started = HIDDEN if alive(int(pid)) else None
    return {"host": socket.gethostname(), "boot": boot, "space": space, "pid": pid, "started": started}
