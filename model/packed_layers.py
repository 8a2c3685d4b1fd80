"""Linear layers as a CPU multiplies them fastest: their weights laid out once for oneDNN, and an MLP's first layer with its activation behind it.

Input: a frozen encoder's blocks in fp32 or bf16. Output: the same blocks, computing the same but for the rounding of sums.

Products of matrices are 85 % of a forward pass. Measured on one core of an AMD EPYC with AVX-512, in 1e9 FLOP/s, at ViT-B/16's shapes and 65 to 1970
rows: torch's own linear layer in fp32, which goes through MKL, 53 to 93, packed 95 to 108, packed on AVX2 alone 82 to 102; in bf16 129 to 198, packed
190 to 215. The activation is another 7 %, which goes into the product. A whole forward pass anew: `pytest -m benchmark -s --jaxtyping-packages=
tests/benchmark/test_packed_layers.py`.
"""

import platform

import torch
from torch import Tensor, nn

__all__ = ["can_pack", "pack_layers"]

_FUSED: dict[str, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "quick_gelu": ("swish", ""),
}
"""Activations by transformers' names, as oneDNN has them behind a product."""
_QUICK = 1.702
"""quick_gelu(x) = x sigmoid(1.702 x) = swish(1.702 x) / 1.702: one factor goes into the weights before, the other into those behind."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies packed weights of a type: where it was measured, which is x86, with what instructions the type needs.

    Args:
        dtype: of the weights.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))  # noqa: SLF001


class _PackedLinear(nn.Module):
    """A linear layer whose weights nothing but a product can read any more. Without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        # Laid out for any number of rows: a batch's last views are fewer.
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # noqa: SLF001
        self._bias = None if bias is None else bias.detach()
        self._activation, self._algorithm = activation

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            inputs, self._weight, self._bias, self._activation, [], self._algorithm
        )
        return found


def pack_layers(blocks: nn.Module, activation: str | None = None) -> None:
    """Pack every linear layer below a module in place. What is packed already stays as it is.

    Args:
        blocks: the module, on the CPU, of a type that `can_pack` takes, never to be trained.
        activation: of their MLPs, by transformers' name. None, and one that oneDNN does not have, run as they are.
    """
    for name, child in list(blocks.named_children()):
        if isinstance(child, nn.Linear):
            setattr(blocks, name, _PackedLinear(child.weight, child.bias))
        elif (packed := _packed_mlp(child, activation)) is not None:
            setattr(blocks, name, packed)
        else:
            pack_layers(child, activation)


def _packed_mlp(mlp: nn.Module, activation: str | None) -> nn.Module | None:
    """An MLP of two layers with an activation between them; None where it is none, or the activation cannot go into the first product."""
    first, second = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if activation not in _FUSED or not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        return None
    factor = _QUICK if activation == "quick_gelu" else 1.0
    # Scaled weights are rounded again: in fp32 by 6e-8 of themselves, which is nothing, in bf16 by 4e-3, which makes another model of them.
    if factor != 1.0 and first.weight.dtype != torch.float32:
        return None
    return nn.Sequential(
        _PackedLinear(first.weight.detach() * factor, first.bias.detach() * factor, _FUSED[activation]),
        _PackedLinear(second.weight.detach() / factor, second.bias),
    )
