"""The training step and a run around it."""
