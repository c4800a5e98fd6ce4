"""The command line from outside: a refusal is one line on stderr with exit code 1 or 2, and leaves nothing behind."""

import json
import re
from functools import partial
from pathlib import Path

import click
import pipeline_builders
import pytest
import yaml
from builders import flip
from click.shell_completion import ShellComplete
from pipeline_builders import (
    accepted,
    h2t,
    invoke,
    make_backbone_dir,
    make_params,
    make_samples,
    make_stage2_cache,
    write_params,
)

from h2t.pipeline.command_line.main import main

refused = partial(pipeline_builders.refused, code=1)


@pytest.fixture
def params(tmp_path):
    return write_params(tmp_path / "params.yaml")


# setting, the line
SETTINGS = {
    "ratio out of range": ("hosts.dr.grid.ratio=[0.0, 1.3]", "hosts.dr.grid.ratio[1]: must lie in [0, 1]; got 1.3"),
    "unknown key": ("prepare.datasett=x", "prepare.datasett: unknown key; did you mean 'dataset'?"),
    "unknown key of a loss": ("hosts.dr.loss={s: 1}", "hosts.dr.loss.s: unknown key"),
    "unknown section": ("prepar={}", "prepar: unknown section; did you mean 'prepare'?"),
    "seed twice": ("hosts.dr.grid.seed=[1, 1]", "hosts.dr.grid.seed: must be a list of one or more different values"),
    "unknown host": ("hosts.dr.host=drr", "hosts.dr.host: no host 'drr'; did you mean 'dr'?"),
    "unknown pool": ("hosts.dr.pool=gapp", "hosts.dr.pool: no pool 'gapp'; did you mean 'gap'?"),
    "unknown backbone": (
        "backbones.ce_mixup.arch=resnet23",
        "backbones.ce_mixup.arch: no backbone 'resnet23'; did you",
    ),
    "unknown dataset": ("prepare.dataset=digit", "prepare.dataset: no dataset 'digit'; did you mean 'digits'?"),
    "a backbone that is not there": ("hosts.dr.backbone=ce", "hosts.dr.backbone: no backbone 'ce'"),
    "a recipe that is not stored": ("hosts.dr.batchnorm=calibrated", "hosts.dr.batchnorm: must be one of extract"),
    "seed": ("seed=-1", "seed: must be a whole number from 0 to 4294967295; got -1"),
    "device": ("device=gpu", "device: must be auto, cpu, cuda or cuda:N; got 'gpu'"),
    "a device of torch that cannot train": ("device=meta", "device: must be auto, cpu, cuda or cuda:N; got 'meta'"),
    "groups": ("evaluate.groups=[7, 3]", "evaluate.groups: must be paper_index, paper_threshold, oltr or two class"),
    "no hosts": ("hosts={}", "hosts: must be a mapping with at least one entry; got {}"),
    "a host that is a path": ("hosts={../x: {}}", "hosts: a name must consist of letters, digits, _ and -"),
    "a host that is a number": ("hosts={1: {}}", "hosts: a name must consist of letters, digits, _ and -"),
    "hosts in one folder of a Mac": (
        "hosts={dr: {}, DR: {}}",
        "hosts: two names must differ by more than upper and lower case, as folders are named after them and some",
    ),
    "backbones in one folder of a Mac": ("backbones={a-B: {}, A-b: {}}", "backbones: two names must differ by more"),
    "inputs in one file of a Mac": ("inputs={x: a, X: b}", "inputs: two names must differ by more than upper and"),
    "an empty section": ("extract=", "extract: must be a mapping of keys; got None"),
    "a ratio below 1": ("prepare.imbalance.ratio=0.5", "prepare.imbalance.ratio: must be at least 1; got 0.5"),
    "no value": ("seed", "--set seed: must have the form key=value"),
    "no key": ("=3", "--set =3: must have the form key=value"),
    "bad value": ("seed=[1", "--set seed=[1: the value must be YAML"),
    "no such section to set in": ("host.dr.grid=1", "--set host.dr.grid=1: no section 'host'; did you mean 'hosts'?"),
    "a class that would be empty": ("prepare.imbalance.ratio=1000", "prepare.imbalance.ratio: must leave class 7 at"),
    "more than a class has": (
        "prepare.test_per_class=5000",
        "prepare.test_per_class: must leave class 0 one of its 178",
    ),
    "no test split": (
        "prepare.test_per_class=0",
        "prepare.test: must be set, as the dataset has no test split",
    ),
}


@pytest.mark.parametrize(("setting", "line"), SETTINGS.values(), ids=SETTINGS)
def test_a_bad_setting_is_one_line_and_leaves_nothing(tmp_path, params, setting, line):
    out = tmp_path / "data" / "prepare"
    assert refused("prepare", out, "--params", params, "--set", setting).removeprefix("error: ").startswith(line)
    assert not list(tmp_path.glob("data/**/*.parquet"))
    assert not out.exists()
    assert not list(tmp_path.glob("data/.*"))


def test_a_missing_section_and_a_missing_file_are_named(tmp_path):
    values = make_params()
    del values["hosts"]
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    assert "hosts: missing" in refused("prepare", tmp_path / "out", "--params", tmp_path / "p.yaml")
    assert "no such parameter file" in refused("prepare", tmp_path / "out", "--params", tmp_path / "q.yaml")


def test_an_option_without_its_value_leads_to_the_help_of_its_command():
    assert "report --help)" in refused("report", "--compare", "HEAD", code=2)
    assert "cache pull --help)" in refused("cache", "pull", "--rev", code=2)


USAGE = {
    "no such command": ["prepair"],
    "no argument": ["prepare"],
    "no such option": ["prepare", "out", "--nope"],
    "too many": ["prepare", "a", "b"],
    "group option": ["--nope"],
    "cache command": ["cache", "infoo"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_misuse_is_one_line_and_exit_code_2(arguments):
    assert "--help" in refused(*arguments, code=2)


# --- places


def test_places_that_cannot_be_made_are_one_line(tmp_path, params):
    (tmp_path / "file").write_text("x")
    assert "cannot be created" in refused("prepare", tmp_path / "file" / "out", "--params", params)
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, params):
    """`h2t prepare data` instead of `data/prepare` must not delete what lies in data."""
    (tmp_path / "data" / "extract").mkdir(parents=True)
    (tmp_path / "data" / "extract" / "cache.json").write_text("{}")
    line = refused("prepare", tmp_path / "data", "--params", params)
    assert "must hold outputs of this stage only; got 'extract'" in line
    assert (tmp_path / "data" / "extract" / "cache.json").read_text() == "{}"
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["extract"]


def test_an_earlier_output_is_replaced(tmp_path, params):
    for _ in range(2):
        accepted("prepare", tmp_path / "out", "--params", params)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["classes.json", "samples.parquet"]


# --- inputs of the later stages


def arguments(command, tmp_path, params, *paths):
    name = {"train-classifier": "dr", "evaluate": "dr"}.get(command, "ce_mixup")
    return [command, name, *paths, tmp_path / "out", "--params", params, "--device", "cpu"]


def test_missing_inputs_are_named(tmp_path, params):
    nothing, backbone = tmp_path / "nothing", tmp_path / "b"
    make_backbone_dir(backbone, classes=3)
    for command, paths in (("train-backbone", [nothing]), ("extract", [nothing, backbone])):
        line = refused(*arguments(command, tmp_path, params, *paths))
        assert line == f"error: {nothing}: no prepared samples here; run h2t prepare {nothing}\n"
    make_samples(tmp_path / "samples")
    line = refused(*arguments("extract", tmp_path, params, tmp_path / "samples", nothing))
    assert line.startswith(f"error: {nothing / 'backbone.safetensors'}: no such file")
    line = refused("report", nothing, tmp_path / "out", "--params", params)
    assert "host 'dr' has not been evaluated" in line
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_in_the_parameters_gets_the_nearest(tmp_path, params):
    line = refused("train-classifier", "drr", tmp_path, tmp_path, tmp_path / "out", "--params", params)
    assert line.startswith("error: params: no section 'hosts.drr'; did you mean 'dr'?")


@pytest.mark.parametrize("kind", ["missing", "uncommitted", "empty"])
def test_a_cache_that_is_not_one_is_refused(tmp_path, params, kind):
    cache = tmp_path / "cache"
    if kind == "uncommitted":
        make_stage2_cache(cache)
        (cache / "cache.json").unlink()
    if kind == "empty":
        cache.mkdir()
    make_backbone_dir(tmp_path / "b")
    line = refused(*arguments("train-classifier", tmp_path, params, cache, tmp_path / "b"))
    assert "not a finished cache" in line
    line = refused(*arguments("evaluate", tmp_path, params, cache, tmp_path / "h", tmp_path / "b"))
    assert "not a finished cache" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_protocol_is_one_line(tmp_path, params):
    make_backbone_dir(tmp_path / "b")
    assert "foo" in refused(*arguments("train-classifier", tmp_path, params, "foo://x/y", tmp_path / "b"))


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "S3://b/x",
            "error: S3://b/x: unknown protocol 'S3'; write a path, s3://, ssh://, https:// or another of fsspec",
        ),
        ("ssh://", "error: ssh://: must name a host or bucket; write ssh://HOST/PATH"),
        ("s3:///x", "error: s3:///x: must name a host or bucket; write s3://HOST/PATH"),
    ],
)
def test_a_url_that_cannot_be_opened_says_what_to_write(url, says):
    assert refused("cache", "info", url, code=1).strip() == says


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(cache, backbone directory) of random maps of 64 channels, as a ResNet-20 would have made."""
    folder = tmp_path_factory.mktemp("small")
    digest = make_backbone_dir(folder / "b", classes=3)
    make_stage2_cache(folder / "c", shape=(64, 1, 1), backbone=digest)
    return folder / "c", folder / "b"


def test_a_cache_of_another_backbone_is_refused(tmp_path, params, small):
    make_backbone_dir(tmp_path / "b", seed=1, classes=3)
    line = refused(*arguments("train-classifier", tmp_path, params, small[0], tmp_path / "b"))
    assert "this cache was extracted by a backbone with weights" in line
    assert not (tmp_path / "out").exists()


def test_heads_of_another_cache_or_backbone_are_refused(tmp_path, params, small):
    cache, backbone = small
    accepted("train-classifier", "dr", cache, backbone, tmp_path / "h", "--params", params)
    digest = make_backbone_dir(tmp_path / "b", seed=1, classes=3)
    line = refused(*arguments("evaluate", tmp_path, params, cache, tmp_path / "h", tmp_path / "b"))
    assert "heads were trained on backbone" in line
    make_stage2_cache(tmp_path / "c", shape=(64, 1, 1), backbone=digest)
    line = refused(*arguments("evaluate", tmp_path, params, tmp_path / "c", tmp_path / "h", backbone))
    assert "heads were trained on cache" in line
    assert not (tmp_path / "out").exists()


def test_a_stage_one_head_that_does_not_fit_is_refused(tmp_path, params, small):
    make_backbone_dir(tmp_path / "b", classes=7)
    line = refused(*arguments("train-classifier", tmp_path, params, small[0], tmp_path / "b"))
    assert "(experts, classes, channels) must be (1, 3, 64), as in the cache; got (1, 7, 64)" in line
    line = refused(*arguments("train-classifier", tmp_path, params, *small), "--set", "hosts.dr.classifier=cosine")
    assert "classifier: must be of the same kind as in stage I, linear; got cosine" in line
    assert not (tmp_path / "out").exists()


def test_statistics_that_the_cache_lacks_are_named(tmp_path, params, small):
    setting = ["--set", "hosts.dr.grid.donor=[reverse]"]
    line = refused(*arguments("train-classifier", tmp_path, params, *small), *setting)
    assert "has no train rows under 'reverse' statistics (it has: balanced, instance)" in line


def test_damage_stops_training(tmp_path, params):
    digest = make_backbone_dir(tmp_path / "b", classes=3)
    make_stage2_cache(tmp_path / "c", shape=(64, 1, 1), backbone=digest)
    for path in (tmp_path / "c" / "maps.zarr" / "expert_0").glob("c.*"):
        flip(path, -40)
    line = refused(*arguments("train-classifier", tmp_path, params, tmp_path / "c", tmp_path / "b"))
    assert "c." in line
    assert not (tmp_path / "out").exists()


def test_training_that_diverges_is_refused(tmp_path, params, small):
    steep = (
        "--set",
        "hosts.dr.optimiser.lr=1e6",
        "--set",
        "hosts.dr.optimiser.weight_decay=1e6",
        "--set",
        "hosts.dr.optimiser.epochs=20",
    )
    line = refused(*arguments("train-classifier", tmp_path, params, *small), *steep)
    assert "training diverged" in line
    assert "lower hosts.dr.optimiser.lr" in line
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_one_line(tmp_path, params, small):
    cache, backbone = small
    make_backbone_dir(tmp_path / "b", classes=3)
    for name in ("backbone.safetensors", "head.safetensors"):
        good = (backbone / name).read_bytes()
        for content in (b"", good[: len(good) // 2], b"x" * 100):
            (tmp_path / "b" / name).write_bytes(content)
            line = refused(*arguments("train-classifier", tmp_path, params, cache, tmp_path / "b"))
            assert "not weights written by h2t" in line
        (tmp_path / "b" / name).write_bytes(good)


# --- what works, with a note


def test_a_class_with_one_sample_works_with_a_note(tmp_path, params):
    setting = ["--params", params, "--set", "prepare.imbalance.ratio=110"]
    said = accepted("prepare", tmp_path / "samples", *setting)
    assert "note: at least one class has only one training sample" in said
    assert json.loads((tmp_path / "samples" / "classes.json").read_text())["counts"][-1] == 1
    digest = make_backbone_dir(tmp_path / "b", classes=2)
    make_stage2_cache(tmp_path / "c", shape=(64, 1, 1), counts=(3, 1), backbone=digest)
    accepted("train-classifier", "dr", tmp_path / "c", tmp_path / "b", tmp_path / "h", "--params", params)


def test_no_validation_split_works_with_a_note(tmp_path, params):
    said = accepted("prepare", tmp_path / "samples", "--params", params, "--set", "prepare.validation_per_class=0")
    assert "note: no validation split" in said
    digest = make_backbone_dir(tmp_path / "b", classes=3)
    make_stage2_cache(tmp_path / "c", shape=(64, 1, 1), val=0, backbone=digest)
    accepted("train-classifier", "dr", tmp_path / "c", tmp_path / "b", tmp_path / "h", "--params", params)
    run = ["evaluate", "dr", tmp_path / "c", tmp_path / "h", tmp_path / "b"]
    accepted(*run, tmp_path / "e", "--params", params)
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["with_h2t"]["ratio"] == 0.3
    said = accepted(*run, tmp_path / "f", "--params", params, "--set", "evaluate.ratio=0.7")
    assert "note: dr: no classifier to report as with_h2t" in said
    assert json.loads((tmp_path / "f" / "metrics.json").read_text())["with_h2t"] is None


# --- the program itself


@pytest.mark.parametrize("group", [[], ["cache"]])
def test_lists_of_commands_are_whole_on_a_narrow_terminal(group):
    text = invoke(*group, "--help", terminal_width=80).stdout
    assert "publish" in text or "evaluate" in text
    assert [line for line in text.partition("Commands:")[2].splitlines() if line.endswith("...")] == []


def test_the_list_of_plugins_is_a_table_of_80_columns():
    lines = accepted("list").splitlines()
    entries = [line for line in lines if re.match("  [a-z]", line)]
    assert len(entries) > 30
    start = {re.match(r"  \S+ +", line).end() for line in entries}
    assert len(start) == 1
    assert all(len(line) <= 80 for line in lines)
    assert {len(line) - len(line.lstrip()) for line in lines if line not in entries} == {0, *start}


def commands(group=main, before=""):
    """Words of a command line -> command, for every command that is not a group."""
    found = {}
    for name, command in group.commands.items():
        words = f"{before} {name}".strip()
        found |= commands(command, words) if isinstance(command, click.Group) else {words: command}
    return found


COMMANDS = commands()


@pytest.mark.parametrize("words", COMMANDS)
def test_help_explains_every_argument_and_option_and_gives_an_example(words):
    text = invoke(*words.split(), "--help", env={"COLUMNS": "200"}).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "\\b" not in text
    assert [p.name for p in COMMANDS[words].params if not p.help] == []
    assert re.search(rf"Example:\s+h2t {words}", text)


def completed(*words):
    """What the shell offers for the last of `words`."""
    shell = ShellComplete(main, {}, "h2t", "_H2T_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


def test_names_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert completed("extract", "") == []  # without a parameter file
    write_params(tmp_path / "params.yaml")
    assert completed("extract", "") == ["ce_mixup"]
    assert completed("evaluate", "d") == ["dr"]
    assert completed("list", "ho") == ["hosts"]
    assert completed("presets", "tin") == ["tiny"]
    assert "gem" in completed("cache", "pool", "--pool", "g")


def test_an_unknown_plugin_is_named_once(tmp_path, params):
    line = refused("prepare", tmp_path / "out", "--params", params, "--set", "prepare.dataset=digit")
    assert line.count("'digit'") == 1


def test_quiet_prints_errors_only(tmp_path, params):
    assert accepted("prepare", tmp_path / "loud", "--params", params)
    assert accepted("prepare", tmp_path / "out", "--params", params, "--quiet") == ""
    assert "prepare.imbalance.ratio" in refused(
        "prepare", tmp_path / "no", "--params", params, "-q", "--set", "prepare.imbalance.ratio=1000"
    )


def test_every_stage_is_a_command():
    stages = Path(__file__).parent.parent / "pipeline" / "stages"
    names = {p.stem.replace("_", "-") for p in stages.glob("*.py") if p.stem != "__init__"}
    assert names <= set(main.commands)


def test_a_refusal_in_a_process_of_its_own(tmp_path, params):
    done = h2t("prepare", "out", "--params", params, "--set", "hosts.dr.grid.ratio=[0.0, 1.3]", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: hosts.dr.grid.ratio[1]: must lie in [0, 1]; got 1.3\n"
    assert not (tmp_path / "out").exists()


def test_record_is_written_beside_the_output(tmp_path, params):
    accepted("prepare", tmp_path / "out", "--params", params, "--record", tmp_path / "runs" / "prepare.json")
    record = json.loads((tmp_path / "runs" / "prepare.json").read_text())
    assert record["seconds"] > 0
    assert set(record) >= {"machine", "versions", "finished"}


def test_list_names_every_plugin_with_a_line():
    found = json.loads(accepted("list", "--json"))
    assert {"dr"} <= set(found["hosts"])
    assert all(line for entries in found.values() for line in entries.values())
    assert "did you mean 'hosts'" in refused("list", "host")
