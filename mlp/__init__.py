"""Drop-in modules and the MLP."""

from .model import MLP
from .modules import Linear, LinearReLU

__all__ = ["MLP", "Linear", "LinearReLU"]
