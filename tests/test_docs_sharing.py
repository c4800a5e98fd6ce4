"""The code blocks of docs/library.md and docs/sharing.md, as they stand there."""

import contextlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from pipeline_builders import ROOT, environment, fitted, make_prepare, write_params
from printed import blocks
from servers import s3_endpoint

from h2t.cache.reader import open_cache
from h2t.cache.tools.pooled import pooled
from h2t.pipeline.base.run import Run
from h2t.pipeline.models.export import Choice
from h2t.pipeline.models.export import run as export

pytestmark = pytest.mark.slow

KINDS = ("prepare/samples", "train_backbone/ce_mixup", "extract/ce_mixup", "pool/ce_mixup", "train_classifier/dr")
DVC_YAML = "stages:\n" + "".join(
    f"  {kind.replace('/', '_')}:\n    cmd: cp -r made/{kind} data/{kind}\n    outs: [data/{kind}]\n" for kind in KINDS
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, digits_cache, backbone_dir):
    """A directory with a cache, its backbone, trained heads and an exported model, where the pages expect them."""
    root = tmp_path_factory.mktemp("docs")
    shutil.copytree(digits_cache, root / "data/extract/ce_mixup")
    shutil.copytree(backbone_dir, root / "data/train_backbone/ce_mixup")
    heads = root / "data/train_classifier/dr"
    fitted(heads, digits_cache, backbone_dir, optimiser={"epochs": 1})
    with open_cache(digits_cache) as cache:
        pooled(cache, root / "data/pool/ce_mixup", lambda maps: maps.mean((2, 3)), "gap")
        prepare = make_prepare().model_dump()
        export(Run("export", root / "model"), cache, heads, backbone_dir, Choice(0), prepare)
    return root


def test_library(place, tmp_path):
    shutil.copytree(place, tmp_path / "place")
    names: dict = {}
    with contextlib.chdir(tmp_path / "place"):
        for block in blocks("docs/library.md", "python"):
            exec(block, names)
        assert names["maps"].shape[0] == 32
        with open_cache("digits.cache") as cache:
            assert cache.spec.provenance["counts"][::9] == [170, 17]


@pytest.mark.sharing
def test_sharing(place, tmp_path, warm_h2t):
    home = tmp_path / "home"
    shutil.copytree(place / "data", home / "made")
    (home / "made/prepare/samples").mkdir(parents=True)
    for kind in KINDS:
        (home / "data" / kind).parent.mkdir(parents=True, exist_ok=True)
        (home / "data" / kind).parent.joinpath(".gitkeep").touch()
    (home / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, home / ".dvc" / name)
    (home / "dvc.yaml").write_text(DVC_YAML)
    (home / "made/prepare/samples/note").write_text("prepared samples")
    folders = ("made", "model", "heads", "result", "features", "pulled", "colleague", "pictures", "kept")
    ignored = [f"/{folder}/" for folder in folders]
    (home / ".gitignore").write_text("\n".join([*ignored, "*.npz", *(f"/data/{kind}" for kind in KINDS)]))
    write_params(home / "params.yaml", extract__dtype="float32", extract__batch_size=32)
    (home / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.savez(home / f"{split}.npz", features=rng.random((12, 4), np.float32), labels=np.arange(12) % 3)
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(home / f"pictures/{split}.png")
    own = environment(
        PATH=f"{warm_h2t.parent}:{sys.executable.rpartition('/')[0]}:/usr/bin:/bin",
        REMOTE=str(tmp_path / "store"),
        REPOSITORY=f"file://{tmp_path}/server.git",
        DVC_SITE_CACHE_DIR=str(tmp_path / "site"),
        GIT_CONFIG_COUNT="2",
        GIT_CONFIG_KEY_0="user.name",
        GIT_CONFIG_VALUE_0="A",
        GIT_CONFIG_KEY_1="user.email",
        GIT_CONFIG_VALUE_1="a@example.org",
    )

    def bash(script: str) -> None:
        done = subprocess.run(["bash", "-ec", script], cwd=home, env=own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, script + done.stdout + done.stderr

    bash("git init --quiet --initial-branch=main && dvc repro --quiet")
    once, publish, *rest = blocks("docs/sharing.md", "sh")
    bash(once)
    bash(publish)
    bash(f"git clone --quiet --bare . {tmp_path}/server.git")
    with s3_endpoint() as bucket:
        own |= {**bucket.environment, "BUCKET": bucket.url}
        for block in rest:
            bash(block)
    assert (home / "colleague/data/extract/ce_mixup/cache.json").is_file()
    (workflow,) = (yaml.safe_load(b) for b in blocks("docs/sharing.md", "yaml") if "runs-on" in b)
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    pull, verify = (step for step in steps if "h2t cache" in step)
    bash(f"cd colleague && {pull} && {verify}")
    shard = home / "colleague/checked/extract/ce_mixup/maps.zarr/expert_0/c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    bash(f"cd colleague && if ( {verify} ); then exit 1; fi")
    assert (home / "pulled/pool/ce_mixup/cache.json").is_file()
    assert (home / "result/metrics.json").is_file()
