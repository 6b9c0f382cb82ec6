"""A planted NaN is named in the step it appears: rank, layer and tensor. No weight moves, and training can continue.

Ranks 0 to 3 as ep 2 x edp 2, two micro-batches each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.configs.config import Config
from counterflow.model.router import Routing
from counterflow.tests.pool import Pool, Worker
from counterflow.tests.training.harness import make_trainer, parameters, tiny
from counterflow.training.non_finite import NonFiniteError
from counterflow.training.trainer import Trainer


@dataclass(frozen=True)
class Plant:
    """Number in a module's output, or in its gradient, that is made NaN or infinite on one rank in one micro-batch."""

    rank: int
    module: str
    backward: bool
    micro_batch: int = 0
    value: float = float("nan")

    @property
    def named(self) -> str:
        direction = "backward" if self.backward else "forward"
        what = f"gradient of the output of {self.module}" if self.backward else f"output of {self.module}"
        return f"rank {self.rank}, micro-batch {self.micro_batch}, {direction}, {what}: 1 of "


PHASES = ["layers.0.attention", "layers.1.mlp.gate", "layers.2.mlp.experts", "layers.1.mlp.shared", "layers.2.mlp_norm"]
PLANTS = [
    *(Plant(rank % 4, phase, backward) for backward in (False, True) for rank, phase in enumerate(PHASES)),
    Plant(3, "mtp.0.block.mlp.experts", False, micro_batch=1),
    Plant(2, "mtp.0.block.attention", True, micro_batch=1),
    Plant(1, "norm", False, value=float("inf")),
    Plant(2, "layers.0.mlp", True, value=float("-inf")),
]
WEIGHTS = {1: "layers.1.mlp.experts.5.w2", 2: "layers.2.mlp.experts.3.w3", 3: "layers.1.attention.kv_up", 0: "head"}


def spoil(tensor: Tensor, value: float) -> Tensor:
    """A copy with one number replaced."""
    spoilt = tensor.clone()
    spoilt.view(-1)[spoilt.numel() // 2] = value
    return spoilt


@contextmanager
def planted(trainer: Trainer, plant: Plant) -> Iterator[None]:
    """Spoil the module's output while open. A failed step runs again to be examined, so the fault repeats."""
    module = dict(trainer.model.modules())[plant.module]
    calls = 0

    def spoil_part(tensor: Tensor) -> Tensor:
        if not plant.backward:
            return spoil(tensor, plant.value)
        tensor = tensor.clone()  # a view of its own in the graph, whose gradient is used nowhere else
        tensor.register_hook(lambda gradient: spoil(gradient, plant.value))
        return tensor

    def hook(_module: Any, _given: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if (calls - 1) % 2 != plant.micro_batch:
            return output
        if isinstance(output, Routing):
            return replace(output, weights=spoil_part(output.weights))
        if isinstance(output, tuple):
            return (spoil_part(output[0]), *output[1:])
        return spoil_part(output)

    handle = module.register_forward_hook(hook) if trainer.groups.rank == plant.rank else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    state = {name: tensor.to_local().clone() for name, tensor in trainer._state().items()}
    return state | {f"published {name}": tensor for name, tensor in parameters(trainer).items()}


def changed(trainer: Trainer, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in state_of(trainer).items() if not torch.equal(tensor, before[name])]


def failure_of(trainer: Trainer) -> str:
    """Message of the next step, which must leave all state unchanged."""
    before, progress = state_of(trainer), trainer.progress
    try:
        trainer.step()
    except NonFiniteError as error:
        assert changed(trainer, before) == []
        assert trainer.progress == progress
        return str(error)
    return "the step did not fail"


def plant_and_train(worker: Worker, config: Config, plants: list[Plant]) -> list[str]:
    """Message of every plant, one after the other in one trainer, which then continues to train."""
    trainer = make_trainer(config, 4, 2)
    messages = []
    for plant in plants:
        with planted(trainer, plant):
            messages.append(failure_of(trainer))
    trainer.step()
    trainer.close()
    return messages


@pytest.fixture(scope="module")
def messages(pool: Pool, text: Path) -> list[list[str]]:
    return pool.run(plant_and_train, 4, tiny(text), PLANTS)


@pytest.mark.parametrize("number", range(len(PLANTS)), ids=lambda number: PLANTS[number].named.split(":")[0])
def test_planted_number_is_named_with_rank_micro_batch_phase_and_tensor(messages: list[list[str]], number: int) -> None:
    plant = PLANTS[number]
    everywhere = {rank[number] for rank in messages}
    assert len(everywhere) == 1, "all ranks stop with the same words"
    (said,) = everywhere
    assert said.startswith(f"step 1 is not finite: {plant.named}")
    assert ("infinite" if abs(plant.value) == float("inf") else "NaN") in said
    assert said.endswith("; no weight was changed by this step")


def _bad_weights(worker: Worker, config: Config) -> list[str]:
    trainer = make_trainer(config, 4, 2)
    messages = []
    for rank, name in WEIGHTS.items():
        names = dict(_tensors(trainer))
        good = names[name].clone() if name in names else None
        if trainer.groups.rank == rank:
            names[name][0, 0] = float("nan")
        try:
            trainer.step()
        except NonFiniteError as error:
            messages.append(str(error))
        if good is not None:
            names[name].copy_(good)
    trainer.step()
    trainer.close()
    return messages


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for item in trainer.model.placed():
        yield from zip(item.names, item.tensors(), strict=True)


def test_a_weight_that_is_nan_is_named_by_its_global_name(pool: Pool, text: Path) -> None:
    for said in pool.run(_bad_weights, 4, tiny(text)):
        assert [message.split(": 1 of")[0] for message in said] == [
            f"step 1 is not finite: rank {rank}, weight {name}" for rank, name in WEIGHTS.items()
        ]


def _bad_leaf_gradient(worker: Worker, config: Config) -> str:
    """The gradient of a weight alone is spoilt: no module's input or output shows it."""
    trainer = make_trainer(config, 2, 1)
    layer, sums = dict(trainer.model.modules())["layers.1.attention.out"], trainer.optimizer

    class Spoiled:
        def gradient_buffer(self, parameter: nn.Parameter) -> Tensor:
            return sums.gradient_buffer(parameter)

        def arrived(self, parameter: nn.Parameter) -> None:
            self.gradient_buffer(parameter)[0, 0] = torch.nan
            sums.arrived(parameter)

    if worker.rank == 1:
        layer.gradients = Spoiled()
    said = failure_of(trainer)
    trainer.close()
    return said


def test_a_gradient_that_only_a_weight_has_is_named(pool: Pool, text: Path) -> None:
    for said in pool.run(_bad_leaf_gradient, 2, tiny(text)):
        assert said.startswith("step 1 is not finite: rank 1, gradient of layers.1.attention.out: ")


def _once(worker: Worker, config: Config) -> str:
    """Message of a fault that does not repeat, like one of memory or of a network."""
    trainer = make_trainer(config, 1, 1)
    calls: list[int] = []

    def hook(_module: Any, _given: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return spoil(output, float("nan")) if len(calls) == 1 else output

    trainer.model.chunks[0].norm.register_forward_hook(hook)
    said = failure_of(trainer)
    trainer.close()
    return said


def test_a_fault_that_does_not_come_again_is_told_apart(pool: Pool, text: Path) -> None:
    (said,) = pool.run(_once, 1, tiny(text))
    assert "running it again was finite, so the fault is not in data or weights" in said


def _blamed(worker: Worker, config: Config, plants: list[Plant]) -> list[bool]:
    trainer = make_trainer(config, 2, 2)
    elsewhere = []
    for plant in plants:
        with planted(trainer, plant), pytest.raises(NonFiniteError) as caught:
            trainer.step()
        elsewhere.append(caught.value.elsewhere)
    trainer.close()
    return elsewhere


def test_only_the_rank_where_it_began_takes_the_blame(pool: Pool, text: Path) -> None:
    """Experts' outputs are sent, so with ep 2 both ranks have numbers that are not finite."""
    plants = [Plant(0, "layers.1.mlp.experts", False), Plant(1, "layers.2.mlp.experts", True)]
    assert pool.run(_blamed, 2, tiny(text), plants) == [[False, True], [True, False]]
