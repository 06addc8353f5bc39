"""Search for options with Optuna: train many nets, and let the best one be a run of its own."""
# pyright: reportMissingImports=false

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from matplotlib.figure import Figure
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from sqlalchemy import URL

from .checkpoint import atomic_write
from .data import Data
from .errors import Diverged, InputError
from .options import Options
from .train import Training

TRIALS = "trials.csv"
# Epochs before a trial may be pruned, and trials before any may be.
WARM_EPOCHS, WARM_TRIALS = 5, 5
WIDTHS, DEPTHS = (32, 64, 128, 256, 512), (1, 2, 3, 4)
RATES, DECAYS, DROPOUTS, BATCHES = (1e-4, 1e-1), (1e-6, 1e-1), (0.0, 0.5), (16, 32, 64, 128, 256)
# A grid has these values in place of ranges.
GRID = {
    "width": [64, 256],
    "depth": [1, 2, 3],
    "dropout": [0.0, 0.2],
    "lr": [1e-3, 1e-2],
    "l2": [1e-4, 1e-2],
    "batch_size": [32, 128],
}


def make_sampler(name: str, seed: int, trials: int) -> BaseSampler:
    """The sampler "tpe", "random" or "grid" of a study that has so many trials.

    One that goes on must not draw what the first one drew. A grid is drawn anew, without the trials that there are.
    """
    if name == "grid":
        return GridSampler(GRID, seed=seed)
    seed = (seed + trials) % 2**32
    return TPESampler(seed=seed) if name == "tpe" else RandomSampler(seed=seed)


def suggest(trial: optuna.Trial, options: Options) -> Options:
    """The options of a trial."""
    on_grid = isinstance(trial.study.sampler, GridSampler)

    def value(name: str, limits: tuple[float, float], log: bool) -> float:
        if on_grid:
            return trial.suggest_categorical(name, GRID[name])
        return trial.suggest_float(name, *limits, log=log)

    def choice(name: str, values: Sequence[int]) -> int:
        return trial.suggest_categorical(name, GRID[name] if on_grid else values)

    return replace(
        options,
        hidden=[choice("width", WIDTHS)] * choice("depth", DEPTHS),
        dropout=value("dropout", DROPOUTS, log=False),
        lr=value("lr", RATES, log=True),
        l2=value("l2", DECAYS, log=True),
        batch_size=choice("batch_size", BATCHES),
    )


def search(options: Options, data: Data) -> tuple[optuna.Study, Options]:
    """Search for the options with the lowest validation loss. The test split is not looked at.

    Args:
        options: Options of every trial, but for those that are searched. `search` is the number of trials of the whole
            search; with `storage`, earlier trials count.
        data: The data set.

    Returns:
        The study, and the options of its best trial.

    Raises:
        InputError: If the storage cannot be used, or every trial diverged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    study = _open_study(options, data)

    def objective(trial: optuna.Trial) -> float:
        with TemporaryDirectory() as folder:
            training = Training(suggest(trial, options), data, Path(folder))

            def report(training: Training) -> None:
                trial.report(training.history[-1]["val_loss"], training.epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

            try:
                training.fit(report)
            except Diverged as error:
                raise optuna.TrialPruned from error
            trial.set_user_attr("epoch", training.best_epoch)
            return training.best_loss

    study.optimize(objective, n_trials=max(0, options.search - len(study.trials)))
    if not study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        raise InputError(f"argument --search: none of {options.search} trials ended with a finite loss")
    return study, _options_of(study, options)


def _options_of(study: optuna.Study, options: Options) -> Options:
    best = study.best_params
    return replace(
        options,
        hidden=[best["width"]] * best["depth"],
        **{name: best[name] for name in ("dropout", "lr", "l2", "batch_size")},
    )


def _open_study(options: Options, data: Data) -> optuna.Study:
    # A file's name may have characters that mean something in an address.
    storage = options.storage and URL.create("sqlite", database=options.storage).render_as_string()
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=f"{data.name} {data.fingerprint()[:16]}",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_TRIALS, n_warmup_steps=WARM_EPOCHS),
            load_if_exists=True,
        )
    except Exception as error:  # of SQLAlchemy, which need not be imported for its names
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"argument --storage: {options.storage} cannot be used: {reason}") from None
    study.sampler = make_sampler(options.sampler, options.seed, len(study.trials))
    return study


def write_search(study: optuna.Study, folder: Path) -> list[str]:
    """Write the trials of a search as a table, and its pictures. Returns the names of the files."""
    with atomic_write(folder / TRIALS) as file:
        study.trials_dataframe(attrs=("number", "value", "params", "user_attrs", "state")).to_csv(file, index=False)
    names = [TRIALS]
    for name, figure in _figures(study):
        names.append(f"{name}.png")
        with atomic_write(folder / names[-1]) as file:
            figure.savefig(file, format="png")
    return names


def _figures(study: optuna.Study) -> Any:
    """The course of the search, and the loss against each option."""
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    losses: list[Any] = [trial.value for trial in done]
    axes.plot([trial.number + 1 for trial in done], losses, "o", label="trial")
    best = [min(losses[: number + 1]) for number in range(len(losses))]
    axes.step([trial.number + 1 for trial in done], best, where="post", color="grey", label="best so far")
    axes.set(title="search: validation loss", xlabel="trial", ylabel="validation loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    yield "search", figure
    names = list(done[0].params)
    figure = Figure(figsize=(3.2 * len(names), 3.4), dpi=150, layout="constrained")
    figure.suptitle("search: validation loss by option")
    for name, axes in zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True):
        axes.plot([trial.params[name] for trial in done], losses, "o", alpha=0.6)
        axes.set(xlabel=name, xscale="log" if name in ("lr", "l2", "width", "batch_size") else "linear", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss")
    yield "search_options", figure
