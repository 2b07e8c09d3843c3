"""What can be set: the fields of the settings' classes, with their defaults and what their classes say of them."""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from textwrap import dedent
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from umbel.cli.said import print_table
from umbel.errors import RecipeError, meant


class Setting(NamedTuple):
    """One setting."""

    name: str  # with the tables it is in, "router.kind"
    default: str  # as TOML writes it; empty where somebody has to say it
    said: str  # what it is, and the words that it may be; empty where the name says it all


def show_settings(name: str, registry: Mapping[str, type], title: str) -> None:
    """A table of one class's settings.

    Raises:
        RecipeError: nothing is registered under that name.
    """
    if name not in registry:
        raise RecipeError(f"there is no {name!r}; {meant(name, registry)}")
    print_settings(title, registry[name])


def print_settings(title: str, cls: type) -> None:
    """A table of the class's settings."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=40)
    table.add_column("what it is")
    for setting in settings_of(cls):
        table.add_row(*(escape(part) for part in setting))
    print_table(title, table)
    print()


def settings_of(cls: type, prefix: str = "", own: Any = None) -> Iterator[Setting]:
    """The settings of a dataclass, table by table; defaults are those of `own`, if it is given."""
    told, hints = _told(cls), get_type_hints(cls)
    for field in fields(cls):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = default if own is None else getattr(own, field.name)
        name = f"{prefix}{field.name}"
        if is_dataclass(default):
            yield from settings_of(type(default), f"{name}.", default)
        else:
            said, words = told.get(field.name, ""), _words(hints[field.name])
            if any(word not in said for word in words):
                said = f"{', '.join(words)}{'; ' if said else ''}{said}"
            yield Setting(name, "" if default is MISSING else _toml(default), said)


def _words(hint: Any) -> list[str]:
    """What may be written where a setting is one of several words or numbers; nothing for others."""
    return [_toml(word) for word in get_args(hint)] if get_origin(hint) is Literal else []


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(own)}' for key, own in value.items())} }}" if value else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


def _told(cls: type) -> dict[str, str]:
    """What a class says of its fields, in comments behind them or in its docstring."""
    names = {field.name for field in fields(cls)}
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _in_docstring(base.__doc__ or "", names) | _in_comments(base)
    return {name: text for name, text in found.items() if name in names}


def _in_docstring(text: str, names: set[str]) -> dict[str, str]:
    """The entries "name: what it is" of a docstring; lines that stand deeper go on with one."""
    found: dict[str, str] = {}
    current, depth = "", 0
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        match = re.match(r"\s*(\w+(?:, \w+)*): (.+)", line)
        if match and set(match[1].split(", ")) & names:
            current, depth = match[1], indent
            found |= dict.fromkeys(current.split(", "), match[2].strip())
        elif current and line.strip() and indent > depth:
            found |= {name: f"{found[name]} {line.strip()}" for name in current.split(", ")}
        else:
            current = ""
    return {name: " ".join(own.split()) for name, own in found.items()}


def _in_comments(cls: type) -> dict[str, str]:
    """The comments behind a class's fields."""
    try:
        source = dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class of a console has no file
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            found |= {node.target.id: " ".join(own)} if own else {}
    return found
