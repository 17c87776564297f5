"""Copies of weights in the layout that a CPU multiplies with fastest, while they do not change.

In decoding, a few rows are multiplied with large matrices, and to bring a matrix into the order of
the inner loops takes as long as the product. oneDNN, a library inside torch, can do that once: the
linear layers of 60 rows are then up to twice as fast, in float32 and in bfloat16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 2**16  # numbers of a matrix that gains anything
LARGEST = 2**32  # bytes of a model whose copy is not too much memory
ROWS = 64  # for which the layout is chosen; it is good for others


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, the large linear layers of a policy on a CPU compute with copies of their weights.

    They give no gradients, and do not follow a change of the weights.
    """
    if not can_prepack(model):
        yield
        return

    layers = large_layers(model)
    try:
        for layer in layers:
            layer.forward = product(layer.weight, layer.bias)
        if has_large_head(model):
            model.head = product(model.head_weight)
        yield
    finally:
        # What an instance has hides what its class has, until it is taken away.
        for layer in layers:
            vars(layer).pop("forward", None)
        vars(model).pop("head", None)


def large_layers(model: nn.Module) -> list[nn.Linear]:
    layers = [layer for layer in model.model.modules() if isinstance(layer, nn.Linear)]
    return [layer for layer in layers if layer.weight.numel() >= SMALLEST]


def has_large_head(model: nn.Module) -> bool:
    return model.head_weight.numel() >= SMALLEST


def copied_bytes(model: nn.Module, width: int) -> int:
    """Of the copies, where a weight has `width` bytes; 0 if the model is too large for any."""
    if width * sum(weight.numel() for weight in model.parameters()) > LARGEST:
        return 0
    numbers = sum(layer.weight.numel() for layer in large_layers(model))
    if has_large_head(model):
        numbers += model.head_weight.numel()
    return width * numbers


def can_prepack(model: nn.Module) -> bool:
    """Whether oneDNN multiplies with these weights, and there is something to copy."""
    weights = list(model.parameters())
    known = {torch.float32}
    # torch's own names, but private ones: without them layers are computed as ever.
    available = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not available or not torch.backends.mkldnn.is_available():
        return False
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        known.add(torch.bfloat16)

    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    suited = on_cpu and {weight.dtype for weight in weights} <= known
    return suited and copied_bytes(model, weights[0].itemsize) > 0


def product(weight: Tensor, bias: Tensor | None = None) -> Callable:
    """x (..., columns) -> x Wᵀ + b (..., rows), with a copy of the weights."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def multiply(x):
        return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")

    return multiply
