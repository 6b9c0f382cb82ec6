"""The `comm` section: collectives and token dispatch."""

from __future__ import annotations

from typing import Literal

from ..settings import Section, key


class CommConfig(Section):
    """How ranks exchange tensors."""

    backend: Literal["auto", "gloo", "nccl"] = key("auto", "collective library; auto is nccl on GPUs and gloo on CPUs")
    dispatcher: Literal["flat"] = key("flat", "how tokens reach their experts: flat is one all-to-all")
