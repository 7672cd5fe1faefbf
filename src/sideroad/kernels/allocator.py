"""The C allocator's habits: glibc's defaults give every large tensor back to the kernel and fault it in again."""

from __future__ import annotations

import ctypes
import logging
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Option numbers of `mallopt(3)`."""
LARGEST_INT = 2**31 - 1
TOP_PAD_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory in the process, for the rest of its life.

    A training step frees and takes the same gigabytes again and again; by default each large block is a fresh mapping
    whose pages the kernel must clear once more. The peak does not change; between steps the memory stays with us.

    Returns:
        Whether the allocator took the settings; False where the C library is not glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, TOP_PAD_BYTES))
    taken = all(mallopt(option, value) == 1 for option, value in settings)
    log.debug("allocator keeps freed memory: %s", taken)
    return taken
