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
    """All findings about the repository around `start`; `full` reads every byte of every input and output.

    Errors become findings; none is raised for a fault of the project.
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
        root = repository.repository(start)
    except UserError as error:
        if not params_file.is_file():  # no project at all
            return [*versions, Finding("project", "fault", f"none in {start.resolve()}", f"{START}, or change to one")]
        return [*findings, Finding("repository", "fault", str(error))]
    caches = outputs.caches(root, full)
    known = {f.place for f in caches if f.state == "fault"}
    checks: dict[str, Callable[[], list[Finding]]] = {
        "numbers": lambda: project.stage_numbers(root),
        "owner": lambda: project.owner(root),
        "locks": lambda: project.locks(root),
        "links": lambda: storage.links(root),
        "queue": lambda: project.queue(root, params_file),
        "remote": lambda: storage.remote(root),
        "data": lambda: outputs.data(root, known, full=full),
        "code": lambda: project.other_code(root),
    }
    for name, check in checks.items():
        try:
            findings += check()
        except (UserError, CacheError, OSError) as error:
            findings.append(Finding(name, "fault", redacted(str(error))))
    return [*findings, *caches]
