"""DeepEP as it is found on this machine, or the reasons why it cannot carry a run's tokens.

Two generations of its interface are known: `deep_ep.Buffer`, with which DeepSeek-V3's kernels were published
(NVSHMEM), and `deep_ep.ElasticBuffer` of version 2 (NCCL), which holds both.
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
"""What a generation is known by; the one to prefer first."""

CHECKED = ("1.2.1", "2.1.0")
"""The releases whose signatures every call was checked against (tests/comm/deepep_signatures.json)."""

SMS = 20
"""Streaming multiprocessors for its kernels where nobody says: V3 gave them 20 of an H800's 132 (V3 §3.2.2)."""

LEGACY_NODE = 8
"""GPUs of a node, where the legacy generation's group has several nodes; a constant in its kernels."""
MOST_TOP_K = 32
"""In both generations' kernels a warp's lane holds one of a token's choices."""
LARGEST_GROUP = 1024
"""Where the search for group sizes that have a configuration ends; the largest known is 160."""

INSTEAD = "comm.dispatcher two-hop needs neither it nor a GPU and sends no more bytes"
INSTALL = "https://github.com/deepseek-ai/DeepEP says how to install it"


@dataclass(frozen=True)
class Library:
    """The module `deep_ep`, imported."""

    module: ModuleType
    version: str
    generations: tuple[Generation, ...]
    """Those it has, the one to prefer first."""

    def choose(self, wanted: Generation | None = None) -> Generation:
        """The generation to use; raises UsageError if it lacks the wanted one."""
        if wanted is None or wanted in self.generations:
            return wanted or self.generations[0]
        found = " and ".join(CLASSES[generation] for generation in self.generations)
        raise UsageError(f"DeepEP {self.version} has no {CLASSES[wanted]}, only {found}; {INSTEAD}")


@dataclass(frozen=True)
class Job:
    """What a run would have it carry.

    nodes: the node of each rank of the expert parallel group, ascending.
    hidden: H. top_k: K. tokens: the most tokens of a rank in one dispatch.
    dtype: of activations. fp8: whether tokens travel to the experts in FP8.
    sms: streaming multiprocessors for its kernels.
    """

    nodes: Sequence[int]
    hidden: int
    top_k: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    sms: int = SMS


def find_library() -> Library:
    """Import DeepEP; raises UsageError with what was looked for."""
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
    """What a module `deep_ep` offers; raises UsageError if it is neither generation."""
    generations = tuple(generation for generation, name in CLASSES.items() if hasattr(module, name))
    if not generations:
        raise UsageError(f"the installed deep_ep has neither {CLASSES['elastic']} nor {CLASSES['legacy']}; {INSTEAD}")
    return Library(module, _version(module), generations)


def deepep_available() -> bool:
    """Whether it can be imported. Whether it can carry a run is for `deepep_faults`."""
    try:
        find_library()
    except UsageError:
        return False
    return True


def deepep_faults(
    job: Job, device_type: str, generation: Generation | None = None, library: Library | None = None
) -> list[str]:
    """Why DeepEP cannot carry this run, each with what would work; empty if it can.

    Args:
        device_type: of the rank's device.
        generation: the one that was asked for; None for the one it prefers.
        library: DeepEP, where it has been imported; otherwise it is looked for.
    """
    faults = list(_faults_of(job))
    if device_type != "cuda":
        faults.insert(0, f"DeepEP moves tokens between NVIDIA GPUs, and this run's device is {device_type}; {INSTEAD}")
        return faults
    try:
        library = library or find_library()
        chosen = library.choose(generation)
    except UsageError as error:
        return [str(error), *faults]
    return [*faults, *_faults_with(job, library, chosen)]


def _faults_of(job: Job) -> list[str]:
    """Of either generation."""
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


def _faults_with(job: Job, library: Library, generation: Generation) -> list[str]:
    faults = []
    sizes = set(Counter(job.nodes).values())
    several = len(set(job.nodes)) > 1
    # Sums are taken in words of 16 bytes by warps of 32 lanes: in the elastic generation's, and between nodes.
    unit = 256 if generation == "elastic" or several else 128 if job.fp8 else 16
    if job.hidden % unit:
        near = nearest_multiples(job.hidden, unit)
        faults.append(f"DeepEP wants a hidden size that is a multiple of {unit}, not {job.hidden} (nearest: {near})")
    if len(sizes) > 1:
        faults.append(
            f"DeepEP wants as many ranks of an expert parallel group on every node, not {sorted(sizes)}; {INSTEAD}"
        )
    elif generation == "legacy" and several and sizes != {LEGACY_NODE}:
        faults.append(
            f"DeepEP {library.version}'s Buffer knows nodes of {LEGACY_NODE} GPUs, and the expert parallel group "
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
    """The sizes it is tuned for stand in its own code and differ between releases, so it is asked."""
    buffer: Any = library.module.Buffer
    try:
        buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
    except AssertionError:
        return False
    return True


def _version(module: ModuleType) -> str:
    """Version 1 does not say by itself."""
    try:
        return getattr(module, "__version__", None) or importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _broken(error: Exception) -> str:
    reason = str(error).strip().splitlines()
    said = reason[0] if reason else type(error).__name__
    return f"DeepEP is installed but cannot be imported: {said}; {INSTALL}; {INSTEAD}"
