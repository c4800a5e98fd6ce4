"""Reads and writes weights: h2t's own safetensors files, and checkpoints from elsewhere.

h2t's files have one metadata key, `h2t`: a JSON object that describes the weights. Pickled checkpoints are loaded with
`weights_only=True`, so they cannot run code.
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

from h2t.pipeline.base.errors import UserError, first_line
from h2t.pipeline.base.text import counted, some

METADATA = "h2t"
NAMED = 4  # keys that a message names

#: Keys under which published checkpoints hold their state dict, or two of them: (backbone, classifier).
WRAPPERS = ("state_dict", "model", "state_dict_best", "state_dict_model")
PAIRS = (("state_dict_model", "state_dict_classifier"), ("feat_model", "classifier"))
#: Names of the classifier's layer; `<name>.<expert>` with several experts. RIDE's `linears` come first, as its
#: checkpoints also hold an unused `fc`.
HEADS = ("linears", "linear", "fc", "classifier", "head")
NORMS = {"norm_weight": "weight", "norm_bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}


class _About(dict[str, Any]):
    """The description in a weights file. A missing key raises UserError."""

    def __init__(self, path: Path, description: Any) -> None:
        super().__init__(dict(description))
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._path}: not weights written by h2t (no {key!r} in its metadata); make them again")


def save_weights(path: Path, state: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Writes the tensors `state` and the JSON object `about`, which describes them. Equal input gives equal bytes."""
    tensors: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for name, t in state.items():
        tensor = t.detach().cpu().contiguous()
        where = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if where in memory else tensor  # some networks give one tensor two names
        memory.add(where)
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.write_bytes(save(tensors, {METADATA: text}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`state` and `about` of a file that `save_weights` wrote. Raises UserError if it is missing or malformed."""
    try:
        with safe_open(path, "pt") as file:
            about = _About(path, json.loads((file.metadata() or {})[METADATA]))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the stage that makes it (dvc repro)") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path}: not weights written by h2t ({error}); make them again") from None


def weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256, in hex, over the names, dtypes, shapes and bytes of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file from elsewhere: safetensors, or a pickled checkpoint (see `state_dict_in`).

    Raises UserError if the file is missing, malformed, or cannot be loaded without running code.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint file; name one that exists") from None
    except pickle.UnpicklingError:
        if not _begins_as_checkpoint(path):
            raise UserError(f"{path}: not a readable checkpoint (a file of another kind); name the weights") from None
        raise UserError(
            f"{path}: refused, it holds more than tensors, and loading it could run code; save model.state_dict()"
        ) from None
    # On a damaged file torch, its unpickler and zipfile raise exceptions that none of them documents.
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)}); save or download it again") from None
    return state_dict_in(content, path)


def _begins_as_checkpoint(path: Path) -> bool:
    """Whether the file begins as a zip file or a pickle does; others are texts, web pages, files of other programs."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def state_dict_in(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in the unpickled `content` of `path`, at the top level or under one of `WRAPPERS` or `PAIRS`.

    Raises UserError if there is none.
    """
    state = _flat(content)
    if not state:
        raise UserError(f"{path}: holds no state dict; save model.state_dict()")
    return state


def _flat(content: Any) -> dict[str, torch.Tensor]:
    """One state dict from the content of a checkpoint; the keys of a pair's classifier get the prefix `classifier.`."""
    if not isinstance(content, dict):
        return {}
    for body, head in PAIRS:
        if isinstance(content.get(body), dict):
            return {**_flat(content[body]), **{f"classifier.{k}": v for k, v in _flat(content.get(head)).items()}}
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return _flat(content[key])
    return {str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, torch.Tensor)}


def split_head(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Splits the state dict of a whole network into (backbone, classifier), with h2t's names.

    The classifier has `weight` (E, K, C), or (E, C, K) if a normalised layer stores it so; `bias` (E, K) if there is
    one; and ResLT's batch norms (3, C) if there are any. Raises UserError if the classifier is missing or malformed.
    """
    plain = {_own_name(k): v for k, v in state.items()}
    name = next((n for n in HEADS if f"{n}.weight" in plain or f"{n}.0.weight" in plain), None)
    if name is None or plain.get(f"{name}.weight", torch.empty(0, 0)).dim() != 2:
        raise UserError(
            "checkpoint: must hold a linear classifier named fc, linear, linears, classifier or head; "
            f"got {some(sorted(state), NAMED)}; rename its keys"
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


def without_head(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a whole network without its classifier, whatever that is; `own` is the network's without it."""
    plain = {_own_name(k): v for k, v in state.items()}
    return {k: v for k, v in plain.items() if k in own or not k.startswith(tuple(f"{name}." for name in HEADS))}


def _stacked(each: list[torch.Tensor], what: str, dims: int) -> torch.Tensor:
    """Stacks the tensors of all experts or branches, each with `dims` axes, as float32 (E, ...).

    Raises UserError unless they are dense, real and finite, and have one shape.
    """
    shapes = sorted({tuple(t.shape) for t in each})
    odd = any(t.layout != torch.strided or t.is_complex() or t.is_quantized or t.is_meta for t in each)
    if odd or len(shapes) > 1 or len(shapes[0]) != dims:
        raise UserError(
            f"checkpoint: {what} must be dense real tensors with {counted(dims, 'axis', 'axes')}, of the same shape in "
            f"every expert or branch; got {'another kind of tensor, ' if odd else ''}"
            f"shape {', '.join(map(str, shapes[:3]))}; save it as plain float tensors"
        )
    stacked = torch.stack(each).float()
    if not torch.isfinite(stacked).all():
        raise UserError(f"checkpoint: {what} holds NaN or infinity; use another checkpoint")
    return stacked


def _own_name(key: str) -> str:
    """A published key without its prefix: RIDE's keys start with `backbone.`, ResLT's with `model.`."""
    for prefix in ("backbone.", "model.", "classifier."):
        if key.startswith(prefix) and key.count(".") > 1:
            return key.removeprefix(prefix)
    return key


def fit_head(head: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """The classifier `head` of a checkpoint, transposed or with a bias of 0 added to match the objective's state `own`.

    Raises UserError, which names the key `where`, if it does not fit.
    """
    fitted = dict(head)
    wanted = own["weight"].shape
    transposed = "bias" not in fitted and fitted["weight"].mT.shape == wanted  # a normalised layer stores (C, K)
    if transposed and ("bias" not in own or fitted["weight"].shape != wanted):
        fitted["weight"] = fitted["weight"].mT.contiguous()
    if "bias" in own and "bias" not in fitted:
        fitted["bias"] = torch.zeros_like(own["bias"])
    for name, tensor in own.items():
        if name not in fitted or fitted[name].shape != tensor.shape:
            got = tuple(fitted[name].shape) if name in fitted else "none"
            raise UserError(
                f"{where}: the classifier's {name} must have shape {tuple(tensor.shape)}; got {got}; "
                "check objective, experts and dataset"
            )
    if "bias" in fitted and "bias" not in own:
        raise UserError(
            f"{where}: the objective's cosine classifier takes no bias; got a linear classifier with one; choose an "
            "objective with a linear classifier, such as ce"
        )
    return {name: fitted[name] for name in own}


def fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], what: str, other: str = "") -> None:
    """Loads `state` into `model`. Raises UserError, naming `what` and the first key that does not fit.

    `other` is asked beside whether it is another architecture (`pretrained.other_version`).
    """
    asked = f"is it another architecture{other}?"
    own = model.state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            raise UserError(f"{what}: must hold weights for {name!r}; got {some(sorted(state), NAMED)}; {asked}")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{what}: {name} must have shape {tuple(tensor.shape)}; got {tuple(state[name].shape)}; {asked}"
            )
        if state[name].isfinite().all():
            continue
        bounds = not tensor.isfinite().all()  # which may be infinite
        if state[name].isnan().any() or not bounds:
            raise UserError(f"{what}: {name} holds NaN or infinity; use other weights")
    unknown = sorted(set(state) - set(own))
    if unknown:
        raise UserError(f"{what}: {counted(len(unknown), 'key')} not in the network: {some(unknown, NAMED)}; {asked}")
    model.load_state_dict(state, strict=False)
