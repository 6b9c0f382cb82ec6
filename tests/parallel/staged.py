"""A toy pipeline for tests of the optimizer: named tensors in stages, and the ranks that hold them.

A stage has a matrix, a norm gain, a deferred matrix and two experts; the first has an embedding too. Nothing is
computed: a test gives each parameter its gradients, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.local_parameter import LocalParameter
from counterflow.parallel.groups import Groups
from counterflow.parallel.layout import Layout

EXPERTS = 2
MICRO_BATCHES = 8  # of each step; each is run by one of the ranks that hold a tensor
DENSE = {"matrix": (7, 5), "gain": (6,), "late": (3, 4)}
EXPERT = (5, 4)
EMBEDDING = (9, 4)

Holders = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A layout, and the pipeline ranks that hold each stage and the embedding."""

    world: int
    pp: int
    ep: int
    stages: tuple[Holders, ...]
    embedding: Holders

    def groups(self) -> Groups:
        return Groups.create(Layout(self.world, self.pp, self.ep), "cpu", holders=[*self.stages, self.embedding])

    @property
    def alone(self) -> Case:
        """The case of the same tensors in a single process."""
        return Case(1, 1, 1, ((0,),) * len(self.stages), (0,))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all global tensors."""
        found: dict[str, tuple[int, ...]] = {"embedding": EMBEDDING}
        for stage in range(len(self.stages)):
            found |= {f"stages.{stage}.{name}": shape for name, shape in DENSE.items()}
            found |= {f"stages.{stage}.experts.{e}": EXPERT for e in range(EXPERTS)}
        return found

    def __str__(self) -> str:
        return f"{self.world}ranks-pp{self.pp}-ep{self.ep}-{'.'.join(''.join(map(str, held)) for held in self.stages)}"


def mirrored(world: int, pp: int, ep: int) -> Case:
    """The case of DualPipe: pipeline ranks r and pp - 1 - r both hold stages r and pp - 1 - r."""
    pairs = tuple(tuple(sorted({stage, pp - 1 - stage})) for stage in range(pp))
    return Case(world, pp, ep, pairs, pairs[0])


def plain(world: int, pp: int, ep: int) -> Case:
    """The case of 1F1B with MTP: the first and the last pipeline rank share the embedding."""
    return Case(world, pp, ep, tuple((stage,) for stage in range(pp)), (0, pp - 1))


CASES = [
    mirrored(2, 2, 1),
    mirrored(4, 2, 2),
    mirrored(4, 4, 1),
    plain(4, 4, 1),
    plain(4, 2, 2),
    mirrored(8, 4, 2),
    mirrored(8, 2, 2),
    plain(8, 4, 1),
    Case(4, 4, 1, ((0, 1, 2), (1,), (0, 3), (2, 3)), (0, 1, 2, 3)),  # overlapping sets
]


class Part:
    """The parameters that a rank of `groups` holds, in the model's order."""

    def __init__(self, case: Case, groups: Groups, dtype: torch.dtype = torch.float32) -> None:
        here, ep = groups.coordinates.pp, groups.coordinates.ep
        per_rank = EXPERTS // groups.layout.ep
        experts = range(ep * per_rank, (ep + 1) * per_rank)
        self.groups = groups
        self.parameters: list[LocalParameter] = []
        if here in case.embedding:
            self.parameters.append(LocalParameter(_empty(EMBEDDING, dtype), ("embedding",), holders=case.embedding))
        for stage, held in enumerate(case.stages):
            if here in held:
                for name, shape in DENSE.items():
                    self.parameters.append(
                        LocalParameter(_empty(shape, dtype), (f"stages.{stage}.{name}",), holders=held)
                    )
                stack = _empty((per_rank, *EXPERT), dtype)
                names = tuple(f"stages.{stage}.experts.{e}" for e in experts)
                self.parameters.append(LocalParameter(stack, names, "edp", held))

    def micro_batches(self, item: LocalParameter) -> list[int]:
        """Micro-batches that this rank runs in each step, dealt out among the ranks that hold `item`."""
        group = self.groups.replicas(item.replicas, item.holders).get_group()
        return list(range(dist.get_rank(group), MICRO_BATCHES, dist.get_world_size(group)))

    def expected(self) -> dict[nn.Parameter, int]:
        """Number of gradients that each parameter gets in a step."""
        return {item.parameter: len(self.micro_batches(item)) for item in self.parameters}

    def backward(self, gradient: Callable[[str, int], Tensor], items: Iterable[LocalParameter] | None = None) -> None:
        """Give `items`, by default all from last to first, the gradients `gradient(name, micro_batch)` of a step."""
        for item in reversed(self.parameters) if items is None else items:
            for micro_batch in self.micro_batches(item):
                self.accumulate(item, micro_batch, gradient)

    def accumulate(self, item: LocalParameter, micro_batch: int, gradient: Callable[[str, int], Tensor]) -> None:
        parameter = item.parameter
        wanted = torch.stack([gradient(name, micro_batch) for name in item.names]).view(parameter.shape)
        wanted = wanted.to(parameter.dtype)
        if item.names[0].endswith("late"):
            torch.autograd.backward(parameter, wanted)  # as the queue of weight gradients does
        else:
            (parameter * wanted).sum().backward()

    def published(self) -> dict[str, Tensor]:
        """Copies of this rank's global tensors."""
        return {n: t.clone() for item in self.parameters for n, t in zip(item.names, item.tensors(), strict=True)}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def seeded(name: str, *numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)) + sum(n * 1000**i for i, n in enumerate(numbers, 1)))


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=seeded(name))


def exact_gradients(case: Case, step: int) -> Callable[[str, int], Tensor]:
    """Gradients in multiples of 1/256: sums are exact in FP32 in any order, so layouts must agree bit for bit."""
    return lambda name, micro: torch.randint(-200, 200, case.shapes[name], generator=seeded(name, micro, step)) / 256


def rounded_gradients(case: Case, step: int) -> Callable[[str, int], Tensor]:
    """Gradients whose sums depend on the order."""
    return lambda name, micro: torch.randn(case.shapes[name], generator=seeded(name, micro, step))
