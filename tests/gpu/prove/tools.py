"""Set-up, timing, errors, models and data that the parts share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.data.dataset import OrderedDataset, PackedDataset
from counterflow.data.loader import Batch
from counterflow.data.open import Data
from counterflow.data.tokenizer import ByteTokenizer
from counterflow.launcher.bootstrap import Backend, bootstrap
from counterflow.launcher.environment import WorkerEnvironment
from counterflow.parallel.layout import Layout
from counterflow.plan.steps import Progress
from counterflow.training.build import make_groups
from counterflow.training.objective import loss_weights
from counterflow.training.trainer import PipelineRun, Trainer

Value = TypeVar("Value")
WIDE = (
    "model.first_k_dense_replace=0",
    "model.num_nextn_predict_layers=0",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=8",
    "model.n_group=1",
    "model.topk_group=1",
    "model.vocab_size=4096",
    "parallel.pp=1",
    "parallel.schedule=auto",
    "parallel.split=balanced",
    "parallel.ep=1",
    "parallel.dp=1",
    "comm.dispatcher=flat",
    "optim.ema_decay=null",
    "batch.ramp=null",
)
"""DeepSeek-V3's layers with 8 experts, all chosen: as many rows for the experts as a rank of V3's gets."""
NARROW = (
    "model.hidden_size=64",
    "model.moe_intermediate_size=32",
    "model.num_attention_heads=4",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "model.vocab_size=320",
)
"""Widths of a rehearsal."""


@dataclass(frozen=True)
class Setup:
    """Place of the proof: on a GPU, or as a rehearsal on a CPU at toy sizes."""

    out: Path
    rehearse: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    def pick(self, full: Value, toy: Value) -> Value:
        """A size for the proof, or for a rehearsal."""
        return toy if self.rehearse else full

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def wide(self, layers: int, *overrides: str) -> Config:
        """DeepSeek-V3's layers, `layers` of them; see WIDE."""
        toy = NARROW if self.rehearse else ()
        return load_config("deepseek-v3-671b", [*WIDE, *toy, f"model.num_hidden_layers={layers}", *overrides])

    def milliseconds(self, run: Callable[[], object], rounds: int = 10) -> float:
        """Median time of `run` on the device, with the caches of a GPU emptied before each round."""
        for _ in range(self.pick(3, 1)):
            run()
        if self.rehearse:
            return self._on_the_host(run)
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for begin, end in pairs:
            flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in pairs)

    def _on_the_host(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context of a process group of this process alone, with the settings of a run."""
        with bootstrap(WorkerEnvironment(), "cpu" if self.rehearse else "cuda"):
            yield

    @contextmanager
    def rank(self, rank: int, world: int, port: int, backend: Backend) -> Iterator[None]:
        """Context of rank `rank` of `world` ranks on this device."""
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        worker = WorkerEnvironment(rank, world, rank, world, "torchrun", threads=1)
        with bootstrap(worker, "cpu" if self.rehearse else "cuda", backend, timeout=100.0):
            yield


def trainer(config: Config, device: torch.device, world: int = 1) -> Trainer:
    """A trainer of this rank; the process group exists."""
    parallel = config.parallel
    layout = Layout.resolve(world, parallel.pp, parallel.ep, "auto", world)
    groups = make_groups(config, layout, device.type)
    return Trainer(config, groups, device, text(config))


def text(config: Config) -> Data:
    """A text of words that repeat, which a model can learn: byte tokens, the same everywhere."""
    words = np.random.default_rng(0).integers(97, 123, (64, 5))
    words[:, 4] = 32
    chosen = np.random.default_rng(1).zipf(1.5, 60_000) % 64
    tokens = words[chosen].reshape(-1).astype(np.uint16)
    length, extra = config.batch.sequence_length, 1 + config.model.num_nextn_predict_layers
    offsets = np.array([0, len(tokens)], dtype=np.int64)
    return Data(
        PackedDataset(tokens, offsets, length, extra, config.run.seed),
        OrderedDataset(tokens[: 64 * (length + extra)], length, extra),
        ByteTokenizer(),
        1.0,
        "words that repeat",
    )


def batches(config: Config, count: int) -> list[Batch]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, length = config.batch.micro_sequences, config.batch.sequence_length
    shape = rows, length + 1 + config.model.num_nextn_predict_layers
    valid = torch.ones(rows, dtype=torch.bool)
    return [
        Batch(torch.randint(0, config.model.vocab_size, shape, generator=generator), valid, tuple(range(rows)))
        for _ in range(count)
    ]


def forward_backward(of: Trainer, given: Sequence[Batch]) -> PipelineRun:
    """Forward and backward of micro-batches; gradients end in the optimizer's sums."""
    return of.forward_backward(list(given), loss_weights(of.config, Progress(), len(given)))


def error(made: Tensor, exact: Tensor) -> float:
    """Difference of two tensors relative to the exact one, by their norms."""
    made, exact = made.double(), exact.double().to(made.device)
    norm = float(exact.norm())
    return float((made - exact).norm()) / norm if norm else float(made.norm())


def errors(made: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest `error` of tensors by name, and that name."""
    by_name = {name: error(tensor, exact[name]) for name, tensor in made.items()}
    worst = max(by_name, key=lambda name: by_name[name])
    return {worst: by_name[worst]}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results, tensors or tuples of them, have the same bits."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool((a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).all())
    if isinstance(a, tuple | list):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
