"""The whole configuration: the sections of all folders, put together and checked against each other."""

from __future__ import annotations

from pydantic import model_validator

from ..checkpoint.config import CheckpointConfig
from ..comm.config import CommConfig
from ..data.config import DataConfig
from ..fp8.config import PrecisionConfig
from ..model.config import ModelConfig
from ..parallel.config import OptimConfig, ParallelConfig
from ..settings import Section, SectionFaults, key
from .clashes import find_clashes, gpu_width_clashes
from .sections import BalanceConfig, BatchConfig, LogConfig, MemoryConfig, RunConfig, TrainConfig


class Config(Section):
    """Complete description of a run."""

    run: RunConfig = key(RunConfig(), "name, folder, seed and device")
    model: ModelConfig = key(ModelConfig(), "architecture")
    parallel: ParallelConfig = key(ParallelConfig(), "layout of the ranks")
    batch: BatchConfig = key(BatchConfig(), "sequences of a step")
    optim: OptimConfig = key(OptimConfig(), "optimizer")
    precision: PrecisionConfig = key(PrecisionConfig(), "number formats")
    comm: CommConfig = key(CommConfig(), "communication")
    data: DataConfig = key(DataConfig(), "text")
    checkpoint: CheckpointConfig = key(CheckpointConfig(), "checkpoints")
    train: TrainConfig = key(..., "length of training, and its evaluations")
    balance: BalanceConfig = key(BalanceConfig(), "balance of the load over experts")
    memory: MemoryConfig = key(MemoryConfig(), "memory of a rank during a step")
    log: LogConfig = key(LogConfig(), "output during a run")

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        clashes = find_clashes(self.model, self.parallel, self.batch, self.balance, self.precision, self.comm)
        if self.run.device == "cuda":  # with auto the launch checks the widths, once it knows the device
            clashes += gpu_width_clashes(self.model, self.precision)
        if clashes:
            raise SectionFaults(clashes)
        return self
