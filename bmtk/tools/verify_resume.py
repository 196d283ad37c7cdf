"""`bmtk verify resume`: kill a user's own run at random moments, resume it, and compare it with one left alone."""

import random
import signal
from collections.abc import Sequence
from pathlib import Path

from .recipe_runs import Kill, Log, Recipe, Watch, last_lines, log_of, run_child, scratch_folder
from .run_difference import Difference, first_difference
from .table import aligned

PHASES = ("training", "saving", "starting")  # in turn; of four kills and more the last one strikes at the end
CHECKPOINTS_OF_A_RUN = 4
ROW = ("process", "killed while", "at step", "seconds", "ended")


def verify_resume(recipe: Recipe, *, steps: int, kills: int, seed: int, work_dir: str | None, log: Log) -> int:
    """Say whether `recipe`, cut to `steps` and killed `kills` times, ends as it does undisturbed; the exit code.

    0 if histories, checkpoints and final weights are the same to the bit; 1 with the first difference, or if a
    process fails.
    """
    with scratch_folder(recipe.output_dir, work_dir, purpose="verify") as scratch:
        trial = Trial(recipe, scratch.folder, steps=steps, log=log)
        log(trial.introduction(kills))
        ended = trial.straight() and trial.killed(kills, seed)
        difference = first_difference(trial.whole, trial.hurt) if ended else None
        causes = trial.causes(difference) if difference else []
        log(f"\n{aligned(ROW, trial.rows)}\n")
        equal = ended and not difference and trial.num_struck > 0
        scratch.is_kept |= not equal
        log(verdict(trial, kills, difference, causes) if ended else f"FAILED: see {log_of(trial.failed)}")
        if scratch.is_kept:
            log(f"the runs are kept in {scratch.folder}; delete it when you have looked at them")
    return 0 if equal else 1


class Trial:
    """The runs of one verification: `whole` is left alone, `hurt` is killed and resumed, `again` asks why."""

    def __init__(self, recipe: Recipe, folder: Path, *, steps: int, log: Log):
        self.recipe, self.steps, self.log = recipe, steps, log
        self.whole, self.hurt, self.again = (folder / name for name in ("whole", "killed", "whole-again"))
        self.rows: list[Sequence[str]] = []
        self.num_struck = 0  # kills that came before the run had ended
        self.failed = self.whole  # the folder whose process failed
        self.timing = Watch(self.whole, steps)  # of the run that is left alone

    @property
    def save_every(self) -> int:
        return max(1, self.steps // CHECKPOINTS_OF_A_RUN)

    def argv(self, folder: Path) -> list[str]:
        """The command line of a leg: evaluations come with the checkpoints, which both recipes can resume at."""
        every = {"save_steps": self.save_every}
        if self.recipe.is_pretraining or self.recipe.settings["eval_strategy"] != "no":
            every["eval_steps"] = self.save_every
        return self.recipe.shortened(folder, steps=self.steps, **every)

    def introduction(self, kills: int) -> str:
        return (
            f"recipes/{self.recipe.name}.py with your settings, but {self.steps} steps, a checkpoint each "
            f"{self.save_every}, each step in the history, no test rows and nothing published:\n"
            f"once left alone, and once with {shown_kills(kills)}, each resumed by the same command (in "
            f"{self.whole.parent})"
        )

    def run(self, folder: Path, words: str, kill: Kill | None = None) -> Watch:
        self.log(f"  {words} ...")
        command = self.recipe.command(self.argv(folder))
        watch = run_child(command, folder, steps=self.steps, log=self.log, kill=kill)
        ended = {0: "to the end", -signal.SIGKILL: "killed"}.get(watch.code or 0, f"failed ({watch.code})")
        phase = kill.phase if kill and watch.code == -signal.SIGKILL else "-"
        self.rows.append((words, phase, str(watch.step or "-"), f"{watch.seconds:.1f}", ended))
        return watch

    def straight(self) -> bool:
        """Run without a kill.  Returns: whether that went well."""
        self.timing = self.run(self.whole, "left alone")
        if self.timing.code == 0:
            start = self.timing.first_step or 0.0
            self.log(f"    {self.timing.seconds:.0f} s, {start:.0f} of them until the first step")
        return self.is_well(self.whole, self.timing)

    def killed(self, kills: int, seed: int) -> bool:
        """Run in the other folder until the end, with kills.  Returns: whether no process failed."""
        expected = self.timing.seconds + kills * (self.timing.first_step or 0.0)
        self.log(f"    the others are expected to take about {expected:.0f} s together")
        for number, kill in enumerate(planned_kills(kills, seed, self.timing), start=1):
            watch = self.run(self.hurt, f"kill {number}", kill)
            if watch.code != -signal.SIGKILL:
                return self.is_well(self.hurt, watch)
            self.num_struck += 1
        return self.is_well(self.hurt, self.run(self.hurt, "last"))

    def is_well(self, folder: Path, watch: Watch) -> bool:
        if watch.code:
            self.failed = folder
            self.log(f"the recipe ended with exit code {watch.code}:\n{last_lines(folder)}")
        return watch.code == 0

    def causes(self, difference: Difference) -> list[str]:
        """Whether the machine gives the same numbers twice at all, asked of another run that is left alone."""
        self.log(f"  they differ ({difference}); is it the resuming, or this machine?")
        if not self.is_well(self.again, self.run(self.again, "left alone again")):
            return []
        if again := first_difference(self.whole, self.again):
            return [
                f"two runs that were left alone differ as well ({again}): this machine adds in another order each time"
            ]
        return ["two runs that were left alone are equal to the bit, so it is the resuming"]


def planned_kills(count: int, seed: int, timing: Watch) -> list[Kill]:
    """`count` moments drawn from `seed`: steps go up; delays are shares of what the undisturbed run took there."""
    draw = random.Random(seed)
    steps = sorted(draw.randint(1, max(1, timing.steps - 1)) for _ in range(count))
    start, done = timing.first_step or 0.0, timing.last_step or timing.seconds
    spans = {
        "starting": start,
        "training": (done - start) / max(1, timing.steps - 1),
        "saving": sum(timing.saves) / len(timing.saves) if timing.saves else 0.0,
        "ending": (timing.seconds - done) / 2,  # a resumed run may be faster there
    }
    phases = [PHASES[number % len(PHASES)] for number in range(count)]
    if count > len(PHASES):
        phases[-1] = "ending"
    return [
        Kill(phase, step, delay=draw.uniform(0, 0.9) * spans[phase]) for phase, step in zip(phases, steps, strict=True)
    ]


def shown_kills(count: int) -> str:
    return f"{count} kill{'' if count == 1 else 's'}"


def verdict(trial: Trial, kills: int, difference: Difference | None, causes: list[str]) -> str:
    """What was found, and what to do next."""
    if difference:
        lines = [f"DIFFERENT: the first difference is at {difference}", *causes]
        lines.append(
            "next: `--kills 1 --seed N` for a shorter case; if it is the resuming, report it with both folders"
        )
    elif trial.num_struck == 0:
        lines = ["NO VERDICT: the run ended before a kill came; give more --steps"]
    else:
        lines = [
            f"EQUAL after {shown_kills(trial.num_struck)}: its {trial.steps} steps, checkpoints and final weights "
            "are those of the run that was left alone, to the bit"
        ]
        if trial.num_struck < kills:
            lines.append(
                f"{shown_kills(kills - trial.num_struck)} came too late, after the end; more --steps leave room"
            )
        lines.append("next: another --seed kills at other moments; `bmtk verify parallel` compares 1 and 2 processes")
    return "\n".join(lines)
