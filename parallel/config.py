"""The `parallel` and `optim` sections: the rank grid and the sharded optimizer."""

from __future__ import annotations

from typing import Literal

from ..settings import Section, TokenSchedule, key


class ParallelConfig(Section):
    """How ranks are laid out. dp = ep x edp; the world size is pp x dp."""

    pp: int = key(1, "pipeline parallel ranks", ge=1)
    ep: int = key(1, "expert parallel ranks: each holds n_routed_experts / ep experts of a layer", ge=1)
    dp: int | Literal["auto"] = key("auto", "data parallel ranks (a multiple of ep); auto follows from the world size")
    gpus_per_node: int | Literal["auto"] = key("auto", "ranks on a node; auto asks the launcher")
    timeout: float = key(600.0, "how long a collective may wait for its peers", unit="seconds", gt=0)


class OptimConfig(Section):
    """AdamW as V3 uses it (V3 §4.2, §3.3.3), its state sharded as ZeRO-1."""

    lr: TokenSchedule = key(TokenSchedule.model_validate(2.2e-4), "learning rate: a number or phases in tokens")
    beta1: float = key(0.9, "decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = key(1e-8, "added to the root of the second moment (V3 does not state its value)", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay; one-dimensional parameters (norm gains) are exempt", ge=0)
    clip_norm: float | None = key(1.0, "largest global gradient norm; null never clips", gt=0)
    moments: Literal["bf16", "fp32"] = key("bf16", "storage of both Adam moments (V3 §3.3.3: bf16)")
    bucket_mb: float = key(256.0, "gradients reduced in one collective, FP32", unit="MiB", gt=0)
