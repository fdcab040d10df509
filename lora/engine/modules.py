"""What the engine has to know of a module: its parameters, and how they can be changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora.formats.names.slots import Shape
from lora.formats.tensors import COMPUTING


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a module that multiplies its input's last axis by a matrix, in whatever form.

    Includes quantised layers, whose weight may be packed: subclasses of nn.Linear and others are measured
    by their features. None if the module is no such layer.
    """
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if stored_transposed(module):
        return int(module.nf), int(module.weight.shape[0])  # type: ignore[union-attr, arg-type, index]
    sizes = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def stored_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as [in, out]: transformers' Conv1D, as in GPT-2."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def parameters_of(module: nn.Module) -> dict[str, Shape]:
    """The shapes of the module's own parameters, a linear weight's as [out, in]."""
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }
    if matrix := linear_shape(module):
        shapes["weight"] = matrix
    return shapes


def targets_of(components: Mapping[str, nn.Module]) -> dict[str, dict[str, dict[str, Shape]]]:
    """Component -> module path -> parameter -> shape, of every module that has parameters of its own."""
    return {
        component: {path: own for path, m in root.named_modules() if (own := parameters_of(m))}
        for component, root in components.items()
    }


def shared_parameters(components: Mapping[str, nn.Module]) -> frozenset[int]:
    """The ids of parameters that several modules use, such as tied embeddings."""
    modules = (module for root in components.values() for module in root.modules())
    users = Counter(id(own) for module in modules for own in module.parameters(recurse=False))
    return frozenset(parameter for parameter, count in users.items() if count > 1)


def writable(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter, if its values are plain numbers in memory that can be written.

    None for one that is quantised (packed, or a tensor of another class) or offloaded (on `meta`).
    """
    parameter = module._parameters.get(name)
    if parameter is None or type(parameter.data) is not Tensor or parameter.is_meta:
        return None
    plain = parameter.dtype.is_floating_point and type(parameter) is nn.Parameter
    return parameter if plain else None


def as_matrix(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter's tensor in the shape that algorithms expect, sharing its memory."""
    return tensor.t() if name == "weight" and stored_transposed(module) else tensor


def takes_low_rank(module: nn.Module) -> bool:
    """Whether two plain products, added to the output, have the same effect as changing the weight."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return linear_shape(module) is not None


def compute_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The module's device and the precision that it computes in, as far as its weight shows them.

    A packed or offloaded weight does not; then they are seen at the first call.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.is_meta:
        return torch.device("cpu"), torch.float32
    return weight.device, weight.dtype if weight.dtype in COMPUTING else torch.float32
