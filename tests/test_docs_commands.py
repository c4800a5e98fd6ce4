"""Every command that README and docs print is run: here on small inputs, by a test named below, by `make stranger`."""

import ast
import contextlib
import json
import re
import shutil
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stranger
import yaml
from click.testing import CliRunner
from dvc.cli import DvcParserError, parse_args
from dvc.repo import Repo
from image_builders import write_image
from printed import PAGES, PROGRAMS, ROOT, blocks, commands, printed, words
from report_builders import make_evaluated

from h2t.pipeline.command_line.main import main

COMMANDS = [command for page in PAGES for command in printed(page)]
TEXTS = sorted({command.text for command in COMMANDS})

#: Run in this file, as they stand, where data lies as `make repro` leaves it.
HERE = (
    "h2t --help",
    "h2t list",
    "h2t list datasets",
    "h2t list backbones",
    "h2t list objectives",
    "h2t presets",
    "h2t presets NAME > params.yaml",
    "h2t presets cifar10-100 > params.yaml",
    "h2t presets cifar10-100-parquet > cifar.yaml",
    "h2t cache info data/extract/ce_mixup",
    "h2t cache verify data/extract/ce_mixup",
    "h2t cache verify URL",
    "h2t report --compare OTHER/data data",
    "h2t report data/evaluate page --runs data/runs",
)

#: Pages whose shell blocks one test runs as they stand.
BY_BLOCK = {"docs/sharing.md": "tests/test_docs_sharing.py::test_sharing"}

#: Who runs the others: a test (with other paths or fewer processes) or the script of CI.
ELSEWHERE = {
    ".ci/run": ("make test", "make check", "make audit"),
    "tests/stranger.py": ("make stranger",),
    "tests/faults/test_kills.py::test_kills_lose_one_shard_at_most_and_never_a_byte": (
        "make faults",
        "python tests/faults/kill.py",
    ),
    "tests/test_faults.py::test_twenty_faults_do_no_harm": ("python tests/faults/campaign.py --seed 20261126",),
    "Makefile": ("python tests/faults/repro.py --runs 3 --seed 20261125",),  # make faults
    "docs/log.md": ("make coverage", "make mutants"),  # by hand, for minutes on all cores; the log has the figures
    "tests/test_recompute.py::test_command": ("h2t cache verify --recompute N",),
    "tests/fuzz/test_fuzz.py::test_nothing_is_found": ("make fuzz",),
    "tests/test_bench_epoch.py::test_epoch_benchmark": ("python -m benchmarks.bench_epoch --data DIR",),
    "tests/test_bench_epoch.py::test_extraction_benchmark": ("python -m benchmarks.bench_extract --data DIR",),
    "tests/test_bench_epoch.py::test_scale_benchmark": ("python -m benchmarks.bench_scale --data DIR",),
    "tests/test_bench_remote.py::test_remote_benchmark": (
        "python -m benchmarks.bench_remote",
        "python -m benchmarks.bench_remote --data DIR",
    ),
    "tests/test_benchmarks.py::test_read_benchmark": ("python -m benchmarks.bench_read --data DIR",),
    "tests/test_benchmarks.py::test_synthetic_cache_is_the_same_every_time": (
        "python -m benchmarks.synthetic OUT --rows 131072 --map 64,8,8",
    ),
    "tests/test_benchmarks.py::test_write_benchmark": ("python -m benchmarks.bench_write --data DIR",),
    "tests/test_cluster.py::test_workers_of_a_scheduler_write_the_same_bytes_also_when_one_is_killed": (
        "dask scheduler",
        "dask worker tcp://HOST:8786 --nthreads 1 --name N",
    ),
    "tests/test_export.py::test_onnx_gives_the_same_logits_for_any_batch": ("h2t export --onnx",),
    "tests/test_format_golden.py::test_the_corpus_is_present": ("python tests/golden/make.py --regenerate",),
    "tests/test_incremental.py::test_statistics_from_names_a_cache_or_a_folder_of_caches": ("h2t extract --anew",),
    "tests/test_online.py::test_a_finished_seed_is_left_alone": (
        "python -m benchmarks.online_h2t --data DATA --params PARAMS",
        "python -m benchmarks.online_h2t --data cifar --params cifar.yaml",
        "python -m benchmarks.online_h2t --ratio 0.3",
    ),
    "tests/test_pipeline.py::test_running_anew_gives_the_same_bytes": ("dvc repro --force",),
    "tests/test_pool.py::test_commands": ("h2t cache pool",),
    "tests/test_sharing.py::test_publish_and_pull_give_the_same_bytes": (
        "dvc push --run-cache",
        "h2t cache pull $REPOSITORY@REV --into kept",
    ),
    "tests/test_train_backbone.py::test_two_processes_train_like_one_and_go_on_where_one_was_killed": (
        "torchrun --nproc-per-node 4 -m h2t.pipeline train-backbone ce_mixup data/prepare data/train_backbone/ce_mixup",
    ),
    "tests/test_golden.py::test_results_are_rewritten_for_a_new_number_only": ("python tests/golden_cases.py",),
    "tests/test_upgrade.py::test_a_lock_file_from_before_the_numbers_is_taken_over": (
        "h2t upgrade",
        "h2t upgrade --apply",
    ),
    "tests/test_two_clones.py::test_nobody_extracts_twice": ("make test-remotes", "dvc repro --pull"),
}


BY_THE_STRANGER = {command for _, typed in stranger.steps() for command in commands(typed)}


def runners(command) -> list[str]:
    found = [who for who, texts in ELSEWHERE.items() if command.text in texts]
    found += ["here"] * (command.text in HERE)
    found += [BY_BLOCK[command.page]] if command.fenced and command.page in BY_BLOCK else []
    found += ["make stranger"] * (command.text in BY_THE_STRANGER)
    if not found:  # a name alone, in a sentence: it is run with its arguments
        longer = [c for c in COMMANDS if c.text.startswith(f"{command.text} ")]
        found = [who for c in longer for who in runners(c)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_somebody_runs_every_command(page):
    assert [c.text for c in printed(page) if not runners(c)] == []


def test_no_entry_is_stale():
    listed = [*HERE, *stranger.LEFT, *(text for texts in ELSEWHERE.values() for text in texts)]
    assert [text for text in listed if text not in TEXTS] == []
    assert [page for page in (*stranger.FOLLOWED, *BY_BLOCK) if not printed(page)] == []


@pytest.mark.parametrize("who", [*ELSEWHERE, *BY_BLOCK.values()])
def test_who_runs_it_is_there_and_knows_the_command(who):
    path, _, name = who.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if name:
        assert name in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    for command in ELSEWHERE.get(who, ()):
        spoken = [w for w in re.findall(r"[a-z_]{4,}", command.partition(" ")[2]) if w in text]
        assert spoken, command


# --- they can be parsed, wherever they are run


def check_h2t(arguments: list[str]) -> None:
    """Commands and options exist. What a sentence names without its arguments lacks nothing here."""
    group, options, at = main, set(main.make_context("h2t", [], resilient_parsing=True).help_option_names), main
    for word in arguments:
        if isinstance(at, click.Group) and not word.startswith("-"):
            group, at = at, at.commands.get(word)
            assert at is not None, f"{group.name}: no command {word!r}"
        elif word.startswith("-"):
            options |= {o for p in at.params for o in (*p.opts, *p.secondary_opts)}
            assert word.partition("=")[0] in options, f"{at.name}: no option {word}"


def check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = set(re.findall(r"^([\w-]+):", text, re.MULTILINE))
    rules |= {f"analysis-{p.stem}" for p in (ROOT / "presets" / "analyses").glob("*.yaml")}
    assert rules >= {a for a in arguments if "=" not in a}


def check_dvc(arguments: list[str]) -> None:
    try:
        parse_args(arguments)
    except DvcParserError:  # a name alone lacks arguments, but then its help is there
        with pytest.raises(SystemExit) as done:
            parse_args([*arguments, "--help"])
        assert done.value.code == 0
        assert not [a for a in arguments if a.startswith("-")]


def check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
    elif arguments[1] == "pytest":
        assert (ROOT / arguments[2]).is_file()
    else:
        text = (ROOT / f"{arguments[1].replace('.', '/')}.py").read_text(encoding="utf-8")
        text += (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
        assert [a for a in arguments if a.startswith("--") and f'"{a}"' not in text] == []


CHECKS = {"h2t": check_h2t, "make": check_make, "dvc": check_dvc, "python": check_python}


@pytest.mark.parametrize("text", [t for t in TEXTS if t.split()[0] in CHECKS])
def test_programs_options_and_targets_exist(text):
    program, *arguments = words(text)
    CHECKS[program](arguments)


def test_phony_targets_have_a_rule():
    """Without one, `make` says that there is nothing to be done, and does nothing."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert [name for name in names if not re.search(rf"^{name}:", text, re.MULTILINE)] == []


def test_analyses_in_the_readme_are_those_that_exist():
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "make analysis-" in line)
    names = set(re.findall(r"`(?:make analysis-)?([a-z]+)`", row))
    assert names == {p.stem for p in (ROOT / "presets" / "analyses").glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_shell_blocks_are_marked(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    for block in blocks(page, ""):
        assert not re.search(rf"^\s*({'|'.join(PROGRAMS)}) ", block, re.MULTILINE), block


# --- the parameters of the README are those of a run


@pytest.fixture
def pets(tmp_path):
    """The files that the README's parameters name: four classes, long-tailed by `prepare`."""
    for split, per_class in (("train", 60), ("test", 5)):
        labels = [j for j in range(4) for _ in range(per_class)]
        images = [
            {"bytes": write_image(tmp_path / "one.png", i).read_bytes(), "path": None} for i in range(len(labels))
        ]
        (tmp_path / "pets").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"pets/{split}.parquet")
    return tmp_path


def test_the_parameters_of_the_readme_prepare_and_are_read_by_dvc(pets, monkeypatch):
    (block,) = blocks("README.md", "yaml")
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, entries in yaml.safe_load(block).items():
        values[section] = values.get(section, {}) | entries
    (pets / "params.yaml").write_text(yaml.safe_dump(values))
    for name in ("dvc.yaml", "stages.yaml"):
        shutil.copy(ROOT / name, pets / name)
    shutil.copytree(ROOT / "plugins", pets / "plugins")
    monkeypatch.chdir(pets)
    done = CliRunner().invoke(main, ["prepare", "data/prepare"])
    assert done.exit_code == 0, done.output
    assert "'test': 20" in done.stdout
    stages = {stage.addressing for stage in Repo.init(no_scm=True).index.stages}
    assert "train_backbone@ce_mixup" in stages
    assert "report" in stages


# --- the cheap ones are run


@pytest.fixture(scope="module")
def place(tmp_path_factory, digits_cache):
    """Where `make repro` has been: parameters, a cache, evaluated hosts; the same again in `OTHER`."""
    root = tmp_path_factory.mktemp("stranger")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    make_evaluated(root / "data")
    for name in ("mislas", "gcl", "ride_linear", "ride_cosine", "reslt"):
        shutil.copytree(root / "data/evaluate/dr", root / "data/evaluate" / name)
    shutil.copytree(digits_cache, root / "data/extract/ce_mixup")
    (root / "data/runs/report").mkdir(parents=True)
    (root / "data/runs/report/report.json").write_text(json.dumps({"seconds": 1.0}))
    with contextlib.chdir(root):
        assert CliRunner().invoke(main, ["report", "data/evaluate", "data/report"]).exit_code == 0
    shutil.copytree(root / "data", root / "OTHER/data")
    return root


SHOWS = {
    "h2t --help": "train-classifier",
    "h2t list datasets": "parquet",
    "h2t list backbones": "resnet32",
    "h2t presets": "cifar10-100",
    "h2t cache info data/extract/ce_mixup": "fingerprint",
    "h2t cache verify data/extract/ce_mixup": "sound",
    "h2t cache verify URL": "sound",
    "h2t report --compare OTHER/data data": "too close to tell",
}


@pytest.mark.parametrize("text", HERE)
def test_it_runs(place, text):
    command = text.replace("> params.yaml", "> other.yaml")  # other commands need the parameters that are here
    command = command.replace("NAME", "cifar10-100").replace("URL", f"file://{place}/data/extract/ce_mixup")
    with contextlib.chdir(place):
        done = CliRunner().invoke(main, words(command)[1:])
        assert done.exit_code == 0, (done.output, done.exception)
        if " > " in command:
            Path(command.split(" > ")[1]).write_text(done.stdout)
            assert "hosts:" in done.stdout
        assert SHOWS.get(text, "") in done.stdout
    if " page" in text:
        assert "Long-tailed" in (place / "page/index.html").read_text()
