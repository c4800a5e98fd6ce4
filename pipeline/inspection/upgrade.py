"""`h2t upgrade`: decides which results a new version of h2t keeps, and which stages must run again.

A stage's results are kept if its numbers are those they were made with (FIRST, where dvc.lock is older than the
numbers) and its parameters and data mean the same. Then dvc.lock records the stage as done; no output is changed.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from h2t.pipeline.base import numbers, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import rewrite, rewriting, text_of
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.inspection.project import stages_of
from h2t.pipeline.sharing.repository import in_one_line, locked_stages, repository

#: What stages read and version 0.1.0 did not write: the digests of the inputs, and of the replicates but 0.
INPUTS, REPLICATES = Path("data/inputs"), Path("data/replicates")
#: Sections that dvc.yaml watches and version 0.1.0 did not have, with what they mean where they are left out.
DEFAULTS: dict[str, Any] = {"replicates": [0], "backbone_defaults": {}, "host_defaults": {}}


@dataclass(frozen=True)
class Redo:
    """A stage that must run again: why, its outputs, and the stages that depend on them (`then`)."""

    stage: str
    reasons: list[str]
    outputs: list[str]
    then: list[str]


@dataclass
class Plan:
    """What an upgrade does to `file`, the stages.yaml that dvc.yaml watches, which may lie in another folder.

    `watched`: the sections of params.yaml that dvc.yaml watches. `numbers`: key -> (number in `file`, number in the
    code); 0 means none.
    """

    file: Path
    watched: set[str]
    numbers: dict[str, tuple[int, int]]
    redo: list[Redo] = field(default_factory=list)
    taken_over: list[str] = field(default_factory=list)


def upgrade(start: Path, say: Say, *, apply: bool = False) -> Plan:
    """Says which stages must run again and which results are kept; with `apply`, rewrites stages.yaml and dvc.lock.

    Raises UserError outside a DVC repository, and if dvc.yaml is an older one.
    """
    root = repository(start)
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root}: has no dvc.yaml; change to the folder of a project")
    present = stages_of(root)
    with in_one_line("dvc"), contextlib.chdir(root):  # DVC names stages of other folders by their path from here
        with _dvc(root, alone=apply) as repo:
            plan = _plan(root, repo)
        _say(plan, say)
        if not plan.numbers and not plan.taken_over:
            say("nothing to change: stages.yaml has the numbers of this version")
        elif not apply:
            say("nothing was written; to write stages.yaml and dvc.lock, type: h2t upgrade --apply")
        else:
            rewrite(plan.file, numbers.text(numbers.in_code()))
            _add_sections(root, plan.watched)
            written = _write_missing(root, present, say) if (root / "dvc.lock").is_file() else []
            with _dvc(root, alone=True) as repo:  # opened again, to read the new stages.yaml
                _record(repo, plan.taken_over, written)
            say("wrote stages.yaml and dvc.lock; to run what must run again, type: dvc repro")
    return plan


def _add_sections(root: Path, watched: set[str]) -> None:
    """Adds to params.yaml the sections of defaults that dvc.yaml watches; DVC stops at one that is missing."""
    path = root / "params.yaml"
    text, end = text_of(path)
    missing = [name for name in DEFAULTS if name in watched and name not in (yaml.safe_load(text) or {})]
    if missing:
        rewrite(path, text.rstrip("\r\n") + end + "".join(f"{end}{name}: {DEFAULTS[name]}{end}" for name in missing))


def _write_missing(root: Path, present: set[str], say: Say) -> list[str]:
    """Writes what stages depend on and older versions did not write, where it is missing; returns the stages.

    That are the digests of the inputs, and those of replicates where there are none but 0; only what a stage in
    `present` would write, as a project of stage II alone needs neither.
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.stages import inputs, replicates, watch

    with contextlib.chdir(root):
        values = params.load(Path("params.yaml"))
        settings.check(values)
        written: list[str] = []
        if "inputs" in present and not INPUTS.exists():
            Path("inputs").mkdir(exist_ok=True)
            for name in values["inputs"]:
                watch.run(name, values["inputs"], Path("inputs", f"{name}.json"), say)
            inputs.run(values, Path("inputs"), INPUTS, say)
            written += [*(f"watch@{name}" for name in values["inputs"]), "inputs"]
        if "replicates" in present and not REPLICATES.exists() and values["replicates"] == DEFAULTS["replicates"]:
            replicates.run(values, Run("replicates", REPLICATES, say=say), INPUTS)
            written.append("replicates")
    return written


@contextmanager
def _dvc(root: Path, *, alone: bool) -> Iterator[Any]:
    """The repository as a DVC object; with `alone`, locked against other DVC commands, which writes."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo, repo.lock if alone else contextlib.nullcontext():
        yield repo


def _plan(root: Path, repo: Any) -> Plan:
    code, stages = numbers.in_code(), _stages(root, repo)
    parameters = [dep for stage in stages for dep in stage.deps if hasattr(dep, "params")]
    watched = {root / dep.def_path for dep in parameters if _is_numbers(dep)}
    if not watched:  # it is an older one, or another program's
        raise UserError("dvc.yaml: watches no numbers of stages.yaml; replace it by the dvc.yaml of this version first")
    path = min(watched)
    file = numbers.read(path) if path.is_file() else {}
    changed = {
        key: (file.get(key, 0), code.get(key, 0))
        for key in sorted(code.keys() | file.keys())
        if file.get(key) != code.get(key)
    }
    plan = Plan(path, {key.partition(".")[0] for dep in parameters for key in dep.params}, changed)
    lock = locked_stages(root)
    for stage in sorted(stages, key=lambda s: str(s.addressing)):
        recorded = lock.get(stage.addressing)
        if recorded is None:  # never run
            continue
        reasons = [*_number_reasons(stage, recorded, code), *_other_reasons(root, stage, recorded)]
        if reasons:
            plan.redo.append(Redo(stage.addressing, reasons, [str(o) for o in stage.outs], _followers(repo, stage)))
        elif _is_stale(stage, recorded, code):
            plan.taken_over.append(stage.addressing)
    return plan


def _stages(root: Path, repo: Any) -> list[Any]:
    """The stages of the project at `root`; DVC's repository may hold others."""
    return [stage for stage in repo.index.stages if Path(stage.path) == root / "dvc.yaml"]


def _is_numbers(dep: Any) -> bool:
    """Whether the dependency `dep` is on keys of stages.yaml."""
    return hasattr(dep, "params") and Path(dep.def_path).name == str(numbers.FILE)


def _recorded(recorded: Mapping[str, Any], dep: Any) -> Mapping[str, Any]:
    """The parameters that dvc.lock records for `dep`."""
    values = recorded.get("params", {}).get(dep.def_path, {})
    return values if isinstance(values, Mapping) else {}


def _number_reasons(stage: Any, recorded: Mapping[str, Any], code: numbers.Numbers) -> Iterator[str]:
    """Numbers that differ from those that the results were made with."""
    for dep in stage.deps:
        if _is_numbers(dep):
            known = _single(_recorded(recorded, dep))
            for key, now in _single({key: _number(code, key) for key in dep.params}).items():
                first = numbers.OWN if now == numbers.OWN else numbers.FIRST
                # A plug-in that the recorded kind lacks is new, and no result was made with it.
                before = known.get(key, now if key.partition(".")[0] in _recorded(recorded, dep) else first)
                if before != now:
                    yield f"{key} has the number {now}, was {before}"


def _number(code: numbers.Numbers, key: str) -> Any:
    """What `stages.yaml` holds for `key`: a number, or name -> number for a whole kind of plug-in."""
    if key in plugins.KINDS:
        return {name.partition(".")[2]: number for name, number in code.items() if name.startswith(f"{key}.")}
    return code.get(key)


def _single(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with whole kinds taken apart: {pools: {gap: 1}} becomes {pools.gap: 1}."""
    single: dict[str, Any] = {}
    for key, value in values.items():
        single |= {f"{key}.{name}": n for name, n in value.items()} if isinstance(value, Mapping) else {key: value}
    return single


def _other_reasons(root: Path, stage: Any, recorded: Mapping[str, Any]) -> Iterator[str]:
    """Parameters and data that differ from those recorded in dvc.lock."""
    hashes = {entry["path"]: entry for entry in recorded.get("deps", [])}
    for dep in stage.deps:
        if _is_numbers(dep):
            continue
        if hasattr(dep, "params"):
            known, now = _recorded(recorded, dep), dep.read_params()
            named = yaml.safe_load((root / dep.def_path).read_text(encoding="utf-8")).get("inputs") or {}
            for key in dep.params:
                left_out = DEFAULTS.get(key)
                before, after = known.get(key, left_out), _with_paths(now.get(key, left_out), named)
                if before is None or after is None or not same_meaning(key, _with_paths(before, named), after):
                    yield f"{dep.def_path}: {key} has changed"
        elif dep.def_path in hashes:
            if dep.exists and dep.status():
                yield f"{dep.def_path} has changed"
        elif not dep.exists and not {INPUTS, REPLICATES} & {Path(dep.def_path), *Path(dep.def_path).parents}:
            yield f"{dep.def_path} is missing"


def _with_paths(value: Any, named: Mapping[str, str]) -> Any:
    """`value` with each inputs/NAME replaced by the path that it stands for."""
    if isinstance(value, dict):
        return {key: _with_paths(part, named) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_paths(part, named) for part in value]
    if isinstance(value, str) and value.startswith("inputs/"):
        name, slash, inside = value.removeprefix("inputs/").partition("/")
        return f"{named.get(name, name)}{slash}{inside}"
    return value


def same_meaning(key: str, before: Any, now: Any) -> bool:
    """Whether two values of the parameter `key` are equal once defaults are filled in and moved keys left out."""
    return bool(before == now or _meaning(key, before) == _meaning(key, now))


def _meaning(key: str, value: Any) -> Any:
    """`value` with defaults filled in and without moved keys; as it is where this version cannot read it."""
    from h2t.pipeline.base import params
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.stages import evaluate, extract, pool, prepare, report, train_backbone, train_classifier

    section, _, name = key.partition(".")
    models: dict[str, Any] = {
        "prepare": prepare.Params,
        "extract": extract.Params,
        "pool": pool.Params,
        "evaluate": evaluate.Params,
        "report": report.Params,
    }
    entries: dict[str, Any] = {"backbones": train_backbone.Params, "hosts": train_classifier.Params}
    if not isinstance(value, dict):
        return value
    if section in entries and not name:
        return {entry: _meaning(f"{section}.{entry}", part) for entry, part in value.items()}
    try:
        kept = {k: v for k, v in value.items() if (section, k) not in settings.MOVED}
        return params.build(entries[section] if name else models[section], key, kept).model_dump()
    except (UserError, KeyError):  # written for a version with other keys
        return value


def _followers(repo: Any, stage: Any) -> list[str]:
    """The stages that depend, directly or not, on the outputs of `stage`."""
    graph, followers, todo = repo.index.graph, set(), [stage]
    while todo:
        for reader in graph.predecessors(todo.pop()):
            if reader.addressing not in followers:
                followers.add(reader.addressing)
                todo.append(reader)
    return sorted(followers)


def _is_stale(stage: Any, recorded: Mapping[str, Any], code: numbers.Numbers) -> bool:
    """Whether DVC would run `stage` again although its results are still right."""
    if stage.cmd != recorded.get("cmd"):
        return True
    if {d.def_path for d in stage.deps if not hasattr(d, "params")} != {d["path"] for d in recorded.get("deps", [])}:
        return True
    for dep in stage.deps:
        if hasattr(dep, "params"):
            known = _recorded(recorded, dep)
            of_code = _is_numbers(dep)
            now = {key: _number(code, key) for key in dep.params} if of_code else dep.read_params()
            if known != now:
                return True
    return False


def _record(repo: Any, kept: list[str], written: list[str]) -> None:
    """Records stages as done in dvc.lock, with their parameters and dependencies as they are now.

    The outputs of `kept` ones stay as recorded; those of `written` ones are stored, as `dvc commit` does. The lock file
    is written once, at the end: with thousands of lines DVC takes seconds to read and write it. A kill before leaves
    the old one, and `dvc repro` then runs the `written` ones again.
    """
    from dvc.dvcfile import Lockfile

    known = {stage.addressing: stage for stage in repo.index.stages}
    stages = [known[name] for name in (*written, *kept)]
    for stage in stages[: len(written)]:
        stage.save()
        stage.commit()
    for stage in stages[len(written) :]:
        for dep in stage.deps:
            if hasattr(dep, "params") or not dep.hash_info:
                dep.save()
    for path in {stage.dvcfile.path for stage in stages}:
        with rewriting(Path(path).with_suffix(".lock")) as partial:  # DVC empties a file before it writes it
            Lockfile(repo, str(partial)).dump_stages([s for s in stages if s.dvcfile.path == path])


def _say(plan: Plan, say: Say) -> None:
    """Prints the plan: changed numbers, stages that run again, stages whose results are kept."""
    for key, (before, now) in plan.numbers.items():
        say(f"stages.yaml: {key}: {before or 'none'} -> {now if now or '.' in key else 'none'}")
    for redo in plan.redo:
        then = f"; read by {', '.join(redo.then)}" if redo.then else ""
        say(f"{redo.stage} runs again and writes {', '.join(redo.outputs)}: {'; '.join(redo.reasons)}{then}")
    if plan.taken_over:
        kept = counted(len(plan.taken_over), "stage")
        say(f"results of {kept} are kept, without running anything: {', '.join(plan.taken_over)}")
