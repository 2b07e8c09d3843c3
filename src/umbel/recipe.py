"""What to run: a TOML file and `--a.b=c` overrides → frozen dataclasses.

A recipe file describes one task and any number of ways to train on it:

    rounds = 150
    [task]
    name = "digits"
    [local]                      # what every method's local training starts from
    lr = 0.1
    [method.floral]              # a label; `name` is the method, by default the label itself
    num_adapters = 4
    [method.floral-oracle]
    like = "floral"              # takes over that table's settings
    router.kind = "oracle"
    [paper]                      # published figures, [mean, standard deviation], to be shown beside ours
    floral = [93.1, 0.4]
    [search]                     # the values that `umbel tune` tries, each with each, for every method alike
    local.lr = [0.05, 0.1, 0.2]
    [search.method.floral]       # and for one of them beside, or instead
    guard = [0.0, 0.02]
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from umbel.cohort import Engine
from umbel.errors import RecipeError, meant
from umbel.methods import METHODS, Method
from umbel.schedule import ARRANGED, Schedule
from umbel.tasks import TASKS, TaskRecipe
from umbel.untrusted import toml_in, toml_of

T = TypeVar("T")
Table = dict[str, Any]
DEEPEST = 32  # tables and lists in one another


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result, and where it runs."""

    label: str  # what the method is called in tables: its name, or a variant's
    task: TaskRecipe
    method: Method
    schedule: Schedule = field(default_factory=Schedule)
    engine: Engine = field(default_factory=Engine)

    def table(self) -> Table:
        """The recipe as a TOML table that `read` turns into this recipe again."""
        return {
            **asdict(self.schedule),
            "task": {"name": name_of(self.task, TASKS), **asdict(self.task)},  # type: ignore[call-overload]
            "engine": asdict(self.engine),
            "method": {self.label: {"name": name_of(self.method, METHODS), **asdict(self.method)}},  # type: ignore[call-overload]
        }

    def identity(self) -> Table:
        """The part of the table that decides the result: all but the engine and how often files are written."""
        return {k: v for k, v in self.table().items() if k not in ("engine", "checkpoint_every")}


def name_of(settings: object, registry: Mapping[str, type]) -> str:
    """The name under which the settings' class is registered; its class name if it is not."""
    names = (name for name, cls in registry.items() if type(settings) is cls)
    return next(names, type(settings).__name__)


def find(name: str) -> Path:
    """The recipe file of that path, or the one of that name that comes with umbel.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {path}")
        return path
    known = shipped()
    if name not in known and name in TASKS:
        there = [own for own, file in known.items() if load(file).get("task", {}).get("name") == name]
        which = f"recipes with it are {', '.join(there)}" if there else "no recipe that comes with umbel has it"
        raise RecipeError(f"{name} is a task, and a recipe is wanted: {which}; or write one (docs/methods.md)")
    if name not in known:
        raise RecipeError(f"there is no recipe {name!r}; {meant(name, known)}")
    return known[name]


def shipped() -> dict[str, Path]:
    """The recipe files that come with umbel, by name; one in a folder is called "folder/name"."""
    folder = Path(str(files("umbel"))) / "recipes"
    return {
        found.relative_to(folder).with_suffix("").as_posix(): found for found in sorted(folder.rglob("*.toml"))
    }


def title_of(path: Path) -> str:
    """What the recipe file is called: its name if it comes with umbel, else the file's name.

    A run folder's recipe.toml is called after the folder.
    """
    for name, known in shipped().items():
        if known.resolve() == path.resolve():
            return name
    return path.stem if path.stem != "recipe" else path.resolve().parent.name


def load(path: Path, overrides: Sequence[str] = ()) -> Table:
    """The file's table with the overrides put in: "a.b=c", where c is TOML or else a plain string.

    Raises:
        RecipeError: the file or an override is not to be read as TOML.
    """
    try:
        table = toml_of(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    check_tables(table)
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is no override; write --key.of.setting=value")
        put(table, key, _value(text))
    check_tables(table)  # an override may have put something else in a table's place
    return table


def check_tables(table: Table) -> None:
    """Raises RecipeError if what has to be a table of settings is none."""
    for key in ("task", "method", "local", "engine", *ARRANGED, "paper", "search"):
        if not isinstance(table.get(key, {}), dict):
            raise RecipeError(f"{key}: a table is wanted, such as [{key}], got {table[key]!r}")


def read(table: Table, label: str) -> Recipe:
    """The recipe of the method called `label` in the table, every key and type checked.

    Raises:
        RecipeError: naming the key that is unknown, missing or of the wrong type, and the nearest known one.
    """
    _check_size(table)
    schedule_keys = {f.name for f in fields(Schedule)}
    _no_strangers(table, schedule_keys | {"task", "engine", "method", "local", "paper", "search"}, "")
    check_tables(table)
    published(table), searched(table, label)  # are checked, but decide nothing
    method_table = _method_table(table, label)
    arranged = _merged(
        {key: table.get(key, {}) for key in ARRANGED}, {key: method_table.pop(key, {}) for key in ARRANGED}
    )
    arranged |= {"pool": method_table.pop("pool")} if "pool" in method_table else {}
    if "task" not in table:
        raise RecipeError("the recipe has no task; add a table [task] with its name, such as name = 'digits'")
    method = _named(method_table, METHODS, f"method.{label}", default=label)
    task = _named(dict(table.get("task", {})), TASKS, "task", default=None)
    schedule = build(Schedule, {k: v for k, v in table.items() if k in schedule_keys} | arranged, "")
    return Recipe(label, task, method, schedule, build(Engine, table.get("engine", {}), "engine"))


def labels(table: Table) -> list[str]:
    """The methods that the table describes, in its order."""
    methods = table.get("method", {})
    return list(methods) if isinstance(methods, dict) else []


def published(table: Table) -> dict[str, tuple[float, float | None]]:
    """The figures of [paper]: label → mean, and standard deviation where there is one.

    Raises:
        RecipeError: an entry is neither [mean, standard deviation] nor a number, or its label no method here.
    """
    found: dict[str, tuple[float, float | None]] = {}
    for label, value in table.get("paper", {}).items():
        if label not in labels(table):
            raise RecipeError(f"paper.{label}: there is no such method here; {meant(label, labels(table))}")
        figures = value if isinstance(value, list) else [value]
        if len(figures) not in (1, 2) or not all(type(figure) in (int, float) for figure in figures):
            raise RecipeError(f"paper.{label}: [mean, standard deviation] or a number is wanted (it is {value!r})")
        found[label] = (float(figures[0]), float(figures[1]) if len(figures) > 1 else None)
    return found


def searched(table: Table, label: str) -> dict[str, list[Any]]:
    """The values that are to be tried for a method, by the dotted name of its setting.

    They are those of [search], which are every method's, and of [search.method.LABEL], which come before them.

    Raises:
        RecipeError: a setting has no list of values, or is not one to be searched; or a label is no
            method's.
    """
    common = dict(table.get("search", {}))
    own = common.pop("method", {})
    if not isinstance(own, dict):
        raise RecipeError(f"search.method: tables such as [search.method.floral] are wanted, got {own!r}")
    for name in own:
        if name not in labels(table) and name not in METHODS:
            raise RecipeError(f"search.method.{name}: there is no such method here; {meant(name, labels(table))}")
    grid: dict[str, list[Any]] = {}
    for where, part in (("search", common), (f"search.method.{label}", own.get(label, {}))):
        if not isinstance(part, dict):
            raise RecipeError(f"{where}: a table of settings is wanted, got {part!r}")
        for key, values in _leaves(part, ""):
            if key in ("like", "name"):
                raise RecipeError(f"{where}.{key}: methods are compared, not searched; name them with --methods")
            if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
                raise RecipeError(
                    f"{where}.{key}: a list of values to try, each once, is wanted (it is {values!r})"
                )
            grid[key] = values
    return grid


def put(table: Table, key: str, value: Any) -> None:
    """Sets what has that dotted name in the table.

    Raises:
        RecipeError: the name goes through a value that is no table.
    """
    *above, last = key.split(".")
    for part in above:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--{key}: {part} is a value, not a table")
    table[last] = value


def build(cls: type[T], table: Any, path: str, under: T | None = None) -> T:
    """An instance of the dataclass from the table; nested dataclasses likewise.

    What the table leaves out is as in `under`, which a method may have other than the class (pFedMe's local.lr).
    """
    if not isinstance(table, dict):
        raise RecipeError(f"{path}: a table is wanted, got {table!r}")
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    _no_strangers(table, known, path)
    values: Table = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if is_dataclass(hints[key]):
            own = _default(cls, key) if under is None else getattr(under, key)
            # PEFT's plan of an adapter says all of it.
            own = None if isinstance(value, dict) and "peft" in value else own
            values[key] = build(hints[key], value, where, own)
            continue
        try:
            values[key] = msgspec.convert(value, hints[key])
        except msgspec.ValidationError as error:
            if isinstance(value, str) and get_origin(hints[key]) is Literal:
                allowed = ", ".join(map(repr, get_args(hints[key])))
                raise RecipeError(f"{where} = {value!r}, but it is one of {allowed}") from None
            quoted = "; a shell takes quotes away: write it within '…'" if str(value).startswith("[") else ""
            told = f"{str(error)[0].lower()}{str(error)[1:]} (it is {value!r}{quoted})"
            raise RecipeError(f"{where}: {told}") from None
    try:
        return cls(**values) if under is None else replace(under, **values)  # type: ignore[type-var]
    except RecipeError as error:
        told = str(error).removeprefix(f"{path.rpartition('.')[2]}: ")  # classes that say their own name
        raise RecipeError(f"{path}: {told}" if path else told) from None


def _default(cls: type, key: str) -> Any:
    """What the field of the dataclass is if nobody says anything; None if somebody has to."""
    own = next(field for field in fields(cls) if field.name == key)
    if own.default_factory is not MISSING:
        return own.default_factory()
    return None if own.default is MISSING else own.default


def _check_size(table: Table) -> None:
    """Raises RecipeError if tables are too deep in one another, or a whole number has more than 64 bits."""
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        inner = [own for outer in level for own in (outer.values() if isinstance(outer, dict) else outer)]
        if huge := [own for own in inner if isinstance(own, int) and not -(1 << 63) <= own < 1 << 63]:
            raise RecipeError(f"a whole number of {huge[0].bit_length()} bits is in it, and 64 are the most")
        level = [own for own in inner if isinstance(own, dict | list)]
    if level:
        raise RecipeError(f"there are tables in one another more than {DEEPEST} deep; no recipe needs that")


def _method_table(table: Table, label: str) -> Table:
    """The method's own settings over those it is `like`, over [local]."""
    methods = table.get("method", {})
    if label not in methods and label not in METHODS:
        raise RecipeError(f"there is no method {label!r}; {meant(label, [*methods, *METHODS])}")
    if strange := [name for name, own in methods.items() if not isinstance(own, dict)]:
        raise RecipeError(f"method.{strange[0]}: a table is wanted, got {methods[strange[0]]!r}")
    own = dict(methods.get(label, {}))
    like = own.pop("like", None)
    if like is not None:
        chain, above = [label], like
        while isinstance(above, str) and above not in chain:
            chain.append(above)
            above = dict(methods.get(above, {})).get("like")
        if above is not None:
            raise RecipeError(f"method.{label}.like: {' → '.join([*chain, str(above)])} goes round in a circle")
        if not isinstance(like, str) or like == label or (like not in methods and like not in METHODS):
            raise RecipeError(
                f"method.{label}.like: there is no other method {like!r}; {meant(str(like), methods)}"
            )
        return _merged({"name": like} | _method_table(table, like), own)
    return _merged({"local": table.get("local", {})}, own)


def _merged(below: Table, above: Table) -> Table:
    """Both tables, the upper one's values first, table by table."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _named(table: Table, registry: Mapping[str, type[T]], path: str, default: str | None) -> T:
    name = table.pop("name", default)
    if not isinstance(name, str) or name not in registry:
        raise RecipeError(f"{path}.name: there is no {name!r}; {meant(str(name), registry)}")
    return build(registry[name], table, path)


def _no_strangers(table: Table, known: set[str], path: str) -> None:
    for key in table:
        if key not in known:
            where = f"{path}.{key}" if path else key
            raise RecipeError(f"{where}: there is no such setting; {meant(key, known)}")


def _leaves(table: Table, path: str) -> Iterator[tuple[str, Any]]:
    """What is not a table, by its dotted name."""
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        yield from _leaves(value, where) if isinstance(value, dict) else [(where, value)]


def _value(text: str) -> Any:
    try:
        return toml_in(f"value = {text}")["value"]
    except ValueError:
        return text
