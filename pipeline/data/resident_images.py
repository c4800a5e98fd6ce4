"""Images that stay on a GPU: decoded once, and cropped and mirrored there.

Small images, such as CIFAR's, train faster than a processor can prepare their batches. The draws of a view and its
pixels are those of `Images`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from h2t.pipeline.base.many_streams import ManyStreams
from h2t.pipeline.base.seeds import word
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.views import crop_and_flip, normalised, padded


class ResidentImages:
    """Augmented views of images on a GPU, made by `resident`.

    `pixels`: the padded images, uint8 (N, H, W, 3) on the device; `rows`: sample number -> its row there.
    """

    def __init__(self, images: Images, rows: dict[int, int], pixels: torch.Tensor) -> None:
        self._images, self._rows, self._pixels = images, rows, pixels
        self._sources = np.array([word(images.sources[s]) for s in rows], np.uint32)
        self._across = torch.arange(images.transform.size, device=pixels.device)
        #: Key of a view -> (top, left, flipped) of the crop of every row, int64 (3, N) on the device. Kept for the next
        #: batch, as all batches of an epoch ask for the same view.
        self._crops: dict[tuple[int | str, ...], torch.Tensor] = {}

    def batch(self, samples: Sequence[int], keys: Sequence[Sequence[int | str]]) -> torch.Tensor:
        """Normalised float32 (B, 3, size, size) on the device: the augmented view `(seed, view)` of each sample."""
        views = [tuple(key) for key in keys]
        rows = torch.tensor([self._rows[s] for s in samples], device=self._pixels.device)
        if len(set(views)) == 1:
            self._crops = {views[0]: self._crops[views[0]] if views[0] in self._crops else self._drawn(views[0])}
            top, left, flipped = self._crops[views[0]][:, rows]
        else:  # a view for every sample: only these are drawn, not those of all rows
            shape, transform = self._pixels.shape[1:], self._images.transform
            crops = [
                crop_and_flip(shape, transform, self._images.draws(s, v)) for s, v in zip(samples, views, strict=True)
            ]
            top, left, flipped = torch.tensor(crops, device=self._pixels.device).T
        across = torch.where(flipped[:, None] == 1, self._across.flip(0), self._across)
        y, x = (top[:, None] + self._across)[:, :, None], (left[:, None] + across)[:, None, :]
        return normalised(self._pixels[rows[:, None, None], y, x], self._images.transform)

    def _drawn(self, view: tuple[int | str, ...]) -> torch.Tensor:
        shape, transform = self._pixels.shape[1:], self._images.transform
        seed, *rest = view
        draws = ManyStreams(int(seed), "view", self._sources, *rest)
        crops = np.stack(np.broadcast_arrays(*crop_and_flip(shape, transform, draws))).astype(np.int64)
        samples = list(self._rows)
        for row in np.flatnonzero(draws.repeats):
            crops[:, row] = crop_and_flip(shape, transform, self._images.draws(samples[row], view))
        return torch.from_numpy(crops).to(self._pixels.device)


def resident(images: Images, samples: Sequence[int], device: torch.device, room: int) -> Images | ResidentImages:
    """`samples` of `images` kept on `device`, or `images` as they are.

    They are kept if augmented views are only crops and flips, all images have one size, and take at most `room` bytes.
    """
    if not images.only_crops:
        return images
    shape = padded(images.array(samples[0]), images.transform).shape
    if len(samples) * math.prod(shape) > room:
        return images
    pixels = torch.empty(len(samples), *shape, dtype=torch.uint8)
    for row, sample in enumerate(samples):
        image = padded(images.array(sample), images.transform)
        if image.shape != shape:
            return images
        pixels[row] = torch.from_numpy(image)
    return ResidentImages(images, {s: row for row, s in enumerate(samples)}, pixels.to(device))
