"""Forward passes on a GPU: one launch a pass, while images and maps are copied beside it.

The thread that launches shares Python's interpreter with those that decode images and write shards, and may wait for
it at each of a network's hundreds of kernels. So a pass, from pixels to maps in the stored dtype, is captured once as a
CUDA graph, for which weights are converted to bfloat16 once and not in each pass. The results are the same bits; the
first batch is computed both ways and compared. A network that waits for the GPU, or draws random numbers, is launched
kernel by kernel.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from h2t.pipeline.base.precision import Network, Precision, converted_weights, guarded_maps
from h2t.pipeline.data.views import Transform, normalised
from h2t.pipeline.extraction import stored_maps

#: Passes that may be under way while the maps of the one before are handled.
IN_FLIGHT = 2

#: Some rows of a pass, and one tensor (rows, C, H, W) per expert for their maps.
Place = tuple[slice, list[torch.Tensor]]


def memory_format(precision: Precision) -> torch.memory_format:
    """The layout of a pass's images: convolutions in half precision are faster with the channels last."""
    return torch.contiguous_format if precision == "float32" else torch.channels_last


@dataclass(frozen=True)
class GpuPass:
    """A pass that was launched: it lies between the events `started` and `ended`, and its copies end with `copied`."""

    largest: torch.Tensor
    started: torch.cuda.Event
    ended: torch.cuda.Event
    copied: torch.cuda.Event

    def wait(self) -> float:
        """Waits until maps and `largest` have arrived. The pass's own seconds on the GPU."""
        self.copied.synchronize()
        return float(self.started.elapsed_time(self.ended)) / 1000


def stored_pass(
    backbone: Network, transform: Transform, precision: Precision, dtype: torch.dtype, pixels: torch.Tensor
) -> list[torch.Tensor]:
    """One map (B, C, H, W) per expert in `dtype`, and their largest absolute value, of `pixels`, uint8 (B, S, S, 3)."""
    x = normalised(pixels, transform, memory_format(precision))
    maps = guarded_maps(backbone, x, precision)
    kept = [m.to(dtype, memory_format=torch.contiguous_format) for m in maps]
    return [*kept, stored_maps.largest(maps)]


class GpuPasses:
    """Launches forward passes of `backbone` over batches of one shape, and stores their maps in `dtype`."""

    def __init__(
        self, backbone: nn.Module, device: torch.device, transform: Transform, precision: Precision, dtype: torch.dtype
    ) -> None:
        self.device = device
        self._backbone, self._settings = backbone, (transform, precision, dtype)
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._run: Callable[[torch.Tensor], list[torch.Tensor]] | None = None
        self._weights: dict[str, torch.Tensor] = {}  # which the captured pass reads

    def _compute(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return stored_pass(self._backbone, *self._settings, pixels)

    @torch.no_grad()
    def launch(self, pixels: torch.Tensor, wanted: slice | torch.Tensor, places: Sequence[Place]) -> GpuPass:
        """Starts a pass over `pixels`, uint8 (B, S, S, 3). The maps of its images `wanted` go to `places`.

        Both lie in pinned memory. The batch-norm statistics are those that the backbone holds now. To be called by one
        thread at a time.
        """
        with torch.cuda.device(self.device):
            return self._launch(pixels, wanted, places)

    def _launch(self, pixels: torch.Tensor, wanted: slice | torch.Tensor, places: Sequence[Place]) -> GpuPass:
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._inward):
            x = pixels.to(self.device, non_blocking=True)
        current.wait_stream(self._inward)
        x.record_stream(current)
        if self._run is None:
            self._run = self._captured(x)
        started = self._event(current)
        *maps, largest = self._run(x)
        ended = self._event(current)
        self._outward.wait_stream(current)
        with torch.cuda.stream(self._outward):
            for rows, room in places:
                for into, one in zip(room, maps, strict=True):
                    into.copy_(one[wanted][rows], non_blocking=True)
            arrived = torch.empty((), pin_memory=True).copy_(largest, non_blocking=True)
        for tensor in (*maps, largest, wanted):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(self._outward)
        return GpuPass(arrived, started, ended, self._event(self._outward))

    @property
    def captured(self) -> bool:
        """Whether a pass is one launch."""
        return self._run not in (None, self._compute)

    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _captured(self, pixels: torch.Tensor) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """`stored_pass` as a CUDA graph, or itself if it cannot be one, or gives other bits as one, on `pixels`."""
        drawn = torch.cuda.get_rng_state(self.device)
        try:
            with _waits_are_errors():
                expected = self._compute(pixels)
        except RuntimeError:
            return self._compute
        if not torch.equal(drawn, torch.cuda.get_rng_state(self.device)):
            return self._compute
        for precision in ("bf16", "float32") if self._settings[1] == "bf16" else ("float32",):
            try:
                self._weights = converted_weights(self._backbone, precision)
            except torch.OutOfMemoryError:
                continue
            replayed = self._graph(pixels)
            if replayed is not None and all(torch.equal(a, b) for a, b in zip(replayed(pixels), expected, strict=True)):
                return replayed
        return self._compute

    def _graph(self, pixels: torch.Tensor) -> Callable[[torch.Tensor], list[torch.Tensor]] | None:
        """A CUDA graph of the pass, with `_weights` in place of the backbone's; None if it cannot be captured."""

        def backbone(x: torch.Tensor) -> Any:
            return functional_call(self._backbone, self._weights, (x,)) if self._weights else self._backbone(x)

        held, graph = pixels.clone(), torch.cuda.CUDAGraph()
        current, aside = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        try:
            # A capture that fails leaves `aside` as the current stream. Other threads pin memory meanwhile.
            with torch.cuda.stream(current), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                found = stored_pass(backbone, *self._settings, held)
        except (RuntimeError, ValueError):  # ValueError: `functional_call` refuses the weights
            return None

        def replayed(x: torch.Tensor) -> list[torch.Tensor]:
            held.copy_(x)
            graph.replay()
            return [tensor.clone() for tensor in found]  # the next pass overwrites them before they are copied

        for tensor in found:
            tensor.zero_()  # so that a graph that computes nothing is found out
        return replayed


@contextmanager
def _waits_are_errors() -> Iterator[None]:
    """In it, operations that wait for the GPU raise RuntimeError, most of them at least."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
