"""Who may import whom, read from the source; and that dvc.yaml watches the numbers and parameters of each stage."""

import ast
from functools import cache

import pytest
import rooms
import yaml
from architecture import LOADED, PLUGINS, ROOT, closure, imports, modules
from pipeline_builders import make_params

from h2t.pipeline.base import numbers
from h2t.pipeline.inspection import settings
from h2t.pipeline.stages import extract

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
MODULES = modules()
CACHE = sorted(m for m in MODULES if m.startswith("h2t.cache."))
WRITER_SIDE = {"h2t.cache.write.writer", "h2t.cache.write.staging", "h2t.cache.format.card"}
READER_SIDE = {"h2t.cache.reader", "h2t.cache.read.files", "h2t.cache.read.plan", "h2t.cache.read.prefetch"}
SHARED = {
    "h2t.cache.format.shard",
    "h2t.cache.format.spec",
    "h2t.cache.format.rows",
    "h2t.cache.format.codecs",
    "h2t.cache.errors",
}


def stage_of(name):
    return DVC[name].get("do", DVC[name])


@cache
def all_imports(module):
    return imports(MODULES[module])


def roots(module):
    return {name.split(".")[0] for name in all_imports(module)}


#: The rooms of `pipeline/`, from the lowest floor up (docs/decisions/0014-rooms-that-follow-the-flow.md).
FLOORS = (
    "base",
    "data",
    "datasets",
    "samplers",
    "networks",
    "backbones",
    "pools",
    "training",
    "objectives",
    "extraction",
    "heads",
    "hosts",
    "evaluation",
    "reporting",
    "stages",
    "models",
    "sharing",
    "inspection",
    "project",
    "command_line",
)


def room(module):
    """The room of a module of the pipeline: `heads` of h2t.pipeline.heads.stack."""
    return module.split(".")[2]


def test_the_packages_were_found():
    assert {
        "h2t.cache.reader",
        "h2t.cache.write.writer",
        "h2t.pipeline.command_line.main",
        "h2t.pipeline.stages.extract",
        "h2t.pipeline.hosts.dr",
    } <= set(MODULES)
    assert {"h2t.cache.errors", "h2t.pipeline.base.seeds"} <= closure({"h2t.pipeline.stages.train_classifier"})


def test_the_import_reader_sees_every_form(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("import a.b\nfrom c import d\ndef f():\n    from e.f import g\nif 1:\n    import h as i\n")
    assert imports(path) == {"a.b", "c", "c.d", "e.f", "e.f.g", "h"}


def test_no_relative_imports():
    """They would be invisible to the closures that this file and `h2t doctor` follow."""
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level], module


def test_the_cache_knows_neither_torch_nor_click_nor_the_pipeline():
    for module in CACHE:
        assert not roots(module) & {"torch", "torchvision", "click", "PIL", "sklearn"}, module
        assert not [name for name in all_imports(module) if name.startswith("h2t.pipeline")], module


def test_the_writer_side_does_not_reach_the_reader_side():
    assert not closure(WRITER_SIDE) & READER_SIDE


def test_the_shared_part_reaches_neither_side():
    assert not closure(SHARED) & (WRITER_SIDE | READER_SIDE)


def test_extraction_does_not_reach_the_reader_and_training_not_the_writer():
    assert not closure({"h2t.pipeline.stages.extract"}) & READER_SIDE
    for stage in ("train_classifier", "evaluate"):
        assert not closure({f"h2t.pipeline.stages.{stage}"}) & WRITER_SIDE


def test_no_module_lies_loose():
    assert {m for m in MODULES if m.count(".") == 2 and m.startswith("h2t.pipeline.")} == {
        f"h2t.pipeline.{name}" for name in ("__main__", *FLOORS)
    }


def test_no_import_runs_upward():
    for module in (m for m in MODULES if m.count(".") > 2 and m.startswith("h2t.pipeline.")):
        above = FLOORS[FLOORS.index(room(module)) + 1 :]
        assert not [n for n in all_imports(module) if n.startswith("h2t.pipeline.") and room(n) in above], module


def test_the_picture_of_the_rooms_is_up_to_date():
    """If this fails, run `python tests/rooms.py`."""
    assert rooms.PICTURE.read_text(encoding="utf-8") == rooms.drawn()


def test_our_packages_have_one_name():
    """`cache` and `pipeline` would be second copies of `h2t.cache` and `h2t.pipeline`, with classes of their own."""
    for module in MODULES:
        assert not roots(module) & {"cache", "pipeline"}, module


PLUGIN_MODULES = sorted(
    m
    for m in MODULES
    if m.startswith("h2t.pipeline.") and m.count(".") == 3 and room(m) in PLUGINS and MODULES[m].name != "__init__.py"
)


def test_the_plugins_were_found():
    assert len(PLUGIN_MODULES) > 40


def test_a_plugin_imports_no_stage_no_other_plugin_and_no_cache():
    for module in PLUGIN_MODULES:
        ours = [name for name in all_imports(module) if name.startswith("h2t.")]
        assert not [name for name in ours if name.startswith("h2t.cache")], module
        assert not [name for name in ours if name.count(".") > 1 and room(name) in ("stages", *PLUGINS)], module
        assert "h2t.pipeline.base.plugins" not in ours, module


def test_nothing_imports_the_command_line():
    importers = {m for m in MODULES if "h2t.pipeline.command_line.main" in all_imports(m)}
    assert importers == {"h2t.pipeline.__main__"}


def test_an_init_holds_a_docstring_at_most():
    """But that of `h2t` refuses Windows, before anything imports what only other systems have."""
    for module in (m for m in MODULES if MODULES[m].name == "__init__.py" and m != "h2t"):
        body = ast.parse(MODULES[module].read_text(encoding="utf-8")).body
        assert len(body) <= 1, module
        assert all(isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body), module


# --- dvc.yaml


def test_every_stage_module_is_a_stage_and_back():
    files = {p.stem for p in (ROOT / "pipeline" / "stages").glob("*.py")} - {"__init__"}
    assert files == set(DVC) == set(LOADED)


def watched(stage, file):
    """What `stage` watches of params.yaml or stages.yaml."""
    params = stage_of(stage)["params"]
    if file == "params.yaml":
        return {p for p in params if isinstance(p, str)}
    return {key for p in params if isinstance(p, dict) for key in p.get(file, [])}


#: Stage -> other stages that it runs.
RUNS = {"replicates": {"prepare", "train_backbone", "extract"}}


@pytest.mark.parametrize("stage", sorted(LOADED))
def test_a_stage_watches_its_number_and_those_of_the_plug_ins_it_loads(stage):
    expected = set()
    for kind, names in LOADED[stage].items():
        expected |= {kind} if names is None else {f"{kind}.{name}" for name in names}
    assert watched(stage, "stages.yaml") == {stage} | expected | RUNS.get(stage, set())


@pytest.mark.parametrize("stage", sorted(LOADED))
def test_of_code_a_stage_watches_the_projects_own_plug_ins(stage):
    """Extraction loads samplers of ours alone, which none of the project can replace."""
    deps = [dep for dep in stage_of(stage)["deps"] if dep.startswith("plugins")]
    kinds = set(LOADED[stage]) - ({"samplers"} if stage in ("extract", "replicates") else set())
    assert sorted(deps) == sorted(f"plugins/{kind}" for kind in kinds)
    assert all((ROOT / dep).is_dir() for dep in deps)


def test_stages_yaml_holds_the_numbers_of_the_code():
    """If this fails, run `h2t upgrade --apply`."""
    assert (ROOT / "stages.yaml").read_text(encoding="utf-8") == numbers.text(numbers.built_in())


def test_dvc_yaml_is_short():
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= 130


#: (stage, module): the module can load plug-ins, but the stage calls no function of it that does.
NEVER_LOADS = {
    ("train_classifier", "h2t.pipeline.data.samples"),
    ("train_classifier", "h2t.pipeline.extraction.batchnorm"),
    ("train_classifier", "h2t.pipeline.networks.trained"),
    ("evaluate", "h2t.pipeline.networks.trained"),
    ("evaluate", "h2t.pipeline.heads.batches"),
    *(("probe", f"h2t.pipeline.heads.{module}") for module in ("batches", "features")),
    ("probe", "h2t.pipeline.networks.trained"),
}


def loaded_kinds(module):
    """The kinds of `plugins.load("kind", ...)` in a module."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "plugins.load":
            yield ast.literal_eval(node.args[0])


@pytest.mark.parametrize("stage", sorted(LOADED))
def test_every_plugin_that_a_stage_loads_is_said_to_be_loaded(stage):
    """Loading by name is no import, so `architecture.LOADED` states it."""
    for module in closure({f"h2t.pipeline.stages.{stage}"}):
        if (stage, module) not in NEVER_LOADS:
            assert set(loaded_kinds(module)) <= set(LOADED[stage]), module


PARAMETERS = {
    "watch": set(),
    "inputs": {"prepare", "backbones", "backbone_defaults", "extract"},
    "prepare": {"seed", "prepare"},
    "train_backbone": {"seed", "backbones.${key}", "backbone_defaults"},
    "extract": {"seed", "extract"},
    "replicates": {"seed", "replicates", "prepare", "backbones", "backbone_defaults", "extract"},
    "pool": {"pool"},
    "probe": {"backbones.${key}", "backbone_defaults"},
    "train_classifier": {"hosts.${key}", "host_defaults"},
    "evaluate": {"evaluate"},
    "report": {"hosts", "report"},
}


@pytest.mark.parametrize("stage", sorted(PARAMETERS))
def test_parameters_of_a_stage_are_those_that_change_its_output(stage):
    """`device`, `train_classifier` (residency) and other stages' sections change no output, so they re-run nothing."""
    assert watched(stage, "params.yaml") == PARAMETERS[stage]


def test_every_section_is_some_stages_or_changes_no_output():
    sections = {p.split(".")[0] for stage in DVC for p in watched(stage, "params.yaml")}
    assert set(settings.SECTIONS) - sections == {"device", "inputs", "train_classifier", "run"}
    assert set(make_params()) <= set(settings.SECTIONS)


def test_settings_that_change_no_byte_lie_in_a_section_that_nobody_watches():
    """Whole sections are watched, so a new key is watched from the start, unless it is put into `run`."""
    assert set(settings.RunSection.model_fields) == {key for _, key in settings.MOVED}
    assert set(settings.RunSection.model_fields) & set(extract.Params.model_fields) == {"cluster"}
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert not [(section, key) for section, key in settings.MOVED if key in values[section]]


@pytest.mark.parametrize("stage", sorted(LOADED))
def test_a_stage_reads_only_what_other_stages_write(stage):
    outs = {out if isinstance(out, str) else next(iter(out)) for s in DVC for out in stage_of(s)["outs"]}
    outs = {out.split("$")[0] for out in outs}
    for dep in stage_of(stage)["deps"]:
        if dep.startswith("data/"):
            assert any(dep.startswith(out) or out.startswith(dep) for out in outs), dep


@pytest.mark.parametrize("stage", sorted(LOADED))
def test_no_output_persists(stage):
    """`persist: true` keeps files of other parameters and disables the run cache."""
    assert all(isinstance(out, str) or not next(iter(out.values())).get("persist") for out in stage_of(stage)["outs"])
