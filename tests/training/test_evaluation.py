"""What a finished model is measured by, on splits of a toy."""

from types import SimpleNamespace

import pytest
import torch

from bmtk.training.evaluation import measure


@pytest.mark.parametrize("draws", [True, False])
def test_pictures_are_of_the_last_split_alone_and_drawn_by_one_process(draws):
    """Each takes seconds, and a report shows those of one split."""
    drawn = []

    def figures(predictions, rows):
        drawn.append(rows)
        return [{"title": f"{len(predictions)} predictions of {rows}"}]

    scorer = SimpleNamespace(
        generated_samples=lambda model, seed: [],
        score=lambda predictions, rows: {"count": len(predictions)},
        baselines=lambda predictions, rows: {},
        samples=lambda predictions, rows: [],
        figures=figures,
    )
    objective = SimpleNamespace(scorer=scorer, rows={"train": "abcd", "validation": "ab", "test": "xyz"})
    results = measure(objective, torch.nn.Linear(1, 1), lambda split: list(objective.rows[split]), seed=0, draws=draws)
    assert results.metrics == {"validation/count": 2, "test/count": 3}
    assert drawn == (["xyz"] if draws else [])
    assert results.figures == ([{"title": "3 predictions of xyz"}] if draws else [])
