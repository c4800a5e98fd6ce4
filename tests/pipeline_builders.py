"""Small inputs for tests of the pipeline: class-sorted samples, caches of random maps, stage-I outputs, real digits.

Every builder has a complete default, so that a test states only what matters to it.
"""

import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from builders import make_maps, make_spec, write_cache
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from h2t.cache.format.rows import make_rows
from h2t.cache.reader import open_cache
from h2t.cache.write.parts import Part
from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.data.classes import ClassIndex
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader, FeatureTable
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed, Residency
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.stack import Stack
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.networks.weights import save_weights, weights_digest
from h2t.pipeline.stages import evaluate, extract, pool, prepare, train_classifier

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@contextmanager
def one_line(says: str = "", **how) -> Iterator[None]:
    """`pytest.raises(UserError, **how)`, whose text is one line with `says` in it."""
    with pytest.raises(UserError, **how) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert says in str(caught.value)


def make_index(counts=(5, 3, 1)) -> ClassIndex:
    counts = np.array(counts, np.int64)
    return ClassIndex(np.cumsum(counts) - counts, counts)


def make_stage2_rows(**overrides) -> pa.Table:
    """The row table of a cache for stage II; `views`, and `val` and `test` samples, per class or one number."""
    given = {
        "counts": (9, 5, 2),
        "views": 1,
        "train": ("balanced", "instance"),
        "evaluation": ("balanced", "mixture", "stage1"),
        "val": 2,
        "test": 3,
    }
    given = SimpleNamespace(**{**given, **overrides})
    columns: dict[str, list] = {k: [] for k in ("sample", "view", "statistics", "split", "label", "source", "digest")}
    sample = 0
    for split, sizes in (
        ("test", np.broadcast_to(given.test, len(given.counts)).tolist()),
        ("train", given.counts),
        ("val", np.broadcast_to(given.val, len(given.counts)).tolist()),
    ):
        for label, size in enumerate(sizes):
            views = given.views if isinstance(given.views, int) else given.views[label]
            for _ in range(size):
                for statistics in given.train if split == "train" else given.evaluation:
                    for view in range(views if split == "train" else 1):
                        source = f"{sample:06}.png"
                        digest = hashlib.sha256(source.encode()).hexdigest()
                        line = (sample, view, statistics, split, label, source, digest)
                        for key, value in zip(columns, line, strict=True):
                            columns[key].append(value)
                sample += 1
    return make_rows(columns)


def make_stage2_cache(target: Path, **overrides) -> Path:
    """A cache of random maps, ready for stage II. Takes the keys of `make_stage2_rows`, of `make_spec`, and:

    `shape` (C, H, W), `experts`, `classes` (names), `backbone` (its digest), `seed` of the maps, `change`(maps, rows).
    """
    rows_keys = {"counts", "views", "train", "evaluation", "val", "test"}
    rows = make_stage2_rows(**{k: overrides.pop(k) for k in rows_keys & set(overrides)})
    train = rows.filter(pa.compute.field("split") == "train")
    _, first = np.unique(train["sample"].to_numpy(), return_index=True)
    counts = np.bincount(train["label"].to_numpy()[first])
    shape, experts = overrides.pop("shape", (6, 2, 2)), overrides.pop("experts", 1)
    names = overrides.pop("classes", [f"class {j}" for j in range(len(counts))])
    backbone, seed = overrides.pop("backbone", "b" * 64), overrides.pop("seed", 0)
    change = overrides.pop("change", None)
    spec = make_spec(
        **{
            "rows": len(rows),
            "maps": (shape,) * experts,
            "dtype": "float32",
            "shard_rows": 8,
            "fingerprint_inputs": {"backbone": {"weights": backbone}},
            "provenance": {"classes": list(names), "counts": counts.tolist()},
            **overrides,
        }
    )
    maps = make_maps(spec, seed)
    if change is not None:
        change(maps, rows)
    write_cache(target, spec, rows, maps)
    return target


def make_stage1_head(classes=3, channels=6, experts=1, seed=0, classifier="linear", scale=1.0) -> StageOneHead:
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, classes, channels, generator=draws) * 0.3
    bias = torch.randn(experts, classes, generator=draws) * 0.1
    state = {"weight": weight} if classifier == "cosine" else {"weight": weight, "bias": bias}
    if classifier == "branches":
        state["norm_weight"] = torch.rand(3, channels, generator=draws) + 0.5
        state["norm_bias"] = torch.randn(3, channels, generator=draws) * 0.1
        state["running_mean"] = torch.rand(3, channels, generator=draws)
        state["running_var"] = torch.rand(3, channels, generator=draws) + 0.5
    return StageOneHead(state, classifier, scale)


def make_backbone_dir(folder: Path, *, arch="resnet20", seed=0, classes=10, experts=1, **head) -> str:
    """What train_backbone writes, with random weights and batch-norm statistics that are not the initial ones.

    Returns the digest of the weights.
    """
    from h2t.pipeline.base import plugins

    module = plugins.load("backbones", arch)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = module.build(module.Options(experts=experts))
        for name, buffer in backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    about = {"arch": arch, "options": {"experts": experts}, "channels": backbone.channels, "experts": experts}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "backbone.safetensors", backbone.state_dict(), about)
    first = make_stage1_head(classes, backbone.channels, experts, seed, **head)
    save_weights(
        folder / "head.safetensors",
        first.state,
        {**about, "objective": "ce", "classifier": first.classifier, "scale": first.scale},
    )
    return weights_digest(backbone.state_dict())


def make_stack(
    cache: Path,
    heads,
    *,
    pooled=True,
    dtype=torch.float32,
    batch_size=4,
    stage1=None,
    host="dr",
    loss=None,
    classifier="linear",
    scale=1.0,
    pool="gap",
    pool_options=None,
    receiver="balanced",
    donors=None,
    rounding="floor",
    at_once=True,
) -> Stack:
    """A stack at its start on the cache in the folder `cache`; `heads` are keyword dictionaries of HeadSetting."""
    settings = [
        HeadSetting(**{"ratio": 0.3, "donor": "instance", "selection": "random", "seed": 0, **h}, rounding=rounding)
        for h in heads
    ]
    with open_cache(cache) as opened:
        streams = Streams(
            opened.rows,
            opened.spec.provenance["classes"],
            receiver,
            donors or {"instance": "instance"},
            sorted({h.seed for h in settings}),
            batch_size,
            receiver=plugins.load("hosts", host).Host.receiver,
            partner=plugins.load("hosts", host).Host.partner,
        )
        channels, height, width = opened.spec.maps[0]
        context = Context(torch.from_numpy(streams.index.counts), channels, opened.experts, height * width)
        parts = HeadParts(host, loss or {}, classifier, scale, pool, pool_options or {}, "hosts.test")
        head = build_head(parts, context)
        reader = FeatureReader(opened, (lambda m: head.pool({}, m)) if pooled else None)
        feed = Feed(streams, reader, Choice("memory", "test"), 2**30, CPU, silent, dtype=dtype)
        stack = Stack(head, settings, feed, at_once=at_once)
        about = (context.classes, context.channels, context.experts)
        stack.start(stage1 or make_stage1_head(*about, classifier=head.host.classifier))
    return stack


def taken(table: FeatureTable, rows: np.ndarray) -> torch.Tensor:
    """Features of `rows` (..., B) as (..., E, B, C[, H, W]), as a training step finds and gathers them."""
    return table.gather([torch.from_numpy(places).to(table.device) for places in table.find(rows)], rows.shape)


def make_optimiser(**overrides) -> Optimiser:
    return Optimiser(**{"epochs": 2, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, **overrides})


def trained(stack: Stack, **overrides) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(state, losses of each epoch) after training."""
    losses: list[torch.Tensor] = []
    stack.train(make_optimiser(**overrides), "test", lambda epoch, found: losses.append(found.clone()))
    return {k: t.detach() for k, t in stack.state.items()}, losses


def make_prepare(**overrides) -> prepare.Params:
    """Digits, long-tailed, small: 24 ... 3 training samples."""
    values = {
        "dataset": "digits",
        "imbalance": {"profile": "exponential", "ratio": 40.0, "seed": 0},
        "test_per_class": 50,
        "validation_per_class": 2,
    }
    return prepare.Params.model_validate({**values, **overrides})


def prepared(section: dict[str, Any], out: Path, seed=0):
    """(Samples, Images) of the section `prepare`, prepared into `out`."""
    params = prepare.Params.model_validate(section)
    prepare.run(params, Run("prepare", out, seed=seed))
    samples = load_samples(out)
    return samples, samples.images(params.model_dump())


def make_samples(folder: Path, seed=0, **overrides):
    """(Samples, Images) of digits, prepared into `folder`."""
    return prepared(make_prepare(**overrides).model_dump(), folder, seed)


def make_extract(**overrides) -> extract.Params:
    values = {"batchnorm_passes": 2, "batch_size": 32, "dtype": "float32"}
    return extract.Params.model_validate({**values, **overrides})


def extracted(
    out: Path,
    samples,
    images,
    backbone: Path,
    *,
    seed=0,
    say=silent,
    previous: Path | None = None,
    replace=False,
    anew=False,
    device=CPU,
    part: Part | None = None,
    commit=False,
    to: str | None = None,
    **overrides,
):
    """Runs extract; returns its summary. `previous` is where the cache lies that `statistics_from` would name."""
    params = make_extract(**overrides)
    with open_cache(previous) if previous is not None else nullcontext() as kept:
        options = {"replace": replace, "previous": kept, "anew": anew, "part": part, "commit": commit, "to": to}
        return extract.run(params, Run("b", out, device, seed=seed, say=say), samples, images, backbone, **options)


def make_host(**overrides) -> train_classifier.Params:
    """Section `hosts.dr`; `optimiser` and `grid` may be given in part."""
    values = {
        "host": "dr",
        "backbone": "b",
        "optimiser": {"epochs": 2, "batch_size": 16, **overrides.pop("optimiser", {})},
        "grid": {"ratio": [0.0, 0.3], "seed": [0, 1], **overrides.pop("grid", {})},
    }
    return train_classifier.Params.model_validate({**values, **overrides})


def fitted(
    out: Path, cache: Path, backbone: Path, *, say=silent, pooled=True, device=CPU, residency=None, **overrides
) -> dict[str, torch.Tensor]:
    """Trains a host as `make_host` says; returns the stacked heads. `residency`: overrides of its section."""
    section, where = make_host(**overrides).model_dump(exclude_unset=True), {"pooled": pooled, **(residency or {})}
    run_host(out, cache, backbone, say=say, device=device, residency=where, **section)
    return load_file(out / "heads.safetensors")


def run_host(
    out: Path, cache: Path, backbone: Path, /, *, name="dr", say=silent, device=CPU, residency=None, **section
) -> train_classifier.Summary:
    """Runs train_classifier for `hosts.NAME` with `section` and nothing else; returns its summary."""
    params = train_classifier.Params.model_validate({"backbone": "b", **section})
    with open_cache(cache) as opened:
        run = Run(name, out, device, say=say)
        return train_classifier.run(params, run, Residency(**(residency or {})), opened, backbone)


def evaluated(out: Path, cache: Path, heads: Path, backbone: Path, *, name="dr", say=silent, **section):
    """Runs evaluate; returns what is in its metrics.json."""
    with open_cache(cache) as opened:
        evaluate.run(evaluate.Params(**section), Run(name, out, say=say), opened, heads, backbone)
    return json.loads((out / "metrics.json").read_text())


def pooled_copy(out: Path, cache: Path, *, replace=False, say=silent, **section):
    """Runs pool; returns the spec of the copy."""
    with open_cache(cache) as opened:
        return pool.run(pool.Params(**section), Run("b", out, say=say), opened, replace=replace)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|d| / max|w|: the norm-relative distance the design speaks of."""
    return float((found - expected).abs().max() / expected.abs().max())


def make_params(**overrides) -> dict[str, Any]:
    """A complete parameter file, tiny: digits, one replicate, one training epoch of the backbone, four heads."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["replicates"] = [0]
    values["prepare"].update(test_per_class=40, validation_per_class=14)
    values["backbones"]["ce_mixup"].update(epochs=1, warmup_epochs=1)
    values["extract"].update(batchnorm_passes=2)
    dr = params.merged(values["host_defaults"], values["hosts"]["dr"])
    values.update(backbone_defaults={}, host_defaults={}, hosts={"dr": {"host": "dr", "pool": "gap", **dr}})
    values["hosts"]["dr"]["optimiser"].update(epochs=2)
    values["hosts"]["dr"]["grid"].update(ratio=[0.0, 0.3], seed=[0, 1])
    for key, value in overrides.items():
        *parents, last = key.split("__")
        at = values
        for part in parents:
            at = at[part]
        at[last] = value
    return values


def write_params(path: Path, **overrides) -> Path:
    path.write_text(yaml.safe_dump(make_params(**overrides), sort_keys=False), encoding="utf-8")
    return path


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process: our packages importable, one thread."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **more}


def h2t(*arguments: Any, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `h2t` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "h2t.pipeline", *map(str, arguments)],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def python(*arguments: Any, program: Path | str = sys.executable, cwd: Path = ROOT, timeout: float = 300) -> str:
    """What a Python in a process of its own says on stdout; it must end well. `program`: perhaps a warm one."""
    command = [str(a) for a in (program, *arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def torchrun(programs: Path, *arguments: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `h2t` in two processes over gloo; `programs` is the fixture `warm_programs`."""
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [programs / "warm_python", *how, programs / "h2t", *arguments]
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def invoke(*arguments: Any, **how: Any) -> Result:
    """Runs `h2t` in this process; `how` as click's runner takes it."""
    from h2t.pipeline.command_line.main import main

    return CliRunner().invoke(main, [str(a) for a in arguments], **how)


def accepted(*arguments: Any) -> str:
    """What a command says on stdout that ends well."""
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(*arguments: Any, leaves: Path | None = None, code: int | None = None) -> str:
    """The one line of a refusal, with the exit code `code` if given, which leaves nothing at `leaves`."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in ((1, 2) if code is None else (code,)), result.output
    assert result.stderr.endswith("\n")
    assert result.stderr[:-1].isprintable(), result.stderr
    assert len(result.stderr) < 4000
    assert leaves is None or not leaves.exists()
    return result.stderr


LOADED = """
import sys
from h2t.pipeline.command_line.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print([name for name in sys.modules if "." not in name])
"""


def loaded_by(*command, cwd):
    """The top-level modules that a process has loaded after this command."""
    return set(ast.literal_eval(python("-c", LOADED, *command, cwd=cwd).splitlines()[-1]))
