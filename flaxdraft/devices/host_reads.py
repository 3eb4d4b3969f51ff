"""The one way from a device to the host in the steady loop of training.

A read waits for everything that was started before it, so it belongs to the steps that log. Reads are counted, and on
an accelerator the loop forbids every other implicit one (`only_counted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

_count = 0


def read(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole, in every process."""
    global _count
    _count += 1
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]  # others are on the host already
    whole = all(x.is_fully_addressable or x.is_fully_replicated for x in arrays)
    return jax.device_get(tree) if whole else multihost_utils.process_allgather(tree, tiled=True)


def count() -> int:
    """Reads since the process started."""
    return _count


@contextmanager
def only_counted() -> Iterator[None]:
    """Within it, an array that becomes a number other than through `read` is an error. (The guard does not see a CPU,
    whose arrays are on the host already.)"""
    with jax.transfer_guard_device_to_host("disallow"):
        yield


@contextmanager
def allowed() -> Iterator[None]:
    """Within it any read may happen: saving a checkpoint is one long read."""
    with jax.transfer_guard_device_to_host("allow"):
        yield
