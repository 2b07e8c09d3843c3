"""own: a task that a Python function of yours makes.

    [task]
    name = "own"
    code = "wards:task"          # module:function, from PYTHONPATH or the working folder

The function takes the seed and returns an `umbel.Task`. In a run across machines every node calls it too, and puts
its own data in place of the task's; on the server a few made-up examples of the right shape are enough then.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from umbel.errors import DataError, RecipeError
from umbel.tasks.task import Task


@dataclass(frozen=True)
class Own:
    """A task that a Python function of yours makes."""

    code: str = ""

    def __post_init__(self) -> None:
        if self.code and not all(self.code.partition(":")):
            raise RecipeError(f'task: code = {self.code!r}, where "module:function" is wanted')

    def load(self, seed: int) -> Task:
        if not self.code:
            raise RecipeError('task: own needs code = "module:function", a function that returns an umbel.Task')
        made = function_of(self.code)(seed)
        if not isinstance(made, Task):
            raise DataError(f"{self.code} returned a {type(made).__name__}, where an umbel.Task is wanted")
        return made


def function_of(place: str) -> Any:
    """The function that "module:function" names, from PYTHONPATH or the working folder.

    Raises:
        DataError: there is none.
    """
    module, _, name = place.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{place}: there is no such function ({error}); is its folder in PYTHONPATH?") from None
    if not callable(found):
        raise DataError(f"{place} is no function, it is {found!r}")
    return found
