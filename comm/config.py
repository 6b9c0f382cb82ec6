"""The `comm` section: collectives and token dispatch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from ..settings import Section, key

Purpose = Literal["experts", "counts", "pipeline", "gradients", "control"]
"""Uses of a communicator."""


class MaxCtas(Section):
    """Most blocks of threads (CTAs) of one NCCL kernel, by the use of its communicator.

    A block has a multiprocessor to itself while it waits for its peers. All communicators of a rank may have a kernel
    at once, so the sum over them has to stay below the multiprocessors of a GPU.
    """

    experts: int = key(
        16, "all-to-alls of tokens (V3: 20 multiprocessors, but NCCL rounds its channels up to a power of two)", ge=1
    )
    counts: int = key(1, "all-to-alls of the numbers of tokens", ge=1)
    pipeline: int = key(
        2, "a transfer between two pipeline ranks: a receive waits for up to a whole action, and is small", ge=1
    )
    gradients: int = key(8, "reductions of gradients and gathers of weights", ge=1)
    control: int = key(1, "statistics, agreements and checkpoints", ge=1)

    @field_validator("experts", "counts", "pipeline")
    @classmethod
    def _is_a_power_of_two(cls, blocks: int) -> int:
        if blocks & (blocks - 1):
            below = 1 << (blocks.bit_length() - 1)
            raise ValueError(
                f"is {blocks}: NCCL rounds the channels of sends and all-to-alls up to a power of two (nearest: "
                f"{below} or {2 * below})"
            )
        return blocks


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
    max_ctas: MaxCtas = key(MaxCtas(), "multiprocessors that NCCL's kernels take, by their use")
