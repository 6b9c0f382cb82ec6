"""The two runs of an audit in lock step, and their records.

Records are written into the audit's folder as they are made, and both runs save checkpoints. So an audit that was
stopped continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

from ..checkpoint.manifest import complete_steps
from ..fp8.statistics import Statistics, Sums
from ..parallel.layout import Layout
from ..training.build import make_groups
from ..training.non_finite import NonFiniteError
from ..training.trainer import Trainer
from .case import AuditCase
from .probe import Point, Probe, compare, moved_share
from .result import AuditStep, Deviations, Look, MeanLoss, MovedShares, Record, RunStep, TensorClass, both_losses

T = TypeVar("T")
Kind = TypeVar("Kind", AuditStep, Look)
STEPS, LOOKS = "steps.jsonl", "looks.jsonl"
OnStep = Callable[[AuditStep], None]
"""Called with each step that both runs have made."""


class Workers:
    """Threads for several tasks at a time on a CPU; each task computes what it would alone."""

    def __init__(self, device: torch.device, at_once: int) -> None:
        # On a GPU all tasks would wait in one queue.
        self._count = at_once if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(threads(device),))

    def map(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        return [future.result() for future in [self._pool.submit(task) for task in tasks]]

    def stream(self, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        yield from self._pool.map(function, items)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def threads(device: torch.device) -> int:
    """CPU threads of one run, where two run at a time."""
    return max(1, torch.get_num_threads() // 2) if device.type == "cpu" else torch.get_num_threads()


class Audit:
    """Both runs, and the models that gradients are looked at with."""

    def __init__(self, case: AuditCase, device: torch.device, workers: Workers) -> None:
        self.case, self.device, self.workers = case, device, workers
        self.groups = make_groups(case.config, Layout(1), device.type)
        configs = {"fp8": case.config, case.against: case.plain(case.against)}
        self.trainers = {name: Trainer(config, self.groups, device, case.plan.data) for name, config in configs.items()}
        self.steps: list[AuditStep] = []
        self.looks: list[Look] = []
        self._probes: dict[str, Probe] = {}

    @property
    def done(self) -> int:
        """Steps that both runs have made."""
        return self.trainers["fp8"].progress.step

    def resume(self) -> int:
        """Continue from the last checkpoint that both runs have written; returns its step, 0 where there is none."""
        folder = self.case.folder
        found = [complete_steps(folder / name / "checkpoints") for name in self.trainers]
        common = [step for step in set.intersection(*map(set, found)) if step <= self.case.steps]
        if not common:
            for name in (STEPS, LOOKS):
                (folder / name).unlink(missing_ok=True)
            return 0
        for trainer, steps in zip(self.trainers.values(), found, strict=True):
            trainer.restore(steps[max(common)])
        self.steps = _cut(folder / STEPS, AuditStep, max(common))
        self.looks = _cut(folder / LOOKS, Look, max(common))
        return max(common)

    def run(self, on_step: OnStep) -> str | None:
        """Train to the last step. If a run does not stay finite, stop and return the reason."""
        case = self.case
        with (case.folder / STEPS).open("a") as steps, (case.folder / LOOKS).open("a") as looks:
            while self.done < case.steps:
                try:
                    made = self.workers.map([trainer.step for trainer in self.trainers.values()])
                except NonFiniteError as error:
                    return str(error)
                fp8, other = (RunStep(loss=m.loss, loss_mtp=m.loss_mtp, grad_norm=m.grad_norm) for m in made)
                record = AuditStep.model_validate({"step": self.done, "fp8": fp8, case.against: other})
                _append(steps, self.steps, record)
                on_step(record)
                looking = self.done % case.every == 0 or self.done == case.steps
                if looking:
                    _append(looks, self.looks, self.look())
                if looking or self.done % case.config.checkpoint.every == 0:
                    for name, trainer in self.trainers.items():
                        trainer.save(case.folder / name / "checkpoints")
        return None

    def look(self) -> Look:
        """Look at the gradients of the next step at the weights of the FP8 run, and at its quantised tensors."""
        point, statistics = Point.of(self.trainers["fp8"]), Statistics()
        if not self._probes:
            configs = {"fp8": self.case.config, "bf16": self.case.plain("bf16"), "fp32": self.case.plain("fp32")}
            self._probes = {name: Probe(config, self.groups, self.device) for name, config in configs.items()}
        fp8, bf16, fp32 = self.workers.map(
            [
                lambda: self._probes["fp8"].gradients(point, statistics),
                lambda: self._probes["bf16"].gradients(point),
                lambda: self._probes["fp32"].gradients(point),
            ]
        )
        fp8_deviations, bf16_deviations = (
            {name: sums.deviation() for name, sums in compare(made, fp32).items()} for made in (fp8, bf16)
        )
        return Look(
            step=self.done,
            gradients=Deviations(fp8=fp8_deviations, bf16=bf16_deviations),
            moved=MovedShares(fp8=moved_share(fp8.choices, fp32.choices), bf16=moved_share(bf16.choices, fp32.choices)),
            classes=_classes(statistics.first),
            classes_for_weights=_classes(statistics.for_weights),
        )

    def validation(self) -> MeanLoss:
        """Losses of both runs over the held-out sequences."""
        fp8, other = self.workers.map([trainer.evaluate for trainer in self.trainers.values()])
        return both_losses(fp8, other, self.case.against)

    def close(self) -> None:
        for trainer in self.trainers.values():
            trainer.close()


@contextmanager
def audit_of(case: AuditCase, device: torch.device, at_once: int = 2) -> Iterator[Audit]:
    """An audit with its runs, closed at the end; on a CPU it runs `at_once` tasks at a time."""
    workers = Workers(device, at_once)
    audit = Audit(case, device, workers)
    try:
        yield audit
    finally:
        audit.close()
        workers.close()


def _classes(sums: Mapping[str, Sums]) -> dict[str, TensorClass]:
    return {name: TensorClass.model_validate(each.to_json()) for name, each in sorted(sums.items())}


def _append(file: TextIO, records: list[Kind], record: Kind) -> None:
    records.append(record)
    file.write(_line(record))
    file.flush()


def _cut(path: Path, kind: type[Kind], last: int) -> list[Kind]:
    """The records of a file up to step `last`; later ones are taken out of the file."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for line in lines if (record := _read(line, kind)) is not None and record.step <= last]
    path.write_text("".join(map(_line, records)))
    return records


def _line(record: Record) -> str:
    return json.dumps(record.model_dump()) + "\n"


def _read(line: str, kind: type[Kind]) -> Kind | None:
    try:
        return kind.model_validate(json.loads(line))
    except json.JSONDecodeError:  # a line that was being written when the audit was stopped
        return None
