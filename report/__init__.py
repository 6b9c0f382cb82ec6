"""Metrics, and pages and text made from them."""
