"""Every combination of what a cross-entropy can be asked for."""

import itertools

import pytest

OPTIONS = [
    pytest.param(*each, id=" ".join(filter(None, (each[0], each[1] and "weighted", each[2] and "smoothed", each[3]))))
    for each in itertools.product(["indices", "probabilities"], [False, True], [0.0, 0.2], ["none", "mean", "sum"])
]
