"""Each error has the class of the error that PyTorch raises, so that code which catches PyTorch's catches ours."""

import pytest
import torch
from fusemlp.mlp import functional as F
from torch.nn import functional as torch_F

ones = torch.ones
x, w, indices = ones(3, 5), ones(4, 5), torch.zeros(3, dtype=torch.int64)
elsewhere = ones(5, device="meta")

# Left out are a batch norm and a loss of too few dimensions, where PyTorch's IndexError comes from a list of sizes.
CALLS = {
    "linear: in_features": lambda f: f.linear(x, ones(4, 6)),
    "linear: scalar input": lambda f: f.linear(ones(()), w),
    "linear: scalar weight": lambda f: f.linear(x, ones(())),
    "linear: weight of 3 dimensions": lambda f: f.linear(x, ones(2, 4, 5)),
    "linear: bias": lambda f: f.linear(x, w, ones(5)),
    "linear: bias of 3 dimensions": lambda f: f.linear(x, w, ones(2, 3, 4)),
    "linear: dtype of weight": lambda f: f.linear(x, w.half()),
    "linear: dtype of bias": lambda f: f.linear(x, w, ones(4).double()),
    "linear: integer input": lambda f: f.linear(x.long(), w),
    "linear: device of bias": lambda f: f.linear(x, w, ones(4, device="meta")),
    "linear: input is a list": lambda f: f.linear([[1.0]], w),
    "linear: no weight": lambda f: f.linear(x, None),
    "linear: bias is a list": lambda f: f.linear(x, w, [1.0] * 4),
    "linear: booleans": lambda f: f.linear(x.bool(), w.bool()),
    "batch_norm: 1-D input": lambda f: f.batch_norm(ones(3), ones(3), ones(3)),
    "batch_norm: one value": lambda f: f.batch_norm(x[:1], None, None, training=True),
    "batch_norm: no averages": lambda f: f.batch_norm(x, None, None),
    "batch_norm: one average": lambda f: f.batch_norm(x, ones(5), None),
    "batch_norm: one average in training": lambda f: f.batch_norm(x, ones(5), None, training=True),
    "batch_norm: shape of averages": lambda f: f.batch_norm(x, ones(4), ones(4)),
    "batch_norm: shape of weight": lambda f: f.batch_norm(x, ones(5), ones(5), ones(4)),
    "batch_norm: dtype of weight": lambda f: f.batch_norm(x, ones(5), ones(5), ones(5).double()),
    "batch_norm: dtype of averages": lambda f: f.batch_norm(x, ones(5).half(), ones(5).half()),
    "batch_norm: integers": lambda f: f.batch_norm(x.long(), ones(5), ones(5)),
    "batch_norm: input is a list": lambda f: f.batch_norm([[1.0]], ones(1), ones(1)),
    "batch_norm: weight is a list": lambda f: f.batch_norm(x, ones(5), ones(5), [1.0] * 5),
    "batch_norm: negative eps": lambda f: f.batch_norm(x, ones(5), ones(5), eps=-1.0),
    "batch_norm: no eps in training": lambda f: f.batch_norm(x, ones(5), ones(5), training=True, eps=0.0),
    "batch_norm: no momentum": lambda f: f.batch_norm(x, ones(5), ones(5), training=True, momentum=None),
    "batch_norm: device": lambda f: f.batch_norm(x, elsewhere, elsewhere),
    "layer_norm: shape": lambda f: f.layer_norm(x, (7,)),
    "layer_norm: no shape": lambda f: f.layer_norm(x, ()),
    "layer_norm: too many dimensions": lambda f: f.layer_norm(x, (1, 3, 5)),
    "layer_norm: shape is an int": lambda f: f.layer_norm(x, 5),
    "layer_norm: shape of strings": lambda f: f.layer_norm(x, "5"),
    "layer_norm: shape of floats": lambda f: f.layer_norm(x, (5.0,)),
    "layer_norm: shape of weight": lambda f: f.layer_norm(x, (5,), ones(4)),
    "layer_norm: dtype of bias": lambda f: f.layer_norm(x, (5,), ones(5), ones(5).double()),
    "layer_norm: device": lambda f: f.layer_norm(x, (5,), elsewhere),
    "layer_norm: input is a list": lambda f: f.layer_norm([1.0], (1,)),
    "layer_norm: integers": lambda f: f.layer_norm(x.long(), (5,)),
    "rms_norm: shape": lambda f: f.rms_norm(x, (7,)),
    "rms_norm: shape is an int": lambda f: f.rms_norm(x, 5),
    "rms_norm: shape of weight": lambda f: f.rms_norm(x, (5,), ones(4)),
    "rms_norm: device": lambda f: f.rms_norm(x, (5,), elsewhere),
    "rms_norm: input is a list": lambda f: f.rms_norm([1.0], (1,)),
    "rms_norm: weight is a list": lambda f: f.rms_norm(x, (5,), [1.0] * 5),
    "rms_norm: integers": lambda f: f.rms_norm(x.long(), (5,)),
    "dropout: p above 1": lambda f: f.dropout(x, 2.0),
    "dropout: p below 0 in evaluation": lambda f: f.dropout(x, -1.0, False),
    "dropout: p is nan": lambda f: f.dropout(x, float("nan")),
    "dropout: p is a string": lambda f: f.dropout(x, "0.5"),
    "dropout: no p": lambda f: f.dropout(x, None),
    "dropout: input is a list": lambda f: f.dropout([1.0], 0.5),
    "dropout: input is a list in evaluation": lambda f: f.dropout([1.0], 0.5, False),
    "dropout: integers": lambda f: f.dropout(x.long(), 0.5),
    "dropout: a leaf in place": lambda f: f.dropout(ones(3).requires_grad_(), 0.5, True, True),
    "cross_entropy: input is a list": lambda f: f.cross_entropy([1.0], indices),
    "cross_entropy: target is a list": lambda f: f.cross_entropy(x, [1, 2, 3]),
    "cross_entropy: too few targets": lambda f: f.cross_entropy(x, indices[:2]),
    "cross_entropy: places": lambda f: f.cross_entropy(ones(3, 5, 2), indices.expand(3, 3)),
    "cross_entropy: shape of probabilities": lambda f: f.cross_entropy(x, ones(3)),
    "cross_entropy: dtype of indices": lambda f: f.cross_entropy(x, indices.int()),
    "cross_entropy: shape of weight": lambda f: f.cross_entropy(x, indices, ones(4)),
    "cross_entropy: dtype of weight": lambda f: f.cross_entropy(x, indices, ones(5).half()),
    "cross_entropy: integer weight": lambda f: f.cross_entropy(x, indices, ones(5).long()),
    "cross_entropy: boolean weight": lambda f: f.cross_entropy(x, indices, ones(5).bool()),
    "cross_entropy: weight is a list": lambda f: f.cross_entropy(x, indices, [1.0] * 5),
    "cross_entropy: reduction": lambda f: f.cross_entropy(x, indices, reduction="max"),
    "cross_entropy: label_smoothing": lambda f: f.cross_entropy(x, indices, label_smoothing=2.0),
    "cross_entropy: label_smoothing is a string": lambda f: f.cross_entropy(x, indices, label_smoothing="a"),
    "cross_entropy: ignore_index of probabilities": lambda f: f.cross_entropy(x, x, ignore_index=1),
    "cross_entropy: ignore_index is a string": lambda f: f.cross_entropy(x, indices, ignore_index="a"),
    "cross_entropy: no ignore_index": lambda f: f.cross_entropy(x, indices, ignore_index=None),
    "cross_entropy: integers": lambda f: f.cross_entropy(x.long(), indices),
    "cross_entropy: device of target": lambda f: f.cross_entropy(x, indices.to("meta")),
    "cross_entropy: device of weight": lambda f: f.cross_entropy(x, indices, elsewhere),
}
CHUNKED_CALLS = {
    "in_features": lambda f: f(x, ones(4, 6), indices),
    "linear_bias": lambda f: f(x, w, indices, linear_bias=ones(5)),
    "linear_bias of size 1": lambda f: f(x, w, indices, linear_bias=ones(1)),
    "linear_bias of places": lambda f: f(x, ones(4, 2, 5), indices[:, None].expand(3, 2), linear_bias=ones(2, 4)),
    "linear_weight of 1 dimension": lambda f: f(x, ones(5), indices),
    "dtype of linear_weight": lambda f: f(x, w.half(), indices),
    "target": lambda f: f(x, w, indices[:2]),
    "reduction": lambda f: f(x, w, indices, reduction="max"),
    "label_smoothing": lambda f: f(x, w, indices, label_smoothing=2.0),
    "ignore_index of probabilities": lambda f: f(x, w, ones(3, 4), ignore_index=1),
    "shape of weight": lambda f: f(x, w, indices, weight=ones(5)),
    "integer weight": lambda f: f(x, w, indices, weight=ones(4).long()),
}


def raised(call, functions):
    try:
        call(functions)
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_class_is_that_of_torch(call, backend):
    with pytest.raises(raised(call, torch_F)):
        call(F)


@pytest.mark.skipif(not hasattr(torch_F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("call", CHUNKED_CALLS.values(), ids=CHUNKED_CALLS)
def test_the_class_is_that_of_torchs_linear_cross_entropy(call, backend):
    with pytest.raises(raised(call, torch_F.linear_cross_entropy)):
        call(F.linear_cross_entropy)
