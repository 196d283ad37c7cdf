"""Runs that several tests look at, each made once a session; the configs of the recipes."""

from pathlib import Path

import pytest

# Those in cleaning/ are of `bmtk clean`, which is no recipe: tests/cleaning runs them.
CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
RECIPE_CONFIGS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "cleaning")
TINY = ["--num_train_steps", "12", "--save_steps", "4", "--eval_steps", "0", "--logging_steps", "4"]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, seed_argv):
    """The folder of a finished run of recipes/pretrain.py: the smoke preset, cut to 12 steps, in this process."""
    from recipes import pretrain

    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain.main(["--preset", "smoke", "--output_dir", str(folder), *TINY, *seed_argv])
    return folder
