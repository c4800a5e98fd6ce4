"""Maps in the dtype of a cache, and whether they fit it."""

from collections.abc import Sequence

import torch

from h2t.pipeline.base.errors import UserError

DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def largest(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest absolute value of all `maps`, a scalar; NaN if one is NaN."""
    return torch.stack([torch.stack(torch.aminmax(m)).abs().amax() for m in maps]).amax()


def check(largest: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises UserError if maps whose largest absolute value is `largest`, float32, cannot be stored in `dtype`."""
    if not largest.isfinite():
        raise UserError("extract: maps must be finite; got NaN or infinity; check the backbone's weights")
    if not largest.to(dtype).isfinite():
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"extract.dtype: {name} holds values up to {torch.finfo(dtype).max:g}; "
            f"got {float(largest):.0f}; use bfloat16 or float32"
        )
