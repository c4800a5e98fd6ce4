"""`h2t cache import`: what reaches beyond one machine or one program."""

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command("import")
@click.argument("out", type=PATH)
@click.option("--train", type=PATH, required=True, help="Training features: .npy, .npz, .safetensors or .parquet.")
@click.option("--train-labels", type=PATH, help="Their labels, where they are in another file.")
@click.option("--val", type=PATH, help="Validation features.")
@click.option("--val-labels", type=PATH, help="Their labels.")
@click.option("--test", type=PATH, help="Test features.")
@click.option("--test-labels", type=PATH, help="Their labels.")
@click.option("--features-key", help="Name of the features in the file; by default features, embeddings, x, ...")
@click.option("--labels-key", help="Name of the labels in the file; by default labels, label, y, ...")
@click.option("--classes", type=PATH, help="A text file with the name of label 0, 1, ... on its lines.")
@click.option("--replace", is_flag=True, help="Replace another cache at OUT.")
def import_command(
    out: Path,
    train: Path,
    train_labels: Path | None,
    val: Path | None,
    val_labels: Path | None,
    test: Path | None,
    test_labels: Path | None,
    features_key: str | None,
    labels_key: str | None,
    classes: Path | None,
    replace: bool,
) -> None:
    """Make a cache OUT of features that another program computed.

    Example: h2t cache import features --train train.npz --test test.npz
    """
    from pipeline import importing

    keys = importing.Keys(features_key, labels_key)
    given = {"train": (train, train_labels), "val": (val, val_labels), "test": (test, test_labels)}
    parts = {split: importing.read_part(f, y, keys) for split, (f, y) in given.items() if f is not None}
    names = classes.read_text(encoding="utf-8").splitlines() if classes is not None else None
    importing.run(parts, out, click.echo, names=names, replace=replace)


COMMANDS = (import_command,)
