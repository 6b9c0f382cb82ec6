"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from .harness import write_text
