"""Three training steps from Python, in this process: build a configuration, build a Trainer, call `step`.

    .venv/bin/python -P examples/first_steps.py

`counterflow train` does the same and more: it checks the configuration against the machine, writes a run folder, saves
and evaluates. The model is `tiny`, in FP32 on a CPU; the text is this repository's documentation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from counterflow.configs.config import Config
from counterflow.configs.load import load_config
from counterflow.data.open import open_data
from counterflow.launcher.bootstrap import bootstrap
from counterflow.launcher.environment import WorkerEnvironment
from counterflow.parallel.layout import Layout
from counterflow.training.build import make_groups
from counterflow.training.trainer import Trainer

DOCUMENTATION = Path(__file__).resolve().parents[1] / "docs"


def make_config() -> Config:
    """Return a shipped configuration with some keys changed, as `--set` does. Every key is checked here."""
    return load_config(
        "tiny",
        [
            "run.device=cpu",
            "data.source=folder",
            f"data.path={DOCUMENTATION}",
            "batch.global_sequences=4",
            "optim.lr=3e-3",
        ],
    )


def main() -> list[float]:
    """Train three steps, print them, and return their losses in nats per token."""
    config = make_config()
    losses = []
    with tempfile.TemporaryDirectory() as cache, bootstrap(WorkerEnvironment(), config.run.device) as process:
        # A sample holds a target for each position, and further ones for multi-token prediction.
        extra = 1 + config.model.num_nextn_predict_layers
        data = open_data(config.data, config.batch.sequence_length, extra, config.run.seed, cache)
        # One process is a grid of one rank. The code below is the same for more ranks.
        groups = make_groups(config, Layout(process.world_size), process.device.type)
        trainer = Trainer(config, groups, process.device, data)
        for _ in range(3):
            metrics = trainer.step()
            losses.append(metrics.loss)
            print(f"step {metrics.step}  loss {metrics.loss:.4f}  gradient norm {metrics.grad_norm:.3f}")
        print(f"validation loss {trainer.evaluate():.4f}")
        trainer.close()
    return losses


if __name__ == "__main__":
    main()
