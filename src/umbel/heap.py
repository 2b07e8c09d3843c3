"""What a step frees the next one takes again: on Linux freed memory stays with the process.

By itself glibc gives the top of its heap back to the system as soon as a step has freed it, and the system clears
and maps it anew for the next step, in pages of 4 kB. For the program umbel alone: whoever imports umbel
decides for their own process.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """From now on the process keeps what it frees, and has large tensors in large pages.

    Its size stays at its largest; pieces of more than 32 MB are given back all the same. To be called before the
    first tensor is made, for PyTorch looks then whether large pages are wanted (unless the user has said so in
    THP_MEM_ALLOC_ENABLE). Where the C library is another one than glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
