"""Which bytes of a remote file one request fetches. Pure: no files, no network."""

from collections.abc import Sequence

#: Ranges with a smaller gap share one request, which costs about as much as reading the gap; and the most it may fetch.
MAX_GAP_BYTES, MAX_SPAN_BYTES = 64 * 1024, 4 * 1024 * 1024


def merged(ranges: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Ranges with gaps of at most `MAX_GAP_BYTES` merged into spans of at most `MAX_SPAN_BYTES`.

    Returns the spans, and for each range the number of its span, its first byte within the span, and its size.
    """
    spans: list[tuple[int, int]] = []
    inside = [(0, 0, 0)] * len(ranges)
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        start, stop = ranges[i]
        if spans and start - spans[-1][1] <= MAX_GAP_BYTES and stop - spans[-1][0] <= MAX_SPAN_BYTES:
            spans[-1] = (spans[-1][0], max(spans[-1][1], stop))
        else:
            spans.append((start, stop))
        inside[i] = (len(spans) - 1, start - spans[-1][0], stop - start)
    return spans, inside
