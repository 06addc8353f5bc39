"""The options of a cross-entropy, as one value."""

from typing import Any, NamedTuple


class LossOptions(NamedTuple):
    """The options of torch.nn.functional.cross_entropy.

    Attributes:
        ignore_index, reduction, label_smoothing: see `cross_entropy.cross_entropy`.
        float32: whether the loss of 16-bit logits is float32, as under torch.autocast.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    float32: bool = False

    def keywords(self) -> dict[str, Any]:
        """The options as keyword arguments of PyTorch's functions."""
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
        }
