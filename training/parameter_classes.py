"""Classes of parameters by their global names."""

from __future__ import annotations

from fnmatch import fnmatchcase

PARAMETERS = (
    ("embedding", "embedding"),
    ("head", "head"),
    ("attention_out", "*.attention.out"),
    ("norms", "*norm"),
    ("attention", "*.attention.*"),
    ("router", "*.mlp.gate*"),
    ("experts_down", "*.mlp.experts.*.w2"),
    ("experts_up", "*.mlp.experts.*"),
    ("shared_down", "*.mlp.shared.w2"),
    ("shared_up", "*.mlp.shared.*"),
    ("dense_down", "*.mlp.w2"),
    ("dense_up", "*.mlp.*"),
    ("mtp", "mtp.*.project"),
)
"""Classes of parameters and patterns of the names in each, router biases included; the first that fits counts."""


def parameter_class(name: str) -> str:
    """Class of the parameter with this global name, one of PARAMETERS."""
    return next(kind for kind, pattern in PARAMETERS if fnmatchcase(name, pattern))
