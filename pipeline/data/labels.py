"""Labels as text, and the usual names of splits."""

from collections.abc import Sequence

from h2t.pipeline.base.errors import UserError

#: Split -> names that folders, files and columns usually give it.
USUAL = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}


def split_of(name: str) -> str | None:
    """The split that a usual name stands for (`Validation` -> `val`), or None."""
    plain = name.strip().lower()
    return next((split for split, names in USUAL.items() if plain in names), None)


def numbered(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """(class names, label of each image) of text labels.

    Classes are sorted by name, or by value if every name is a whole number. So they do not depend on the images' order.
    """
    names = set(texts)
    whole = all(name.isascii() and name.isdigit() and len(name) < 19 for name in names)
    classes = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    number = {name: j for j, name in enumerate(classes)}
    return classes, [number[text] for text in texts]


def check_text(value: object, where: str) -> str:
    """`value` as the text of a label. Raises UserError, with `where` in front, for an empty one and for other types."""
    if isinstance(value, bool | int):
        return str(value)
    if not isinstance(value, str):
        got = "none" if value is None else f"{value!r:.60}"
        raise UserError(f"{where}: a label must be text or a whole number; got {got}; correct the file")
    if not value.strip():
        raise UserError(f"{where}: a label must not be empty; got {value!r:.60}; add the label or remove the row")
    return value.strip()
