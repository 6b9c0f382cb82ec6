"""The AdamW update in one kernel: Transformer Engine's FusedAdam on the optimizer's own tensors.

FusedAdam replaces `adamw` on GPUs. Masters and moments stay where they are, so checkpoints do not depend on the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...fp8.saved_tensors import memory_of
from ...fp8.te.library import Library
from ..config import OptimConfig
from .adamw import Update


class FusedAdamW:
    """An update with the arguments of `adamw`, on GPU tensors. Every master weight gets a separate FusedAdam."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._of: dict[int, tuple[nn.Parameter, torch.optim.Optimizer]] = {}

    @torch.no_grad()
    def __call__(
        self,
        master: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        config: OptimConfig,
        decay: float,
        now: Update,
    ) -> None:
        """Update in place as `adamw`, except for rounding. A clipped gradient is scaled in place too."""
        if not master.numel():
            return
        key = memory_of(master)
        if key not in self._of:
            self._of[key] = self._adopt(master, exp_avg, exp_avg_sq, config, decay)
        parameter, adam = self._of[key]
        if now.gradient_scale != 1.0:
            gradient.mul_(now.gradient_scale)
        (group,) = adam.param_groups
        group["lr"], group["step"] = now.lr, now.step - 1  # the FusedAdam counts the step itself, before it computes
        parameter.grad = gradient
        adam.step()
        parameter.grad = None

    def _adopt(
        self, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, config: OptimConfig, decay: float
    ) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        """Make a FusedAdam whose parameter is the master weights and whose state is our moments."""
        parameter = nn.Parameter(master)  # FP32 already: no master copy is needed
        adam = self.library.pytorch.optimizers.FusedAdam(
            [parameter],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=decay,
            bias_correction=True,
            adam_w_mode=True,
            master_weights=False,
            exp_avg_dtype=exp_avg.dtype,
            exp_avg_sq_dtype=exp_avg_sq.dtype,
        )
        # FusedAdam records a scale for every state that is not FP32, also for BF16, to which it applies none.
        adam.initialize_state(parameter, False)
        adam.state[parameter] |= {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return parameter, adam
