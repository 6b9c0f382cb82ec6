"""A whole run on one rank: restore, step, evaluate, save, report."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from ..configs.config import Config
from ..fp8.number_formats import DTYPES
from ..fp8.products import Products
from ..model.counts import FLOP_CONVENTION, count_parameters
from ..parallel.groups import Groups
from ..report.hardware import Peak, peak_tflops
from ..report.metrics import METRICS_FILE, MetricsWriter, StepMetrics, read_metrics
from ..report.progress import ProgressDisplay
from ..report.summary import RunSummary, describe_run
from ..report.text.layout import draw_layout
from ..report.text.split import describe_split
from ..report.traffic import mean_step
from ..settings import UsageError
from .dispatch import describe_dispatch
from .garbage import collecting_every
from .preflight import RunPlan
from .trace import PipelineTrace, gather_trace
from .trainer import PipelineRun, Trainer

logger = logging.getLogger(__name__)


def run_training(plan: RunPlan, groups: Groups, device: torch.device) -> None:
    """Train from the checkpoint of `plan`, or from the start, to its last step."""
    config, data = plan.config, plan.data
    peak = _peak(config, device)
    trainer = Trainer(config, groups, device, data, peak)
    if plan.checkpoint is not None:
        record = trainer.restore(plan.checkpoint)
        logger.info("resumed from %s", plan.checkpoint)
        if record["data_digest"] != data.digest:
            logger.warning("the text is not the one this run was started on: losses will not continue exactly")
    with ExitStack() as stack:
        stack.callback(trainer.close)
        collect = stack.enter_context(collecting_every(config.train.collect_every))
        recorder = stack.enter_context(_Recorder(plan, groups, peak)) if groups.rank == 0 else None
        metrics: StepMetrics | None = None
        while trainer.progress.step < plan.total_steps:
            timed = config.parallel.pp > 1 and trainer.progress.step + 1 == config.log.trace_step
            runs: list[PipelineRun] = []
            metrics = trainer.step(runs.append if timed else None)
            trace = gather_trace(groups, runs[0]) if runs else None
            step, last = metrics.step, metrics.step == plan.total_steps
            if step == plan.progress.step + 1 and config.parallel.step_timeout is not None:
                groups.set_timeout(config.parallel.step_timeout)  # kernels are compiled, and connections made
            collect(step)
            if last or step % config.train.evaluate_every == 0:
                metrics = metrics.model_copy(update=trainer.validate())
            if recorder is not None:
                recorder.step(metrics)
                if trace is not None:
                    recorder.trace(trace, plan.run_dir / "traces" / f"step-{step}.html", metrics)
            if last or step % config.checkpoint.every == 0:
                path = trainer.save(plan.run_dir / "checkpoints")
                logger.info("checkpoint %s written", path)
        trainer.model.dispatcher.close()


def summarise(plan: RunPlan) -> RunSummary:
    """The result of a finished run, from its records."""
    steps = list(read_metrics(plan.run_dir)) if (plan.run_dir / METRICS_FILE).exists() else []
    if not steps:
        raise UsageError(f"{plan.run_dir} has a checkpoint but no {METRICS_FILE}: start again with --fresh")
    rates = sorted(step.tokens_per_second for step in steps)
    evaluated = [step for step in steps if step.validation_loss is not None]
    return RunSummary(
        steps=steps[-1].step,
        loss=steps[-1].loss,
        validation_loss=evaluated[-1].validation_loss if evaluated else None,
        validation_loss_ema=evaluated[-1].validation_loss_ema if evaluated else None,
        unigram_entropy=plan.data.unigram_entropy,
        tokens_per_second=rates[len(rates) // 2],
        traffic=tuple(mean_step([step.traffic for step in steps if step.traffic])),
        run_dir=str(plan.run_dir),
    )


class _Recorder(ExitStack):
    """Display and metrics files of a run, on rank 0."""

    def __init__(self, plan: RunPlan, groups: Groups, peak: Peak) -> None:
        super().__init__()
        config, first = plan.config, plan.progress.step
        self._display = ProgressDisplay(config.log, config.run.name, plan.total_steps, first)
        counts = count_parameters(config.model)
        self._display.note(draw_layout(groups.layout))
        if config.parallel.pp > 1:
            self._display.note(f"\n{describe_split(config)}")
        for note in plan.notes:
            self._display.note(note)
        if groups.mesh.device_type == "cpu" and config.precision.format == "bf16":
            self._display.note(f"products of BF16 on this CPU: {Products.choose(config.precision.cpu_products)}")
        rows = describe_run(
            total_parameters=counts.total,
            active_parameters=counts.active,
            mtp_parameters=counts.mtp_module * config.model.num_nextn_predict_layers,
            layout="as drawn above",
            dispatch=describe_dispatch(config, groups.layout, groups.mesh.device_type),
            flop_convention=FLOP_CONVENTION,
            peak=peak,
            run_dir=str(plan.run_dir),
        )
        self._display.show_rows(config.run.name, rows)
        self._writer = self.enter_context(MetricsWriter(plan.run_dir, config.log.tensorboard, first))
        self.enter_context(self._display)

    def step(self, metrics: StepMetrics) -> None:
        self._writer.write(metrics)
        self._display.update(metrics)

    def trace(self, trace: PipelineTrace, path: Path, metrics: StepMetrics) -> None:
        trace.write(path, metrics.step, metrics.traffic or ())
        self._display.note(f"step {metrics.step}: {trace.describe()}; drawn in {path}")


def _peak(config: Config, device: torch.device) -> Peak:
    """Peak that MFU refers to. All ranks of a node measure at the same time, because they share its cores."""
    if config.log.peak_tflops == "auto":
        products = Products.choose(config.precision.cpu_products)
        return peak_tflops(device, products.computes_in(device, DTYPES[config.precision.format]))
    return Peak(config.log.peak_tflops, "set by log.peak_tflops")
