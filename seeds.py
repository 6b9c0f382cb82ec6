"""Seeds of all random numbers: each is named by its purpose, so that no layout and no order of execution changes it."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def seed_of(*purpose: object) -> int:
    """A 63-bit seed named by what it is for, independent of rank, layout and order."""
    text = "/".join(map(str, purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def named_permutation(length: int, *name: str | int) -> NDArray[np.int64]:
    """A random order of range(length), int64 [length], that depends on `length` and `name` alone.

    Sorts the raw words of a counter-based generator. NumPy keeps a bit generator's words the same for ever, which it
    does not promise of `Generator.permutation`: a run resumed under another NumPy must see the same data.
    """
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(generator.random_raw(length), kind="stable").astype(np.int64, copy=False)
