"""Names under which a checkpoint's progress keeps the loads and the places of experts; needs no torch."""

from __future__ import annotations

LOADS = "expert_loads"
"""`steps` and `tokens`: tokens that each expert of each MoE layer was sent in that many steps, up to this one."""
PLACEMENT = "expert_placement"
"""`ranks`, `nodes` and `experts`: the expert at each place of each MoE layer; absent where all are in their order."""
