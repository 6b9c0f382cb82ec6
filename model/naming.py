"""Names of the model's global tensors, and initial weights that depend on nothing but seed and name.

A global tensor is named by its position in the whole network, whichever rank holds it: `layers.12.mlp.experts.37.w1`.
w1 is the gate projection, w3 the up projection, w2 the down projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..local_parameter import LocalParameter
from ..seeds import seed_of
from .feed_forward import MixtureOfExperts
from .transformer import Transformer


def local_parameters(model: Transformer) -> list[LocalParameter]:
    """All parameters of this rank's model with the global tensors in them, in a fixed order."""
    experts_of = {
        name: module.local_experts for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)
    }
    parameters = [_local_parameter(name, parameter, experts_of) for name, parameter in model.named_parameters()]
    names = [name for item in parameters for name in item.names]
    assert len(set(names)) == len(names), "two parameters claim one global tensor"
    return parameters


def router_biases(model: Transformer) -> dict[str, Tensor]:
    """Selection biases of the routers by global name; every rank with a layer holds the whole bias of that layer."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(".gate.bias")}


def _local_parameter(name: str, parameter: nn.Parameter, experts_of: dict[str, tuple[int, ...]]) -> LocalParameter:
    path, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "gain"):
        return LocalParameter(parameter, (name,))  # embedding, head
    layer, _, projection = path.rpartition(".")
    weights = {"gate_up": ("w1", "w3"), "down": ("w2",)}.get(projection)
    if weights is None:
        return LocalParameter(parameter, (path,))
    if layer.endswith(".experts"):
        experts = experts_of[layer.removesuffix(".experts")]
        return LocalParameter(parameter, tuple(f"{layer}.{expert}.{w}" for expert in experts for w in weights), "edp")
    return LocalParameter(parameter, tuple(f"{layer}.{w}" for w in weights))


def initial_tensor(name: str, shape: tuple[int, ...], std: float, seed: int, device_type: str = "cpu") -> Tensor:
    """Initial value of a global tensor, FP32 on the CPU: ones for norm gains, else N(0, std) (V3 §4.2).

    Drawn on the CPU for every device but `meta`, where a tensor has no values.
    """
    if device_type == "meta":
        return torch.empty(shape, device="meta")
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed_of("initial weight", seed, name))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill every parameter of `model` with its initial value and every router bias with zero."""
    for item in local_parameters(model):
        for name, tensor in zip(item.names, item.tensors(), strict=True):
            tensor.copy_(initial_tensor(name, item.shape, model.config.initializer_range, seed))
    for bias in router_biases(model).values():
        bias.zero_()
