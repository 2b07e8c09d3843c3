"""Memory that is freed is taken again."""

import subprocess
import sys

import pytest

ALLOCATES = """
import resource, torch
from umbel.heap import keep_freed_memory

def faults(pieces, rows):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.ones(rows, 1 << 10) for _ in range(pieces)]  # of rows · 4 kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(128, 256), faults(128, 256))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_what_is_freed_is_taken_again():
    done = subprocess.run([sys.executable, "-c", ALLOCATES], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second <= first / 4
