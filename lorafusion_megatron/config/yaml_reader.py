"""YAML as run files use it: safe, without doubled keys, with numbers read the way people write them."""

import re
from typing import Any

import yaml

from lorafusion_megatron.config.rules import show
from lorafusion_megatron.errors import UserError

MAX_CHARACTERS = 1 << 22
"""Longest run file, 4 Mi characters: a thousand jobs take a tenth of it."""


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses doubled keys and resolves numbers by YAML 1.2.

    YAML 1.1 reads ``2e-4`` as a string, ``010`` as 8, ``1:30`` as 90 and ``2024-01-01`` as a date; here the first is
    a float and the rest stay strings.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and type are PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As PyYAML's; a key that comes twice is an error.

        Asked here and not where the mapping is built: by then a merge (``<<``) may have put keys of other mappings in.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {show(key.value)} comes twice", key.start_mark)
                seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace ``<<`` by what it merges: a mapping's own keys go first, then earlier mappings before later ones.

        PyYAML 6.0.4 compares keys by where they lie in memory: a merged ``r`` wins over an own one where that mapping
        is merged again, and of a list of mappings the last one wins.
        """
        merged: dict[object, tuple[yaml.Node, yaml.Node]] = {}
        merges = [value for key, value in node.value if key.tag == _MERGE]
        node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        for value in merges:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "<< merges something else than a section or a list of them", source.start_mark
                    )
                self.flatten_mapping(source)
                for pair in source.value:
                    merged.setdefault(_identity(pair[0]), pair)
        own = {_identity(key) for key, _ in node.value}
        node.value = [pair for key, pair in merged.items() if key not in own] + node.value


def _identity(key: yaml.Node) -> object:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][\d_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def parse_yaml(text: str, *, source: str) -> object:
    """The value of one YAML document.

    Args:
        text: the document.
        source: what to call it in a message: the run file, or an override.

    Raises:
        UserError: not YAML, a doubled key, an object that is not plain data, too deep or too long.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{len(text)} characters",
            rule=f"a run file has at most {MAX_CHARACTERS}",
            remedy="give a run file (data sets are given by path)",
            key=source,
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        given = " ".join(part for part in (error.context, error.problem) if part) + where
        rule = "each key may come once" if "comes twice" in given else "must be valid, plain YAML"
        raise UserError(given, rule=rule, remedy="mend that line", key=source) from None
    except yaml.YAMLError as error:
        raise UserError(
            show(str(error)), rule="must be valid, plain YAML", remedy="mend or remove that text", key=source
        ) from None
    except RecursionError:
        raise UserError(
            "lists or sections nested hundreds deep", rule="must be valid, plain YAML", remedy="flatten it", key=source
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # PyYAML's constructors of tagged scalars (`!!int x`, `!!bool y`) let these through.
        raise UserError(
            f"a value does not fit its type ({show(str(error))})",
            rule="must be valid, plain YAML",
            remedy="remove the tag or mend the value",
            key=source,
        ) from None
