"""The range test finds the rate at which a problem with a known largest rate starts to diverge."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from bmtk.training.arguments import LoopArguments
from bmtk.training.lr_range_test import HIGHEST, LOWEST, RangeTest, range_test
from bmtk.training.optimizers import NamedOptimizer
from bmtk.training.prepared import Prepared
from bmtk.training.updates import Losses


class Bowl(torch.nn.Module):
    """The loss is curvature / 2 x w^2: gradient descent converges below a rate of 2 / curvature, and above it not."""

    accepts_loss_kwargs = False

    def __init__(self, curvature: float):
        super().__init__()
        self.curvature, self.weight = curvature, torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        self.config = SimpleNamespace()

    def forward(self, rows):
        return SimpleNamespace(loss=self.curvature / 2 * (self.weight**2).mean())


class Batches:
    carries_state = False

    def __getitem__(self, step):
        return [{"rows": torch.zeros(1)}]


def found(curvature: float) -> RangeTest:
    model = Bowl(curvature)
    descent = torch.optim.SGD(model.parameters(), lr=LoopArguments().learning_rate)
    optimizer = NamedOptimizer([descent], {model.weight: "weight"})
    return range_test(Prepared(model, optimizer, Accelerator(cpu=True)), Batches(), Losses(len))


@pytest.mark.parametrize("curvature", [100.0, 1000.0])
def test_the_suggestion_lies_below_the_rate_of_divergence_and_scales_with_the_problem(curvature):
    test = found(curvature)
    largest = 2 * 2 / curvature  # the mean over two weights halves the curvature
    assert largest / 100 < test.suggestion < largest
    assert test.rates[0] == pytest.approx(1e-3 * LOWEST)
    assert test.rates[-1] < 1e-3 * HIGHEST, "the test goes on although the loss has exploded"
    assert min(test.losses) < 0.1 * test.losses[0]


def test_the_picture_and_the_words_name_the_rate(tmp_path):
    test = RangeTest([1e-4, 1e-3, 1e-2], [3.0, 1.0, 5.0])
    assert test.suggestion == 1e-4
    test.draw(tmp_path / "new" / "learning_rate.svg")
    assert "<svg" in (tmp_path / "new" / "learning_rate.svg").read_text()


def test_a_loss_that_is_not_finite_from_the_start_is_an_error():
    with pytest.raises(ValueError, match="the first step of the range test has no finite loss; look at the data"):
        found(float("nan"))
