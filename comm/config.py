"""The `comm` section: collectives and token dispatch."""

from __future__ import annotations

from typing import Literal

from ..settings import Section, key


class CommConfig(Section):
    """Exchange of tensors between ranks."""

    backend: Literal["auto", "gloo", "nccl"] = key("auto", "collective library; auto is nccl on GPUs and gloo on CPUs")
    dispatcher: Literal["auto", "flat", "two-hop", "deepep"] = key(
        "auto",
        "how tokens reach their experts: flat is one all-to-all, two-hop sends a token once to each node and fans it "
        "out there, deepep is DeepSeek's library; auto is deepep on GPUs that have it, else two-hop where the experts "
        "of a layer lie on several nodes, else flat",
    )
    wire: Literal["auto", "fp8", "bf16"] = key(
        "auto",
        "format of tokens on their way to the experts, and of gradients in the backward; what comes back stays in high "
        "precision (V3 §3.3.3); auto is fp8 where the recipe quantises both anyhow, to the same values, else the "
        "format of the activations",
    )
    sms: int = key(20, "GPU multiprocessors that DeepEP's kernels take (V3: 20 of 132)", ge=2, multiple_of=2)
