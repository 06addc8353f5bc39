"""`ParallelTraining`: the run of one process, in every layout of the ranks."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fusemlp.mlp.training.data import load_data
from fusemlp.mlp.training.errors import InputError
from fusemlp.mlp.training.optim import OPTIMIZERS, make_optimizer, make_scheduler
from fusemlp.mlp.training.options import parse_options
from fusemlp.mlp.training.train import Training
from fusemlp.parallel.training.command import check_optimizer
from fusemlp.parallel.training.layout import Layout
from fusemlp.parallel.training.train import ParallelTraining
from ranks import on_ranks
from sklearn.datasets import load_iris
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = "--dataset iris --hidden 16 8 8 --epochs 3 --no-verify --device cpu --dropout 0".split()  # noqa: SIM905
# Adam would make steps of the rounding errors that are the gradients of biases before a batch norm.
NORMALISED = ["--batch-norm", "--optimizer", "momentum"]


def options_and_data(options):
    # A data set may be given once.
    options = parse_options([*(OPTIONS[2:] if {"--csv", "--dataset"} & {*options} else OPTIONS), *options])
    return options, load_data(options.source)


def start(layout, folder, *options):
    return ParallelTraining(*options_and_data(options), Path(folder), layout, layout.mesh("cpu"))


def losses(training):
    training.fit(lambda _: None)
    return [(row["train_loss"], row["val_loss"]) for row in training.history]


def train(layout, folder, options):
    return losses(start(layout, folder, *options))


def soft_iris(tmp_path):
    table = load_iris(as_frame=True)
    soft = pd.DataFrame(0.7 * np.eye(3)[table.target] + 0.1, columns=["a", "b", "c"])
    path = tmp_path / "iris.csv"
    pd.concat([table.data, soft], axis=1).to_csv(path, index=False)
    return ["--csv", str(path), "--target", "a", "b", "c", "--task", "classification"]


UNPIPED = {
    "mixup": (lambda _: ["--mixup", "0.2"], "--mixup"),
    "bce": (lambda _: ["--dataset", "breast_cancer", "--loss", "bce"], "--loss bce"),
    "soft labels": (soft_iris, "a --target of probabilities"),
}


@pytest.mark.parametrize(("given", "what"), UNPIPED.values(), ids=UNPIPED)
def test_a_pipeline_refuses_what_it_cannot_leave_out(given, what, tmp_path):
    with pytest.raises(InputError, match=f"--pp: 2 does not fit {what}"):
        ParallelTraining(*options_and_data(given(tmp_path)), tmp_path, Layout(pp=2), mesh=None)


LAYOUTS = {
    "tp, dropout": (Layout(tp=2, uneven=True), ["--dropout", "0.2", *NORMALISED]),
    "ddp": (Layout(dp=2), NORMALISED),
    "fsdp": (Layout(dp=2, dp_mode="fsdp"), NORMALISED),
    "fsdp, recomputed": (Layout(dp=2, dp_mode="fsdp"), [*NORMALISED, "--checkpoint-activations"]),
    "ddp, accumulated": (Layout(dp=2), ["--accumulate", "2"]),
    "fsdp, accumulated": (Layout(dp=2, dp_mode="fsdp"), ["--accumulate", "2", "--l1", "1e-3"]),
    "fsdp, clipped": (Layout(dp=2, dp_mode="fsdp"), ["--clip", "0.1"]),
    "tp x fsdp": (Layout(tp=2, dp=2, dp_mode="fsdp"), NORMALISED),
    "pipeline, accumulated": (Layout(pp=2), ["--accumulate", "2"]),
    "interleaved": (Layout(pp=2, schedule="interleaved", stages_per_rank=2), ["--accumulate", "2", "--clip", "0.1"]),
    "interleaved x fsdp": (Layout(pp=2, dp=2, dp_mode="fsdp", schedule="interleaved", stages_per_rank=2), []),
    "pipeline x tp": (Layout(pp=2, tp=2, schedule="gpipe"), []),
}


@pytest.mark.parametrize(("layout", "options"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_losses_are_those_of_one_process(layout, options, tmp_path):
    alone = losses(Training(*options_and_data(options), tmp_path))
    for found in on_ranks(layout.pp * layout.dp * layout.tp, train, layout, str(tmp_path), options):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def steps_of(training, names):
    """The loss before a step of each optimizer in turn, and after the last one."""
    losses = []
    for name in (*names, "sgd"):
        training.optimizer = make_optimizer(name, training.model, None, 0.01)
        training.scheduler = make_scheduler("constant", training.optimizer, 1, 0.0)
        losses.append(training.step(training.train.x[:24], training.train.y[:24]))
    return torch.stack(losses)


def is_refused(name, layout):
    try:
        check_optimizer(name, layout)
    except InputError:
        return True
    return False


SMALL = ["--hidden", "15"]
LAYOUTS_OF_RANKS = {
    2: {
        "ddp": Layout(dp=2),
        "fsdp": Layout(dp=2, dp_mode="fsdp"),
        "tp": Layout(tp=2, uneven=True),
        "pp": Layout(pp=2),
    },
    4: {
        "tp x ddp": Layout(tp=2, dp=2, uneven=True),
        "tp x fsdp": Layout(tp=2, dp=2, dp_mode="fsdp", uneven=True),
        "pp x ddp": Layout(pp=2, dp=2),
        "pp x fsdp": Layout(pp=2, dp=2, dp_mode="fsdp"),
        "pp x tp": Layout(pp=2, tp=2, uneven=True),
    },
}


def steps_by_layout(folder, layouts):
    """By layout, the optimizers that are refused, and the losses of steps of the others."""
    found = {}
    for which, layout in layouts.items():
        refused = {name for name in OPTIMIZERS if is_refused(name, layout)}
        names = [name for name in OPTIMIZERS if name not in refused]
        found[which] = refused, steps_of(start(layout, folder, *SMALL), names)
    return found


@pytest.mark.parametrize("world", LAYOUTS_OF_RANKS)
def test_each_optimizer_steps_as_on_one_process_or_is_refused(world, tmp_path):
    layouts = LAYOUTS_OF_RANKS[world]
    alone = {
        names: steps_of(Training(*options_and_data(SMALL), tmp_path), names)
        for names in (tuple(OPTIMIZERS), tuple(name for name in OPTIMIZERS if name != "adafactor"))
    }
    for found in on_ranks(world, steps_by_layout, str(tmp_path), layouts):
        for which, (refused, losses) in found.items():
            assert refused == (set() if which == "pp" else {"adafactor"}), which
            names = tuple(name for name in OPTIMIZERS if name not in refused)
            torch.testing.assert_close(losses, alone[names], rtol=1e-4, atol=1e-5, msg=which)


class Interrupted(Exception):
    pass


def train_two_epochs(layout, folder):
    def stop(training):
        if training.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        start(layout, folder).fit(stop)


def go_on(layout, folder):
    training = start(layout, folder)
    training.resume()
    assert training.epoch == 2
    return losses(training)


RESUMED = {
    "fsdp, then ddp x tp": (Layout(dp=2, dp_mode="fsdp"), Layout(dp=2, tp=2)),
    "interleaved, then fsdp": (Layout(pp=2, schedule="interleaved", stages_per_rank=2), Layout(dp=2, dp_mode="fsdp")),
    "tp, then interleaved": (Layout(tp=2), Layout(pp=2, schedule="interleaved", stages_per_rank=2)),
}


@pytest.mark.parametrize(("layout", "other"), RESUMED.values(), ids=RESUMED)
def test_a_run_goes_on_in_another_layout(layout, other, tmp_path):
    alone = losses(Training(*options_and_data([]), tmp_path))
    on_ranks(layout.pp * layout.dp * layout.tp, train_two_epochs, layout, str(tmp_path))
    for found in on_ranks(other.pp * other.dp * other.tp, go_on, other, str(tmp_path)):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def weights_in_use(model):
    """The number of weights that are whole on this rank."""
    return sum(not isinstance(layer.weight, DTensor) for layer in model.modules() if isinstance(layer, nn.Linear))


def watch_a_step(folder, dp_mode):
    """The number of whole weights at each layer of a step, and between its passes."""
    training = start(Layout(dp=2, dp_mode=dp_mode), folder, "--hidden", *["8"] * 7)
    found = []

    def look(module, *_):
        found.append(weights_in_use(training.model))

    for layer in training.model.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(look)
            layer.register_full_backward_hook(look)
    output = training.model(training.train.x[:4])
    between = weights_in_use(training.model)
    output.sum().backward()
    return found, between, weights_in_use(training.model)


def test_fsdp_keeps_at_most_two_layers_whole(tmp_path):
    for found, between, after in on_ranks(2, watch_a_step, str(tmp_path), "fsdp"):
        assert len(found) == 14
        assert set(found) <= {1, 2}
        assert (between, after) == (0, 0)


def local_fraction(folder, dp_mode):
    parameters = [*start(Layout(dp=2, dp_mode=dp_mode), folder).model.parameters()]
    return sum(t.to_local().numel() for t in parameters) / sum(t.numel() for t in parameters)


@pytest.mark.parametrize(("dp_mode", "fraction"), [("ddp", 1), ("fsdp", 0.5)])
def test_the_share_of_the_weights_that_a_rank_has(dp_mode, fraction, tmp_path):
    for found in on_ranks(2, local_fraction, str(tmp_path), dp_mode):
        assert found == pytest.approx(fraction, abs=0.02)


class Operations(TorchDispatchMode):
    """The names of the operations inside the `with` block, in order."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def order_of_a_pass(folder):
    training = start(Layout(dp=2, dp_mode="fsdp"), folder)
    with Operations() as operations:
        training.model(training.train.x[:4])
    return [what for name in operations.names for what in ("allgather", "addmm") if what in name]


def test_fsdp_gathers_the_next_weights_before_it_multiplies(tmp_path):
    for found in on_ranks(2, order_of_a_pass, str(tmp_path)):
        assert found == ["allgather", "allgather", "addmm", "allgather", "addmm", "allgather", "addmm", "addmm"]


def count_sums(folder, dp_mode, accumulate):
    """The number of sums over ranks in a step of so many micro-batches, without those of the losses."""
    training = start(Layout(dp=2, dp_mode=dp_mode), folder, "--accumulate", str(accumulate))
    rows = slice(0, 32 * accumulate)
    with Operations() as operations:
        training.accumulate(training.train.x[rows], training.train.y[rows])
    found = Counter(name for name in operations.names if name.startswith("c10d::"))
    return found["c10d::allreduce_"] - accumulate, found["c10d::_reduce_scatter_base_"]


@pytest.mark.parametrize(("dp_mode", "sums"), [("ddp", (4, 0)), ("fsdp", (0, 4))])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_summed_once_for_each_layer(accumulate, dp_mode, sums, tmp_path):
    for found in on_ranks(2, count_sums, str(tmp_path), dp_mode, accumulate):
        assert found == sums


def train_in_stages(options, amp, scale, folder):
    options, data = options_and_data(["--epochs", "6", *options])
    options = dataclasses.replace(options, amp=amp)
    layout = Layout(pp=2)
    training = ParallelTraining(options, data, Path(folder), layout, layout.mesh("cpu"))
    if scale is not None:
        training.scaler.update(scale)
    training.fit(lambda _: None)
    averages = [t for t in training.model.buffers() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in averages)
    return [row["val_loss"] for row in training.history], training.scaler.get_scale()


def test_batch_norm_in_a_pipeline(tmp_path):
    (first, _), (second, _) = on_ranks(2, train_in_stages, NORMALISED, "none", None, str(tmp_path))
    assert first == second
    assert first[-1] < first[0] < 2


def test_fp16_in_a_pipeline_skips_a_step_that_overflows_on_all_stages(tmp_path):
    (first, scale), (second, other_scale) = on_ranks(2, train_in_stages, [], "fp16", 2.0**30, str(tmp_path))
    assert scale == other_scale
    assert scale < 2.0**30
    assert first == second
    assert first[-1] < first[0] < 2


def draw_by_itself(folder):
    training = start(Layout(tp=2), folder, "--dropout", "0.2")
    if torch.distributed.get_rank() == 1:
        torch.rand(1)
    with pytest.raises(ValueError, match="random generator: rank 1 differs from rank 0"):
        training.fit(lambda _: None)


def test_a_rank_that_draws_by_itself_is_found(tmp_path):
    on_ranks(2, draw_by_itself, str(tmp_path))


def refuse_to_build(layout, folder, message, hidden):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        start(layout, folder, "--hidden", *hidden)


UNFIT = {
    "width": (
        Layout(tp=2),
        "out_features of '0': 15 does not divide by 2 ranks; the nearest that do are 14 and 16 ",
        ["15", "8", "6"],
    ),
    "stages": (
        Layout(pp=5),
        "argument --pp: 5 stages; at most 4 are allowed, one for each linear layer",
        ["15", "8", "6"],
    ),
    "empty part": (
        Layout(tp=2, dp=2, uneven=True),
        "argument --uneven: size 1 of '0.weight' leaves one of 2 tensor-parallel ranks without a part",
        ["1", "8", "6"],
    ),
}


@pytest.mark.parametrize(("layout", "message", "hidden"), UNFIT.values(), ids=UNFIT)
def test_nets_that_the_ranks_cannot_share_are_refused(layout, message, hidden, tmp_path):
    on_ranks(layout.pp * layout.dp * layout.tp, refuse_to_build, layout, str(tmp_path), message, hidden)


def recovered(layout, folder, options):
    """The history of a run that explodes; whether the ranks agree; and the checkpoints that are left."""
    training = start(layout, folder, *options)
    training.fit(lambda _: None)
    lasting = sorted(path.name for path in Path(folder).glob("epoch-*"))
    return training.history, training.recovered, training.best_epoch, lasting


EXPLODING = "--dataset diabetes --optimizer momentum --lr 3 --schedule constant --epochs 3 --recover 12".split()  # noqa: SIM905
RECOVERING = {
    "fsdp": Layout(dp=2, dp_mode="fsdp"),
    "pipeline": Layout(pp=2),
}


@pytest.mark.parametrize("layout", RECOVERING.values(), ids=RECOVERING)
def test_an_exploding_run_recovers_as_on_one_process(layout, tmp_path):
    options, data = options_and_data(EXPLODING)
    (tmp_path / "alone").mkdir()
    alone = Training(options, data, tmp_path / "alone")
    alone.fit(lambda _: None)
    assert alone.recovered > 0
    for history, times, best_epoch, lasting in on_ranks(2, recovered, layout, str(tmp_path), EXPLODING):
        assert (times, best_epoch) == (alone.recovered, alone.best_epoch)
        assert f"epoch-3-recovery-{times}" in lasting
        assert len(lasting) <= 2
        found, expected = ([row["val_loss"] for row in rows] for rows in (history, alone.history))
        assert found == pytest.approx(expected, rel=0.01)
