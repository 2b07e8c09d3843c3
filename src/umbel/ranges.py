"""The ranges of settings, told where a value lies outside, and the groups of tensors that they name."""

from collections.abc import Iterable

from umbel.errors import RecipeError, meant


def check_ranges(settings: object, **ranges: str) -> None:
    """Refuse a setting that does not lie in its range.

    Args:
        settings: what has them as attributes: numbers, or tuples or dictionaries of which each number is meant.
        ranges: by the name of a setting, an interval in the usual notation, such as "[0, 1)" or "(0, inf)".

    Raises:
        RecipeError: the first that does not lie in its range, with its value. NaN lies in none.
    """
    for key, interval in ranges.items():
        value = getattr(settings, key)
        held = {"": value}
        if isinstance(value, dict):
            held = {f".{name}": of_name for name, of_name in value.items()}
        elif isinstance(value, tuple):
            held = {f"[{at}]": of_place for at, of_place in enumerate(value)}
        for place, number in held.items():
            if not _lies(number, interval):
                raise RecipeError(f"{key}{place} = {number}, but it must be {_words(interval)}")


def check_groups(setting: str, named: Iterable[str], known: Iterable[str]) -> None:
    """Raises RecipeError if the setting names a group that is not among those that are known to be summed."""
    for name in named:
        if name not in known:
            raise RecipeError(f"{setting}.{name}: there is no such group in the run's sums; {meant(name, known)}")


def _lies(number: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number > low if interval[0] == "(" else number >= low
    below = number < high if interval[-1] == ")" else number <= high
    return above and below


def _words(interval: str) -> str:
    low, high = (end.strip() for end in interval[1:-1].split(","))
    if high == "inf":
        return f"{'above' if interval[0] == '(' else 'at least'} {low}"
    return f"in {interval}"
