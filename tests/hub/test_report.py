"""The report: one page that loads nothing, shows every value it has, and that no name or figure can break."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bmtk.hub import report
from bmtk.hub.report import write_report
from bmtk.hub.run_record import RunRecord

HOSTILE = '"><script>alert(1)</script>{{ 7 * 7 }}\n---'
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
RUN = {
    "bmtk_version": "0.1.0",
    "recipe": "pretrain",
    "task": "causal_lm",
    "about": {"noun": "causal language model"},
    "command": "accelerate launch recipes/pretrain.py",
    "started_at": "2026-02-03T10:15:00Z",
    "train_seconds": 151.2,
    "model": {"class": "BmTransformerForCausalLM", "model_type": "bm_transformer", "num_parameters": 3_214_592},
    "data": {"name": "Tiny Shakespeare", "source": "corpus", "train": {"documents": 1, "tokens": 301_966}},
    "config": {"num_train_steps": 600, "logging_steps": 1, "learning_rate": 0.003},
    "metrics": {"validation/loss": 1.98, "validation/perplexity": 7.24},
    "throughput": {"tokens_per_second": 54_120.3, "mfu": 0.412},
    "environment": {"torch": "2.13.0", "hardware": "2 CPU cores"},
    "samples": [{"prompt": "ROMEO:", "text": "ROMEO:\n  Speak <soft> & low."}],
}


def simulated_history(num_steps: int, *, eval_steps: int = 50) -> list[dict]:
    """A pretraining run: a falling loss with seeded noise, a cosine learning rate, a steady speed."""
    noise, rows = np.random.default_rng(0), []
    for step in range(1, num_steps + 1):
        loss = 1.75 + 6.3 * math.exp(-10 * step / num_steps) + noise.normal(0, 0.05)
        rate = 3e-3 * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
        row = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": abs(noise.normal(1, 0.1))}
        row |= {"tokens": step * 8192, "tokens_per_second": noise.normal(54_000, 900), "mfu": noise.normal(0.41, 0.01)}
        rows.append(row)
        if step % eval_steps == 0:
            rows.append({"step": step, "validation/loss": loss + 0.1, "validation/perplexity": math.exp(loss + 0.1)})
    return rows


def page_of(directory: Path, run: dict, rows: list[dict]) -> str:
    (directory / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (directory / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return write_report(directory).read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags of a page with their attributes, the titles of its charts, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.charts, self.open = [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.text += data
        if self.open == "h3" and data.strip():
            self.charts.append(data.strip())
            self.open = ""

    def paths(self, css: str) -> list[str]:
        return [attrs["d"] for tag, attrs in self.tags if tag == "path" and attrs["class"] == css]


def test_the_page_loads_and_runs_nothing(tmp_path):
    page = Page(page_of(tmp_path, {**RUN, "figures": [{"title": "f", "png_base64": PNG}]}, simulated_history(60)))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")]
    assert links == [f"data:image/png;base64,{PNG}"]
    policies = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_tells_the_run_in_one_sentence_and_large_figures(tmp_path):
    page = Page(page_of(tmp_path, RUN, simulated_history(600)))
    assert (
        "A causal language model with 3.21 M parameters, trained from scratch on Tiny Shakespeare for 600 steps in "
        "2 min 31 s on 2 CPU cores: validation loss 1.98, validation perplexity 7.24."
    ) in page.text
    assert page.charts == [
        *("Loss", "Loss, second half", "Learning rate", "Gradient norm", "Throughput", "Model FLOPs utilisation")
    ]
    assert "Interrupted" not in page.text
    for shown in ("54.1 k", "2M", "301,966 tokens", "accelerate launch", "num_train_steps", "2.13.0"):
        assert shown in page.text


def test_results_come_first_and_curves_are_folded(tmp_path):
    text = page_of(tmp_path, {**RUN, "figures": [{"title": "f", "png_base64": PNG}]}, simulated_history(60))
    places = [text.index(part) for part in ('class="tiles"', ">Figures<", ">Samples<", ">Curves<", ">Results<")]
    assert places == sorted(places)
    assert [attrs for tag, attrs in Page(text).tags if tag == "details"] == [{}, {}]  # curves, configuration
    interrupted = Page(page_of(tmp_path, {**RUN, "metrics": {}}, simulated_history(60)))
    assert [attrs for tag, attrs in interrupted.tags if tag == "details"] == [{"open": None}, {}]


def test_baselines_stand_beside_the_tiles_of_their_metric(tmp_path):
    metrics = {"test/mse": 1.4, "test/mae": 0.5, "test/naive_mse": 1.294, "test/seasonal_naive_mse": 1.5}
    run = {**RUN, "about": {"noun": "forecaster", "main_metric": "mse"}, "metrics": metrics}
    text = page_of(tmp_path, run, [])
    tile = (
        '<dt>Test MSE</dt><dd>1.4</dd><dd class="beside">last value 1.294</dd><dd class="beside">last season 1.5</dd>'
    )
    assert f"{tile}</div>" in text
    assert "<dt>Test MAE</dt><dd>0.5</dd></div>" in text
    warning = "A baseline without a model does better: test MSE 1.4, last value 1.294."
    assert text.index(warning) < text.index('class="verdict"')


def test_settings_without_a_value_are_left_out(tmp_path):
    config = {"max_steps": -1, "eval_steps": 0, "a": None, "precision": "auto", "tags": [], "seed": 0, "dropout": 0.0}
    page = page_of(tmp_path, {**RUN, "config": {**config, "use_cache": False}}, [])
    table = page[page.index("Configuration") :]
    assert re.findall(r'<th scope="row">(\w+)</th>', table) == ["seed", "dropout", "use_cache"]
    assert "3 settings that have a value" in table


def test_a_sample_shows_its_image(tmp_path):
    samples = [{"prompt": "/home/ann/row 1", "text": " -> circle", "png_base64": PNG}, {"prompt": "b", "text": "c"}]
    page = Page(page_of(tmp_path, {**RUN, "samples": samples}, []))
    assert [attrs["src"] for tag, attrs in page.tags if tag == "img"] == [f"data:image/png;base64,{PNG}"]
    assert "/home/ann" not in page.text
    bad = Page(page_of(tmp_path, {**RUN, "samples": [{"prompt": "a", "text": "b", "png_base64": "no!"}]}, []))
    assert not [tag for tag, _ in bad.tags if tag == "img"]


def test_a_narrow_screen_scrolls_no_page(tmp_path):
    """Without a browser: what is wide scrolls in its own box, and nothing but labels of curves refuses to break."""
    style = (report.TEMPLATES / "report_style.html").read_text(encoding="utf-8")
    rules = dict(re.findall(r"(?m)^(\S[^{\n]*) \{([^}]*)\}", style))
    assert "overflow-x: auto" in rules[".scroll"]
    assert "overflow-x: auto" in rules[".picture"]
    assert "overflow-wrap: anywhere" in style[style.index("body {") : style.index("h1 {")]
    unbroken = [name for name, rule in rules.items() if "nowrap" in rule]
    assert unbroken == [".plot span", "th"]
    narrow = style[style.index("max-width: 46rem") :]
    assert "th { white-space: normal" in narrow


def test_samples_keep_their_white_space_and_their_angle_brackets(tmp_path):
    text = page_of(tmp_path, RUN, [])
    assert "<b>ROMEO:</b>\n  Speak &lt;soft&gt; &amp; low." in text
    assert "Nothing was logged" in text


def test_hostile_names_change_no_tag(tmp_path):
    text = json.dumps({**RUN, "figures": [{"title": "Tiny Shakespeare", "png_base64": PNG}]})
    for safe in ("Tiny Shakespeare", "2 CPU cores", "ROMEO:", "accelerate launch", "learning_rate", "2026-02-03"):
        text = text.replace(safe, "@@")
    rows = simulated_history(30)
    hostile, safe = (
        Page(page_of(tmp_path, json.loads(text.replace("@@", json.dumps(name)[1:-1])), rows))
        for name in (HOSTILE, "safe")
    )
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in safe.tags]
    assert [set(attrs) for _, attrs in hostile.tags] == [set(attrs) for _, attrs in safe.tags]
    assert "{{ 7 * 7 }}" in hostile.text


def test_secrets_never_reach_the_page(tmp_path):
    token = "hf_" + "aB3" * 11
    run = {**RUN, "command": f"train --hub_token {token}", "config": {"hub_token": "abc-123"}, "recipe": token}
    text = page_of(tmp_path, {**run, "figures": [{"title": token, "png_base64": PNG}]}, [])
    assert token not in text
    assert "abc-123" not in text


def test_values_that_are_not_finite_are_marked_and_break_the_line(tmp_path):
    rows = simulated_history(10)
    rows[4]["loss"], rows[7]["loss"] = "NaN", math.inf
    page = Page(page_of(tmp_path, RUN, rows))
    assert "2 values are not finite (NaN or infinite), at steps 5, 8." in page.text
    assert page.paths("break") == ["M50.0 0V100M80.0 0V100"]
    assert page.paths("train")[0].count("M") == 3


def test_a_loss_that_was_never_finite_is_still_a_chart(tmp_path):
    page = Page(page_of(tmp_path, RUN, [{"step": step, "loss": math.nan} for step in range(1, 50)]))
    assert page.charts == ["Loss"]
    assert "49 values are not finite (NaN or infinite), at steps 1, 2, 3, 4, 5 … 49." in page.text


def test_one_log_line_is_one_point(tmp_path):
    page = Page(page_of(tmp_path, RUN, [{"step": 1, "loss": 4.0}]))
    assert page.paths("train dot") == ["M50.00 50.00h.01"]
    assert "Stopped at step 1 of 600." in page.text


def test_an_interrupted_run_says_where_it_ended(tmp_path):
    run = {key: RUN[key] for key in ("task", "model", "config")}
    assert "Interrupted at step 340 of 600." in page_of(tmp_path, run, simulated_history(340))
    assert "Interrupted before its first log line of 600." not in page_of(tmp_path, {}, [])


def test_a_long_history_stays_a_small_page_and_keeps_its_extremes(tmp_path):
    rows = [{"step": step, "loss": 2 + 0.1 * math.sin(step)} for step in range(1, 100_001)]
    rows[77_776]["loss"] = 9.0
    text = page_of(tmp_path, {**RUN, "config": {}}, rows)
    assert len(text) < 200_000
    steps, values = report.Curves(tmp_path)["loss"]
    kept = report.thin(values)
    assert len(kept) <= report.MAX_DRAWN + 2
    assert {0, 77_776, 99_999} <= set(kept.tolist())
    assert steps[-1] == 100_000


def test_a_fine_tuning_history_has_its_validation_charts(tmp_path):
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4, "epoch": step / 2} for step in (1, 2, 3, 4)]
    rows += [
        {
            "step": 4,
            "eval_loss": 0.4,
            "eval_accuracy": 0.81,
            "eval_macro_f1": 0.8,
            "eval_runtime": 2.0,
            "eval_rows": 9,
        },
        {"step": 4, "train_loss": 0.3, "train_runtime": 9.0},
    ]
    page = Page(page_of(tmp_path, {"task": "sequence_classification", "metrics": {"eval_accuracy": 0.81}}, rows))
    assert page.charts == ["Loss", "Learning rate", "Validation accuracy", "Validation macro-F1"]
    assert len(page.paths("validation dot")) == 3


@pytest.mark.parametrize(("about", "unit"), [({}, "nats"), ({"loss_unit": "nats per token"}, "nats per token")])
def test_the_unit_of_the_loss_is_the_tasks(tmp_path, about, unit):
    page_of(tmp_path, RUN, [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}])
    assert report.charts(RunRecord(about=about), report.Curves(tmp_path))[0].panel.unit == unit


def test_what_a_model_is_compared_with_has_no_curve(tmp_path):
    rows = [{"step": 1, "loss": 1.0}]
    rows += [{"step": 1, "eval_mse": 0.4, "eval_naive_mse": 1.3, "eval_seasonal_naive_mae": 0.6}]
    rows += [{"step": 1, "eval_mean_colour_mae": 0.2}]
    page = Page(page_of(tmp_path, {"task": "time_series_forecasting", "metrics": {}}, rows))
    assert page.charts == ["Loss", "Validation MSE"]


def test_the_most_telling_metrics_come_first():
    metrics = {"eval_loss": 0.4, "eval_runtime": 2.0, "eval_rows": 9, "eval_macro_f1": 0.8, "eval_accuracy": 1}
    assert report.tiles(RunRecord(metrics=metrics)) == [
        ("1", "Validation accuracy"),
        ("0.8", "Validation macro-F1"),
        ("0.4", "Validation loss"),
    ]


def test_the_metric_of_the_task_leads_and_that_of_the_test_rows():
    metrics = {"loss": 0.4, "accuracy": 0.9, "precision": 0.3, "f1": 0.25, "tokens": 70}
    both = {f"{split}/{name}": value for split in ("validation", "test") for name, value in metrics.items()}
    run = RunRecord(about={"main_metric": "f1", "noun": "tagger"}, metrics=both)
    assert report.tiles(run) == [("0.25", "Test F1"), ("0.9", "Test accuracy"), ("0.4", "Test loss")]
    assert report.tiles(replace(run, metrics={"validation/loss": 0.4})) == [("0.4", "Validation loss")]
    assert report.tiles(replace(run, metrics={})) == []
    assert report.verdict(run, None).endswith(": test F1 0.25, validation F1 0.25.")


def test_tokens_stand_where_the_steps_reached_them(tmp_path):
    rows = [{"step": step, "loss": 4.0, "tokens": tokens} for step, tokens in ((1, 100), (2, 1000), (4, 2000))]
    page_of(tmp_path, RUN, rows)
    chart = report.charts(RunRecord(), report.Curves(tmp_path))[0]
    first = pytest.approx(25 * (1 + 4 / 9))  # 400 of the 900 tokens of step 2, of 4 steps
    assert chart.token_ticks == [(first, "500"), (50, "1k"), (75, "1.5k"), (100, "2k")]


def test_all_charts_share_their_steps(tmp_path):
    rows = [{"step": step, "loss": 4.0} for step in (10, 20, 30, 40)] + [{"step": 40, "validation/accuracy": 0.5}]
    page = Page(page_of(tmp_path, RUN, rows))
    assert page.paths("train") == ["M25.00 50.00L50.00 50.00L75.00 50.00L100.00 50.00"]
    assert page.paths("validation") == ["M100.00 50.00"]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 9}', '{"step": 2, "loss": 2}', "cut sho", '{"loss": 1}']
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    steps, values = report.Curves(tmp_path)["loss"]
    assert (steps.tolist(), values.tolist()) == ([1, 2], [3, 2])


def test_a_figure_is_an_image_or_nothing(tmp_path):
    svg = '<svg xmlns="http://www.w3.org/2000/svg" onload="x()"><script>y()</script></svg>'
    figures = [{"title": "ok", "svg": svg}, {"svg": "<p>"}, {"png_base64": "no!"}, {"png_base64": "aGk="}, {}, "text"]
    page = Page(page_of(tmp_path, {**RUN, "figures": figures}, []))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert images == [{"src": f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}", "alt": "ok"}]


def test_the_same_run_makes_the_same_bytes(tmp_path):
    rows = simulated_history(100)
    assert page_of(tmp_path, RUN, rows) == page_of(tmp_path, RUN, rows)


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (report.Axis(0, 600, whole=True), ["0", "200", "400", "600"]),
        (report.Axis(0, 2, whole=True), ["0", "1", "2"]),
        (report.Axis(1.7, 3.1), ["2.0", "2.5", "3.0"]),
        (report.Axis(0, 3.1e-3), ["0", "1e-3", "2e-3", "3e-3"]),
        (report.Axis(0, 61_000), ["0", "20k", "40k", "60k"]),
        (report.Axis(0.02, 30, log=True), ["0.1", "1", "10"]),
    ],
)
def test_ticks_are_round_numbers(axis, labels):
    assert [label for _, label in axis.ticks()] == labels


def test_places_are_percentages():
    assert report.Axis(10, 30).place(np.array([10.0, 20.0, 30.0])).tolist() == [0, 50, 100]
    assert report.Axis(1, 100, log=True).place(np.array([1.0, 10.0, 100.0])).tolist() == pytest.approx([0, 50, 100])


def test_a_loss_over_two_decades_is_drawn_on_a_logarithmic_axis():
    assert report.value_axis(np.array([0.01, 1.0, np.nan])).log
    assert not report.value_axis(np.array([1.0, 10.0])).log


def test_smoothing_leaves_out_what_is_not_finite():
    assert report.smooth(np.array([1.0, 2.0, np.nan, 4.0, 8.0])).tolist() == [1.0, 1.5, 3.0, 6.0, 6.0]
