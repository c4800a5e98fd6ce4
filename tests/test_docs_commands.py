"""Commands, options, targets, files and links that README and docs name exist; what is cheap to run is run."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import yaml
from dvc.cli import DvcParserError, parse_args
from dvc.repo import Repo
from image_builders import write_image
from pipeline_builders import accepted
from printed import PAGES, ROOT, TESTED, TYPED, blocks, commands

from h2t.pipeline.command_line.main import main

#: Run below, where a run has left its data: command -> part of its output.
SHOWN = {
    "h2t --help": "train-classifier",
    "h2t list datasets": "parquet",
    "h2t list backbones": "resnet32",
    "h2t presets": "cifar10-100",
    "h2t cache info CACHE": "fingerprint",
    "h2t cache verify CACHE": "sound",
}


def all_of(program: str) -> list[str]:
    return sorted({command for page in PAGES for command in commands(page, program)})


@pytest.mark.parametrize("text", all_of("h2t"))
def test_h2t_has_the_command_and_its_options(text):
    at, options = main, set(main.make_context("h2t", [], resilient_parsing=True).help_option_names)
    for word in shlex.split(text)[1:]:
        if word.startswith("-"):
            options |= {o for p in at.params for o in (*p.opts, *p.secondary_opts)}
            assert word.partition("=")[0] in options, f"{at.name}: no option {word}"
        elif isinstance(at, click.Group):
            assert word in at.commands, f"{at.name}: no command {word}"
            at = at.commands[word]


@pytest.mark.parametrize("text", all_of("dvc"))
def test_dvc_has_the_command_and_its_options(text):
    arguments = shlex.split(text)[1:]
    for left_out in ([], ["x"]):  # a sentence may leave out what a command works on
        with contextlib.suppress(DvcParserError):
            parse_args([*arguments, *left_out])
            return
    with pytest.raises(SystemExit) as done:  # or a group's command; a wrong one has no help
        parse_args([*arguments, "--help"])
    assert done.value.code == 0
    assert not [a for a in arguments if a.startswith("-")]


@pytest.mark.parametrize("text", all_of("python"))
def test_python_has_the_file_or_module(text):
    _, first, *rest = shlex.split(text)
    if rest[:1] == ["pytest"]:
        first, *rest = rest[1:2]
    module = f"{rest[0].replace('.', '/')}.py" if first == "-m" else first
    assert (ROOT / module).is_file()
    code = (ROOT / module).read_text(encoding="utf-8") + (ROOT / "benchmarks/measure.py").read_text(encoding="utf-8")
    assert [a for a in rest if a.startswith("--") and f'"{a}"' not in code] == []


@pytest.mark.parametrize("file", ["Makefile", "tests/Makefile"])
def test_make_has_the_targets(file):
    """A phony target without a rule does nothing, and says so only to those who read."""
    rules = set(re.findall(r"^([\w-]+):", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert set(phony) <= rules
    rules |= {f"analysis-{p.stem}" for p in (ROOT / "presets/analyses").glob("*.yaml")} | {"-C", "tests"}
    mine = [t for t in all_of("make") if ("-C tests" in t) == (file == "tests/Makefile")]
    assert [t for t in mine if not {w for w in shlex.split(t)[1:] if "=" not in w} <= rules] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_shell_blocks_are_run(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert page in (*TYPED, *TESTED) or not blocks(page)
    for block in blocks(page, ""):
        assert not re.search(r"^\s*(h2t|make|dvc|git|python|pip) ", block, re.MULTILINE), block


@pytest.mark.parametrize("text", SHOWN)
def test_it_runs(digits_cache, text):
    assert any(text in (ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert SHOWN[text] in accepted(*shlex.split(text.replace("CACHE", str(digits_cache)))[1:])


def test_the_parameters_of_the_readme_prepare_and_are_read_by_dvc(tmp_path, monkeypatch):
    (block,) = blocks("README.md", "yaml")
    (tmp_path / "params.yaml").write_text(block)
    values = yaml.safe_load(block)
    photos = tmp_path / values["inputs"][Path(values["prepare"]["options"]["root"]).name]
    for split, per_class in (("train", 3), ("test", 5)):
        for label in range(4):
            (photos / split / f"kind{label}").mkdir(parents=True)
            for i in range(per_class):
                write_image(photos / split / f"kind{label}" / f"{i}.png", 60 * label + i)
    for name in ("dvc.yaml", "stages.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "plugins", tmp_path / "plugins")
    monkeypatch.chdir(tmp_path)
    assert "test 20" in accepted("prepare", "data/prepare")
    stages = {stage.addressing for stage in Repo.init(no_scm=True).index.stages}
    assert stages >= {
        "report",
        *(f"{stage}@{b}" for b in values["backbones"] for stage in ("train_backbone", "extract")),
    }
    assert stages >= {*(f"watch@{name}" for name in values["inputs"]), *(f"evaluate@{h}" for h in values["hosts"])}
