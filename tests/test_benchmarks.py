"""The house of benchmarks: ratios, turns and targets, one tiny row from the command to the picture, no GPU."""

import json
import statistics
import sys

import PIL.Image
import pytest
import torch

from benchmarks import gpu, rows, run, time_to_loss
from benchmarks.rows import Line, Settings, at_least, at_most


def test_a_ratio_is_of_one_turn_and_the_median_of_all_keeps_the_target():
    line = Line("work", "s", ours=[1.0, 4.0, 3.0], peer=[2.0, 2.0, 1.0], target=at_most(2.0))
    assert line.ratios == [0.5, 2.0, 3.0]
    assert line.is_reached  # 2.0; the ratio of the medians would be 1.5, the mean 1.83
    assert not Line("work", "s", line.ours, line.peer, target=at_most(1.9)).is_reached
    assert Line("work", "s", line.ours, line.peer, target=at_least(2.0)).is_reached
    assert not Line("work", "s", line.ours, line.peer, target=at_least(2.1)).is_reached
    assert "2 (0.5 to 3; 3)" in line.cells()


def test_without_a_peer_the_value_itself_keeps_the_target():
    assert Line("work", "s", ours=[0.8, 1.2, 0.9], target=at_most(0.9)).is_reached
    assert Line("work", "s", ours=[0.8], target=at_most(0.9), did_not_get_there=True).is_reached is False
    assert Line("work", "s", ours=[0.8]).is_reached is None
    assert rows.not_run("work", "needs a card", at_most(1.0)).is_reached is None


def test_contestants_take_turns_forth_and_back():
    order, clock = [], iter(range(100))

    def contestant(name):
        return lambda: order.append(name) or float(next(clock))

    found = rows.take_turns({"a": contestant("a"), "b": contestant("b")}, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first round warms up
    assert found == {"a": [2.0, 5.0, 6.0], "b": [3.0, 4.0, 7.0]}


def test_a_row_that_fails_is_a_line_and_the_others_go_on(tmp_path, capsys):
    def broken(settings):
        raise RuntimeError("no such file")

    chosen = [rows.Row("one", broken, ""), rows.Row("two", lambda settings: Line("two", "s", [1.0]), "")]
    found = rows.measured(chosen, Settings(tmp_path))
    assert found["one"][0].note == "failed: no such file"
    assert found["two"][0].ours == [1.0]
    late = rows.measured(chosen[1:], Settings(tmp_path), minutes=-1)
    assert late["two"][0].note.startswith("not run: ")


def test_a_long_table_is_kept_after_each_row(tmp_path):
    chosen = [rows.Row(name, lambda settings, name=name: Line(name, "s", [1.0]), "") for name in ("one", "two")]
    kept = []
    rows.measured(chosen, Settings(tmp_path), keep=lambda found: kept.append(list(found)))
    assert kept == [["one"], ["one", "two"]]


def test_a_run_has_got_there_at_its_first_whole_line_that_has(tmp_path):
    history = tmp_path / "history.jsonl"
    assert time_to_loss.first_at(0.7, "accuracy", history) is None
    lines = [{"seconds": 2.0}, {"accuracy": 0.6}, {"seconds": 3.5}, {"accuracy": 0.71}, {"accuracy": 0.9}]
    texts = [json.dumps(line) + "\n" for line in lines]
    history.write_text("".join(texts[:3]) + texts[3][:-1])
    assert time_to_loss.first_at(0.7, "accuracy", history) is None  # half a line
    history.write_text("".join(texts))
    assert time_to_loss.first_at(0.7, "accuracy", history) == (3.5, 0.71)


def test_a_run_is_ended_when_it_has_got_there(tmp_path):
    code = "import json, pathlib, sys, time\n"
    code += "line = json.dumps({'seconds': 1.5, 'accuracy': 0.8}) + chr(10)\n"
    code += "pathlib.Path(sys.argv[-1], 'history.jsonl').write_text(line)\ntime.sleep(600)"
    lap = time_to_loss.lap_until(0.7, "accuracy", [sys.executable, "-c", code, str(tmp_path)], tmp_path)
    assert (lap.training, lap.reached) == (1.5, 0.8)
    with pytest.raises(SystemExit, match="no such luck"):
        time_to_loss.lap_until(0.7, "x", [sys.executable, "-c", "exit('no such luck')", str(tmp_path)], tmp_path)


def test_the_list_names_every_row(capsys):
    run.main(["--list"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(rows.ROWS)
    assert {"lm_time_to_loss", "lm_step", "image_classification", "object_detection", "start"} <= set(rows.ROWS)
    assert all(len(line.split()) > 3 for line in printed)  # each says what it measures


def test_a_tiny_row_prints_a_table_and_writes_json_and_a_picture(tmp_path, capsys):
    run.main(["char_step", "--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    line = facts["rows"]["char_step"][0]
    assert line["ratios"] == [pytest.approx(line["ours"][0] / line["peer"][0])]
    assert 0 < line["mfu"] < 1
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["processor"] in printed
    assert f"{statistics.median(line['ours']):,.0f} tokens/s" in printed
    with PIL.Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("L").getcolors()) > 10  # something is drawn


def test_an_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["lm_stp"])
    assert "unknown: lm_stp" in capsys.readouterr().err


def test_rows_of_a_gpu_are_not_run_without_a_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--output", str(tmp_path)])
    assert capsys.readouterr().out.startswith("not run: no CUDA device")
    run.main(["gpu_gpt2", "--output", str(tmp_path)])
    assert "not run: needs a CUDA device" in capsys.readouterr().out
