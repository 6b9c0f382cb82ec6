"""Sections of a run as a whole, which belong to no single folder: run, batch, train, balance, memory, log."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..settings import Clash, Section, SectionFaults, TokenSchedule, UsageError, key, nearest_multiples


class RunConfig(Section):
    """Name, folder, seed and device of a run."""

    name: str = key("run", "name of the run, whose folder is DIR/NAME; when not given, the name of the config file")
    dir: str = key("runs", "folder that holds run folders")
    seed: int = key(1234, "seed of initial weights and data order", ge=0)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "device; auto is cuda where there is a GPU")
    deterministic: bool = key(
        False,
        "take GPU kernels whose results are the same in every run, which are slower; CPUs have no others",
    )
    compile: bool = key(False, "fuse the RMSNorm and SwiGLU kernels with torch.compile; needs a C++ compiler on CPUs")

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"is {name!r}; as a folder it starts with a letter or digit and holds only those, '.', '_' and '-'"
            )
        return name


class BatchRamp(Section):
    """Growth of the global batch at the start of training."""

    start: int = key(..., "sequences of the first global batch", unit="sequences", ge=1)
    tokens: float = key(..., "tokens over which the batch grows to its full size, linearly", unit="tokens", gt=0)
    increment: int = key(..., "the batch grows in multiples of this, whatever the layout", unit="sequences", ge=1)


class BatchConfig(Section):
    """Sequences of a step."""

    sequence_length: int = key(4096, "tokens of a sequence", unit="tokens", ge=1)
    global_sequences: int = key(15360, "sequences of a global batch", unit="sequences", ge=1)
    micro_sequences: int = key(1, "sequences of a micro-batch on one rank", unit="sequences", ge=1)
    ramp: BatchRamp | None = key(None, "growth of the global batch at the start; null for none")

    @model_validator(mode="after")
    def _ramp_ends_at_the_full_batch(self) -> BatchConfig:
        if self.ramp is None:
            return self
        start, full, increment = self.ramp.start, self.global_sequences, self.ramp.increment
        clashes = []
        if start > full:
            clashes.append(Clash(("ramp.start", "global_sequences"), f"{start} is above global_sequences {full}"))
        for name, size in (("ramp.start", start), ("global_sequences", full)):
            if size % increment:
                message = f"{size} is not a multiple of ramp.increment {increment}"
                clashes.append(Clash((name, "ramp.increment"), message))
        if clashes:
            raise SectionFaults(clashes)
        return self

    def sequences_at(self, tokens: float) -> int:
        """Sequences of the global batch after `tokens` tokens of training."""
        if self.ramp is None or tokens >= self.ramp.tokens:
            return self.global_sequences
        grown = (self.global_sequences - self.ramp.start) * tokens / self.ramp.tokens
        return self.ramp.start + int(grown // self.ramp.increment) * self.ramp.increment

    def sizes(self) -> dict[str, int]:
        """Numbers of sequences, by key, that micro-batches on every rank have to make up exactly."""
        sizes = {"global_sequences": self.global_sequences}
        if self.ramp is not None:
            sizes |= {"ramp.start": self.ramp.start, "ramp.increment": self.ramp.increment}
        return sizes

    def faults(self, dp: int) -> dict[str, str]:
        """The keys of `sizes()` whose values micro-batches on `dp` ranks do not make up, each with its message."""
        sizes = self.sizes().items()
        return {name: f"{size} {fault}" for name, size in sizes if (fault := self._size_fault(size, dp))}

    def microbatches(self, sequences: int, dp: int) -> int:
        """Micro-batches that each of `dp` ranks runs for a global batch of `sequences`.

        Raises UsageError where micro-batches do not make up the batch exactly.
        """
        fault = self._size_fault(sequences, dp)
        if fault:
            raise UsageError(f"a global batch of {sequences} sequences {fault}")
        return sequences // (dp * self.micro_sequences)

    def _size_fault(self, sequences: int, dp: int) -> str:
        """Message that micro-batches on `dp` ranks do not make up `sequences`, and numbers that work; "" if they do."""
        unit = dp * self.micro_sequences
        if sequences > 0 and sequences % unit == 0:
            return ""
        return (
            f"is not a multiple of {unit} (dp {dp} x batch.micro_sequences {self.micro_sequences}); "
            f"nearest that work: {nearest_multiples(sequences, unit)}"
        )


class BalanceConfig(Section):
    """Balance of the load over experts."""

    bias_update_speed: TokenSchedule = key(
        TokenSchedule.model_validate(0.001), "step of the router bias after each batch (V3 §2.1.2); 0 freezes it"
    )
    expert_loss: float = key(
        1e-4, "weight alpha of the sequence-wise balance loss over experts (V3 eq. 17; V2's alpha1)", ge=0
    )
    device_loss: float = key(0.0, "weight alpha2 of the balance loss over groups of experts (V2 §2.2.3)", ge=0)
    communication_loss: float = key(
        0.0, "weight alpha3 of the balance loss over tokens sent to groups of experts (V2 §2.2.3)", ge=0
    )
    capacity_factor: float | None = key(
        None,
        "most tokens of a training sequence that a group of experts computes, as a share of its even load; the tokens "
        "of lowest affinity are dropped (V2: 1.0); null drops none",
        gt=0,
    )
    keep_sequences: float = key(
        0.1, "share of the training sequences that capacity_factor spares (V2: 0.1)", ge=0, le=1
    )


class MemoryConfig(Section):
    """Memory of a rank during a step."""

    recompute: Literal["none", "v3", "full"] = key(
        "none", "activations computed again in the backward: v3 is RMSNorms, MLA up-projections and SwiGLU (V3 §3.2.3)"
    )
    deferred_weights: Annotated[int, Field(ge=1)] | Literal["auto"] | None = key(
        "auto",
        "most weight gradients (W) that a pipeline rank defers at a time: auto defers no more than fit into the memory "
        "of the steady state, with recompute full a fourth of the forwards in flight there; null leaves the schedule "
        "as it is",
    )
    limit_gib: Annotated[float, Field(gt=0)] | Literal["auto"] | None = key(
        "auto",
        "memory of a device, which a dry run of each pipeline rank is compared with before the first step: a run that "
        "does not fit is refused; auto is the GPU's own and no check on CPUs; null leaves the check out",
        unit="GiB",
    )


class TrainConfig(Section):
    """Length of training, and its evaluations."""

    steps: int | None = key(None, "stop after this many steps", unit="steps", ge=1)
    tokens: float | None = key(None, "stop at the first step that reaches this many tokens", unit="tokens", gt=0)
    mtp_weight: TokenSchedule = key(TokenSchedule.model_validate(0.3), "weight lambda of the MTP loss (V3 §2.2)")
    evaluate_every: int = key(100, "steps between evaluations; the last step always evaluates", unit="steps", ge=1)
    evaluate_sequences: int = key(64, "held-out sequences of an evaluation", unit="sequences", ge=1)
    evaluate_ema: bool = key(True, "evaluate the averaged weights as well, where optim.ema_decay keeps them")
    collect_every: int | None = key(
        100,
        "steps between collections of Python's garbage, on all ranks at once; null leaves the times to Python, and in "
        "each step all ranks wait for those that collect",
        unit="steps",
        ge=1,
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.steps is None and self.tokens is None:
            raise ValueError("give `steps` or `tokens`: a run needs an end")
        return self


class LogConfig(Section):
    """Output during a run. metrics.jsonl gets every step, whatever is set here."""

    progress: bool = key(True, "show a progress bar on a terminal, plain lines elsewhere")
    every: int = key(10, "steps between plain progress lines where there is no terminal", unit="steps", ge=1)
    trace_step: int | None = key(
        3,
        "step whose pipeline is timed and drawn, measured above simulated, in traces/step-N.html; null draws none",
        ge=1,
    )
    tensorboard: bool = key(True, "write TensorBoard events")
    peak_tflops: Annotated[float, Field(gt=0)] | Literal["auto"] = key(
        "auto",
        "dense peak of one rank's device, for MFU; auto looks up known GPUs, and elsewhere times a matmul",
        unit="TFLOP/s",
    )
