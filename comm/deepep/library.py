"""DeepEP as found on this machine, or the reasons why it cannot send a run's tokens.

Two generations of its interface are supported: `deep_ep.Buffer`, with which DeepSeek-V3's kernels were published
(NVSHMEM), and `deep_ep.ElasticBuffer` of version 2 (NCCL). Version 2 has both.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from ...settings import UsageError, nearest_multiples

Generation = Literal["elastic", "legacy"]
CLASSES: dict[Generation, str] = {"elastic": "ElasticBuffer", "legacy": "Buffer"}
"""Class that identifies a generation, the preferred one first."""

CHECKED = ("1.2.1", "2.1.0")
"""Releases against whose signatures every call was checked (tests/comm/deepep_signatures.json)."""

SMS = 20
"""Default number of streaming multiprocessors for DeepEP's kernels: V3 gave them 20 of an H800's 132 (V3 §3.2.2)."""

LEGACY_NODE = 8
"""GPUs per node of a legacy group on several nodes; a constant in that generation's kernels."""
MOST_TOP_K = 32
"""Largest top-k: in both generations' kernels each lane of a warp holds one of a token's choices."""
LARGEST_GROUP = 1024
"""End of the search for group sizes that have a configuration; the largest known is 160."""

INSTEAD = "comm.dispatcher two-hop needs neither it nor a GPU and sends no more bytes"
INSTALL = "https://github.com/deepseek-ai/DeepEP says how to install it"


@dataclass(frozen=True)
class Library:
    """Imported module `deep_ep`."""

    module: ModuleType
    version: str
    generations: tuple[Generation, ...]
    """Generations that the module has, the preferred one first."""

    def choose(self, wanted: Generation | None = None) -> Generation:
        """Return the generation to use; raises UsageError if the library lacks the wanted one."""
        if wanted is None or wanted in self.generations:
            return wanted or self.generations[0]
        found = " and ".join(CLASSES[generation] for generation in self.generations)
        raise UsageError(f"DeepEP {self.version} has no {CLASSES[wanted]}, only {found}; {INSTEAD}")


@dataclass(frozen=True)
class Job:
    """Requirements of a run.

    nodes: the node of each rank of the expert parallel group, ascending.
    hidden: H. top_k: K. tokens: largest number of tokens of a rank in one dispatch.
    dtype: type of activations. fp8: whether tokens are sent to the experts in FP8.
    sms: streaming multiprocessors for DeepEP's kernels.
    timeout: seconds that a kernel, and the host, may wait for other ranks.
    """

    nodes: Sequence[int]
    hidden: int
    top_k: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    sms: int = SMS
    timeout: float = 600.0


def find_library() -> Library:
    """Import DeepEP; raises a UsageError that names the classes looked for."""
    looked = f"looked for deep_ep.{CLASSES['elastic']} (version 2) and deep_ep.{CLASSES['legacy']} (version 1)"
    try:
        module = importlib.import_module("deep_ep")
    except ModuleNotFoundError as error:
        if error.name != "deep_ep":
            raise UsageError(_broken(error)) from error
        raise UsageError(f"DeepEP is not installed: {looked}; {INSTALL}; {INSTEAD}") from error
    except Exception as error:  # AssertionError for a wrong NCCL, OSError without libraries, and others
        raise UsageError(_broken(error)) from error
    return read_library(module)


def read_library(module: ModuleType) -> Library:
    """Return the generations of a module `deep_ep`; raises UsageError if it has neither."""
    generations = tuple(generation for generation, name in CLASSES.items() if hasattr(module, name))
    if not generations:
        raise UsageError(f"the installed deep_ep has neither {CLASSES['elastic']} nor {CLASSES['legacy']}; {INSTEAD}")
    return Library(module, _installed_version(module), generations)


def deepep_available() -> bool:
    """Whether DeepEP can be imported; `deepep_faults` finds out whether it can serve a run."""
    try:
        find_library()
    except UsageError:
        return False
    return True


def deepep_faults(
    job: Job, device_type: str, generation: Generation | None = None, library: Library | None = None
) -> list[str]:
    """Reasons why DeepEP cannot serve this run, each with what would work; empty if it can.

    Args:
        device_type: type of the rank's device.
        generation: the requested generation; None for the preferred one.
        library: DeepEP if already imported; None imports it.
    """
    faults = _faults_of_job(job)
    if device_type != "cuda":
        faults.insert(0, f"DeepEP moves tokens between NVIDIA GPUs, and this run's device is {device_type}; {INSTEAD}")
        return faults
    try:
        library = library or find_library()
        chosen = library.choose(generation)
    except UsageError as error:
        return [str(error), *faults]
    return [*faults, *_faults_of_generation(job, library, chosen)]


def _faults_of_job(job: Job) -> list[str]:
    """Faults of a job with either generation."""
    faults = []
    if job.dtype != torch.bfloat16:
        faults.append(
            f"DeepEP carries BF16 and FP8, and activations are {job.dtype}; precision.recipe bf16 makes them BF16"
        )
    if job.sms < 2 or job.sms % 2:
        faults.append(
            f"DeepEP's kernels take an even number of SMs, not {job.sms}; {max(job.sms - job.sms % 2, 2)} works"
        )
    if job.top_k > MOST_TOP_K:
        faults.append(f"DeepEP sends a token to at most {MOST_TOP_K} experts, and top-k is {job.top_k}; {INSTEAD}")
    if len(job.nodes) == 1:
        faults.append("an expert parallel group of one rank sends nothing; comm.dispatcher flat is all it needs")
    return faults


def _faults_of_generation(job: Job, library: Library, generation: Generation) -> list[str]:
    faults = []
    sizes = set(Counter(job.nodes).values())
    several = len(set(job.nodes)) > 1
    # The elastic generation, and the legacy one between nodes, sum in words of 16 bytes by warps of 32 lanes.
    unit = 256 if generation == "elastic" or several else 128 if job.fp8 else 16
    if job.hidden % unit:
        near = nearest_multiples(job.hidden, unit)
        faults.append(f"DeepEP needs a hidden size that is a multiple of {unit}, not {job.hidden} (nearest: {near})")
    if len(sizes) > 1:
        faults.append(
            f"DeepEP needs equally many ranks of an expert parallel group on every node, not {sorted(sizes)}; {INSTEAD}"
        )
    elif generation == "legacy" and several and sizes != {LEGACY_NODE}:
        faults.append(
            f"DeepEP {library.version}'s Buffer supports nodes of {LEGACY_NODE} GPUs, and the expert parallel group "
            f"has {sizes.pop()} on each; {INSTEAD}"
        )
    if generation == "legacy" and not _has_config(library, len(job.nodes)):
        fits = [ranks for ranks in range(2, LARGEST_GROUP + 1) if _has_config(library, ranks)]
        faults.append(
            f"DeepEP {library.version}'s Buffer has no configuration for an expert parallel group of "
            f"{len(job.nodes)} ranks; parallel.ep can be one of {fits}"
        )
    return faults


def _has_config(library: Library, ranks: int) -> bool:
    """Whether the legacy Buffer is tuned for a group size; the list is in its code and differs between releases."""
    buffer: Any = library.module.Buffer
    try:
        buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
    except AssertionError:
        return False
    return True


def _installed_version(module: ModuleType) -> str:
    """Version of the module, or of its package: version 1 has no attribute for it."""
    try:
        return getattr(module, "__version__", None) or importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _broken(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    message = reason[0] if reason else type(error).__name__
    return f"DeepEP is installed but cannot be imported: {message}; {INSTALL}; {INSTEAD}"
