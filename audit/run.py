"""The two runs of an audit in lock step, and what is recorded of them.

Everything is in the audit's folder as it happens, and both runs save checkpoints, so an audit that was stopped goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint.manifest import complete_steps
from ..fp8.statistics import Statistics
from ..launcher.environment import usable_cores
from ..parallel.layout import Layout
from ..training.build import make_groups
from ..training.non_finite import NonFiniteError
from ..training.trainer import Trainer
from .case import Case
from .probe import Point, Probe, compare, moved_share

T = TypeVar("T")
STEPS, LOOKS = "steps.jsonl", "looks.jsonl"
Told = Callable[[dict[str, Any]], None]


class Workers:
    """Runs two things at a time where there are two cores; each computes as it would alone."""

    def __init__(self, device: torch.device) -> None:
        # On a GPU both would wait in one queue.
        self._count = 2 if device.type == "cpu" and usable_cores() > 1 else 1
        self._pool = ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(threads(device),))

    def map(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        return [future.result() for future in [self._pool.submit(task) for task in tasks]]

    def stream(self, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        yield from self._pool.map(function, items)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def threads(device: torch.device) -> int:
    """CPU threads of one run, if two run at a time."""
    return max(1, torch.get_num_threads() // 2) if device.type == "cpu" else torch.get_num_threads()


class Audit:
    """Both runs, and the models that look at gradients."""

    def __init__(self, case: Case, device: torch.device, workers: Workers) -> None:
        self.case, self.device, self.workers = case, device, workers
        self.groups = make_groups(case.config, Layout(1), device.type)
        configs = {"fp8": case.config, case.against: case.plain(case.against)}
        self.trainers = {name: Trainer(config, self.groups, device, case.plan.data) for name, config in configs.items()}
        self.steps: list[dict[str, Any]] = []
        self.looks: list[dict[str, Any]] = []
        self._probes: dict[str, Probe] = {}

    @property
    def done(self) -> int:
        """Steps that both have made."""
        return self.trainers["fp8"].progress.step

    def resume(self) -> int:
        """Go on from the last checkpoint that both have written; returns its step, 0 where there is none."""
        folder = self.case.folder
        found = [complete_steps(folder / name / "checkpoints") for name in self.trainers]
        common = [step for step in set.intersection(*map(set, found)) if step <= self.case.steps]
        if not common:
            for name in (STEPS, LOOKS):
                (folder / name).unlink(missing_ok=True)
            return 0
        for trainer, steps in zip(self.trainers.values(), found, strict=True):
            trainer.restore(steps[max(common)])
        self.steps = _cut(folder / STEPS, max(common))
        self.looks = _cut(folder / LOOKS, max(common))
        return max(common)

    def run(self, told: Told) -> str | None:
        """Train to the last step, reporting each. Returns why it ended before, if a run did not stay finite."""
        case = self.case
        with (case.folder / STEPS).open("a") as steps, (case.folder / LOOKS).open("a") as looks:
            while self.done < case.steps:
                try:
                    made = self.workers.map([trainer.step for trainer in self.trainers.values()])
                except NonFiniteError as error:
                    return str(error)
                record: dict[str, Any] = {"step": self.done}
                for name, metrics in zip(self.trainers, made, strict=True):
                    record[name] = {key: getattr(metrics, key) for key in ("loss", "loss_mtp", "grad_norm")}
                _append(steps, self.steps, record)
                told(record)
                looking = self.done % case.every == 0 or self.done == case.steps
                if looking:
                    _append(looks, self.looks, self.look())
                if looking or self.done % case.config.checkpoint.every == 0:
                    for name, trainer in self.trainers.items():
                        trainer.save(case.folder / name / "checkpoints")
        return None

    def look(self) -> dict[str, Any]:
        """Gradients of the next step at the weights of the FP8 run, and what quantisation does to its tensors."""
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
        return {
            "step": self.done,
            "gradients": {
                name: {key: difference.to_json() for key, difference in compare(made, fp32).items()}
                for name, made in (("fp8", fp8), ("bf16", bf16))
            },
            "moved": {"fp8": moved_share(fp8.choices, fp32.choices), "bf16": moved_share(bf16.choices, fp32.choices)},
            "classes": {name: sums.to_json() for name, sums in sorted(statistics.first.items())},
            "classes_for_weights": {name: sums.to_json() for name, sums in sorted(statistics.for_weights.items())},
        }

    def validation(self) -> dict[str, float]:
        """Loss of both over the held-out sequences."""
        losses = self.workers.map([trainer.evaluate for trainer in self.trainers.values()])
        return dict(zip(self.trainers, losses, strict=True))

    def close(self) -> None:
        for trainer in self.trainers.values():
            trainer.close()


@contextmanager
def audit_of(case: Case, device: torch.device) -> Iterator[Audit]:
    """An audit with its runs, closed at the end."""
    workers = Workers(device)
    audit = Audit(case, device, workers)
    try:
        yield audit
    finally:
        audit.close()
        workers.close()


def _append(file: Any, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    records.append(record)
    file.write(json.dumps(record) + "\n")
    file.flush()


def _cut(path: Path, last: int) -> list[dict[str, Any]]:
    """The records of a file up to step `last`; later ones are taken out of it."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(_read, lines) if record is not None and record["step"] <= last]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def _read(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:  # a line that was being written when the audit was stopped
        return None
    return record
