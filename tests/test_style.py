"""Rules that a machine can check over the whole package."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from importlib import import_module
from math import isfinite
from pathlib import Path

import pytest
from typer.testing import CliRunner

import umbel
from umbel.cli import app
from umbel.cohort import Engine
from umbel.methods import METHODS, Method
from umbel.methods.protocol import Moving, Summed
from umbel.recipe import labels, load, read, shipped
from umbel.runs import run_recipe
from umbel.tasks import TASKS

SOURCE = Path(umbel.__file__).parent
REPOSITORY = Path(__file__).parents[1]
PATHS = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", PATHS)

# A module imports from lines above its own only; a package's modules from lines above their own in the package.
LAYERS = """
    errors seeds tree flops untrusted heap
    ranges
    clients hazards
    weighting secure privacy
    schedule
    model mixing
    adapters faults robust attacks clock
    train clustering
    methods tasks
    cohort
    costs
    evaluate recipe meeting
    rounds
    folder
    scratch
    pretrainable
    pretraining runs
    onboarding exporting serving
    flower
    tables
    plots
    report
    cli
    __main__
"""
INSIDE = {
    "secure": "settings secrets messages \n fixed_point client \n server \n exchange",
    "privacy": "settings \n accounting clipping",
    "cli": "said \n options watch show settings \n jobs onboarding exporting deploying unread \n comparing \n"
    "tuning \n app",
    "adapters": "places bank \n lora_layers precondition \n lora_folders \n mixture plan \n products \n averaging",
    "methods": "protocol server gate \n routing lora settling \n similarity trusting \n"
    "fedavg local floral ensemble fedit feddpa fl_tac threshold_clustering trust \n"
    "ffa_lora fedsa_lora flexlora fedem ifca fedprox finetune apfl partial local_adapter knnper \n"
    "ditto pfedme fedper fedbn \n fedrep",
    "flower": "wire fingerprint credentials leash arriving facts \n kept \n vault \n protected \n work \n post \n"
    "exchange roster resume summed letters \n attendance answers \n fleet \n lead \n apps \n node \n trial",
    "model": "copies dropout nets pretrained \n stacked \n loss recompute",
    "tasks": "augment corpora partition task \n bases grouped pool texts slots \n"
    "tokens cifar digits femnist mnist shakespeare synthetic own \n vectors language cifar_vit \n"
    "glue dolly flan_feddpa \n"
    "ag_news code_vs_prose multilingual shakespeare_roles \n unused",
}
# A report is made of what lies in run folders, never of a run.
READERS = {"tables", "plots", "report"}
READ = READERS | {"folder", "errors", "untrusted"}

LATE = {
    "Crypto",
    "cryptography",
    "dp_accounting",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "tomli_w",
    "PIL",
    "pyarrow",
    "datasets",
    "peft",
    "transformers",
    "flwr",
}  # imported where they are used: they take their time
NEVER = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "random"}
UNSAFE = {"torch.save", "torch.load", "np.load", "np.save", "torch.serialization.load"}
SEEDING = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.seed",
    "torch.random.seed",
    "torch.cuda.manual_seed",
}
SEEDERS = {"seeds", "tasks.synthetic"}  # the one source of randomness, and draws as published
DRAWS = {
    f"torch.{name}" for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
}
GENERATORS = {"Generator", "Philox"}  # of np.random

# What says what it is by its name, or by the docstring of what it implements.
STATES = {"Shared", "Message", "Private", "Upload"}  # of a method; their fields have comments
IMPLEMENTS = {name for cls in (Method, Summed, Moving) for name in vars(cls) if name[0] != "_"}
IMPLEMENTS |= {"load", "forward", "parse_args"}
PLAIN = {
    "adapters.bank:LowRank.a_name",
    "adapters.bank:LowRank.b_name",
    "adapters.bank:LowRank.a_shape",
    "adapters.bank:LowRank.b_shape",
    "clients:Examples.num_clients",
    "clients:Examples.to",
    "methods.floral:FLoRAL.bank",
    "tables:Group.oracle",
    "tasks.synthetic:Truth.drawn",
    "tasks.task:Task.num_clients",
}


@cache
def parsed(module):
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def imports(module, late=True):
    """The full names of what a module imports; without `late` only what importing it imports.

    What stands under `if TYPE_CHECKING:` is no import.
    """

    def within(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif late or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from within(child)

    return set(within(parsed(module)))


def own_module(name):
    """The module of umbel that an import names, None where it is another package or umbel itself."""
    first, *rest = name.split(".")
    while first == "umbel" and rest:
        known = ".".join(rest)
        if known in PATHS:
            return known
        if f"{known}.__init__" in PATHS:
            return f"{known}.__init__"
        rest.pop()
    return None


def depth(table):
    return {name: level for level, line in enumerate(table.strip().splitlines()) for name in line.split()}


def dotted(node):
    """a.b.c for the expression a.b.c, else an empty string."""
    return ast.unparse(node) if re.fullmatch(r"[\w.]+", ast.unparse(node)) else ""


def attributes(module):
    return {dotted(node) for node in ast.walk(parsed(module)) if isinstance(node, ast.Attribute)}


# Imports.


def test_every_module_has_its_layer():
    tops = {name.split(".")[0] for name in PATHS} - {"__init__"}
    assert set(depth(LAYERS)) == tops
    for package, table in INSIDE.items():
        files = {name.split(".")[1] for name in PATHS if name.startswith(f"{package}.")} - {"__init__"}
        assert set(depth(table)) == files
    assert {name.split(".")[0] for name in PATHS if "." in name} == set(INSIDE)


@every_module
def test_imports_point_one_way(module):
    top, _, own = module.partition(".")
    layers = depth(LAYERS)
    for name in imports(module):
        other = own_module(name)
        if other is None:
            assert not name.startswith("umbel.") or name == "umbel.__version__", (
                f"{module}: which module has {name}?"
            )
            continue
        other_top, _, part = other.partition(".")
        if top != other_top:
            assert top == "__init__" or layers[other_top] < layers[top], f"{module} imports {other}"
        elif own != "__init__":
            inside = depth(INSIDE[top])
            assert part != "__init__" and inside[part] < inside[own], f"{module} imports {other}"  # noqa: PT018


@pytest.mark.parametrize("module", sorted(READERS))
def test_a_report_knows_nothing_of_training(module):
    assert {other for name in imports(module) if (other := own_module(name))} <= READ


@every_module
def test_nothing_unwanted_is_imported(module):
    everywhere = {name.split(".")[0] for name in imports(module)}
    at_once = {name.split(".")[0] for name in imports(module, late=False)}
    assert everywhere.isdisjoint(NEVER)
    assert "flwr" not in everywhere or module.startswith("flower.")
    assert at_once & LATE <= ({"typer"} if module.partition(".")[0] == "cli" else set())


HEAVY = "{'torch', 'numpy', 'matplotlib', 'rich', 'sklearn', 'safetensors', 'msgspec'}"


def fresh(code):
    """What a new interpreter prints last."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def test_import_umbel_loads_nothing_heavy():
    assert fresh(f"import sys, umbel; print({HEAVY} & set(sys.modules))") == "set()"


def test_umbels_help_loads_nothing_heavy():
    code = (
        "import atexit, sys\n"
        "from umbel.cli import main\n"
        f"atexit.register(lambda: print({HEAVY} & set(sys.modules)))\n"
        "sys.argv = ['umbel', '--help']\n"
        "main()"
    )
    assert fresh(code) == "set()"


def test_every_public_name_of_umbel_is_there():
    for name in umbel.__all__:
        assert inspect.isclass(getattr(umbel, name)) or inspect.isfunction(getattr(umbel, name))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        umbel.nothing_of_the_kind  # noqa: B018


# Calls.


@every_module
def test_nothing_is_written_or_read_that_could_run_code(module):
    assert (attributes(module) | imports(module)).isdisjoint(UNSAFE)


@every_module
def test_every_draw_has_a_generator_of_its_own(module):
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute) and dotted(node.value) in ("np.random", "numpy.random"):
            assert node.attr in GENERATORS, ast.unparse(node)
    assert not any(name.startswith("numpy.random") for name in imports(module))
    if module in SEEDERS:
        return
    assert attributes(module).isdisjoint(SEEDING)
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Call) and dotted(node.func) in DRAWS:
            assert "generator" in {word.arg for word in node.keywords}, ast.unparse(node)


@every_module
def test_only_the_command_line_prints(module):
    calls = {dotted(node.func) for node in ast.walk(parsed(module)) if isinstance(node, ast.Call)}
    assert module.startswith("cli.") or calls.isdisjoint({"print", "input"})


@every_module
def test_nothing_is_left_to_be_done(module):
    assert re.findall(r"\b(TODO|FIXME|XXX|HACK)\b", PATHS[module].read_text(encoding="utf-8")) == []


# Docstrings.


def public(node, prefix=""):
    """The functions and classes that a reader may use, by dotted name."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name[0] != "_":
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")


def registered(module, name):
    """Whether it is a method's or a task's class, which the module's docstring is about (see `umbel methods`)."""
    classes = {(cls.__module__, cls.__name__) for cls in (*METHODS.values(), *TASKS.values())}
    return (f"umbel.{module}", name) in classes


@every_module
def test_everything_public_says_what_it_is(module):
    assert ast.get_docstring(parsed(module))
    for name, node in public(parsed(module)):
        owner, _, own = name.rpartition(".")
        excused = name in STATES or registered(module, name) or (owner and own in IMPLEMENTS)
        assert ast.get_docstring(node) or excused or f"{module}:{name}" in PLAIN, f"{name} has no docstring"


def test_nothing_is_excused_that_need_not_be():
    bare = {f"{m}:{name}" for m in PATHS for name, node in public(parsed(m)) if not ast.get_docstring(node)}
    assert bare >= PLAIN


@every_module
def test_docstrings_speak_of_arguments_that_exist(module):
    for name, node in public(parsed(module)):
        text = ast.get_docstring(node) or ""
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
        if section and isinstance(node, ast.FunctionDef):
            told = re.findall(r"^    (\w+): ", section[1], re.MULTILINE)
            named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            taken = [arg.arg for arg in (*named, node.args.kwarg) if arg is not None]
            assert told, f"{name}: Args of nothing"
            assert set(told) <= set(taken), f"{name}: {set(told) - set(taken)}"


# Registries, documents, recipes.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_in_the_documentation(name):
    page = REPOSITORY / "docs" / "methods.md"
    if not page.exists():
        pytest.skip("docs/methods.md does not exist yet")
    assert re.search(rf"\b{name}\b", page.read_text(encoding="utf-8"))


def test_every_task_and_recipe_is_listed_by_umbel_tasks():
    listing = CliRunner().invoke(app, ["tasks"])
    assert listing.exit_code == 0
    for name in (*TASKS, *shipped()):
        assert re.search(rf"^  {name} ", listing.stdout, re.MULTILINE), name


def test_every_method_and_task_says_what_it_is_in_a_line():
    for cls in (*METHODS.values(), *TASKS.values()):
        first = import_module(cls.__module__).__doc__.strip().splitlines()[0]
        assert first.endswith((".", ")")) or ", §" in first
        assert len(first) < 115


def test_every_method_has_a_recipe():
    recipes = [read(table, label) for table in map(load, shipped().values()) for label in labels(table)]
    assert {type(recipe.method) for recipe in recipes} == set(METHODS.values())


def _attending(*labels):
    """Overrides for the small base, which is a GPT-2."""
    return [f'method.{label}.adapter.peft.target_modules=["c_attn"]' for label in labels]


# Of the tasks, or recipes, that read data sets a few clients are enough, and noise in the same format is as good.
SMALL = {
    "mnist": ["task.num_clients=8", "clients_per_round=2"],
    "cifar10": ["task.num_clients=4", "task.reduction=0.1", "clients_per_round=2", "local.batch_size=8"],
    "cifar100": [
        "task.num_clients=10",
        "clients_per_round=2",
        "task.samples_per_client=10",
        "local.batch_size=8",
    ],
    "shakespeare": ["task.num_clients=2", "clients_per_round=2", "task.hidden=8", "task.least_letters=161"],
    "languages": ["task.tokens_per_client=512", "clients_per_round=3", "local.steps=2"],
    "femnist_digits": ["clients_per_round=2"],
    "fl_tac": [
        "task.base=models/stories260K",
        "task.pooling=mean",
        "clients_per_round=2",
        "local.steps=2",
        *_attending("fl_tac", "fedit"),
    ],
    "flan_feddpa": ["clients_per_round=2", "local.steps=2", "local.batch_size=4", *_attending("fedit", "floral")],
    "dolly": ["clients_per_round=2", "local.steps=2", *_attending("fl_tac", "fedit")],
    "cifar_vit": ["task.base=models/vit", "clients_per_round=2", "local.steps=2", "local.batch_size=4"],
    "fl_tac_embedded": ["task.base=models/stories260K", "clients_per_round=2", "local.steps=2"],
}
# Cells that differ from another one in a setting of the task: labels that the other one has are read, not run.
ALIKE = {
    **{f"table1/{cell}": "table1/mnist_ls" for cell in ("mnist_r", "mnist_r_5", "mnist_ls_5")},
    **{f"table1/{cell}": "table1/cifar10_ls" for cell in ("cifar10_r", "cifar10_r_5", "cifar10_ls_5")},
    "table1/cifar100": "table1/cifar100_5",
}


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name, path in shipped().items() for label in labels(load(path))]
)
def test_every_label_of_every_recipe_runs_a_round(name, label, tiny_data):
    task = load(shipped()[name])["task"]["name"]
    recipe = read(load(shipped()[name], ["rounds=1", *SMALL.get(name, SMALL.get(task, ()))]), label)
    assert recipe.label == label
    assert read(recipe.table(), label) == recipe
    if name in ALIKE and label in labels(load(shipped()[ALIKE[name]])):
        return
    if name.startswith("table1/cifar") and label not in ("fedavg", "floral", "local-adapter"):
        return
    result = run_recipe(replace(recipe, engine=Engine(mode="stacked")))
    assert len(result.history) == 1
    assert isfinite(result.figures["loss"])
    json.dumps(result.history)
