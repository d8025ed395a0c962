"""Reference pages made from the code: the run file from its dataclasses, the commands from their parsers."""

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from lorafusion_megatron.cli.main import COMMANDS, PROGRAM, build_parser
from lorafusion_megatron.config import RunConfig

NOTICE = "<!-- Made by python -m scripts.generate; change the code and run it again. -->\n\n"


def run_file_page() -> str:
    """Every key of the run file: type, default, what it does."""
    lines = [
        NOTICE,
        "# The run file\n\n",
        "YAML. Unknown keys are errors that name the nearest known one. Every value can be overridden on the command "
        "line, after the run file: `runtime.seed=7`, `jobs[0].peft.r=8`, or by the job's name, "
        "`jobs.summaries.optimizer.lr=1e-4`. Relative input paths are looked up in the current directory, then beside "
        "the run file; output goes to the current directory. `configs/reference.yaml` is the same list as a file to "
        "copy from.\n",
    ]
    for path, cls in sections(RunConfig, ""):
        if path:
            lines.append(f"\n## `{path}` {{#{anchor(path)}}}\n\n{inspect.getdoc(cls)}\n")
        lines.append("\n| key | type | default | |\n| --- | --- | --- | --- |\n")
        texts, types = attribute_docs(cls), annotations(cls)
        for field in dataclasses.fields(cls):
            inner = section_of(cls, field.name)
            if inner is None:
                kind, default = code(types[field.name]), default_of(field)
            else:
                name = join(path, field.name, cls)
                kind, default = f"[section{'s, a list' if name.endswith('[]') else ''}](#{anchor(name)})", ""
                if field.default is dataclasses.MISSING:
                    default = "required"
            lines.append(f"| `{field.name}` | {kind} | {default} | {texts[field.name]} |\n")
    return "".join(lines)


def sections(cls: type, path: str) -> Iterator[tuple[str, type]]:
    """(key path, dataclass) of a section and all within it, in the order of the file."""
    yield path, cls
    for field in dataclasses.fields(cls):
        inner = section_of(cls, field.name)
        if inner is not None:
            yield from sections(inner, join(path, field.name, cls))


def section_of(cls: type, name: str) -> type | None:
    """The dataclass that a field holds, alone or in a list."""
    hint = typing.get_type_hints(cls)[name]
    return next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def join(path: str, name: str, cls: type) -> str:
    """The key path of a field; a list of sections ends in ``[]``."""
    is_list = typing.get_origin(typing.get_type_hints(cls)[name]) is tuple
    return f"{path}.{name}".lstrip(".") + ("[]" if is_list else "")


def anchor(path: str) -> str:
    """The id of a section's heading."""
    return path.replace("[]", "").replace(".", "-")


def attribute_docs(cls: type) -> dict[str, str]:
    """Field -> the string below it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    out = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            out[field.target.id] = " ".join(str(text.value.value).split()).replace("|", "&#124;")
    return out


def annotations(cls: type) -> dict[str, str]:
    """Field -> its type in the run file's words."""
    return {name: type_name(hint) for name, hint in typing.get_type_hints(cls).items() if name != "not_supported"}


def type_name(hint: Any) -> str:
    """A type in the run file's words: ``path``, ``whole number``, ``null`` …"""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"list of {type_name(args[0])}"
    if args:
        return " | ".join(type_name(arg) for arg in args)
    words = {"str": "text", "int": "whole number", "float": "number", "bool": "true | false", "NoneType": "null"}
    return words.get(hint.__name__, hint.__name__.lower())


def default_of(field: "dataclasses.Field[Any]") -> str:
    """A default as YAML would have it."""
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    if value is None or isinstance(value, bool):
        return "`null`" if value is None else f"`{str(value).lower()}`"
    return f"`[{', '.join(value)}]`" if isinstance(value, tuple) else f"`{value}`"


def commands_page() -> str:
    """Every command with its arguments."""
    lines = [
        NOTICE,
        "# Commands\n\n",
        f"`{PROGRAM} COMMAND`. All end with exit status 0 when all is well, 2 for input that can be mended (one line "
        "says what was given, the rule and the remedy, and names the key), 130 after Ctrl-C; `train` also with those "
        "of [operations](../operations.md#exit-statuses).\n",
    ]
    for name, summary in COMMANDS.items():
        parser = build_parser(name)
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        lines.append(f"\n## {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{arguments(commands.choices[name])}")
    return "".join(lines)


def arguments(parser: argparse.ArgumentParser) -> str:
    """A table of a parser's arguments, and one for each command within it."""
    rows, inner = [], ""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                inner += f"\n### {parser.prog.split()[-1]} {name}\n\n{arguments(sub)}"
            continue
        metavar = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        value = "|".join(map(str, action.choices)) if action.choices else str(metavar)
        words = f"{action.option_strings[-1]} {value}" if action.option_strings else f"{value}"
        default = "" if action.default in (None, False, [], "") or "default" in str(action.help) else action.default
        note = "; ".join(filter(None, (action.help or "", f"default {default}" if default != "" else "")))
        note += "; required" if action.required and action.option_strings else ""
        note = re.sub(r"\s+", " ", note.lstrip("; ")).replace("|", "&#124;").replace("%%", "%")
        rows.append(f"| {code(words.strip())} | {note} |\n")
    table = "| argument | |\n| --- | --- |\n" + "".join(rows) if rows else ""
    return table + inner


def code(text: str) -> str:
    """Text in code type within a table."""
    return f"<code>{text.replace('|', '&#124;').replace('<', '&lt;')}</code>" if "|" in text else f"`{text}`"
