"""Codecs by name: encoding and decoding of a chunk, and the matching Zarr codec chain.

Every chain ends with crc32c. Every Zarr v3 tool reads `none`, `zstd` and `blosc-lz4`; TensorStore cannot read
`numcodecs.lz4` and `pcodec`. No codec shuffles bytes: maps after a ReLU have scattered zeros, and shuffling makes
their chunks larger. numcodecs is imported for the codecs that need it: it takes as long as reading a small cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from h2t.cache.errors import CacheError

#: Codecs that TensorStore and other readers outside Python cannot decode.
PYTHON_ONLY = frozenset({"numcodecs.lz4", "pcodec"})


@dataclass(frozen=True, slots=True)
class Codec:
    """Compression of one chunk.

    `encode` takes a contiguous array and returns its encoded bytes. `decode` takes encoded bytes and fills the
    contiguous array given to it; it raises ValueError or RuntimeError if the bytes do not decode to exactly its size.
    """

    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[Any, np.ndarray], None]


def _none() -> Codec:
    def decode(data: Any, out: np.ndarray) -> None:
        if len(data) != out.nbytes:
            raise ValueError(f"it has {len(data)} bytes, not {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)

    return Codec(lambda chunk: chunk.tobytes(), decode)


def _numcodecs(
    make: Callable[[int], Any], decompress: Callable[[Any, Any], Any], stated: Callable[[Any], int]
) -> Codec:
    """A codec of numcodecs. `make(itemsize)` builds its encoder; `stated(data)` reads the decoded size from `data`.

    `decompress` is the function that the codec's own `decode` calls; calling `decode` costs 10 % more for 8 KiB rows.
    """
    make = cache(make)  # the objects only hold settings, so threads can share them

    def encode(chunk: np.ndarray) -> bytes:
        return bytes(make(chunk.dtype.itemsize).encode(chunk))

    def decode(data: Any, out: np.ndarray) -> None:
        # numcodecs raises no error if `out` is too large: it fills only the front.
        if stated(data) != out.nbytes:
            raise ValueError(f"it decodes to {stated(data)} bytes, not {out.nbytes}")
        decompress(data, out.reshape(-1).view(np.uint8))

    return Codec(encode, decode)


def _integer(data: Any, start: int, size: int) -> int:
    return int.from_bytes(data[start : start + size], "little")


def _zstd_bytes(data: Any) -> int:
    """Decoded size stated in a Zstandard frame header (RFC 8878, section 3.1.1.1); 0 if it states none."""
    flags = _integer(data, 4, 1)
    single = flags >> 5 & 1
    size = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    return _integer(data, start, size) + (256 if size == 2 else 0)


def _blosc_bytes(data: Any) -> int:
    """Decoded size stated in a Blosc header; 0 if the stated encoded size is not that of `data`.

    Blosc reads as many bytes as the header says, so a wrong encoded size would make it read beyond `data`.
    """
    return _integer(data, 4, 4) if _integer(data, 12, 4) == len(data) else 0


def _zstd() -> Codec:
    from numcodecs import zstd

    return _numcodecs(lambda _: zstd.Zstd(level=1), zstd.decompress, _zstd_bytes)


def _blosc() -> Codec:
    from numcodecs import blosc

    def make(size: int) -> Any:
        return blosc.Blosc(cname="lz4", clevel=3, shuffle=blosc.Blosc.NOSHUFFLE, typesize=size)

    return _numcodecs(make, blosc.decompress, _blosc_bytes)


def _lz4() -> Codec:
    from numcodecs import lz4

    return _numcodecs(lambda _: lz4.LZ4(), lz4.decompress, lambda data: _integer(data, 0, 4))


def _pcodec() -> Codec:
    from numcodecs.pcodec import PCodec
    from pcodec import standalone

    def decode(data: Any, out: np.ndarray) -> None:
        try:  # into `out`, because a few bytes can claim to decode to gigabytes
            progress = standalone.simple_decompress_into(bytes(data), out.reshape(-1))
        except TypeError as error:
            raise ValueError(str(error)) from None
        if progress.n_processed != out.size or not progress.finished:
            raise ValueError(f"it does not decode to {out.size} values")

    return Codec(lambda chunk: bytes(PCodec().encode(chunk)), decode)


CODECS: dict[str, Callable[[], Codec]] = {
    "none": _none,
    "zstd": _zstd,
    "blosc-lz4": _blosc,
    "numcodecs.lz4": _lz4,
    "pcodec": _pcodec,
}


def codec(name: str) -> Codec:
    """The codec called `name`. Raises CacheError `spec` for an unknown name."""
    if name not in CODECS:
        raise CacheError("spec", f"codec: must be one of {', '.join(CODECS)}; got {name!r}")
    return CODECS[name]()


def zarr_codecs(name: str, itemsize: int) -> dict[str, Any]:
    """Keyword arguments for `zarr.create_array` that describe the chain of codec `name`."""
    import zarr.codecs as z

    serializer: Any = z.BytesCodec(endian="little")
    compressors: list[Any] = [z.Crc32cCodec()]
    if name == "zstd":
        compressors.insert(0, z.ZstdCodec(level=1))
    elif name == "blosc-lz4":
        compressors.insert(0, z.BloscCodec(cname="lz4", clevel=3, shuffle="noshuffle", typesize=itemsize))
    elif name == "numcodecs.lz4":
        from zarr.codecs.numcodecs import LZ4

        compressors.insert(0, LZ4())
    elif name == "pcodec":
        from zarr.codecs.numcodecs import PCodec

        serializer = PCodec()
    elif name != "none":
        codec(name)
    return {"serializer": serializer, "compressors": compressors, "filters": []}
