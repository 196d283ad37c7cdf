"""The study: which values to try next, their results, and the best of them.  It resumes where it stopped."""

import dataclasses
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bmtk import arguments
from bmtk.errors import UserError
from bmtk.hub.formatting import format_number, format_seconds
from bmtk.training import arguments as loop_arguments
from bmtk.training import finetuning_arguments
from bmtk.training.evaluation import lower_is_better
from bmtk.training.run_folder import held
from bmtk.training.signals import deferred_signals
from bmtk.training.starting_weights import may_change

from .space import SearchArguments, default_space, read_space
from .trial import RecipeTrials, TrialFailed, write_settings

JOURNAL, BEST, TRIALS = "study.journal", "best.yaml", "trials"
HOPELESS = 3  # failed trials without any success after which the cause is not the values
NUM_SHOWN = 5  # trials in the last table
NUM_FOR_IMPORTANCES = 8  # with fewer trials the importance of a field cannot be estimated
# Trials that differ in these are measured on other rows, or written to another folder.
INCOMPARABLE = arguments.SOURCE_KEYS.union(
    "seed validation_fraction group_column leakage output_dir overwrite_output_dir".split()
)
OF_THIS_RUN = {"config", "preset", "overwrite_output_dir", "resume_from_checkpoint"}  # not passed on to trials
# May differ when it goes on.
FREE_KEYS = arguments.FREE_RUN_KEYS | loop_arguments.FREE_KEYS | finetuning_arguments.FREE_KEYS
OF_A_RESULT = {"push_to_hub", "private"}


class SearchedTask(Protocol):
    """What is read of a task before its rows are."""

    @property
    def main_metric(self) -> str | None:
        """The metric by which models are compared; None: the rows decide."""

    def main_metric_of(self, args: Any, **reading: Any) -> str:
        """That of these data; the training rows are read if it depends on them."""


def search_settings(
    args: SearchArguments,
    settings: Sequence[Any],
    task: SearchedTask,
    *,
    recipe: str,
    log: Callable[[str], object],
) -> None:
    """Run `recipe` with many values of its `settings`, the bound dataclasses run, data, training, ..., architecture.

    Trials are compared by metric_for_best_model, or the task's main metric, of the validation rows; test rows are not
    read.
    Raises: UserError for several processes, a space that does not fit, another search in the folder, and if no trial
    succeeds; Stopped (exit code 130 or 143) after SIGINT or SIGTERM, when the trial that was running is saved.
    """
    run, data, training, *_, architecture = settings
    _check_launch(run)
    current = {f.name: vars(part)[f.name] for part in settings for f in dataclasses.fields(part) if f.init}
    args.search_space = args.search_space or default_space(current)
    refused = _refused(run, architecture)
    chosen = _metric(training)
    refused |= data.settings_that_change(chosen or task.main_metric or "")  # before rows are read
    space = read_space(args.search_space, arguments.field_types(*settings), refused)
    folder, metric = Path(training.output_dir), chosen or task.main_metric_of(data, **run.reading)
    changed = {k: v for k, v in arguments.changed_settings(*settings).items() if k not in OF_THIS_RUN}
    in_trials = {k: v for k, v in changed.items() if k not in OF_A_RESULT}
    if "corpus_dir" in current:
        in_trials.setdefault("corpus_dir", str(folder / "corpus"))  # tokens are made once
    config = {**arguments.resolved_config(*settings), **vars(args)}
    check = {"overwrite": training.overwrite_output_dir, "free_keys": FREE_KEYS | data.free_keys}
    with held(folder, config, **check), deferred_signals(second_stops_at_once=False) as request:
        maximise = getattr(training, "greater_is_better", None)
        maximise = not lower_is_better(metric) if maximise is None else maximise
        study = open_study(folder / JOURNAL, maximise=maximise, first=_inside(space, current))
        run_trial = RecipeTrials(recipe, in_trials, folder / TRIALS, f"validation/{metric}", request)

        def tell(trial: FrozenTrial) -> None:
            log(progress_line(study, trial, metric, args.trials))
            if trial.state == TrialState.COMPLETE:
                place = {"output_dir": str(folder / "best")}
                write_settings(folder / BEST, {**changed, **study.best_trial.params, **place})
            for other in finished(study):
                run_trial.clear(other.number, keep_model=_is_best(study, other))

        log(f"{args.trials} trials, each with its log in {folder / TRIALS}: {', '.join(args.search_space)}")
        if done := len(finished(study)):
            log(f"resuming after {done} of them")
        explore(study, space, run_trial, num_trials=args.trials, seed=training.seed, tell=tell)
    log(f"{summary(study, metric)}\n\nnext: {_next_command(recipe, folder / BEST)}")


def _metric(training: Any) -> str | None:
    """The metric that `metric_for_best_model` names, without the prefix of Trainer."""
    name = getattr(training, "metric_for_best_model", None)
    return name and name.removeprefix("eval_")


def explore(
    study: optuna.Study,
    space: Mapping[str, BaseDistribution],
    run_trial: Callable[[optuna.Trial], float],
    *,
    num_trials: int,
    seed: int,
    tell: Callable[[FrozenTrial], None],
) -> None:
    """Run trials until the study has `num_trials`; unfinished ones of an interrupted search come first.

    The values of a trial depend only on the seed, its number and the results of the trials before it.
    Raises: UserError if the first HOPELESS trials fail; what `run_trial` raises besides TrialFailed and TrialPruned.
    """
    while True:
        trials = study.get_trials(deepcopy=False)
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        if interrupted := [trial for trial in begun if trial.state == TrialState.RUNNING]:
            trial = optuna.Trial(study, interrupted[0]._trial_id)
        elif len(begun) < num_trials:
            study.sampler = _sampler(seed, len(begun))
            trial = study.ask(dict(space))
        else:
            return
        started = time.monotonic()
        state, value = TrialState.COMPLETE, None
        try:
            value = run_trial(trial)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except TrialFailed as failure:
            state = TrialState.FAIL
            trial.set_user_attr("reason", str(failure))
        trial.set_user_attr("seconds", time.monotonic() - started)
        tell(study.tell(trial, value, None if state == TrialState.COMPLETE else state))
        ended = finished(study)
        if len(ended) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in ended):
            raise UserError(
                f"none of {len(ended)} trials succeeded; the last one: {ended[-1].user_attrs['reason']}. Fix that, "
                "then set overwrite_output_dir to start over"
            )


def open_study(path: Path, *, maximise: bool, first: Mapping[str, object]) -> optuna.Study:
    """The study in the file `path`, or a new one whose first trial has the values `first`; others are sampled.

    The caller holds the folder's lock.  An incomplete last line, left by a kill, is dropped.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)
    held_already: Any = _HeldAlready()  # optuna exports no class to derive it from
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path), lock_obj=held_already)),
        study_name="search",
        direction="maximize" if maximise else "minimize",
        pruner=optuna.pruners.MedianPruner(),
        load_if_exists=True,
    )
    if first and not study.get_trials(deepcopy=False):
        study.enqueue_trial(dict(first))
    return study


class _HeldAlready:
    """No lock at all: Optuna's own outlives a killed process, and the caller holds the lock of the folder."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Of one trial: the same before and after an interruption (Watanabe 2023, arXiv:2304.11127: multivariate TPE)."""
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=state, multivariate=True)


def _check_launch(run: arguments.RunArguments) -> None:
    if run.dry_run or run.find_lr:
        raise UserError("search, dry_run and find_lr exclude one another; set only one of them")
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise UserError(
            f"a search starts its trials one by one, and this is one of {processes} processes; launch it with one "
            "(accelerate launch --num_processes 1), and train on several with best.yaml"
        )


def _refused(run: arguments.RunArguments, architecture: Any) -> dict[str, str]:
    """Fields that cannot be searched, with the reason."""
    names = INCOMPARABLE | {f.name for f in dataclasses.fields(run)}
    refused = dict.fromkeys(names, "decides what is run or measured, not how well it learns")
    if run.model:
        fields = [f.name for f in dataclasses.fields(architecture) if not may_change(f.name)]
        refused |= dict.fromkeys(fields, f"is an architecture field, and {run.model} keeps its own")
    return refused


def _inside(space: Mapping[str, BaseDistribution], current: Mapping[str, object]) -> dict[str, object]:
    """The `current` values, where they lie in `space`."""

    def has(distribution: BaseDistribution, value: object) -> bool:
        if isinstance(distribution, CategoricalDistribution):
            return value in distribution.choices
        assert isinstance(distribution, FloatDistribution | IntDistribution)  # read_space makes no other
        return isinstance(value, int | float) and distribution.low <= value <= distribution.high

    return {name: current[name] for name, distribution in space.items() if has(distribution, current[name])}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have ended, well or not."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have a value, the best first."""
    complete = [trial for trial in finished(study) if trial.state == TrialState.COMPLETE]
    return sorted(complete, key=_value, reverse=study.direction.name == "MAXIMIZE")


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # of a trial that is complete
    return trial.value


def _is_best(study: optuna.Study, trial: FrozenTrial) -> bool:
    return trial.number in [best.number for best in ranked(study)[:1]]


def progress_line(study: optuna.Study, trial: FrozenTrial, metric: str, num_trials: int) -> str:
    """The result of a trial, the best so far, and the time left."""
    results = {TrialState.PRUNED: "stopped early", TrialState.FAIL: f"failed: {trial.user_attrs.get('reason')}"}
    result = results.get(trial.state) or f"{metric} {format_number(_value(trial))}"
    best = ranked(study)[:1]
    rest = [f"best {format_number(_value(best[0]))} (trial {best[0].number})"] if best else []
    seconds = [other.user_attrs["seconds"] for other in finished(study) if "seconds" in other.user_attrs]
    if left := num_trials - len(finished(study)):
        rest.append(f"about {format_seconds(left * sum(seconds) / len(seconds))} left")
    head = f"trial {trial.number} ({len(finished(study))} of {num_trials})"
    return "; ".join([f"{head}: {_values(trial)}: {result}", *rest])


def summary(study: optuna.Study, metric: str) -> str:
    """The best trials, how many others ended early or failed, and the importance of each field."""
    best, counts = ranked(study), Counter(trial.state for trial in finished(study))
    lines = [
        f"  {trial.number:>4}  {format_number(_value(trial)):>10}  {_values(trial)}" for trial in best[:NUM_SHOWN]
    ]
    lines = ["", f"  {'trial':>4} {metric:>10}  values", *lines, ""]
    named = {"stopped early": TrialState.PRUNED, "failed": TrialState.FAIL}
    others = [f"{counts[state]} {name}" for name, state in named.items() if state in counts]
    lines.append(f"{len(finished(study))} trials" + (f", {' and '.join(others)}" if others else ""))
    if len(best) >= NUM_FOR_IMPORTANCES and len(best[0].params) > 1:
        shares = optuna.importance.get_param_importances(study)
        lines.append("importance: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return "\n".join(lines)


def _values(trial: FrozenTrial) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in trial.params.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _next_command(recipe: str, config: Path) -> str:
    script = Path(recipe)
    script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join(["accelerate", "launch", str(script), "--config", str(config)])
