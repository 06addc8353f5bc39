"""Train on several ranks: `torchrun --nproc-per-node N -m fusemlp.parallel --tp T --dp D --pp P [training options]`."""
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
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..mlp.__main__ import console, fit, introduce, verify
from ..mlp.checkpoint import load_checkpoint
from ..mlp.data import Data, load_data
from ..mlp.errors import Diverged, InputError
from ..mlp.options import Options, configuration, count, make_parser, parse_options
from ..mlp.report import CONFIG, metrics_table, prepare_folder, write_json, write_report
from ..mlp.train import Training
from .collectives import Ranks
from .handshake import check_alike
from .lost_ranks import enlist, lost_ranks
from .train import POINTER, PROGRESS, SCHEDULES, ParallelTraining, last_checkpoint

PROG = "fusemlp.parallel"


def make_degrees_parser() -> ArgumentParser:
    parser = ArgumentParser(prog=f"torchrun -m {PROG}", add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("ranks", "as many as torchrun starts: T D P")
    group.add_argument("--tp", type=count, metavar="T", default=1, help="ranks that share each layer (1)")
    group.add_argument("--dp", type=count, metavar="D", help="ranks that share each batch (the others)")
    group.add_argument("--pp", type=count, metavar="P", default=1, help="stages of a pipeline of layers (1)")
    group.add_argument("--schedule-pp", choices=SCHEDULES, default="1f1b", help="of the pipeline (1f1b)")
    group.add_argument(
        "--timeout", type=count, metavar="S", default=300, help="seconds after which a rank that waits gives up (300)"
    )
    group.add_argument("--uneven", action="store_true", help="allow widths that the ranks cannot share alike")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says. Returns 0, 1 for a run that failed, 2 for what the user must change."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(make_degrees_parser().format_help())
        make_parser().print_help()
        return 0
    try:
        return run(argv)
    except ValueError as error:
        speak(f"{PROG}: error: {error}")
        return 2
    except Diverged as error:
        speak(f"{PROG}: stopped: {error}")
        return 1
    except RuntimeError as error:
        # torchrun's, who ends them all, and has patience.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        rank = os.environ.get("RANK")
        lost = [f"rank {each} is lost" for each in lost_ranks()] if dist.is_initialized() else []
        print(f"{PROG}: rank {rank} stopped: {'; '.join([*lost, str(error)])}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def speak(message: str) -> None:
    """Say for all ranks what ends all of them."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
    else:
        # The first rank to leave has torchrun end the others.
        time.sleep(1)


def make_mesh(degrees: Namespace, options: Options, data: Data, device_type: str) -> DeviceMesh:
    """The ranks that torchrun started, as (pp, dp, tp).

    Raises InputError if they are not as many as asked for, ValueError if their command lines or data differ.
    """
    if "RANK" not in os.environ:
        raise InputError("no ranks: start with torchrun --nproc-per-node N -m fusemlp.parallel ...")
    world = int(os.environ["WORLD_SIZE"])
    dp = degrees.dp or max(1, world // (degrees.tp * degrees.pp))
    asked = degrees.tp * dp * degrees.pp
    if asked != world:
        given = f"--tp {degrees.tp} x --dp {dp} x --pp {degrees.pp}"
        raise InputError(f"argument --nproc-per-node: {world} ranks, and {given} makes {asked}")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=degrees.timeout)
    store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun may hand its store on from one start to the next, with the addresses of ranks that are no more.
    store = dist.PrefixStore(f"start {restarts()}", store)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    enlist()
    asked_for = vars(degrees) | configuration(options)
    facts = {f"argument --{name.replace('_', '-')}": value for name, value in asked_for.items()}
    check_alike(Ranks.world(), device_type, data=data.fingerprint(), **facts)
    return init_device_mesh(device_type, (degrees.pp, dp, degrees.tp), mesh_dim_names=("pp", "dp", "tp"))


def run(argv: Sequence[str]) -> int:
    degrees, rest = make_degrees_parser().parse_known_args(argv)
    options = parse_options(rest)
    resuming = options.resume or (restarts() and options.out is not None and (Path(options.out) / POINTER).exists())
    if resuming:
        saved = load_checkpoint(last_checkpoint(Path(str(options.out))) / PROGRESS)
        options = parse_options(rest, saved["options"])
    torch.set_num_threads(options.threads or 1)
    data = load_data(options.dataset, options.csv, options.target, options.task, options.seed)
    device_type = "cuda" if options.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    mesh = make_mesh(degrees, options, data, device_type)
    folder = Path(agreed(options.out or f"runs/{data.name}-{datetime.now():%Y%m%d-%H%M%S}"))
    training = ParallelTraining(options, data, folder, mesh, degrees.uneven, degrees.schedule_pp)
    first = dist.get_rank() == 0
    if resuming:
        training.resume()
    else:
        prepare(folder, options.overwrite or restarts() > 0)
    if first:
        write_json(folder / CONFIG, configuration(options))
        introduce(training)
        sizes = zip(("pipeline", "data", "tensor"), mesh.shape, strict=True)
        console.print(f"on {' x '.join(f'{size} ({name})' for name, size in sizes)} ranks")
        fit(training)
    else:
        training.fit(lambda _: None)
    return report(training) if first else 0


def restarts() -> int:
    """How often torchrun has started the ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def agreed(value: Any) -> Any:
    """The first rank's."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def prepare(folder: Path, overwrite: bool) -> None:
    """Have the first rank make the folder; what it cannot do ends every rank alike."""
    refused = None
    if dist.get_rank() == 0:
        try:
            prepare_folder(folder, overwrite)
        except InputError as error:
            refused = str(error)
    refused = agreed(refused)
    if refused is not None:
        raise InputError(refused)


def report(training: ParallelTraining) -> int:
    """Test the best weights on one rank, in the net of one process."""
    alone = Training(training.options, training.data, training.folder)
    alone.history, alone.epoch, alone.best_epoch = training.history, training.epoch, training.best_epoch
    metrics, plots = write_report(alone)
    console.print(metrics_table(metrics, f"{alone.data.name}: test split, weights of epoch {alone.best_epoch}"))
    status = verify(alone)
    console.print(
        f"wrote {alone.folder}: metrics, history, checkpoints and the plots {', '.join(p.name for p in plots)}"
    )
    return status


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
