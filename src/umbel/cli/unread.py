"""Settings of the command line that nothing reads, because of what another setting is."""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from umbel.cli.options import lineage

if TYPE_CHECKING:
    from umbel.recipe import Recipe

Values = tuple[Any, ...]
COMPARED: Values = ("weights", "validation", "predictions")
WHOM = ("threshold", "top_k", "topology", "self_weight", "staleness", "begin", "every")
ADAPTIVE: Values = ("adam", "yogi")
# By class: another setting, and for each setting the values of that one with which it is read.
READ_WITH: dict[str, list[tuple[str, dict[str, Values]]]] = {
    "Router": [
        ("kind", dict.fromkeys(("temperature", "examples"), ("em",))),
        ("kind", dict.fromkeys(("lr", "noise", "noise_rounds"), ("gradient",))),
    ],
    "FLoRAL": [("router.kind", {"restart_below": ("em",)}), ("send_top", {"restart_below": (0,)})],
    "ServerOptimizer": [
        ("kind", {"momentum": ("momentum",)}),
        ("kind", dict.fromkeys(("beta1", "beta2", "eps", "bias_correction"), ADAPTIVE)),
    ],
    "LocalTraining": [
        ("optimizer", dict.fromkeys(("beta1", "beta2", "eps"), ("adamw",))),
        ("decay", {"final": ("cosine",)}),
    ],
    "Trust": [
        ("scheme", dict.fromkeys(("temperature", "mode"), COMPARED)),
        ("scheme", {"top": ("predictions",)}),
        ("scheme", dict.fromkeys(WHOM, (*COMPARED, "uniform", "oracle"))),
    ],
    "FedDPA": [
        ("variant", {"local_weight": ("T",)}),
        ("gate", {"samples": ("instance",)}),
    ],
    "Weighting": [("rule", dict.fromkeys(("a", "b"), ("feddisco",))), ("rule", {"eta": ("rea",)})],
}


def unread(overrides: Sequence[str], table: dict[str, Any], recipes: "Mapping[str, Recipe]") -> list[str]:
    """What to say of each override "a.b=c" that changes nothing for any of the methods that it is for.

    Args:
        overrides: of a recipe.
        table: the recipe's.
        recipes: by label.
    """
    said = []
    for override in overrides:
        key = override.partition("=")[0]
        first, *rest = key.split(".")
        meant = [label for label in recipes if first != "method" or rest[0] in lineage(table, label)]
        found = [_of(key, recipes[label]) for label in meant]
        reached = [why for there, why in found if there]
        if reached and all(reached):
            said.append(f"--{key} changes nothing: {reached[0]}")
    return said


def _of(key: str, recipe: "Recipe") -> tuple[bool, str]:
    """Whether the recipe has that setting, and why nothing reads it; "" if something does."""
    *path, last = key.split(".")
    own: Any = recipe.method
    if path[:1] == ["method"]:
        path = path[2:]
    if path and hasattr(recipe.schedule, path[0]):
        own = recipe.schedule
    if path[:1] == ["weighting"] and getattr(recipe.method, "mixes_clients", False):
        return True, "here every client's trust decides how much another counts"
    for part in path:
        own = getattr(own, part, None)
    if not hasattr(own, last):
        return False, ""
    for switch, read in READ_WITH.get(type(own).__name__, ()):
        value = attrgetter(switch)(own)
        if last in read and value not in read[last]:
            wanted = " or ".join(repr(one) for one in read[last])
            return True, f"{last} is read with {switch} = {wanted}, and {switch} is {value!r}"
    return True, ""
