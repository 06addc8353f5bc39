"""Drop-in modules and the MLP."""

from .model import MLP
from .modules import BatchNorm1d, Dropout, Linear, LinearReLU

__all__ = ["MLP", "BatchNorm1d", "Dropout", "Linear", "LinearReLU"]
