"""Plain YAML data to config dataclasses: types checked, unknown keys refused with the nearest known one."""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from lorafusion_megatron.config.rules import show
from lorafusion_megatron.errors import UserError


def join(path: str, key: str) -> str:
    """The key path of ``key`` within ``path``."""
    return key if not path else f"{path}{key}" if key.startswith("[") else f"{path}.{key}"


def nearest(word: object, known: Iterable[str]) -> str:
    """A remedy that names the nearest known word, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word)[:80], names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"use one of: {', '.join(names)}"


def aliases(cls: type) -> dict[str, str]:
    """Second spellings of a section's keys -> first spelling."""
    return {f.metadata["alias"]: f.name for f in dataclasses.fields(cls) if "alias" in f.metadata}


class Builder:
    """Builds config dataclasses out of plain data.

    Args:
        folder: where relative input paths are looked up that don't exist in the current directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def section[T](self, cls: type[T], raw: object, path: str) -> T:
        """One section.

        Args:
            cls: its dataclass.
            raw: its YAML data; null stands for a section without keys.
            path: its key path, for messages.

        Raises:
            UserError: not a mapping, an unknown, doubled or missing key, a value of a wrong type or out of its range.
        """
        if raw is None:
            raw = {}
        if not isinstance(raw, dict):
            raise UserError(f"got {show(raw)}", rule="must be a section of keys", remedy="write key: value", key=path)
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(typing.cast(typing.Any, cls))}
        names = {name: name for name in fields} | aliases(cls)
        values: dict[str, object] = {}
        for key, value in raw.items():
            where = join(path, key if isinstance(key, str) and re.fullmatch(r"[\w.-]{1,80}", key) else show(key))
            name = names.get(key) if isinstance(key, str) else None
            if name is None:
                self._refuse(cls, key, where, names)
            assert name is not None
            converted = self.value(hints[name], value, where, is_output="output" in fields[name].metadata)
            if "text_or_file" in fields[name].metadata and isinstance(converted, str) and "{" not in converted:
                converted = str(self._path(converted, where, is_output=False))
            if name in values and values[name] != converted:
                raise UserError(
                    f"got {show(converted)}, and {show(values[name])} under its other spelling",
                    rule="two spellings of one key must agree",
                    remedy="remove one of them",
                    key=where,
                )
            values[name] = converted
        for name, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise UserError("the key is missing", rule="it is required", remedy="add it", key=join(path, name))
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(error.given, rule=error.rule, remedy=error.remedy, key=join(path, error.key)) from None

    def value(self, hint: typing.Any, raw: object, key: str, *, is_output: bool = False) -> object:
        """One value, as the type ``hint`` asks for it."""
        origin = typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            options = [option for option in typing.get_args(hint) if option is not types.NoneType]
            if raw is None and len(options) < len(typing.get_args(hint)):
                return None
            fixed = [option for option in options if typing.get_origin(option) is typing.Literal]
            if fixed and len(options) > 1 and isinstance(raw, str):
                return self.value(fixed[0], raw, key)
            return self.value(next(o for o in options if o not in fixed or len(options) == 1), raw, key)
        if origin is typing.Literal:
            return _literal(typing.get_args(hint), raw, key)
        if origin is tuple:
            item = typing.get_args(hint)[0]
            if item is str and isinstance(raw, str):
                raw = [raw]
            if not isinstance(raw, list):
                raise _wrong(raw, "a list", key)
            return tuple(self.value(item, value, f"{key}[{index}]") for index, value in enumerate(raw))
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), raw, key)
        if hint is Path:
            return self._path(raw, key, is_output=is_output)
        return _scalar(hint, raw, key)

    def _path(self, raw: object, key: str, *, is_output: bool) -> Path:
        if not isinstance(raw, str) or not raw or "\0" in raw:
            raise _wrong(raw, "a path", key)
        _check_unicode(raw, key)
        path = Path(os.path.expanduser(raw))
        beside = self.folder / path
        # os.path.exists, unlike Path.exists, takes names too long for the file system for missing ones.
        return beside if not is_output and not os.path.exists(path) and os.path.exists(beside) else path

    @staticmethod
    def _refuse(cls: type, key: object, where: str, known: Iterable[str]) -> typing.NoReturn:
        reason = getattr(cls, "not_supported", {}).get(key) if isinstance(key, str) else None
        if reason:
            raise UserError("this key is not supported yet", rule=reason, remedy="remove it", key=where)
        raise UserError("unknown key", rule="only known keys are read", remedy=nearest(key, known), key=where)


def _wrong(raw: object, wanted: str, key: str) -> UserError:
    return UserError(
        f"got {show(raw)}",
        rule=f"must be {wanted}",
        remedy="mend the value (quote it to make it text)" if wanted in ("text", "a path") else "mend the value",
        key=key,
    )


def _literal(options: tuple[object, ...], raw: object, key: str) -> object:
    if isinstance(raw, str) and raw in options:
        return raw
    words = [str(option) for option in options]
    raise UserError(f"got {show(raw)}", rule=f"must be one of {', '.join(words)}", remedy=nearest(raw, words), key=key)


def _check_unicode(text: str, key: str) -> None:
    """YAML's escapes can make half of a surrogate pair, which no file name, terminal or tokenizer takes."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(
            f"got {show(text)}", rule="half of a surrogate pair is no character", remedy="mend the text", key=key
        )


def _scalar(hint: type, raw: object, key: str) -> object:
    if hint is bool and isinstance(raw, bool):
        return raw
    if hint is str and isinstance(raw, str):
        _check_unicode(raw, key)
        return raw
    if hint in (int, float) and isinstance(raw, int | float) and not isinstance(raw, bool):
        if isinstance(raw, float) and not math.isfinite(raw):
            raise _wrong(raw, "a finite number", key)
        if abs(raw) > 1 << 64:
            raise _wrong(raw, "within 64 bits", key)
        if hint is float:
            return float(raw)
        if int(raw) == raw:
            return int(raw)
    wanted = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[hint]
    raise _wrong(raw, wanted, key)
