"""Changes of the training rows: mixtures of rows, noise, and how often each class is seen."""

import numpy as np
import torch
from torch import Tensor


def mix(
    x: Tensor, y: Tensor, alpha: float, classes: int, embedded: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each row with another one: x' = w x_i + (1 - w) x_j, and y' alike, with one w (Zhang et al. 2018).

    A number of a category cannot be mixed. A mixed row has those of both rows and w, and the net mixes their vectors.

    Args:
        x: Inputs (rows, in_features).
        y: Targets of these rows: class indices (rows,), or values (rows, targets).
        alpha: w is drawn from Beta(alpha, alpha).
        classes: Number of classes.
        embedded: How many of the last inputs are numbers of categories.
        generator: Draws w and the partners.

    Returns:
        Inputs, with embedded categories as `EmbeddedMLP` takes those of mixed rows; and the probabilities of the
        classes (rows, classes) or values.
    """
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    soft = y if y.is_floating_point() else torch.nn.functional.one_hot(y, classes).to(x.dtype)
    mixed = weight * soft + (1 - weight) * soft[partner]
    plain, categories = x.tensor_split([x.shape[1] - embedded], dim=1)
    plain = weight * plain + (1 - weight) * plain[partner]
    if not embedded:
        return plain, mixed
    return torch.cat([plain, categories, categories[partner], x.new_full((len(x), 1), weight)], dim=1), mixed


def add_noise(x: Tensor, deviation: float, numbers: int) -> Tensor:
    """Add normal noise to the first `numbers` inputs, the standardised numbers. The others stand for categories."""
    plain, categories = x.tensor_split([numbers], dim=1)
    return torch.cat([plain + deviation * torch.randn_like(plain), categories], dim=1)


def balanced_order(y: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many rows as there are, with replacement, each class equally often on average.

    A class is drawn first, then one of its rows. Weights of rows would not do: `torch.multinomial` adds them up in
    float32, and takes at most 2^24 rows.

    Args:
        y: Class indices (rows,). Classes without rows are not drawn.
        generator: Draws the rows.
    """
    y = y.cpu()
    counts = y.bincount()
    present = counts.nonzero()[:, 0]
    drawn = present[torch.randint(len(present), (len(y),), generator=generator)]
    # The remainder of a number this large is as good as uniform.
    place = torch.randint(2**62, (len(y),), generator=generator) % counts[drawn]
    first = counts.cumsum(0) - counts
    return y.argsort(stable=True)[first[drawn] + place]
