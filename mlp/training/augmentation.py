"""Changes of the training rows: mixtures of rows, noise, and how often each class is seen."""

import numpy as np
import torch
from torch import Tensor


def mix(x: Tensor, y: Tensor, alpha: float, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix each row with another one: x' = w x_i + (1 - w) x_j, and y' alike, with one w (Zhang et al. 2018).

    Args:
        x: Inputs (rows, in_features).
        y: Targets of these rows: class indices (rows,), or values (rows, targets).
        alpha: w is drawn from Beta(alpha, alpha).
        classes: Number of classes.
        generator: Draws w and the partners.

    Returns:
        Inputs, and the probabilities of the classes (rows, classes) or values.
    """
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    soft = y if y.is_floating_point() else torch.nn.functional.one_hot(y, classes).to(x.dtype)
    return weight * x + (1 - weight) * x[partner], weight * soft + (1 - weight) * soft[partner]


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """Add normal noise to standardised inputs."""
    return x + deviation * torch.randn_like(x)


def balanced_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many rows as there are, with replacement, each class equally often on average.

    Args:
        y: Class indices (rows,).
        generator: Draws the rows.
    """
    weight = 1.0 / torch.bincount(y.cpu())[y.cpu()]
    return torch.multinomial(weight, len(y), replacement=True, generator=generator)
