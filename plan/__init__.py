"""Predictions: costs, simulation, steps of a run."""
