"""Lists the texts that a user can see: `python tests/messages.py` writes tests/golden/messages.txt.

These are all string expressions of two or more words in `cache/` and `pipeline/` (errors, notes, printed lines, help),
and the docstrings of commands. Values that are filled in at run time appear as {expression}. Other docstrings are left
out. A reader can check in one place whether the texts are clear.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "messages.txt"

WORDS = re.compile(r"[A-Za-z]{2,}[,;:)}'\"`]* [({'\"`]?[A-Za-z]|^[^{]*[a-z]{2,}[:,;] \{")


def messages() -> dict[str, list[str]]:
    """Path of a source file relative to the repository -> its texts in order; files without texts are left out."""
    paths = sorted(path for folder in ("cache", "pipeline") for path in (ROOT / folder).rglob("*.py"))
    listed = {path.relative_to(ROOT).as_posix(): texts(path.read_text(encoding="utf-8")) for path in paths}
    return {path: lines for path, lines in listed.items() if lines}


def texts(source: str) -> list[str]:
    """The texts in the source of a module, each once and in one line."""
    return list(dict.fromkeys(_inside(ast.parse(source))))


def _inside(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
        return
    if isinstance(node, ast.FunctionDef) and any("command(" in ast.unparse(d) for d in node.decorator_list):
        yield " ".join((ast.get_docstring(node) or "").split())
    if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
        text = " ".join(_template(node).split())
        if isinstance(node, ast.Constant) and not isinstance(node.value, str):
            return
        if not isinstance(node, ast.BinOp) or _is_text(node):
            if WORDS.search(text):
                yield text
            return
    for child in ast.iter_child_nodes(node):
        yield from _inside(child)


def _is_text(node: ast.expr) -> bool:
    """True for a string and for a sum that begins or ends with one."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (_is_text(node.left) or _is_text(node.right))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _template(node: ast.expr) -> str:
    """The text of an expression, with each part that is not a text in braces."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(_template, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _is_text(node):
            return _template(left) + _template(right)
        case ast.FormattedValue(value=value):
            return _template(value) if isinstance(value, ast.IfExp) else _code(value)
        case ast.IfExp(body=body, orelse=orelse):
            return f"{{{_template(body)} | {_template(orelse)}}}"
    return _code(node)


def _code(node: ast.AST) -> str:
    """An expression in braces, with one kind of quotes: which ones `ast` takes hangs on the version of Python."""
    return f"{{{ast.unparse(node)}}}".replace('"', "'")


def page() -> str:
    """The list as text: each file, then its texts."""
    parts = ["Texts that a user can see. Written by: python tests/messages.py"]
    parts += ["\n".join([path, *(f"  {line}" for line in lines)]) for path, lines in messages().items()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(page(), encoding="utf-8")
