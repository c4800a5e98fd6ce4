"""Weights in and out of files: our safetensors, and checkpoints that people bring.

A `.safetensors` file of ours carries one metadata key, `h2t`, with a JSON object that says what the weights are.
Pickled checkpoints are read with `weights_only=True`, so that a file cannot run code.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from pipeline.errors import UserError

METADATA = "h2t"


def save_weights(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Writes `state` and the JSON object `about`; the same input gives the same bytes."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.write_bytes(save(tensors, {METADATA: text}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and `about` of a file that `save_weights` wrote. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path}: not weights written by h2t ({error}); make them anew") from None


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file that people bring: safetensors, or a pickled checkpoint with or without wrapping.

    Raises UserError for a file that is missing, malformed, or needs code to be run.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint file") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: refused, it holds more than tensors and loading it could run code; save a plain state dict"
        ) from None
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    for key in ("state_dict", "model", "state_dict_model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{path}: holds no state dict; save model.state_dict()")
    return {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, torch.Tensor)}


def split_head(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(backbone, linear head) of a plain classifier's state dict; the head as weight (1, K, C) and bias (1, K)."""
    for name in ("fc", "linear", "classifier", "head"):
        if f"{name}.weight" in state and state[f"{name}.weight"].dim() == 2:
            weight = state[f"{name}.weight"].float()
            bias = state.get(f"{name}.bias", torch.zeros(len(weight))).float()
            backbone = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
            return backbone, {"weight": weight[None], "bias": bias[None]}
    raise UserError("checkpoint: no linear head found (fc, linear, classifier or head); its keys: " + _some(state))


def fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str) -> None:
    """Loads `state` into `model`. Raises UserError naming the first key or shape that does not fit."""
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            raise UserError(f"{what}: no weights for {name!r}; it has {_some(state)}")
        if state[name].shape != tensor.shape:
            raise UserError(f"{what}: {name} must have shape {tuple(tensor.shape)}; got {tuple(state[name].shape)}")
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{what}: {name} holds NaN or infinity")
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise UserError(
            f"{what}: {len(unknown)} keys fit nowhere: {', '.join(unknown[:3])}; is it another architecture?"
        )
    model.load_state_dict(state, strict=False)


def _some(state: Mapping[str, torch.Tensor]) -> str:
    names = sorted(state)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
