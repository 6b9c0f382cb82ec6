"""Counterflow pretrains DeepSeek-V3-class mixture-of-experts language models."""

__version__ = "0.2.0"
