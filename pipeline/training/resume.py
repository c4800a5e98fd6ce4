"""Unfinished training, kept beside the output so that a killed run goes on from its last saved step."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import replace_file
from h2t.pipeline.networks.weights import load_weights, save_weights

SECONDS = 30.0  # between saves; a run shorter than this saves nothing


class Checkpoint:
    """The saved step of one training run: parameters, momenta and losses, valid for one `token` only."""

    def __init__(self, out: Path, token: str, seconds: float = SECONDS, part: int = 0) -> None:
        self.folder = out.parent / f".{out.name}.training"
        self.path = self.folder / f"state-{part}.safetensors"
        self.token = token
        self.seconds = seconds
        self.restored = 0  # steps that an earlier process did
        self._saved = time.monotonic()

    @classmethod
    def saved(cls, out: Path) -> dict[int, str]:
        """The tokens of the parts with a saved step: part -> token."""
        found: dict[int, str] = {}
        for path in cls(out, "").folder.glob("state-*.safetensors"):
            with suppress(UserError, ValueError):
                found[int(path.stem.removeprefix("state-"))] = str(load_weights(path)[1]["token"])
        return found

    def restore(self, state: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, losses: torch.Tensor) -> int:
        """Fills the arguments from the saved step and returns how many steps are done; 0 if there is nothing to use."""
        try:
            saved, about = load_weights(self.path)
        except UserError:
            return 0
        if about.get("token") != self.token:
            return 0
        with torch.no_grad():
            losses.copy_(saved["losses"])
            for name, tensor in state.items():
                tensor.copy_(saved[f"state/{name}"])
                if f"momentum/{name}" in saved:
                    buffer = saved[f"momentum/{name}"].to(tensor.device)
                    optimiser.state[tensor]["momentum_buffer"] = buffer
        self.restored = int(about["steps"])
        return self.restored

    def offer(
        self,
        steps: int,
        state: dict[str, torch.Tensor],
        optimiser: torch.optim.Optimizer,
        losses: torch.Tensor,
    ) -> None:
        """Saves, unless the last save is recent."""
        if time.monotonic() - self._saved < self.seconds:
            return
        tensors = {"losses": losses, **{f"state/{name}": t for name, t in state.items()}}
        for name, tensor in state.items():
            if (buffer := optimiser.state[tensor].get("momentum_buffer")) is not None:
                tensors[f"momentum/{name}"] = buffer
        partial = self.folder / f"state-{os.getpid()}.partial"  # two runs may train the same
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the other run has just ended, and forgotten its steps with ours
            save_weights(partial, tensors, {"token": self.token, "steps": steps})
            replace_file(partial, self.path)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Forgets the saved step."""
        shutil.rmtree(self.folder, ignore_errors=True)
