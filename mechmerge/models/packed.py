"""Models whose linear layers hold their weights in oneDNN's own layout: the same products, two to four times as fast on CPU.

PyTorch brings a weight into the layout of the kernel at every call, which dominates where few rows meet a large matrix, as in
decoding. Packing it once is what `torch.compile` does when it freezes a model
(https://github.com/pytorch/pytorch, torch/_inductor/fx_passes/mkldnn_fusion.py); here it is done without a compiler. Sums are
made in another order, so values differ from the plain ones by rounding: which kernels answered belongs to what answers depend
on (`kernels`). Such a model is for generating only: its weights can no longer be read or written.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Literal

from mechmerge.models.load import load_model

Kernels = Literal["onednn", "torch"]


def kernels(dtype: str, device: str) -> Kernels:
    """Whose matrix products `load_packed` uses: oneDNN's for float32 and bfloat16 on an x86 processor, PyTorch's elsewhere."""
    import torch

    if device != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return "torch"
    supported = {"float32": True, "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported()}
    return "onednn" if supported.get(dtype, False) else "torch"


def load_packed(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """Like `load_model`, with packed linear layers where `kernels` says onednn. For generating only.

    Memory: a packed weight takes the place of the plain one; a tied output matrix is held twice.
    """
    return packed(load_model(folder, dtype, device), dtype, device)


def packed(model: Any, dtype: str, device: str) -> Any:
    """A model that nobody else holds yet, with packed linear layers where `kernels` says onednn. For generating only."""
    if kernels(dtype, device) == "onednn":
        _pack(model)
    return model


def _pack(model: Any) -> None:
    """Replaces every `nn.Linear` inside a model that nobody else holds yet."""
    import torch

    class PackedLinear(torch.nn.Module):
        """A linear layer without gradients."""

        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # type: ignore[no-any-return]

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, PackedLinear(child))
