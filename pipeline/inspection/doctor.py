"""`h2t doctor`: checks the project and says what to type. A check that fails does not stop the others."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from h2t.cache.errors import CacheError
from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.inspection import outputs, project, setting_up, storage
from h2t.pipeline.inspection.findings import Finding
from h2t.pipeline.sharing import repository

START = "h2t init DIR --data IMAGES"  # what starts a project


def examine(start: Path, params_file: Path, *, full: bool = False) -> list[Finding]:
    """All findings about the project around `start` and its repository.

    `full` reads every byte of every input and output. A fault of the project is a finding, not an error.
    """
    versions = setting_up.versions()
    if find_spec("torch") is None:  # the base install, which the other checks cannot run in
        return versions
    findings = [
        *versions,
        *setting_up.parameters(params_file),
        *setting_up.watched(params_file, full=full),
        *setting_up.compute(params_file),
        *setting_up.disk(start),
    ]
    try:
        root, here = repository.repository(start), repository.project(start)
    except UserError as error:
        if not params_file.is_file():  # no project at all
            return [*versions, Finding("project", "fault", f"none in {start.resolve()}", f"{START}, or change to one")]
        return [*findings, Finding("repository", "fault", str(error))]
    caches = outputs.caches(here, full)
    known = {f.place for f in caches if f.state == "fault"}
    checks: dict[str, Callable[[], list[Finding]]] = {
        "numbers": lambda: project.stage_numbers(root),
        "locks": lambda: project.locks(root, here),
        "links": lambda: storage.links(root),
        "queue": lambda: project.queue(here, params_file),
        "remote": lambda: storage.remote(root),
        "data": lambda: outputs.data(here, known, full=full),
        "code": lambda: project.other_code(here),
    }
    for name, check in checks.items():
        try:
            findings += check()
        except (UserError, CacheError, OSError) as error:
            findings.append(Finding(name, "fault", redacted(str(error))))
    return [*findings, *caches]
