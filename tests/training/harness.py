"""Text, small configuration and trainers that the tests of training share.

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

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.data.open import Data, open_data
from counterflow.model.router import Router
from counterflow.parallel.layout import Layout
from counterflow.tests.gather import gathered
from counterflow.tests.pool import Pool, Worker
from counterflow.training.build import make_groups
from counterflow.training.trainer import Trainer

NUMBERS = ("loss", "loss_mtp", "loss_balance", "grad_norm")
# World size and ep of every layout with ep 1, 2, 4 x edp 1, 2; the first is a single process.
LAYOUTS = [(1, 1), (2, 2), (4, 4), (2, 1), (4, 2), (8, 4)]


def write_text(folder: Path) -> Path:
    """Text that is the same on every machine: words with a language's frequencies, made by hash functions."""
    letters = str.maketrans("0123456789", "ghijklmnop")
    words = [hashlib.blake2b(f"word {i}".encode(), digest_size=2 + i % 3).hexdigest() for i in range(400)]
    folder.mkdir(parents=True)
    for number in range(24):
        noise = hashlib.shake_128(f"document {number}".encode()).digest(400)
        chosen = [int(400 ** (int.from_bytes(noise[i : i + 2], "big") / 2**16)) - 1 for i in range(0, 400, 2)]
        (folder / f"{number}.txt").write_text(" ".join(words[i] for i in chosen).translate(letters))
    return folder


def settings(text: Path) -> list[str]:
    """Overrides of `tiny` in the tests: FP32 throughout, on the text of `write_text`, 8 sequences of 16 tokens.

    Routing is a decision. Two scores that differ by less than the rounding of a layout's sums may be ordered either
    way, and everything differs from there on. So experts are spread wider than in a real run (larger initial weights)
    and kept in use (faster bias). The moments are FP32: rounding them to BF16 sometimes turns a difference in the
    last bit of FP32 into one in the last bit of BF16, which is 65,536 times as large.
    """
    return [
        "data.source=folder",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "run.seed=2",
        "model.initializer_range=0.05",
        "batch.sequence_length=16",
        "optim.lr=5e-4",
        "optim.moments=fp32",
        "balance.bias_update_speed=0.02",
    ]


def tiny(text: Path, *overrides: str) -> Config:
    """Return the `tiny` configuration with `settings` and `overrides`."""
    return load_config("tiny", [*settings(text), *overrides])


def open_text(config: Config) -> Data:
    extra = 1 + config.model.num_nextn_predict_layers
    assert config.data.cache_dir is not None
    return open_data(config.data, config.batch.sequence_length, extra, config.run.seed, config.data.cache_dir)


def make_trainer(config: Config, world_size: int, ep: int, ranks: Sequence[int] | None = None) -> Trainer:
    """Make a trainer on a grid of `world_size` ranks; every rank calls this.

    pp comes from the configuration, and so do the ranks of a node unless they are `auto`.
    """
    node = config.parallel.gpus_per_node
    layout = Layout(world_size, config.parallel.pp, ep, 8 if node == "auto" else node)
    groups = make_groups(config, layout, "cpu", ranks)
    return Trainer(config, groups, torch.device("cpu"), open_text(config))


@dataclass
class Curve:
    """Record of one rank in a run: numbers of every step, and the tensors at the end."""

    numbers: list[dict[str, float]] = field(default_factory=list)
    """Values of loss, loss_mtp, loss_balance and grad_norm in each step."""
    counts: list[Tensor] = field(default_factory=list)
    """`[L, E]` tokens that all ranks together sent to each expert in the step."""
    biases: list[Tensor] = field(default_factory=list)
    """`[L, E]` router biases after the step; NaN in the rows of layers that this rank does not hold."""
    closest_choice: float = float("inf")
    """Smallest difference between a chosen routing score and one that was not chosen; in a single process only."""
    validation_loss: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Global tensors that this rank's parameters hold at the end."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Summed gradients of the first step: whole tensors, of which this rank holds at least a part."""


def train(
    worker: Worker,
    config: Config,
    ep: int,
    steps: int,
    save_at: dict[int, Path] | None = None,
    resume: Path | None = None,
) -> Curve:
    """Train until step `steps`, from the start or from a checkpoint; `save_at` has the folder of each saved step.

    A function for `pool.run`.
    """
    trainer = make_trainer(config, worker.world_size, ep)
    if resume is not None:
        trainer.restore(resume)
    return run_steps(trainer, steps, save_at or {})


def run_steps(trainer: Trainer, steps: int, save_at: dict[int, Path]) -> Curve:
    """Train until step `steps` and evaluate. Counts come from the routers, not from the sums of the trainer."""
    curve, counts = Curve(), no_counts(trainer)
    routers = trainer.model.routers()
    layer_of = {id(router): layer for layer, router in routers}

    def add_counts(router: Any, _given: Any, routing: Any) -> None:
        counts[layer_of[id(router)]] += routing.counts

    def note_choice(router: Any, given: Any, _routing: Any) -> None:
        curve.closest_choice = min(curve.closest_choice, closest_choice(router, given[0]))

    handles = [router.register_forward_hook(add_counts) for _, router in routers]
    if trainer.groups.layout.world_size == 1:
        handles += [router.register_forward_hook(note_choice) for _, router in routers]
    while trainer.progress.step < steps:
        counts = no_counts(trainer)
        metrics = trainer.step()
        dist.all_reduce(counts, group=trainer.groups.world)
        curve.numbers.append({name: getattr(metrics, name) for name in NUMBERS})
        curve.counts.append(counts)
        curve.biases.append(biases(trainer))
        if not curve.gradients:
            curve.gradients = whole_gradients(trainer)
        if metrics.step in save_at:
            trainer.save(save_at[metrics.step])
    for handle in handles:
        handle.remove()
    curve.validation_loss = trainer.evaluate()
    curve.weights = parameters(trainer)
    trainer.close()
    return curve


def whole_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Summed gradients of the last step, whole; every rank calls this."""
    return {name: gathered(gradient) for name, gradient in trainer.optimizer.reduced_gradients().items()}


def no_counts(trainer: Trainer) -> Tensor:
    """Zeros `[L, E]`.

    A separate function, because cloudpickle takes `config` next to `dist` for torch.distributed.config.
    """
    model = trainer.config.model
    return torch.zeros(model.num_moe_layers, model.n_routed_experts, dtype=torch.int64)


def biases(trainer: Trainer) -> Tensor:
    """`[L, E]` router biases; NaN in the rows of layers that this rank does not hold or that have no bias."""
    held = torch.full(no_counts(trainer).shape, float("nan"))
    for layer, router in trainer.model.routers():
        if router.bias is not None:
            held[layer] = router.bias
    return held


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of the global tensors that this rank's parameters hold, by name."""
    placed = trainer.model.placed()
    return {name: t.clone() for item in placed for name, t in zip(item.names, item.tensors(), strict=True)}


def closest_choice(router: Router, x: Tensor) -> float:
    """Smallest margin of the router's three choices for `x` `[B, S, H]`: groups, experts and scores."""
    config = router.config
    with torch.no_grad():
        logits = (x.float() @ router.weight.float().t()).flatten(0, 1)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    biased = (scores if router.bias is None else scores + router.bias).unflatten(1, (config.n_group, -1))
    groups = biased.amax(-1) if router.bias is None else biased.topk(2, -1).values.sum(-1)
    closed = groups < groups.topk(config.topk_group, -1).values[:, -1:]
    experts = biased.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
    top_k = config.num_experts_per_tok
    return min(_gap(groups, config.topk_group), _gap(experts, top_k), _gap(scores, top_k))


def _gap(scores: Tensor, chosen: int) -> float:
    """Smallest difference between the last chosen and the first not chosen, over rows."""
    best = scores.topk(chosen + 1, -1).values
    return float((best[:, chosen - 1] - best[:, chosen]).min())


def replicas(ranks: list[Curve]) -> dict[str, list[Tensor]]:
    """Name of every global tensor, and the copies that the ranks hold."""
    held: dict[str, list[Tensor]] = {}
    for rank in ranks:
        for name, tensor in rank.weights.items():
            held.setdefault(name, []).append(tensor)
    return held


def relative(one: float, other: float) -> float:
    """Relative difference of two numbers."""
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


class Runs:
    """Runs of 20 steps of `tiny`, one per layout, each made at its first use; a checkpoint of step 10 is kept."""

    def __init__(self, pool: Pool, config: Config, folder: Path) -> None:
        self.config = config
        self._pool, self._folder = pool, folder
        self._curves: dict[tuple[int, int], list[Curve]] = {}

    def curves(self, world_size: int, ep: int) -> list[Curve]:
        """Record of each rank."""
        key = world_size, ep
        if key not in self._curves:
            save_at = {10: self._folder / f"{world_size}-{ep}"}
            self._curves[key] = self._pool.run(train, world_size, self.config, ep, 20, save_at)
        return self._curves[key]

    def checkpoint(self, world_size: int, ep: int) -> Path:
        """Checkpoint of step 10."""
        self.curves(world_size, ep)
        return self._folder / f"{world_size}-{ep}" / "step-10"

    def resumed(self, world_size: int, ep: int, checkpoint: Path, steps: int = 20) -> list[Curve]:
        """Records of steps 11 to `steps` of a run that continues from `checkpoint`."""
        return self._pool.run(train, world_size, self.config, ep, steps, None, checkpoint)
