"""Which layout of dp, fsdp, tp and pp to take for a net on a number of ranks, by the model of `parallel_step`."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from .cases import NetCase
from .cluster import Cluster
from .layout import DataParallel, Layout
from .parallel_step import Step, net_step

MAX_RANKS = 1024
# More micro-batches for each stage would only shorten a bubble of less than 7 % of the step.
MICRO_BATCHES_PER_STAGE = 16
DATA_PARALLEL: tuple[DataParallel, ...] = ("dp", "fsdp", "fsdp-keep")


@dataclass(frozen=True)
class Choice:
    """A layout, what the model says of it, and whether it fits into a rank's memory."""

    layout: Layout
    step: Step
    fits: bool


def divisors(number: int) -> list[int]:
    """The numbers that divide a number, smallest first."""
    return [each for each in range(1, number + 1) if number % each == 0]


def powers_of_two(last: int) -> list[int]:
    """The powers of two up to a number, smallest first."""
    return [2**i for i in range(last.bit_length())]


def mixes(case: NetCase, ranks: int) -> Iterator[Layout]:
    """List the layouts of a number of ranks, with one micro-batch.

    tp cuts no layer into more parts than the net is wide, pp has at most one stage for each layer, and data parallelism
    leaves every rank at least one row.
    """
    widest, layers = max(case.widths()), len(case.hidden_features) + 1
    for tp in divisors(ranks):
        for pp in divisors(ranks // tp):
            data = ranks // tp // pp
            if tp <= widest and pp <= layers and data <= case.rows:
                for data_parallel in DATA_PARALLEL[: None if data > 1 else 1]:
                    yield Layout(data, data_parallel, tp, pp)


def variants(case: NetCase, mix: Layout) -> Iterator[Layout]:
    """List the numbers of micro-batches and the schedules of a layout.

    Micro-batches are powers of two of at least one row. gpipe takes as long as 1f1b and more memory, and is left out.
    Interleaved schedules need a multiple of pp micro-batches.
    """
    layers, rows = len(case.hidden_features) + 1, case.rows // mix.data
    if mix.pp == 1:
        yield from (replace(mix, micro_batches=count) for count in powers_of_two(rows))
        return
    for count in powers_of_two(min(rows, MICRO_BATCHES_PER_STAGE * mix.pp)):
        yield replace(mix, micro_batches=count)
        if count % mix.pp == 0:
            for chunks in range(2, layers // mix.pp + 1):
                yield replace(mix, micro_batches=count, schedule="interleaved", chunks=chunks)


def best_variant(case: NetCase, mix: Layout, cluster: Cluster) -> Choice:
    """The fastest variant of a layout that fits, or the smallest if none does."""
    best = None
    for layout in variants(case, mix):
        step = net_step(case, layout, cluster)
        choice = Choice(layout, step, step.memory_gb <= cluster.device.memory_gb)
        if best is None or _rank(choice) < _rank(best):
            best = choice
        # Without a pipeline, more micro-batches only save memory.
        if choice.fits and mix.pp == 1:
            break
    assert best is not None
    return best


def _rank(choice: Choice) -> tuple[bool, float, float]:
    if not choice.fits:
        return True, choice.step.memory_gb, choice.step.modelled_us
    return False, choice.step.modelled_us, choice.step.memory_gb


def choices(case: NetCase, ranks: int, cluster: Cluster) -> list[Choice]:
    """The best variant of every layout of a number of ranks: fastest first, then those that do not fit."""
    return sorted((best_variant(case, mix, cluster) for mix in mixes(case, ranks)), key=_rank)


def one_rank_us(case: NetCase, cluster: Cluster) -> float:
    """The modelled time of a step on one rank, whether it fits or not, in microseconds."""
    return net_step(case, Layout(), cluster).modelled_us


class Point(NamedTuple):
    """The best layout of a net on a number of ranks; a row of the table of curves.

    Attributes:
        case: Name of the point.
        net: Name of the net.
        scaling: "strong" if the net's rows are those of all ranks together, "weak" if each rank has as many.
        ranks: Number of ranks.
        rows: Rows of all ranks together.
        kind: Kind of the layout, or "none" if no layout fits.
        layout: The layout in words, or "none".
        modelled_us: Time of a step in microseconds; infinite if no layout fits.
        modelled_efficiency: Time on one rank for its share of the rows, divided by `modelled_us`.
    """

    case: str
    net: str
    scaling: str
    ranks: int
    rows: int
    kind: str
    layout: str
    modelled_us: float
    modelled_efficiency: float


def curve(case: NetCase, cluster: Cluster) -> list[Point]:
    """Model the best layout on every power of two of ranks up to MAX_RANKS, with strong and with weak scaling."""
    alone_us = one_rank_us(case, cluster)
    points = []
    for scaling in ("strong", "weak"):
        for count in powers_of_two(MAX_RANKS):
            of_all = case if scaling == "strong" else replace(case, rows=count * case.rows)
            share_us = alone_us / count if scaling == "strong" else alone_us
            best = next((each for each in choices(of_all, count, cluster) if each.fits), None)
            kind, layout, us = "none", "none", math.inf
            if best is not None:
                kind, layout, us = best.layout.kind, str(best.layout), best.step.modelled_us
            name = f"{case.name}, {scaling} scaling, {count} ranks"
            points.append(Point(name, case.name, scaling, count, of_all.rows, kind, layout, us, share_us / us))
    return points


def advice_rows(case: NetCase, found: list[Choice], cluster: Cluster) -> Iterator[dict[str, object]]:
    """The rows of one net in the table of `--advise`, one for each layout of `choices`."""
    alone_us = one_rank_us(case, cluster)
    for choice in found:
        layout, step = choice.layout, choice.step
        yield {
            "case": f"{case.name}, {layout.mix}",
            "net": case.name,
            "kind": layout.kind,
            "layout": str(layout),
            "rows": case.rows,
            "ranks": layout.ranks,
            **asdict(layout),
            "modelled_us": step.modelled_us,
            "modelled_efficiency": alone_us / step.modelled_us / layout.ranks,
            "modelled_exposed_us": step.exposed_us,
            **{f"modelled_{name}": value for name, value in asdict(step).items()},
            "fits": choice.fits,
        }


def largest_excess(slower: Step, faster: Step) -> str:
    """The part of a step's time that exceeds another's most."""
    return max(slower.parts, key=lambda part: slower.parts[part] - faster.parts[part])


def reason(found: list[Choice], points: list[Point], memory: float) -> str:
    """Say in one sentence which layout to take, why, and what limits it.

    Args:
        found: Result of `choices`.
        points: Result of `curve`.
        memory: Memory of a rank in GB.
    """
    best = found[0]
    ranks, step = counted(best.layout.ranks, "rank"), best.step
    if not best.fits:
        return f"nothing fits into {memory:g} GB on {ranks}; {best.layout} needs {step.memory_gb:.3g} GB"
    limit = max(step.parts, key=lambda part: step.parts[part])
    share = step.parts[limit] / step.modelled_us
    clauses = [f"on {ranks} take {best.layout}: {_us(step.modelled_us)}, {share:.0%} of it for {limit}"]
    other = next((each for each in found if each.fits and each.layout.kind != best.layout.kind), None)
    if other is not None:
        clauses.append(_against(other, step))
    too_large = next((each for each in found if each.layout.kind == "dp" and not each.fits), None)
    if too_large is not None:
        clauses.append(f"dp alone needs {too_large.step.memory_gb:.3g} of {memory:g} GB")
    fewer = [each for each in points if each.scaling == "strong" and each.ranks < best.layout.ranks]
    fastest = min(fewer, key=lambda each: each.modelled_us, default=None)
    if fastest is not None and fastest.modelled_us < step.modelled_us:
        clauses.append(f"but {counted(fastest.ranks, 'rank')} would take {_us(fastest.modelled_us)}")
    return "; ".join(clauses)


def counted(count: int, what: str) -> str:
    """A count with its noun, such as "1 rank" or "2 ranks"."""
    return f"{count} {what}{'s' * (count != 1)}"


def _us(us: float) -> str:
    return f"{us:,.0f} us" if us >= 100 else f"{us:.3g} us"


def _against(other: Choice, step: Step) -> str:
    ratio = other.step.modelled_us / step.modelled_us
    if ratio < 1.005:
        return f"{other.layout} takes as long"
    return f"{other.layout} takes {ratio:.3g} times as long because of {largest_excess(other.step, step)}"
