"""Header before the first step and summary after the last: rows of a name and a text."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from .hardware import Peak
from .text.numbers import format_count
from .traffic import Sent, describe_traffic


def describe_run(
    *,
    total_parameters: int,
    active_parameters: int,
    mtp_parameters: int,
    layout: str,
    dispatch: str,
    flop_convention: str,
    peak: Peak,
    run_dir: str,
) -> dict[str, str]:
    """Rows of the header. `mtp_parameters` counts all MTP modules; `total_parameters` does not include them."""
    model = f"{format_count(total_parameters)} parameters, {format_count(active_parameters)} active per token"
    if mtp_parameters:
        model += f"; MTP adds {format_count(mtp_parameters)}"
    return {
        "model": model,
        "layout": layout,
        "dispatch": dispatch,
        "MFU": flop_convention,
        "peak": f"{peak.tflops:.3g} TFLOP/s per rank, {peak.source}",
        "run": run_dir,
    }


class RunSummary(BaseModel):
    """Result of a run; as JSON, the last line of `train --json`. Losses in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    steps: int  # of the whole run, earlier parts of a resumed one included
    loss: float  # of the last step
    validation_loss: float | None
    validation_loss_ema: float | None = None  # of the averaged weights
    unigram_entropy: float | None  # of the validation data: the loss of predicting by token frequencies alone
    tokens_per_second: float  # of all ranks together
    traffic: tuple[Sent, ...] = ()  # of all ranks in a mean step
    run_dir: str

    def rows(self) -> dict[str, str]:
        rows = {"steps": str(self.steps), "loss": f"{self.loss:.4f}"}
        if self.validation_loss is not None:
            rows["validation loss"] = f"{self.validation_loss:.4f}"
        if self.validation_loss_ema is not None:
            rows["averaged weights"] = f"{self.validation_loss_ema:.4f}, their validation loss"
        if self.unigram_entropy is not None:
            rows["unigram entropy"] = f"{self.unigram_entropy:.4f}, the loss of token frequencies alone"
        rows["speed"] = f"{format_count(self.tokens_per_second)} tok/s"
        if self.traffic:
            rows["traffic"] = describe_traffic(self.traffic)
        return {**rows, "run folder": self.run_dir}
