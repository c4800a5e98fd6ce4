"""Mutations that keep a structure, so that what lies behind the first checks is reached: trees, lines, bytes."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NUMBERS = [0, 1, -1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63),
           10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]  # fmt: skip
TEXTS = ["", " ", ".", "..", "../x", "/etc/passwd", "~", "~/x", "a/../../b", "a\\b", "a\0b", "a\nb", "a\rb", "\x1b[2J",
         "\u2028", "\u202e", "\ud800", "é", "<b>", "A" * 5000, "0", "-1", "1e400", "NaN", "null", "true", "x=y", "a.b",
         "${x}", "{0}", "%s", "digits", "float16", "float32", "zstd", "none", "train", "stage1"]  # fmt: skip
SCALARS: list[Any] = [None, True, False, [], {}, *NUMBERS, *TEXTS]


def tree(value: Any, random: Random, keys: list[str] | None = None) -> Any:
    """`value` (dicts, lists, scalars), itself changed in one to four places; `keys` are names worth trying."""
    root = [value]
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 4))):
        holder, key = _place(root, random)
        holder[key] = _changed(holder[key], root[0], random, keys or [])
    return root[0]


def _place(root: list[Any], random: Random) -> tuple[Any, Any]:
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], (dict, list)) and holder[key] and random.random() < 0.8:
        holder = holder[key]
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
    return holder, key


def _changed(value: Any, root: Any, random: Random, keys: list[str]) -> Any:
    kind = random.random()
    if isinstance(value, dict) and value and kind < 0.5:
        key = random.choice(list(value))
        if kind < 0.15:
            value.pop(key)
        elif kind < 0.3:
            value[random.choice([*TEXTS, *keys])] = value[key]
        elif kind < 0.4 and keys:
            value[random.choice(keys)] = random.choice(SCALARS)
        else:
            value[key] = random.choice(SCALARS)
        return value
    if isinstance(value, list) and value and kind < 0.5:
        at = random.randrange(len(value))
        if kind < 0.15:
            del value[at]
        elif kind < 0.35:
            value.extend(value[at : at + 1] * random.choice((1, 2, 7, 200)))
        else:
            value[at] = random.choice(SCALARS)
        return value
    if isinstance(value, str) and kind < 0.4:
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice(TEXTS) + value[at + random.choice((0, 0, 1, 3)) :]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kind < 0.4:
        return random.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**6, float(value) if value < 2**60 else 0)
        )
    if kind < 0.8:
        return random.choice(SCALARS)
    if kind < 0.9:
        return random.choice(([value], {"x": value}, [value] * 3))
    if kind < 0.92:
        for _ in range(random.choice((5, 90, 400))):
            value = [value] if random.random() < 0.5 else {"x": value}
        return value
    return copy.deepcopy(_place([root], random)[0]) if random.random() < 0.9 else random.choice(SCALARS)


def as_json(value: Any) -> bytes:
    """JSON with whatever Python's writer lets through: NaN, lone surrogates as escapes."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


def from_json(data: bytes) -> Any:
    """What `as_json` wrote; None for other bytes."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def lines(text: str, random: Random, words: list[str], separator: str = "\n") -> str:
    """`text` with a few of its lines changed, repeated, moved or mixed with `words`."""
    parts = text.split(separator)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(len(parts))
        kind = random.random()
        if kind < 0.1 and len(parts) > 1:
            del parts[at]
        elif kind < 0.2:
            parts.insert(random.randrange(len(parts) + 1), parts[at])
        elif kind < 0.25:
            parts[at:at] = [parts[at]] * random.choice((5, 40))
        elif kind < 0.4:
            parts.insert(at, random.choice(words))
        else:
            line = parts[at]
            cut = random.randrange(len(line) + 1)
            parts[at] = (
                line[:cut] + random.choice((*words, *TEXTS)) + line[cut + random.choice((0, 0, 1, 4, len(line))) :]
            )
    return separator.join(parts)


def raw(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut, repeated, or overwritten by numbers that matter."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(found) + 1)
        kind = random.randrange(7)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << random.randrange(8)
        elif kind == 1 and found:
            found[at % len(found)] = random.randrange(256)
        elif kind == 2:
            del found[at : at + random.choice((1, 2, 8, 64))]
        elif kind == 3:
            found[at:at] = random.randbytes(random.choice((1, 2, 8)))
        elif kind == 4:
            number = random.choice((0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1))
            size, form = random.choice(((4, "<I"), (8, "<Q"), (4, ">I")))
            found[at : at + size] = struct.pack(form, number & (256**size - 1))
        elif kind == 5:
            found[at : at + 16] = found[max(0, at - 16) : at]
        else:
            del found[at:]
    return bytes(found)


def mostly(structured: Callable[[bytes, Random], bytes], share: float = 0.85) -> Callable[[bytes, Random], bytes]:
    """Mutations by `structured`, and by bytes for the rest and for what it cannot take apart."""

    def mutate(data: bytes, random: Random) -> bytes:
        if random.random() < share:
            try:
                return structured(data, random)
            except Exception:  # noqa: BLE001 - earlier mutations left nothing to take apart
                return raw(data, random)
        return raw(data, random)

    return mutate
