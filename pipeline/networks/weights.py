"""Weights in and out of files: our safetensors, and checkpoints that people bring.

A `.safetensors` file of ours carries one metadata key, `h2t`, with a JSON object that says what the weights are.
Pickled checkpoints are read with `weights_only=True`, so that a file cannot run code.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from h2t.pipeline.base.errors import UserError

METADATA = "h2t"

#: How published checkpoints wrap their state dicts: one of these keys, or a pair of backbone and classifier.
WRAPPERS = ("state_dict", "model", "state_dict_best", "state_dict_model")
PAIRS = (("state_dict_model", "state_dict_classifier"), ("feat_model", "classifier"))
#: Names of heads; one layer per expert is `<name>.<expert>`. Where RIDE's are found, a lone `fc` beside them is unused.
HEADS = ("linears", "linear", "fc", "classifier", "head")
NORMS = {"norm_weight": "weight", "norm_bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}


class _About(dict[str, Any]):
    """What a file says of itself; a key that it lacks is a UserError."""

    def __init__(self, path: Path, said: Any) -> None:
        super().__init__(dict(said))
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: not weights written by h2t (it does not say its {key}); make them anew")


def save_weights(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Writes `state` and the JSON object `about`; the same input gives the same bytes."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.write_bytes(save(tensors, {METADATA: text}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and `about` of a file that `save_weights` wrote. Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            about = _About(path, json.loads((file.metadata() or {})[METADATA]))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RuntimeError, RecursionError) as error:
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
    # A damaged file makes torch, its unpickler and zip fail in ways that nobody lists.
    except Exception as error:  # noqa: BLE001
        reason = str(error).splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    return state_dict_in(found, path)


def state_dict_in(found: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what the checkpoint `path` holds, however wrapped. Raises UserError if there is none."""
    state = _flat(found)
    if not state:
        raise UserError(f"{path}: holds no state dict; save model.state_dict()")
    return state


def _flat(found: Any) -> dict[str, torch.Tensor]:
    """One state dict from what a checkpoint wraps; the classifier's keys of a pair get the prefix `classifier.`."""
    if not isinstance(found, dict):
        return {}
    for body, head in PAIRS:
        if isinstance(found.get(body), dict):
            return {**_flat(found[body]), **{f"classifier.{k}": v for k, v in _flat(found.get(head)).items()}}
    for key in WRAPPERS:
        if isinstance(found.get(key), dict):
            return _flat(found[key])
    return {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, torch.Tensor)}


def split_head(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(backbone, head) of a classifier's state dict, in this project's names.

    The head is `weight` (E, K, C), or (E, C, K) where a normalised layer without bias stores it so, `bias` (E, K) if
    there is one, and the batch norms of three branches (3, C). Raises UserError if no head is found.
    """
    plain = {_own_name(k): v for k, v in state.items()}
    name = next((n for n in HEADS if f"{n}.weight" in plain or f"{n}.0.weight" in plain), None)
    if name is None or plain.get(f"{name}.weight", torch.empty(0, 0)).dim() != 2:
        raise UserError(
            "checkpoint: no linear head found (fc, linear, linears, classifier or head); its keys: " + _some(state)
        )
    head = {}
    for part in ("weight", "bias"):
        each = [plain[k] for k in sorted(plain) if re.fullmatch(rf"{name}\.(\d+\.)?{part}", k)]
        if each:
            head[part] = _stacked(each, f"{name}.{part}", 2 if part == "weight" else 1)
    for ours, theirs in NORMS.items():
        if all(f"BN{b}.{theirs}" in plain for b in "HMT"):
            head[ours] = _stacked([plain[f"BN{b}.{theirs}"] for b in "HMT"], f"BN[HMT].{theirs}", 1)
    used = (*(f"{n}." for n in HEADS), "BNH.", "BNM.", "BNT.")
    return {k: v for k, v in plain.items() if not k.startswith(used)}, head


def _stacked(each: list[torch.Tensor], what: str, dims: int) -> torch.Tensor:
    """One tensor of those of all experts or branches, `dims` axes each. Raises UserError for what no weights are."""
    shapes = sorted({tuple(t.shape) for t in each})
    odd = any(t.layout != torch.strided or t.is_complex() or t.is_quantized or t.is_meta for t in each)
    if odd or len(shapes) > 1 or len(shapes[0]) != dims:
        raise UserError(
            f"checkpoint: {what} must be plain numbers with {dims} axes, of one shape in all experts or branches; got "
            f"{', '.join(map(str, shapes[:3]))}"
        )
    found = torch.stack(each).float()
    if not torch.isfinite(found).all():
        raise UserError(f"checkpoint: {what} holds NaN or infinity")
    return found


def _own_name(key: str) -> str:
    """A published key without the attribute that held the part: RIDE has `backbone.`, ResLT `model.`."""
    for prefix in ("backbone.", "model.", "classifier."):
        if key.startswith(prefix) and key.count(".") > 1:
            return key.removeprefix(prefix)
    return key


def fit_head(head: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """`head` of a checkpoint in the shapes of the objective's state `own`. Raises UserError if it does not fit."""
    found = dict(head)
    wanted = own["weight"].shape
    transposed = "bias" not in found and found["weight"].mT.shape == wanted  # a normalised layer keeps (C, K)
    if transposed and ("bias" not in own or found["weight"].shape != wanted):
        found["weight"] = found["weight"].mT.contiguous()
    if "bias" in own and "bias" not in found:
        found["bias"] = torch.zeros_like(own["bias"])
    for name, tensor in own.items():
        if name not in found or found[name].shape != tensor.shape:
            got = tuple(found[name].shape) if name in found else "none"
            raise UserError(f"{where}: the head's {name} must have shape {tuple(tensor.shape)}; got {got}")
    if "bias" in found and "bias" not in own:
        raise UserError(f"{where}: has a linear head with a bias; the objective's cosine classifier has none")
    return {name: found[name] for name in own}


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
