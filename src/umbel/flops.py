"""How much arithmetic a piece of work is: the FLOPs of its matrix products and convolutions."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WHOLE: set[Any] = set()  # operators that have shown to be made of no others; to ask costs more than most of them


class CountedFlops(TorchDispatchMode):
    """Counts in `total`, from PyTorch's own formulas, what is computed inside the `with` block, backward too.

    Like torch.utils.flop_counter.FlopCounterMode, but the first use does not load the compiler, which takes
    seconds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func not in WHOLE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            WHOLE.add(func)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
