"""The training loop of stage I: epochs of SGD on augmented batches, in one process or several, resumable by epoch.

Each batch is split into `accumulate` parts. Every part is normalised by its own batch-norm statistics; gradients are
summed and running statistics averaged over the parts. The result therefore does not depend on the number of processes:
W processes compute accumulate / W parts each, and only the order of float additions differs from one process.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import computing
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import class_index
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.resident_images import ResidentImages, resident
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.networks.backbone import Backbone, frozen_part
from h2t.pipeline.networks.classifier import global_average, logits
from h2t.pipeline.training.batches import Batches, Part, rectangle
from h2t.pipeline.training.captured import captured
from h2t.pipeline.training.objective import Objective
from h2t.pipeline.training.parallel import Group
from h2t.pipeline.training.resume import Checkpoint
from h2t.pipeline.training.settings import Training, learning_rate

Curves = list[dict[str, float]]


class StageOne:
    """One training run: the networks, on the device of `group`, their optimiser and the curves of finished epochs."""

    def __init__(
        self,
        params: Training,
        backbone: Backbone,
        objective: Objective,
        samples: Samples,
        images: Images,
        seed: int,
        group: Group,
    ) -> None:
        self.params, self.seed, self.group = params, seed, group
        self.backbone, self.objective = backbone.to(group.device), objective.to(group.device)
        if params.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if params.frozen:
            self.backbone.requires_grad_(False)
        self._forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
        self._two_batches = objective.first_branch_share(0.0) is not None
        forward = self._each_alone if self._two_batches else self.backbone
        self._forward = torch.compile(forward) if params.compile else forward
        self._labels = torch.from_numpy(samples.labels)
        self._train = samples.of("train")  # sorted by class
        classes = class_index(samples.labels[self._train], samples.facts["classes"])
        self.batches = Batches(params, self._train, classes, objective.first_branch_share, seed)
        self._images: Images | ResidentImages = images.turned(params.rotation) if params.rotation else images
        networks = (("backbone", self.backbone), ("objective", self.objective))
        self._state = {f"{n}.{k}": t for n, m in networks for k, t in m.state_dict(keep_vars=True).items()}
        self._buffers = [b for _, m in networks for b in m.buffers()]
        self._trained = [p for _, m in networks for p in m.parameters() if p.requires_grad]
        self._optimiser = torch.optim.SGD(
            self._trained,
            lr=params.lr,
            momentum=params.momentum,
            weight_decay=params.weight_decay,
            nesterov=params.nesterov,
        )
        self._scaler = torch.amp.GradScaler(group.device.type, enabled=params.precision == "fp16")
        self._scale = torch.tensor([65536.0, 0.0])  # the gradient scaler's scale and its steps since the last change
        self._curves = torch.zeros(params.epochs, 3, dtype=torch.float64)

    def run(self, name: str, save: Checkpoint, say: Say) -> Curves:
        """Trains the epochs that `save` has not finished; returns `lr`, `loss` and `accuracy` (%) of every epoch.

        Raises UserError if the loss is not finite, or if there are too few images for one batch.
        """
        if len(self._train) < (self.params.batch_size if self.params.drop_last else 2):
            raise UserError(
                f"backbones.{name}.batch_size: an epoch must have at least one batch; got "
                f"{counted(len(self._train), 'training image')} for batches of {self.params.batch_size}; "
                "prepare more images, or lower batch_size"
            )
        state = {**self._state, "scaler": self._scale}
        if anew := save.differences():
            say(f"{name}: starts anew, as the saved training differs: {'; '.join(anew)}")
        done = save.restore(state, self._optimiser, self._curves)
        self._load_scale()
        if done:
            say(f"{name}: resumes after epoch {done} of {self.params.epochs}")
        if isinstance(self._images, Images) and self.group.device.type == "cuda":
            room = torch.cuda.mem_get_info(self.group.device)[0] // 4
            self._images = resident(self._images, self._train.tolist(), self.group.device, room)
            if isinstance(self._images, ResidentImages) and self._may_capture():
                self._forward = captured(self.backbone.train(), self._some_images())
        bar = progress(
            range(done, self.params.epochs),
            f"train_backbone {name}",
            unit="epoch",
            total=self.params.epochs,
            initial=done,
            disable=self.group.rank > 0,
        )
        for epoch in bar:
            self._curves[epoch] = self._epoch(epoch)
            loss = float(self._curves[epoch, 1])
            if not math.isfinite(loss):
                raise UserError(
                    f"backbones.{name}: training diverged, the loss must be finite; got {loss} in epoch {epoch}; "
                    f"lower backbones.{name}.lr"
                )
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._keep_scale()
            if self.group.rank == 0:
                save.offer(epoch + 1, state, self._optimiser, self._curves)
        return [dict(zip(("lr", "loss", "accuracy"), line, strict=True)) for line in self._curves.tolist()]

    def _may_capture(self) -> bool:
        """Whether a step is one plain float32 pass, as `captured` needs it."""
        params = self.params
        one = params.accumulate == 1 and self.group.size == 1 and not self._two_batches
        plain = params.precision == "float32" and not params.compile and not params.channels_last
        return one and plain and not params.frozen and len(self._train) >= params.batch_size

    def _some_images(self) -> torch.Tensor:
        """A batch of the usual size, (batch_size, 3, H, W)."""
        some = self._train[: self.params.batch_size].tolist()
        return self._images.batch(some, [(self.seed, "stage1", 0)] * len(some))

    def _epoch(self, epoch: int) -> torch.Tensor:
        """Trains one epoch; (learning rate, mean loss, training accuracy in percent), float64 (3,)."""
        rate = learning_rate(self.params, epoch)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self.backbone.train(not self.params.frozen)
        totals = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        seen = 0
        with torch.random.fork_rng():
            for parts, inputs in self._decoded(epoch):
                totals += self._step(parts, inputs, epoch)
                seen += sum(len(part.samples) for part in parts)
        self.group.add_up([totals])
        loss, correct = (totals / seen).tolist()
        return torch.tensor([rate, loss, 100 * correct], dtype=torch.float64)

    def _decoded(self, epoch: int) -> Iterator[tuple[list[Part], list[torch.Tensor]]]:
        """(parts of a batch, images of this process's parts); the next batch is decoded in the background."""
        key = (self.seed, "stage1", epoch)

        def images(part: Part) -> torch.Tensor:
            samples = part.samples.tolist()
            keys: list[tuple[int | str, ...]] = [key] * len(samples)
            if part.second:  # an image that is drawn in several steps has another view in each
                more = part.second.samples.tolist()
                samples, keys = samples + more, [*keys, *[(*key, *part.second.view)] * len(more)]
            return self._images.batch(samples, keys)

        def decode(parts: list[Part]) -> list[torch.Tensor]:
            return [images(part) for part in parts[self.group.rank :: self.group.size]]

        with ThreadPoolExecutor(1, "decode-ahead") as decoder:
            current = None
            for parts in self.batches.of(epoch):
                following = (parts, decoder.submit(decode, parts))
                if current is not None:
                    yield current[0], current[1].result()
                current = following
            if current is not None:
                yield current[0], current[1].result()

    def _step(self, parts: list[Part], inputs: list[torch.Tensor], epoch: int) -> torch.Tensor:
        """One optimiser step; (summed loss, number of correct predictions) of this process's samples, float64 (2,)."""
        self._optimiser.zero_grad()
        several = len(parts) > 1
        before = [b.clone() for b in self._buffers] if several else []
        sums = [torch.zeros_like(b, dtype=torch.float64) for b in before]
        totals = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        for part, x in zip(parts[self.group.rank :: self.group.size], inputs, strict=True):
            for buffer, value in zip(self._buffers, before, strict=False):
                buffer.copy_(value)
            torch.manual_seed(part.seed)
            loss, correct = self._loss(part, x, epoch)
            self._scaler.scale(loss * part.weight).backward()
            totals += torch.stack([loss.detach() * len(part.samples), correct]).double()
            for total, buffer in zip(sums, self._buffers, strict=False):
                total += buffer
        if self.group.size > 1:
            for parameter in self._trained:
                if parameter.grad is None:  # this process had no part of the batch
                    parameter.grad = torch.zeros_like(parameter)
            self.group.add_up([p.grad for p in self._trained if p.grad is not None])
        if several:
            self.group.add_up(sums)
            for buffer, total in zip(self._buffers, sums, strict=True):
                buffer.copy_(total / len(parts))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return totals

    def _each_alone(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (2 B, 3, H, W) -> a map (B, C, H', W') of each branch: of the first from the first half of `x`."""
        return tuple(self.backbone.alone(own, expert) for expert, own in enumerate(x.chunk(2)))

    def _loss(self, part: Part, x: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, number of correct predictions) of a part, from its images `x` (B, 3, H, W) or (2 B, 3, H, W).

        Mixup (Zhang et al., ICLR 2018): one share per batch, one permutation per part. CMO (Park et al., CVPR 2022, and
        the authors' code): a rectangle of the second half of `x` replaces that of the first half, one rectangle per
        batch; labels are mixed by its area. Two branches (Zhou et al., CVPR 2020, and the authors' code): each half
        runs through its branch, each map is weighted by twice its branch's share; loss and correct predictions are
        mixed by the shares.
        """
        params, device = self.params, self.group.device
        x, y = x.to(device), self._labels[part.samples].to(device)
        partner, share = torch.from_numpy(part.partner).to(device), part.share
        others = y[partner] if params.mixup else None
        if params.mixup:
            x = share * x + (1 - share) * x[partner]
        if part.second:
            others = self._labels[part.second.samples].to(device)
        if part.second and part.second.rectangle:
            x, second = x.split(len(y))
            rows, columns = rectangle(*part.second.rectangle, *x.shape[-2:])
            x[..., rows, columns] = second[..., rows, columns]
            share = 1 - second[0, 0, rows, columns].numel() / second[0, 0].numel()
        if params.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with computing(device, params.precision):
            maps = self._forward(x)
        maps = tuple(m.to(torch.promote_types(m.dtype, torch.float32)) for m in maps)
        if part_after := frozen_part(self.backbone):  # what it gives is a map of 1 x 1
            maps = tuple(part_after(global_average(m))[..., None, None] for m in maps)
        if self._two_batches:
            maps = tuple(2 * weight * m for weight, m in zip((share, 1 - share), maps, strict=True))
        loss = self.objective.loss(maps, y, epoch, others, share)
        with torch.no_grad():
            features = torch.stack([global_average(m) for m in maps])
            state = self.objective.state_dict()
            predicted = logits(self.objective.classifier, state, features, self.objective.scale).argmax(1)
            correct = (predicted == y).double().sum()
            if self._two_batches and others is not None:
                correct = share * correct + (1 - share) * (predicted == others).double().sum()
        return loss, correct

    def _load_scale(self) -> None:
        if self._scaler.is_enabled():
            scale, steps = self._scale.tolist()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(steps)})

    def _keep_scale(self) -> None:
        if self._scaler.is_enabled():
            state = self._scaler.state_dict()
            self._scale.copy_(torch.tensor([state["scale"], state["_growth_tracker"]]))
