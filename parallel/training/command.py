"""The command `torchrun -m fusemlp.parallel`: train on several ranks, resume after a failure, report lost ranks."""
# pyright: reportPrivateImportUsage=false

import os
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ...mlp.training.checkpoint import load_checkpoint
from ...mlp.training.command import INTERRUPTED, fit, introduce, show_report, verify
from ...mlp.training.console import console
from ...mlp.training.data import Data, load_data
from ...mlp.training.errors import CannotWrite, Diverged, InputError, Interrupted
from ...mlp.training.optim import OPTIMIZERS
from ...mlp.training.options import Options, configuration, parse_options, resolve_device
from ...mlp.training.parser import count, make_parser
from ...mlp.training.predict import KEPT
from ...mlp.training.report import CONFIG, prepare_folder, write_json, write_report
from ...mlp.training.train import Training
from ..collectives import Ranks
from ..handshake import check_alike
from .checkpoint import KEPT_POINTER, POINTER, PROGRESS, find_checkpoint
from .layout import DataParallel, Layout
from .lost_ranks import enlist, hung_ranks, lost_ranks
from .pipeline import SCHEDULES
from .train import ParallelTraining

PROG = "fusemlp.parallel"
# Seconds that a rank waits for rank 0 to print an error.
PATIENCE = 5
# Optimizers that cannot step DTensors.
OF_WHOLE_PARAMETERS = {"adafactor"}


def make_degrees_parser() -> ArgumentParser:
    """Make the parser of the options that exist only on several ranks."""
    parser = ArgumentParser(prog=f"torchrun -m {PROG}", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("ranks", "torchrun must start T * D * P ranks")
    group.add_argument("--tp", type=count, metavar="T", default=1, help="tensor-parallel ranks, which split layers (1)")
    group.add_argument(
        "--dp", type=count, metavar="D", help="data-parallel ranks, which split batches (all ranks / (T * P))"
    )
    group.add_argument("--pp", type=count, metavar="P", default=1, help="pipeline stages (1)")
    group.add_argument(
        "--dp-mode",
        choices=get_args(DataParallel),
        default="ddp",
        help="what a data-parallel rank keeps between the passes; ddp: all weights, fsdp: its share of each (ddp)",
    )
    group.add_argument("--schedule-pp", choices=SCHEDULES, default="1f1b", help="pipeline schedule (1f1b)")
    group.add_argument(
        "--stages-per-rank", type=count, metavar="V", help="pipeline stages of a rank (interleaved: 2, else 1)"
    )
    group.add_argument(
        "--timeout", type=count, metavar="S", default=300, help="seconds that a rank waits for the others (300)"
    )
    group.add_argument("--uneven", action="store_true", help="allow layer widths that are not multiples of T")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training command on this rank.

    Args:
        argv: Command-line arguments without the program name; None means `sys.argv[1:]`.

    Returns:
        The exit status: 0 if the run succeeded, 1 if training diverged, a rank was lost or the kernels differ from
        PyTorch, 2 if an option or an input file is invalid.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(make_degrees_parser().format_help())
        make_parser().print_help()
        return 0
    try:
        return run(argv)
    except ValueError as error:
        speak(f"error: {error}")
        return 2
    except (CannotWrite, Diverged) as error:
        speak(f"stopped: {error}")
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{PROG}: {error or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        # torchrun sends SIGTERM to all ranks when one fails. Ignore it, so that this rank can report lost ranks first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        rank = os.environ.get("RANK")
        print(f"{PROG}: rank {rank} stopped: {'; '.join([*missing_ranks(), str(error)])}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def missing_ranks() -> list[str]:
    """Which ranks a failed collective waited for, in words."""
    if not dist.is_initialized():
        return []
    lost = [f"rank {each} is lost" for each in lost_ranks()]
    return lost or [f"rank {each} hangs" for each in hung_ranks()]


def speak(message: str) -> None:
    """Print an error. If rank 0 has the same one, it prints it for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROG}: {message}", file=sys.stderr)
        with suppress(LookupError, RuntimeError):  # no other rank can be asked
            common_store().set("said", message)
    # torchrun ends all ranks as soon as one exits, so the other ranks give rank 0 time to print.
    elif said_by_rank_0() != message:
        print(f"{PROG}: rank {os.environ['RANK']}: {message}", file=sys.stderr)


def said_by_rank_0() -> str | None:
    """The error that rank 0 prints within PATIENCE seconds; None if it prints none, or cannot be asked."""
    deadline = time.monotonic() + PATIENCE
    with suppress(LookupError, RuntimeError):
        store = common_store()
        while time.monotonic() < deadline:
            if store.check(["said"]):
                return store.get("said").decode()
            time.sleep(0.02)
    return None


def common_store() -> dist.Store:
    """The store of this start of torchrun. It exists before the process group does.

    Raises:
        LookupError, RuntimeError: There is none.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
    return dist.PrefixStore(f"errors of start {restarts()}", store)


def make_layout(degrees: Namespace) -> Layout:
    """The layout of the ranks that torchrun started.

    Args:
        degrees: Parsed options of `make_degrees_parser`.

    Raises:
        InputError: If the process was not started by torchrun, the number of ranks is not T * D * P, or the schedule
            does not allow the number of stages.
    """
    if "RANK" not in os.environ:
        raise InputError("this process is not a rank: start with torchrun --nproc-per-node N -m fusemlp.parallel ...")
    world = int(os.environ["WORLD_SIZE"])
    dp = degrees.dp or max(1, world // (degrees.tp * degrees.pp))
    asked = degrees.tp * dp * degrees.pp
    if asked != world:
        given = f"--tp {degrees.tp} x --dp {dp} x --pp {degrees.pp}"
        raise InputError(f"argument --nproc-per-node: {world} ranks were started, but {given} needs {asked}")
    interleaved = degrees.schedule_pp == "interleaved"
    stages_per_rank = degrees.stages_per_rank or (2 if interleaved else 1)
    if stages_per_rank > 1 and not interleaved:
        raise InputError(
            f"argument --stages-per-rank: {stages_per_rank} with --schedule-pp {degrees.schedule_pp}; allowed is 1, "
            "or any number with --schedule-pp interleaved"
        )
    if interleaved and degrees.pp == 1:
        raise InputError("argument --schedule-pp: interleaved without pipeline ranks; it needs --pp of at least 2")
    return Layout(
        tp=degrees.tp,
        dp=dp,
        pp=degrees.pp,
        dp_mode=degrees.dp_mode,
        schedule=degrees.schedule_pp,
        stages_per_rank=stages_per_rank,
        uneven=degrees.uneven,
    )


def check_optimizer(name: str, layout: Layout) -> None:
    """Check that an optimizer can step the parameters that a rank of the layout holds.

    Those of tensor- and data-parallel ranks are DTensors. PyTorch's Adafactor changes norms of parameters in place, and
    DTensor has no rule for that.

    Raises:
        InputError: If it cannot.
    """
    if name in OF_WHOLE_PARAMETERS and (layout.tp > 1 or layout.dp > 1):
        tp, dp, others = layout.tp, layout.dp, ", ".join(sorted({*OPTIMIZERS} - OF_WHOLE_PARAMETERS))
        raise InputError(
            f"argument --optimizer: {name} cannot step parameters that --tp {tp} x --dp {dp} ranks share; "
            f"allowed are {others}, or {name} on pipeline ranks alone (--pp)"
        )


def join(layout: Layout, timeout: timedelta, options: Options, data: Data, device_type: str) -> DeviceMesh:
    """Initialise the process group and arrange the ranks in a mesh.

    Args:
        layout: The layout of the net.
        timeout: How long a rank waits for the others.
        options: Training options.
        data: The prepared data set.
        device_type: "cuda" or "cpu".

    Returns:
        The mesh of the layout.

    Raises:
        ValueError: If layout, options or data differ between the ranks.
    """
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world = layout.pp * layout.dp * layout.tp
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun may reuse its store after a restart. A prefix for each start hides addresses of ranks that have ended.
    store = dist.PrefixStore(f"start {restarts()}", store)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    enlist()
    facts = {f"argument --{name.replace('_', '-')}": value for name, value in configuration(options).items()}
    check_alike(Ranks.world(), device_type, data=data.fingerprint(), layout=layout, timeout=timeout, **facts)
    return layout.mesh(device_type)


def run(argv: Sequence[str]) -> int:
    """Do what `main` does, but let exceptions pass and leave the process group open."""
    degrees, rest = make_degrees_parser().parse_known_args(argv)
    options = parse_options(rest)
    resuming = options.resume or (restarts() and options.out is not None and (Path(options.out) / POINTER).exists())
    if resuming:
        saved = load_checkpoint(find_checkpoint(Path(str(options.out)) / POINTER) / PROGRESS)
        options = parse_options(rest, saved["options"])
    if options.device.startswith("cuda:"):
        raise InputError(
            f"argument --device: {options.device!r}; every rank takes the GPU of its own number, so allowed are auto, "
            "cpu, cuda"
        )
    for name in ("predict", "folds", "diagnose", "find_lr", "search"):
        if getattr(options, name):
            raise InputError(f"argument --{name.replace('_', '-')}: works in one process: python -m fusemlp.mlp")
    torch.set_num_threads(options.threads or 1)
    data = load_data(options.source)
    device_type = resolve_device(options.device).type
    layout = make_layout(degrees)
    check_optimizer(options.optimizer, layout)
    mesh = join(layout, timedelta(seconds=degrees.timeout), options, data, device_type)
    folder = Path(agreed(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}"))
    training = ParallelTraining(options, data, folder, layout, mesh)
    first = dist.get_rank() == 0
    if resuming:
        training.resume()
    else:
        prepare(folder, options.overwrite or restarts() > 0)
    if first:
        write_json(folder / CONFIG, configuration(options))
        write_json(folder / KEPT, data.to_plain())
        introduce(training)
        sizes = {"pipeline": layout.pp, f"data, {layout.dp_mode}": layout.dp, "tensor": layout.tp}
        console.print(f"on {' x '.join(f'{size} ({name})' for name, size in sizes.items())} ranks")
        fit(training)
    else:
        training.fit(lambda _: None)
    return report(training) if first else 0


def restarts() -> int:
    """The number of times torchrun has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def agreed(value: Any) -> Any:
    """Broadcast rank 0's value to every rank. The value must be picklable."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def prepare(folder: Path, overwrite: bool) -> None:
    """Create the folder of the run on rank 0. If that fails, every rank raises the same InputError."""
    refused = None
    if dist.get_rank() == 0:
        try:
            prepare_folder(folder, overwrite)
            (folder / KEPT_POINTER).unlink(missing_ok=True)
        except InputError as error:
            refused = str(error)
    refused = agreed(refused)
    if refused is not None:
        raise InputError(refused)


def report(training: ParallelTraining) -> int:
    """Load the best weights into an unsplit model, test it and write the report. Only rank 0 calls this.

    Returns:
        The exit status: 1 if the kernels differ from PyTorch, else 0.
    """
    alone = Training(training.options, training.data, training.folder)
    alone.history, alone.epoch, alone.best_epoch = training.history, training.epoch, training.best_epoch
    found = write_report(alone)
    show_report(alone, found)
    status = verify(alone)
    console.print(
        f"wrote {alone.folder}: metrics, history, checkpoints and the plots {', '.join(p.name for p in found.plots)}"
    )
    return status
