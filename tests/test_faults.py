"""Twenty runs of the fault campaign, over every fault that this machine can have and every stage of the pipeline."""

import json
import subprocess

import pytest
from pipeline_builders import ROOT, environment

RUNS, SEED = 20, 89538  # of this seed: amid its shards an extraction is killed, ended in both ways, and stopped


@pytest.mark.timeout(900)
def test_twenty_faults_do_no_harm(tmp_path, warm_programs):
    command = [warm_programs / "warm_python", ROOT / "tests" / "faults" / "campaign.py", "--runs", RUNS, "--seed", SEED]
    command += ["--out", tmp_path / "faults.json", "--keep", tmp_path / "places"]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True, timeout=880)
    print(done.stdout)  # noqa: T201
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads((tmp_path / "faults.json").read_text())
    struck = {name: fault["stages"] for name, fault in found["faults"].items() if name not in found["skipped"]}
    assert sum(n for stages in struck.values() for n in stages.values()) == RUNS
    assert all(struck.values()), struck
    assert {stage for stages in struck.values() for stage in stages} == set(found["undisturbed"])
    assert all("extract" in struck[name] for name in ("SIGKILL", "SIGTERM", "Ctrl-C", "SIGSTOP, SIGCONT")), struck
    assert "shared cache deleted" in struck
