"""One trial: the recipe as a process of its own in a folder of its own, watched until it ends."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml

from bmtk.files import write_text
from bmtk.hub.run_record import RunRecord
from bmtk.training.history import History
from bmtk.training.run_folder import CHECKPOINTS, locked
from bmtk.training.signals import Stopped, StopRequest

SETTINGS, LOG = "trial.yaml", "log.txt"  # of a trial's folder
STOPPED = (130, 143)  # exit status of a run that was asked to stop, and has been saved
SECONDS_BETWEEN_LOOKS = 0.5
OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TrialFailed(Exception):
    """A trial ended without a value; the message is the reason."""


@dataclass(frozen=True)
class RecipeTrials:
    """Runs `recipe` with `settings`, changed by each trial; the value of a trial is a validation metric."""

    recipe: str
    settings: Mapping[str, object]
    folder: Path
    metric: str  # its name in history.jsonl and run.json: "validation/accuracy"
    request: StopRequest

    def folder_of(self, number: int) -> Path:
        return self.folder / f"{number:04d}"

    def __call__(self, trial: optuna.Trial) -> float:
        """Run a trial, or resume it.

        Raises: TrialFailed; optuna.TrialPruned if it was worse than the median of those before, at the same
        evaluation; Stopped if it was asked to stop; UserError if another process still runs it.
        """
        folder = self.folder_of(trial.number)
        with locked(folder):  # a search that was killed may have left its trial running
            mine = {"output_dir": str(folder), "skip_test": True}
            write_settings(folder / SETTINGS, {**self.settings, **trial.params, **mine})
        command = [sys.executable, self.recipe, "--config", str(folder / SETTINGS)]
        alone = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
        with (folder / LOG).open("ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            child = subprocess.Popen(command, env=alone, start_new_session=True, **streams)  # gets signals below
            is_pruned = self._watch(child, trial, History(folder))
        if is_pruned:
            raise optuna.TrialPruned
        if self.request.signal_number or child.returncode in STOPPED:
            raise Stopped(child.returncode if child.returncode in STOPPED else self.request.exit_code)
        if child.returncode:
            raise TrialFailed(_reason(folder / LOG, child.returncode))
        return self._value(folder)

    def _watch(self, child: subprocess.Popen[bytes], trial: optuna.Trial, history: History) -> bool:
        """Wait for the end of `child` and pass signals on; stop it early and return True if the trial is hopeless."""
        is_signalled = is_pruned = False
        while child.returncode is None:
            try:
                child.wait(SECONDS_BETWEEN_LOOKS)
            except subprocess.TimeoutExpired:
                if self.request.signal_number and not is_signalled:
                    child.send_signal(self.request.signal_number)
                    is_signalled = True
                elif not is_signalled and not is_pruned and self._is_hopeless(trial, history):
                    child.terminate()
                    is_pruned = True
        return is_pruned

    def _is_hopeless(self, trial: optuna.Trial, history: History) -> bool:
        """Whether an evaluation that is not the last of a run came out worse than the median."""
        finished = [t for t in trial.study.get_trials(deepcopy=False) if t.state == optuna.trial.TrialState.COMPLETE]
        last = max((t.last_step or 0 for t in finished), default=0)
        values = [record[self.metric] for record in history.read() if self.metric in record]
        known = trial.study.trials[trial.number].intermediate_values
        for place, value in enumerate(values, 1):
            if place not in known:
                trial.report(math.nan if value is None else value, place)
        return 0 < len(values) < last and trial.should_prune()

    def _value(self, folder: Path) -> float:
        metrics = RunRecord.read(folder).metrics
        if self.metric not in metrics:
            raise TrialFailed(f"{self.metric} was not measured, only {', '.join(metrics) or 'nothing'}")
        if not math.isfinite(metrics[self.metric]):
            raise TrialFailed(f"{self.metric} is {metrics[self.metric]}")
        return float(metrics[self.metric])

    def clear(self, number: int, *, keep_model: bool) -> None:
        """Delete the checkpoints of a finished trial, and its weights unless they are to be kept."""
        folder = self.folder_of(number)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        for path in [] if keep_model else folder.glob("*.safetensors"):
            path.unlink()


def write_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write a config file, whole or not at all."""
    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _reason(log: Path, status: int) -> str:
    """The error that a run ended with, from its output."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error")] or [line for line in lines if line]
    reason = errors[-1] if errors and status > 0 else f"ended by signal {-status}" if status < 0 else "no output"
    return f"{reason} (exit status {status}; see {log})"
