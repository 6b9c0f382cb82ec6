"""Random orders from seeds named by what they are for."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray


def named_permutation(length: int, *name: str | int) -> NDArray[np.int64]:
    """A random order of range(length), int64 [length], that depends on `length` and `name` alone.

    Sorts the raw words of a counter-based generator. NumPy keeps a bit generator's words the same for ever, which it
    does not promise of `Generator.permutation`: a run resumed under another NumPy must see the same data.
    """
    digest = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.argsort(generator.random_raw(length), kind="stable").astype(np.int64, copy=False)
