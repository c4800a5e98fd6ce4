"""Saves unfinished training beside the output, so that a killed run resumes from its last saved step."""

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import replace_file
from h2t.pipeline.networks.weights import load_weights, save_weights

SECONDS = 30.0  # between two saves; a shorter run saves nothing


class HasMomentum(Protocol):
    """An optimiser of torch, or anything with its `state`: tensor -> {"momentum_buffer": tensor, ...}."""

    state: Any


class Checkpoint:
    """The saved step of one training run: parameters, momenta and losses.

    Training resumes only if `token` is unchanged. `part` numbers trainings that share one output. `restored` is the
    number of steps that an earlier process did.
    """

    def __init__(self, out: Path, token: str, seconds: float = SECONDS, part: int = 0) -> None:
        self.folder = out.parent / f".{out.name}.training"
        self.path = self.folder / f"state-{part}.safetensors"
        self.token = token
        self.seconds = seconds
        self.restored = 0
        self._saved = time.monotonic()

    @classmethod
    def saved(cls, out: Path) -> dict[int, str]:
        """Token of each part of the output `out` that has a saved step."""
        tokens: dict[int, str] = {}
        for path in cls(out, "").folder.glob("state-*.safetensors"):
            with suppress(UserError, ValueError):
                tokens[int(path.stem.removeprefix("state-"))] = str(load_weights(path)[1]["token"])
        return tokens

    def differences(self) -> list[str]:
        """Why the saved step of another training is not resumed: keys of its token that differ, with both values.

        Empty if nothing is saved, or if the tokens agree. Tokens are JSON objects; one that is not, as earlier versions
        saved, differs by "version".
        """
        try:
            saved = str(load_weights(self.path)[1].get("token"))
        except UserError:
            return []
        if saved == self.token:
            return []
        try:
            before, now = _flat(json.loads(saved)), _flat(json.loads(self.token))
        except (ValueError, AttributeError):
            return ["version"]
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        return [f"{key} {_short(now.get(key))}, was {_short(before.get(key))}" for key in changed]

    def restore(self, state: dict[str, torch.Tensor], optimiser: HasMomentum, losses: torch.Tensor) -> int:
        """Loads the saved step into the arguments; returns the number of steps done, 0 if nothing usable is saved."""
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
        optimiser: HasMomentum,
        losses: torch.Tensor,
    ) -> None:
        """Saves the state after `steps` steps, unless the last save is less than `seconds` ago."""
        if time.monotonic() - self._saved < self.seconds:
            return
        tensors = {"losses": losses, **{f"state/{name}": t for name, t in state.items()}}
        for name, tensor in state.items():
            if (buffer := optimiser.state[tensor].get("momentum_buffer")) is not None:
                tensors[f"momentum/{name}"] = buffer
        partial = self.folder / f"state-{os.getpid()}.partial"  # another process may train the same
        # FileNotFoundError: it has finished and removed the folder; FileExistsError: while mkdir looked at it.
        with suppress(FileNotFoundError, FileExistsError):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_weights(partial, tensors, {"token": self.token, "steps": steps})
            replace_file(partial, self.path)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Deletes the saved steps of all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _flat(token: dict[str, object]) -> dict[str, object]:
    """The keys of a token, those of its objects as KEY.KEY."""
    flat: dict[str, object] = {}
    for key, value in token.items():
        inner = _flat(value) if isinstance(value, dict) else {}
        flat |= {f"{key}.{name}": v for name, v in inner.items()} or {key: value}
    return flat


def _short(value: object) -> str:
    """A value in a message; of a digest the first 12 digits."""
    text = str(value)
    return text if len(text) < 64 else text[:12]
