"""Checks of arguments. Each raises an error that names the argument, the value given and the values allowed.

A ValueError is an `ArgumentValueError` and a TypeError an `ArgumentTypeError`. What only PyTorch can compute, such as
complex numbers, passes: PyTorch computes it or raises an error.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, NoReturn, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from ..kernels.launch import FLOATING
from .autocast import loss_dtype
from .errors import ArgumentTypeError, ArgumentValueError
from .layer import Layer, Norm, RowNorm
from .loss_options import LossOptions
from .reference import ACTIVATIONS

ACTIVATION_NAMES = tuple(ACTIVATIONS)
REDUCTIONS = ("none", "mean", "sum")


def check_is_tensor(name: str, value: Any) -> None:
    """Raise TypeError for anything but a tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name}: {type(value).__name__}; must be a torch.Tensor")


def check_device(name: str, t: Tensor, like: Tensor) -> None:
    """Raise ValueError for a tensor that is not on input's device."""
    if t.device != like.device:
        raise ArgumentValueError(f"{name}: on {t.device}; must be on input's device, {like.device}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError for a value that is not among the allowed ones."""
    if value not in allowed:
        raise ArgumentValueError(f"{name}: {value!r}; allowed are {', '.join(map(repr, allowed))}")


def check_activation(activation: str | None, name: str = "activation") -> None:
    """Raise ValueError for an unknown activation name."""
    check_choice(name, activation, ACTIVATION_NAMES)


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: {value!r}; must be True or False")


def check_integer(name: str, value: Any) -> None:
    """Raise TypeError for anything but an integer."""
    if not isinstance(value, int | SupportsIndex):
        raise ArgumentTypeError(f"{name}: {value!r}; must be an int")


def as_number(name: str, value: Any) -> float:
    """The value as Python's float, which kernels take. Raise TypeError for anything but a number."""
    if isinstance(value, float):
        return float(value)  # of NumPy's, too
    if not isinstance(value, SupportsFloat):
        raise ArgumentTypeError(f"{name}: {value!r}; must be a number")
    return float(value)


def check_probability(name: str, p: float) -> None:
    """Raise TypeError for anything but a number, and ValueError for a number outside [0, 1]."""
    if not isinstance(p, SupportsFloat):
        raise ArgumentTypeError(f"{name}: {p!r}; must be a number between 0 and 1")
    if not 0 <= p <= 1:
        raise ArgumentValueError(f"{name}: {p}; must be between 0 and 1")


def check_widths(in_features: Any, hidden_features: Any, out_features: Any) -> list[int]:
    """The widths of a net from input to output. Raise TypeError or ValueError if they are not positive integers."""
    if not isinstance(hidden_features, Iterable) or isinstance(hidden_features, str):
        raise ArgumentTypeError(f"hidden_features: {hidden_features!r}; must be a sequence of widths, such as [64, 64]")
    widths = {"in_features": [in_features], "hidden_features": hidden_features, "out_features": [out_features]}
    for name, given in widths.items():
        for width in given:
            if not isinstance(width, SupportsIndex):
                raise ArgumentTypeError(f"{name}: {width!r}; every width must be an int")
            if index(width) < 1:
                raise ArgumentValueError(f"{name}: {width}; every width must be at least 1")
    return [index(width) for given in widths.values() for width in given]


def check_layer_tensors(input: Any, layers: Sequence[Layer]) -> None:
    """Raise TypeError unless input, weights and biases are tensors; a bias may be None."""
    check_is_tensor("input", input)
    for layer in layers:
        check_is_tensor("weight", layer.weight)
        if layer.bias is not None:
            check_is_tensor("bias", layer.bias)


def check_layers(input: Tensor, layers: Sequence[Layer], scale: int = 1) -> bool:
    """Raise an error if layers cannot be applied to the input one after the other.

    Args:
        input: (*, in_features) of the first layer.
        layers: each with a weight (out_features, in_features) and a bias (out_features,) or None, all of input's
            dtype and device. A bias may be of any shape that PyTorch might broadcast. The weight of a single plain
            layer may be (in_features,).
        scale: number of rows that the layers get for each row of the input.

    Returns:
        Whether the kernels take these shapes, and the dtypes of the norms' parameters.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape, device or activation.
    """
    taken = True
    features = input.size(-1) if input.dim() else None  # a nested tensor has no shape
    for layer in layers:
        check_activation(layer.activation)
        weight, bias = layer.weight, layer.bias
        if weight.dim() != 2:
            taken = False
            if weight.dim() != 1 or len(layers) > 1 or not layer.plain:
                raise ArgumentValueError(f"weight: shape {tuple(weight.shape)}; expected (out_features, in_features)")
        if features != weight.shape[-1]:
            raise ArgumentValueError(
                f"input: shape {tuple(input.shape)}; a weight of shape {tuple(weight.shape)} takes "
                f"in_features = {weight.shape[-1]}, but gets {features}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            if taken and bias.shape[-1:] not in ((), (1,), weight.shape[:1]):
                raise ArgumentValueError(
                    f"bias: shape {tuple(bias.shape)}; expected (out_features,) = ({weight.shape[0]},)"
                )
            taken = False
        for name, parameter in (("weight", weight), ("bias", bias)):
            if parameter is None:
                continue
            if parameter.dtype != input.dtype:
                _raise_mixed_dtypes(name, parameter.dtype, input.dtype)
            check_device(name, parameter, input)
        features = weight.shape[0]
        if layer.residual and weight.shape[0] != weight.shape[1]:
            raise ArgumentValueError(
                f"weight: shape {tuple(weight.shape)}; a residual layer has as many outputs as inputs"
            )
        if isinstance(layer.norm, RowNorm):
            check_row_norm_parameters(layer.norm, (features,), input)
            taken = taken and kernels_take(layer.norm, input.dtype)
        elif layer.norm is not None:
            check_norm_parameters(layer.norm, features, input.shape[0] * scale, input)
    return taken


def _raise_mixed_dtypes(name: str, given: torch.dtype, of_input: torch.dtype) -> NoReturn:
    """Raise TypeError for a weight or bias that does not have the dtype of a linear layer's input."""
    if of_input not in FLOATING and given in FLOATING:
        raise ArgumentTypeError(f"input: dtype {of_input}; must be that of the {name}, {given}")
    double = torch.float64 in (given, of_input)
    hint = "call .float() or .double() on the input or the module" if double else "see torch.autocast"
    raise ArgumentTypeError(f"{name}: dtype {given}; must be input's, {of_input} ({hint})")


def check_norm(input: Any, norm: Norm | None, activation: str | None) -> None:
    """Raise an error for an input to which batch normalisation and an activation cannot be applied.

    Args:
        input: (N, C, *); without a norm, of any shape.
        norm: see `check_norm_parameters`; None if nothing is normalised.
        activation: name of an activation, or None.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or activation, or only one value for each channel in training.
    """
    check_is_tensor("input", input)
    check_activation(activation)
    if norm is None or input.numel() == 0:  # PyTorch computes and checks an empty input
        return
    if input.dim() < 2:
        raise ArgumentValueError(f"input: shape {tuple(input.shape)}; expected (N, C, *)")
    check_norm_parameters(norm, input.shape[1], input.numel() // max(1, input.shape[1]), input)


def check_norm_parameters(norm: Norm, channels: int, values: int, like: Tensor) -> None:
    """Raise an error for a norm that does not fit its input.

    Args:
        norm: parameters and running averages (C,) or None, of input's dtype; float32 is allowed as well if input's
            dtype has 16 bits.
        channels: C.
        values: number of values of the input in each channel.
        like: a tensor of input's dtype and device.

    Raises:
        TypeError: a wrong type or dtype, or no momentum although batches are not counted.
        ValueError: a wrong shape, device or eps, a missing running average, or only one value for each channel in
            training.
    """
    if norm.eps < 0 or (norm.eps == 0 and norm.batch_stats):
        raise ArgumentValueError(f"eps: {norm.eps}; must be positive in training, and must not be negative")
    absent = norm.running_mean is None
    if absent != (norm.running_var is None) or (absent and not norm.batch_stats):
        missing = "running_mean" if absent else "running_var"
        raise ArgumentValueError(
            f"{missing}: None; running_mean and running_var must be given, or in training both be None"
        )
    if norm.batch_stats and channels and values == 1:
        raise ArgumentValueError("input: expected more than 1 value per channel when training")
    if norm.batch_stats and norm.momentum is None and norm.batches is None and norm.running_mean is not None:
        raise ArgumentTypeError("momentum: None; must be a number if batches are not counted")
    for name in ("weight", "bias", "running_mean", "running_var"):
        _check_affine(name, getattr(norm, name), "(C,)", (channels,), like, _dtypes_beside(like.dtype))
    _check_one_dtype(norm, ("weight", "bias", "running_mean", "running_var"))


def _dtypes_beside(dtype: torch.dtype) -> Sequence[torch.dtype]:
    """The dtypes of parameters that the kernels take with an input of a dtype in `FLOATING`."""
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


def kernels_take(norm: RowNorm, dtype: torch.dtype) -> bool:
    """Whether the kernels take the dtypes of the norm's parameters with an input of this dtype."""
    return all(t is None or t.dtype in _dtypes_beside(dtype) for t in (norm.weight, norm.bias))


def _check_affine(
    name: str, given: Any, meaning: str, shape: tuple[int, ...], like: Tensor, dtypes: Sequence[torch.dtype] | None
) -> None:
    """Raise an error unless a parameter or running average is None or fits an input; dtypes: None for any dtype."""
    if given is None:
        return
    check_is_tensor(name, given)
    if given.shape != shape:
        raise ArgumentValueError(f"{name}: shape {tuple(given.shape)}; expected {meaning} = {shape}")
    if dtypes is not None and given.dtype not in dtypes and like.dtype in FLOATING:
        raise ArgumentTypeError(f"{name}: dtype {given.dtype}; allowed are {', '.join(map(str, dtypes))}")
    check_device(name, given, like)


def _check_one_dtype(norm: Norm | RowNorm, names: Sequence[str]) -> None:
    """Raise TypeError if parameters and running averages differ in dtype, which PyTorch does not compute."""
    given = [(name, t) for name in names if (t := getattr(norm, name)) is not None]
    for name, t in given[1:]:
        if t.dtype != given[0][1].dtype:
            first, like = given[0]
            raise ArgumentTypeError(f"{name}: dtype {t.dtype}; must be that of the {first}, {like.dtype}")


def check_row_norm_parameters(norm: RowNorm, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise an error unless the parameters of the norm have this shape; dtypes and devices as `check_norm_parameters`.

    PyTorch computes RMS normalisation with parameters of any dtype.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
    """
    dtypes = _dtypes_beside(like.dtype) if norm.centre else None
    _check_affine("weight", norm.weight, "normalized_shape", shape, like, dtypes)
    _check_affine("bias", norm.bias, "normalized_shape", shape, like, dtypes)
    _check_one_dtype(norm, ("weight", "bias"))


def check_normalized_shape(input: Tensor, shape: tuple[int, ...], norm: RowNorm) -> None:
    """Raise an error for an input whose last dimensions cannot be normalised.

    Args:
        input: (*, *shape).
        shape: of a row, at least one dimension.
        norm: see `check_row_norm_parameters`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
    """
    last = tuple(input.size(dim) for dim in range(-min(len(shape), input.dim()), 0))
    if not shape or last != shape:
        raise ArgumentValueError(
            f"normalized_shape: {shape}; must be the last dimensions of the input, which are {last}"
        )
    check_row_norm_parameters(norm, shape, input)


def check_loss(input: Any, target: Any, weight: Any, options: LossOptions) -> None:
    """Raise an error for invalid arguments of a cross-entropy.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...).
        target: class indices of input's shape without C, or probabilities of input's shape.
        weight: (C,) or None. With class indices it has input's dtype; torch.autocast casts both.
        options: reduction, label_smoothing and ignore_index.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or option.
    """
    check_is_tensor("input", input)
    check_is_tensor("target", target)
    check_device("target", target, input)
    if weight is not None:
        check_is_tensor("weight", weight)
        check_device("weight", weight, input)
    if input.dim() == 0:
        raise ArgumentValueError("input: shape (); expected (C,), (N, C) or (N, C, d1, ...)")
    classes = input.shape[0 if input.dim() == 1 else 1]
    without_classes = () if input.dim() == 1 else (*input.shape[:1], *input.shape[2:])
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ArgumentValueError(f"target: shape {tuple(target.shape)}; probabilities need {tuple(input.shape)}")
        if options.ignore_index >= 0:
            raise ArgumentValueError(f"ignore_index: {options.ignore_index}; must be negative for class probabilities")
    elif target.dtype not in (torch.int64, torch.uint8):
        raise ArgumentTypeError(
            f"target: dtype {target.dtype}; allowed are int64, uint8 and, for probabilities, floating ones"
        )
    elif target.shape != without_classes:
        raise ArgumentValueError(
            f"target: shape {tuple(target.shape)}; class indices for this input need {without_classes}"
        )
    if weight is not None:
        if weight.shape != (classes,):
            raise ArgumentValueError(f"weight: shape {tuple(weight.shape)}; expected (C,) = ({classes},)")
        wanted = loss_dtype(input)
        if not target.is_floating_point() and loss_dtype(weight) != wanted and input.dtype in FLOATING:
            raise ArgumentTypeError(f"weight: dtype {weight.dtype}; must be {wanted}, as the input's")
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_integer("ignore_index", options.ignore_index)
    check_probability("label_smoothing", options.label_smoothing)


def check_indices(target: Tensor, ignore_index: int, classes: int) -> None:
    """Raise IndexError for a class index out of range. This waits for the device."""
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(f"target: {wrong[0].item()}; class indices go from 0 to {classes - 1}")
