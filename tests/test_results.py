"""The table of results: which runs are one row, what it says of several seeds, and of what was not measured."""

import json

import pytest

from benchmarks import results


def write_run(folder, *, seed=1, metrics=None, task="sequence_classification", seconds=90.0, name="reviews", **config):
    content = {
        "task": task,
        "about": {"main_metric": "loss" if task == "causal_lm" else "accuracy"},
        "metrics": metrics or {},
        "config": {"seed": seed, "output_dir": str(folder), "hidden_size": 32, **config},
        "data": {"name": name},
        "model": {"class": "BmCnnForSequenceClassification", "num_parameters": 33_761},
        "environment": {"hardware": "2 CPU cores", "precision": "fp32"},
        "train_seconds": seconds,
        "inference": {"rows_per_second": 100.0 * seed} if metrics else {},
        "started_at": f"2026-01-0{seed}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def measured(accuracy, loss=0.5, split="test"):
    return {f"{split}/loss": loss, f"{split}/macro_f1": accuracy - 0.01, f"{split}/accuracy": accuracy}


def table(capsys, *folders):
    results.main([*map(str, folders)])
    header, line, *rows = capsys.readouterr().out.splitlines()
    assert set(line) == {"|", "-", " "}
    assert {len(row) for row in rows} == {len(header)}
    columns = [cell.strip() for cell in header.strip("|").split(" | ")]
    return [dict(zip(columns, (c.strip() for c in row.strip("|").split(" | ")), strict=True)) for row in rows]


def test_three_seeds_are_one_row_with_mean_and_spread(tmp_path, capsys):
    folders = [
        write_run(tmp_path / str(seed), seed=seed, metrics=measured(accuracy), seconds=60.0 * seed)
        for seed, accuracy in ((1, 0.90), (2, 0.92), (3, 0.94))
    ]
    other = write_run(tmp_path / "wide", metrics=measured(0.5), hidden_size=64)
    rows = table(capsys, *folders, other)
    assert rows[1] == {
        "task": "sequence_classification",
        "data": "reviews",
        "model": "BmCnnForSequenceClassification",
        "parameters": "33.8 k",
        "seeds": "1, 2, 3",
        "split": "test",
        "result": "accuracy 0.92 ± 0.02; macro f1 0.91 ± 0.02; loss 0.5 ± 0",
        "training time": "2 min 00 s",
        "rows/s": "200",
        "hardware": "2 CPU cores, fp32",
    }
    assert rows[0]["result"] == "accuracy 0.5; macro f1 0.49; loss 0.5"
    assert rows[0]["seeds"] == "1"
    assert len(rows) == 2


def test_the_whole_table_is_markdown(tmp_path, capsys):
    results.main([str(write_run(tmp_path / "one", metrics={"test/accuracy": 0.75}, name="a|b"))])
    assert capsys.readouterr().out == (
        "| task                    | data | model                          | parameters | seeds "
        "| split | result        | training time | rows/s | hardware          |\n"
        "| ----------------------- | ---- | ------------------------------ | ---------- | ----- "
        "| ----- | ------------- | ------------- | ------ | ----------------- |\n"
        "| sequence_classification | a\\|b | BmCnnForSequenceClassification | 33.8 k     | 1     "
        "| test  | accuracy 0.75 | 1 min 30 s    | 100    | 2 CPU cores, fp32 |\n"
    )


def test_a_metric_that_some_runs_lack_says_how_many_have_it(tmp_path, capsys):
    metrics = [measured(0.9), {"test/accuracy": 0.8, "test/loss": None}, {}]
    folders = [write_run(tmp_path / str(seed), seed=seed, metrics=of) for seed, of in enumerate(metrics, 1)]
    (row,) = table(capsys, *folders)
    assert row["seeds"] == "1, 2"  # the third measured nothing
    assert row["result"] == "accuracy 0.85 ± 0.07071; macro f1 0.89 (1 of 2 runs); loss 0.5 (1 of 2 runs)"
    (row,) = table(capsys, *reversed(folders))
    assert row["result"].startswith("accuracy 0.85 ± 0.07071; ")


def test_a_seed_that_was_run_twice_counts_once_by_its_newest_run(tmp_path, capsys):
    old, new = write_run(tmp_path / "old", metrics=measured(0.1)), write_run(tmp_path / "new", metrics=measured(0.7))
    run = json.loads((new / "run.json").read_text(encoding="utf-8"))
    (new / "run.json").write_text(json.dumps({**run, "started_at": "2026-02-01"}), encoding="utf-8")
    for folders in ((old, new), (new, old)):
        (row,) = table(capsys, *folders)
        assert (row["seeds"], row["result"]) == ("1", "accuracy 0.7; macro f1 0.69; loss 0.5")


def test_the_test_rows_go_before_the_validation_rows_and_the_main_metric_before_others(tmp_path, capsys):
    both = {**measured(0.6, split="validation"), **measured(0.9), "test/tokens": 7, "test/runtime": 1.0}
    only = write_run(
        tmp_path / "only", metrics={"validation/loss": 1.25, "validation/perplexity": 3.49}, task="causal_lm"
    )
    rows = table(capsys, write_run(tmp_path / "both", metrics=both), only)
    assert (rows[1]["split"], rows[1]["result"]) == ("test", "accuracy 0.9; macro f1 0.89; loss 0.5")
    assert (rows[0]["split"], rows[0]["result"]) == ("validation", "loss 1.25; perplexity 3.49")


def test_runs_that_measured_nothing_are_no_row_and_no_runs_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="none of these 1 runs has measured anything; run recipes/evaluate"):
        results.main([str(write_run(tmp_path / "run", metrics={"train/loss": 1.0, "test/rows": 4}))])
    with pytest.raises(SystemExit, match=r"no run\.json in these folders; run a recipe first"):
        results.main([str(tmp_path / "empty")])
