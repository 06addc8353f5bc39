"""Targets of a cross-entropy: class indices y or class probabilities t, and how much each class counts in a row.

    q_c = w_c ((1 - s) 1[c = y] + s / C)    or    w_c ((1 - s) t_c + s / C)

w: class weights; s: label smoothing.
"""
# pyright: reportGeneralTypeIssues=false
# (the checker takes a @triton.jit function that unpacks a result for one that never returns)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import join_scalar, split_scalar


class Rules(NamedTuple):
    """How classes count.

    Attributes:
        weight: (classes,), contiguous, or None.
        ignore_index: index of rows that do not count.
        smoothing: in (0, 1]; None for 0; in a kernel, see `tile.split_scalar`.
        classes: number of classes in the whole row.
        first_class: the first class of the given logits, if they are a part of the row.
    """

    weight: Tensor | None
    ignore_index: int
    smoothing: float | tuple[float, ...] | None
    classes: int
    first_class: int = 0

    def for_kernel(self, dtype: torch.dtype) -> "Rules":
        """The rules as an argument of a kernel that computes q in `dtype`."""
        if not isinstance(self.smoothing, float):
            return self
        return self._replace(smoothing=split_scalar(self.smoothing, dtype))


@triton.jit
def row_offsets(rows, S, stride_n, stride_s):
    """Offsets of rows of logits (N, C, S). Row n S + s is sample n at place s."""
    rows = rows.to(tl.int64)
    return (rows // S) * stride_n + (rows % S) * stride_s


@triton.jit
def load_index(target_ptr, rows, row_mask, rules):
    """Class indices of rows, whether each row is ignored, and whether its index is in range or ignored."""
    index = tl.load(target_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    ignored = (index == rules.ignore_index) | (row_mask == 0)
    valid = ((index >= 0) & (index < rules.classes)) | ignored
    return index, ignored, valid


@triton.jit
def class_weights(target, target_offs, cols, mask, rules, dtype: tl.constexpr, PROBABILITIES: tl.constexpr):
    """A tile of q. target: indices [BLOCK_M, 1], or a pointer to probabilities, with offsets target_offs."""
    classes = rules.first_class + cols
    if PROBABILITIES:
        q = tl.load(target + target_offs, mask=mask, other=0.0).to(dtype)
    else:
        q = (target == classes[None, :]).to(dtype)
    if rules.smoothing is not None:
        smoothing = join_scalar(rules.smoothing, dtype)
        q = q * (1 - smoothing) + smoothing / rules.classes
    if rules.weight is not None:
        w = tl.load(rules.weight + classes, mask=classes < rules.classes, other=0.0)
        w = w.to(dtype)[None, :]
        if PROBABILITIES or rules.smoothing is not None:
            q = q * w
        else:
            # Select: 0 times the infinite weight of another class would be nan.
            q = tl.where(q != 0, w, 0.0)
    return tl.where(mask, q, 0.0)


def class_strides(target: Tensor) -> tuple[int, ...]:
    """Strides of probabilities (N, C, S). They are not used for class indices (N, S), which are contiguous."""
    return target.stride() if target.is_floating_point() else (0, 0, 0)


def rows_in_octets(*matrices: Tensor) -> bool:
    """Whether the classes and the distance between samples of all that are (N, C, S) are multiples of 8."""
    return all(x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 for x in matrices if x.ndim == 3)
