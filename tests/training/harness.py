"""What the tests of training share: a text, a small configuration, and trainers on the ranks of the pool.

L MoE layers, E experts, T tokens of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.data.open import Data, open_data
from counterflow.launcher.config import Config
from counterflow.launcher.load import load_config
from counterflow.launcher.trainer import Trainer
from counterflow.model.config import ModelConfig
from counterflow.model.naming import placements
from counterflow.model.router import Router, Routing
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout
from counterflow.tests.pool import Worker

# World size and ep of every layout with ep 1, 2, 4 x edp 1, 2; the first is a single process.
LAYOUTS = [(1, 1), (2, 2), (4, 4), (2, 1), (4, 2), (8, 4)]


def write_text(folder: Path) -> Path:
    """A text that is the same on every machine: words with the frequencies of a language, from hash functions."""
    letters = str.maketrans("0123456789", "ghijklmnop")
    words = [hashlib.blake2b(f"word {i}".encode(), digest_size=2 + i % 3).hexdigest() for i in range(400)]
    folder.mkdir(parents=True)
    for number in range(24):
        noise = hashlib.shake_128(f"document {number}".encode()).digest(400)
        chosen = [int(400 ** (int.from_bytes(noise[i : i + 2], "big") / 2**16)) - 1 for i in range(0, 400, 2)]
        (folder / f"{number}.txt").write_text(" ".join(words[i] for i in chosen).translate(letters))
    return folder


def tiny(text: Path, *overrides: str) -> Config:
    """The `tiny` model, in FP32 throughout, on the text of `write_text`; 20 steps of 8 sequences of 16 tokens.

    Routing is a decision: two numbers that differ by less than the rounding of a layout's sums may come out either
    way, and everything differs from there on. So experts are spread wider than a real run's (larger initial weights)
    and kept in use (faster bias), and the moments are FP32: rounding them to BF16 turns a difference in the last bit
    of FP32 into one in the last bit of BF16 now and then, 65,536 times as large.
    """
    keys = [
        "data.source=folder",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "run.seed=2",
        "model.initializer_range=0.05",
        "batch.sequence_length=16",
        "optim.lr=5e-4",
        "optim.moments=fp32",
        "train.bias_update_speed=0.02",
    ]
    return load_config("tiny", [*keys, *overrides])


def open_text(config: Config) -> Data:
    extra = 1 + config.model.num_nextn_predict_layers
    assert config.data.cache_dir is not None
    return open_data(config.data, config.batch.sequence_length, extra, config.run.seed, config.data.cache_dir)


def make_trainer(config: Config, world_size: int, ep: int, ranks: Sequence[int] | None = None) -> Trainer:
    """A trainer on a grid of `world_size` ranks, on which every rank calls this."""
    groups = Groups.create(Layout(world_size, 1, ep), "cpu", ranks)
    return Trainer(config, groups, torch.device("cpu"), open_text(config))


@dataclass
class Curve:
    """What one rank saw of a run: per step, numbers that all ranks know, and its final weights by global name."""

    numbers: list[dict[str, float]] = field(default_factory=list)
    """loss, loss_mtp, loss_balance, grad_norm"""
    counts: list[Tensor] = field(default_factory=list)
    """`[L, E]` tokens each expert was sent, of all ranks together."""
    biases: list[Tensor] = field(default_factory=list)
    """`[L, E]` after the step."""
    validation_loss: float = 0.0
    closest_choice: float = float("inf")
    """Smallest difference between a score that was chosen and one that was not, of this rank's tokens."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def run_steps(trainer: Trainer, steps: int) -> Curve:
    """Train `steps` steps, evaluate, and tell; counts are taken from the model, not from what the trainer sums."""
    curve, counts = Curve(), torch.zeros(0)

    def add_counts(_module: Any, _given: Any, output: Any) -> None:
        nonlocal counts
        counts = counts + output.counts

    def note_margin(router: Any, given: Any, routing: Any) -> None:
        curve.closest_choice = min(curve.closest_choice, closest_choice(router, given[0]))

    handles = [trainer.model.register_forward_hook(add_counts)]
    handles += [router.register_forward_hook(note_margin) for router in trainer.model.routers()]
    for _ in range(steps):
        counts = torch.zeros(len(trainer.model.routers()), trainer.config.model.n_routed_experts, dtype=torch.int64)
        metrics = trainer.step()
        dist.all_reduce(counts, group=trainer.groups.dp)
        curve.numbers.append({name: getattr(metrics, name) for name in ("loss", "loss_mtp", "loss_balance", "grad_norm")})
        curve.counts.append(counts)
        curve.biases.append(torch.stack([router.bias for router in trainer.model.routers()]))
    for handle in handles:
        handle.remove()
    curve.validation_loss = trainer.evaluate()
    curve.weights = parameters(trainer)
    trainer.close()
    return curve


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the global tensors that this rank's parameters hold, by name."""
    placed = placements(trainer.model)
    return {name: t.clone() for item in placed for name, t in zip(item.names, item.tensors(), strict=True)}


@torch.no_grad()
def closest_choice(router: Router, x: Tensor) -> float:
    """How near any of the router's three choices for `x` `[B, S, H]` was to coming out otherwise."""
    config: ModelConfig = router.config
    scores = (x.float() @ router.weight.float().t()).sigmoid().flatten(0, 1)
    biased = (scores + router.bias).unflatten(1, (config.n_group, -1))
    groups = biased.topk(2, -1).values.sum(-1)
    closed = groups < groups.topk(config.topk_group, -1).values[:, -1:]
    experts = biased.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
    top_k = config.num_experts_per_tok
    return min(_gap(groups, config.topk_group), _gap(experts, top_k), _gap(scores, top_k))


def _gap(scores: Tensor, chosen: int) -> float:
    """Smallest difference between the last chosen and the first not chosen, over rows."""
    best = scores.topk(chosen + 1, -1).values
    return float((best[:, chosen - 1] - best[:, chosen]).min())


def train(worker: Worker, config: Config, ep: int, steps: int) -> Curve:
    """For `pool.run`: a run of `steps` steps on all ranks."""
    return run_steps(make_trainer(config, worker.world_size, ep), steps)


def relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


__all__ = ["LAYOUTS", "Curve", "Routing", "closest_choice", "make_trainer", "parameters", "relative", "run_steps", "tiny"]
