"""Seeds of all random numbers, each named by its purpose: no layout and no order of execution changes a seed."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def seed_of(*purpose: object) -> int:
    """Return a 63-bit seed that depends on the words of its purpose alone, not on rank, layout or order."""
    text = "/".join(map(str, purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def named_permutation(length: int, *name: str | int) -> NDArray[np.int64]:
    """Return a random order of range(length), int64 [length], that depends on `length` and `name` alone.

    The order sorts the raw words of a counter-based generator. NumPy keeps the words of a bit generator the same in
    every version, but not the results of `Generator.permutation`. A run resumed under another NumPy must read the same
    data.
    """
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(generator.random_raw(length), kind="stable").astype(np.int64, copy=False)
