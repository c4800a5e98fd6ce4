"""YAML as DVC reads it, without what could be meant otherwise or would take all memory."""

import re
from typing import Any

import yaml

MAX_NODES = 100_000  # values in a parameter file
MAX_DIGITS = 300  # digits of a whole number; Python refuses to convert or print very long ones
TEXT_LIMIT = 400  # characters of a parser's error message that are shown

#: Numbers to YAML 1.2, as DVC has it, and text to YAML 1.1, as PyYAML has it: 08, 0o10, 1_0e3.
NUMBER_TO_DVC = re.compile(r"[-+]?(0o?[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+)")


class Loader(yaml.SafeLoader):
    """Reads YAML as DVC does: `1e-3` is a number, and a duplicate key is an error.

    An alias counts as many values as its target, so a few lines cannot expand to billions.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and id(node) not in self._sizes:
            if alias:
                raise yaml.composer.ComposerError(None, None, "an alias inside its own target", node.start_mark)
            inside = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
            size = 1 + sum(self._sizes.get(id(part), 1) for part in inside)
            if size > MAX_NODES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {MAX_NODES:,} values after expanding aliases", node.start_mark
                )
            self._sizes[id(node)] = size
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses duplicate keys. Runs before `<<` merges, because a merged key may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in seen:
                raise _refused(f"duplicate key {name!r}", node)
            seen.add(name)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuses whole numbers that Python could not print or convert to a float, and those that DVC reads otherwise.

        To YAML 1.1, which this is, 010 is 8; to YAML 1.2, as DVC has it, 10. After an edit from one to the other DVC
        would run nothing again.
        """
        if len(node.value) > MAX_DIGITS:
            raise _refused(f"a number of more than {MAX_DIGITS} digits", node)
        if re.match(r"[-+]?0[0-7_]", node.value):
            raise _refused(f"{node.value} can mean base 8; write a number without a leading 0, text in quotes", node)
        _refuse_base_60(node)
        number: int = super().construct_yaml_int(node)
        return number

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """Refuses text without quotes that DVC reads as a number."""
        if node.style is None and NUMBER_TO_DVC.fullmatch(node.value):
            raise _refused(f"{node.value} can be text or a number; put text in quotes", node)
        text: str = super().construct_yaml_str(node)
        return text

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Refuses numbers that DVC reads as text."""
        _refuse_base_60(node)
        number: float = super().construct_yaml_float(node)
        return number


def _refused(why: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _refuse_base_60(node: yaml.ScalarNode) -> None:
    if ":" in node.value:
        raise _refused(f"{node.value} can be text or a number of base 60; put text in quotes", node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)

Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parsed(text: str) -> Any:
    """Parses YAML. Raises ValueError with the reason in one line."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:  # not str(error): it quotes the file, which may hold a URL
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}"[:TEXT_LIMIT]) from None
    # PyYAML's constructors raise errors of many kinds for invalid tags and dates.
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        RecursionError,
    ) as error:
        raise ValueError(" ".join(str(error).split())[:TEXT_LIMIT]) from None
