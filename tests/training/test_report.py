"""Reading runs, and drawing them: every panel with data is there, bad input is one clear error."""

import html.parser
import importlib.util
import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_ultramem.config.load import save_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.reporting import load_run, write_report
from megatron_ultramem.reporting.figure import draw, loss_range, mean_over_layers, smoothed
from megatron_ultramem.reporting.runs import Series, describe_layout, describe_model, format_count

SCRIPT = Path(__file__).parents[2] / "tools" / "report_run.py"


def write_run(folder: Path, steps: int = 30, layers: int = 2, health_every: int = 10, config: bool = True) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": 3 + 4 / step, "lr": 1e-3, "value_lr": 4e-3, "grad_norm": 1 / step,
                "tokens_per_s": 1e5, "tflops_per_gpu": 300.0, "step_time_s": 0.5, "memory_gib": 40.0}  # fmt: skip
        if step % health_every == 0:
            line |= {f"memory/layer_{layer:02d}/rows_touched": 0.5 + 0.01 * layer * step for layer in range(layers)}
        lines.append(line)
    lines.append({"step": steps, "valid_loss": 3.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        settings = Config()
        settings.model.vocab_size = 50304
        settings.parallel.tensor_parallel_size = 2
        save_config(settings, folder / "config.yaml")
    return folder


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def report_script():
    spec = importlib.util.spec_from_file_location("report_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lines_of_one_step_complete_each_other(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    assert run.metrics["valid_loss"] == Series([30], [3.25])
    assert run.metrics["loss"].steps == list(range(1, 31))
    assert list(run.health()) == ["rows_touched"] and list(run.health()["rows_touched"]) == [0, 1]


def test_null_is_read_as_nan_and_a_half_written_last_line_is_ignored(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    losses = load_run(tmp_path).metrics["loss"]
    assert losses.steps == [1, 2] and math.isnan(losses.values[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl: no such file; a run folder"),
        ("", "holds no metrics yet"),
        ('{"step": 3, "lo', "holds no metrics yet"),
        ('{"step": 1}\n', "holds no metrics yet"),
        ('{"step": 1, "loss": 1}\ngarbage\n{"step": 2, "loss": 1}\n', "line 2: not a metrics record: 'garbage'"),
        ('{"step": 1, "loss": "x"}\n{"step": 2, "loss": 1}\n', "line 1: not a metrics record"),
    ],
    ids=["missing", "empty", "half-a-line", "no-values", "damaged-line", "text-value"],
)
def test_bad_metrics_files_are_one_clear_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_bad_baselines_are_one_clear_error(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/baselines.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"baselines\.json: must hold losses by name"):
        load_run(tmp_path / "run")


def test_a_config_of_another_version_costs_only_the_header(tmp_path):
    write_run(tmp_path / "run", config=False)
    (tmp_path / "run/config.yaml").write_text("model: {no_such_setting: 1}")
    run = load_run(tmp_path / "run")
    assert run.config is None and run.describe() == []


def test_without_a_config_in_the_run_folder_the_newest_checkpoint_tells_settings_and_vocabulary(tmp_path):
    folder = write_run(tmp_path / "run", config=False)
    for step, layers in ((10, 3), (20, 4)):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        settings = Config()
        settings.model.num_layers = layers
        save_config(settings, checkpoint / "config.yaml")
        (checkpoint / "run.json").write_text('{"vocab_size": 257}')
    config = load_run(folder).config
    assert (config.model.num_layers, config.model.vocab_size) == (4, 257)


def test_the_header_tells_parameters_and_layout(tmp_path):
    config = load_run(write_run(tmp_path / "run")).config
    assert "20 layers × 768" in describe_model(config)
    assert "parameters" in describe_model(config) and "active" in describe_model(config)
    assert describe_layout(config).startswith("TP 2  ·  batch 8 × 4,096 tokens")


def test_one_run_with_several_layers_is_drawn_with_heat_maps(tmp_path):
    run = load_run(write_run(tmp_path / "run"))
    run.baselines = {"unigram": 6.0}
    figure = draw([run])
    assert titles(figure) == [
        "loss", "learning rate", "gradient norm", "tokens per second", "model TFLOP/s per device", "step time (s)",
        "peak memory (GiB)", "share of rows touched",
    ]  # fmt: skip
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["train (3.133)", "validation (3.250)", "unigram baseline (6.000)"]
    heat = next(axes for axes in figure.axes if axes.get_title(loc="left") == "share of rows touched")
    assert heat.collections[0].get_array().shape == (2, 3)


def test_two_runs_are_overlaid_in_every_panel(tmp_path):
    runs = [load_run(write_run(tmp_path / name)) for name in ("a", "b")]
    figure = draw(runs)
    means = next(axes for axes in figure.axes if axes.get_title(loc="left") == "share of rows touched")
    assert means.get_ylabel() == "mean over layers"
    for axes in figure.axes[1:]:
        assert len(axes.lines) >= 2
    assert [label.split(",")[0] for label in figure.axes[0].get_legend_handles_labels()[1]] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_runs_can_be_drawn(tmp_path, steps):
    run = load_run(write_run(tmp_path / "run", steps=steps, health_every=1))
    assert "share of rows touched" in titles(draw([run]))[-1]


def test_runs_with_different_metrics_can_be_overlaid(tmp_path):
    full = load_run(write_run(tmp_path / "full"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/metrics.jsonl").write_text('{"step": 1, "valid_loss": 2.0}\n')
    assert "gradient norm" in titles(draw([full, load_run(tmp_path / "bare")]))


def test_a_run_whose_loss_was_never_finite_can_be_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "grad_norm": null}\n')
    assert titles(draw([load_run(tmp_path)])) == ["loss", "gradient norm"]


def test_the_script_writes_a_png(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert report_script().main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.png")
    assert imread(folder / "report.png").shape[1] == 13 * 130


def test_the_script_writes_a_self_contained_page(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "<b>")
    output = tmp_path / "out" / "compare.html"
    assert report_script().main([str(a), str(b), "-o", str(output)]) == 0
    page = output.read_text()
    assert "<svg" in page and "model.memory.num_keys" in page and "<b>" not in page
    links = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            links.extend(value for name, value in attrs if name in ("src", "href") or tag in ("script", "link"))

    Links().feed(page)
    assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("output", ["report.pdf", "report"])
def test_an_unknown_extension_is_refused(tmp_path, output):
    run = load_run(write_run(tmp_path / "run"))
    with pytest.raises(UserError, match=r"unknown extension .*legal: \.png, \.html"):
        write_report([run], tmp_path / output)


def test_the_script_reports_bad_input_without_a_traceback(tmp_path, capsys):
    assert report_script().main([str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err
    folder = write_run(tmp_path / "run")
    assert report_script().main([str(folder), "-o", str(folder / "metrics.jsonl" / "report.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_smoothing_keeps_a_straight_line_and_removes_a_spike():
    line = Series(list(range(300)), [10 - 0.01 * step for step in range(300)])
    assert smoothed(line).values[:297] == pytest.approx(line.values[:297])
    assert smoothed(line).values[297:] == pytest.approx(line.values[297:], abs=0.02)
    spiked = Series(line.steps, [50.0 if step == 150 else value for step, value in enumerate(line.values)])
    assert max(abs(a - b) for a, b in zip(smoothed(spiked).values, line.values, strict=True)) <= 0.0201


def test_the_loss_axis_cuts_spikes_but_shows_start_and_baselines():
    losses = [11.0] + [3.0] * 500
    losses[300] = 80.0
    low, high = loss_range(losses, [7.0])
    assert low < 3.0 and 11.0 < high < 12.0


def test_the_mean_over_layers_leaves_out_values_that_are_not_finite():
    layers = {0: Series([1, 2], [1.0, math.nan]), 1: Series([1, 2], [3.0, 5.0])}
    assert mean_over_layers(layers) == Series([1, 2], [2.0, 5.0])


@pytest.mark.parametrize(("number", "text"), [(1231379360, "1.23B"), (236297120, "236M"), (999, "999"), (0, "0")])
def test_counts_have_three_digits(number, text):
    assert format_count(number) == text
