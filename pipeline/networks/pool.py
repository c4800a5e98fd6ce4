"""Base class of pools: maps of a backbone -> one feature vector per image."""

from collections.abc import Mapping

import torch

from h2t.pipeline.base.params import Section


class Pool:
    """Maps (..., C, H, W) -> features (..., C), or (..., C, M) if the pool gives M numbers per channel.

    A subclass defines `__call__`. It states `commutes`, `linear` and `numbers` where they differ from the defaults,
    which are always safe. Options of its own: a class `Options(Section)` in the same file.
    """

    #: The keys under hosts.<name>.pool_options of a plug-in file without a class `Options`: none.
    Options: type[Section] = Section
    #: True if the pool acts on each channel separately and trains nothing. Pooling before fusion then gives the same
    #: result as pooling after it, so stage II can run on pooled vectors.
    commutes: bool = False
    #: True if the pool is linear in the maps. Feature mixup then commutes with it as well.
    linear: bool = False
    #: M, the numbers per channel.
    numbers: int = 1

    def __init__(self, options: Section, channels: int) -> None:
        self.channels = channels

    def initial(self) -> dict[str, torch.Tensor]:
        """The trained parameters at the start, name -> tensor; none by default."""
        return {}

    def __call__(self, state: Mapping[str, torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., C, H, W) -> features (..., C) or (..., C, M), given the parameters `state`."""
        raise NotImplementedError
