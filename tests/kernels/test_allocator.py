"""Freed memory stays: taking it again faults no page."""

import subprocess
import sys

import pytest

from sideroad.kernels import allocator

COUNT_FAULTS = """
import resource, torch
from sideroad.kernels.allocator import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert keep_freed_memory()
def work():
    for _ in range(10):
        torch.ones(4_000_000)
work()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(not allocator.keep_freed_memory(), reason="the C library is not glibc")
def test_large_tensors_are_not_faulted_in_again():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    pages = 10 * 4_000_000 * 4 // 4096
    assert int(done.stdout) < pages / 100


def test_elsewhere_it_says_no(monkeypatch):
    monkeypatch.setattr(allocator.platform, "system", lambda: "Darwin")
    assert allocator.keep_freed_memory() is False
