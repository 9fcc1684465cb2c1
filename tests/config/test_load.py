"""YAML and overrides become a configuration, or one error that names the setting, its value and what is legal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron_ultramem.cli import main
from megatron_ultramem.config import Config, config_from_dict, load_config, save_config
from megatron_ultramem.config.describe import print_config
from megatron_ultramem.config.load import walk
from megatron_ultramem.errors import ConfigError

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "configs").glob("*.yaml"))


def test_a_saved_config_loads_equal(tmp_path: Path) -> None:
    config = load_config(
        None, ["model.memory.sharing=block", "model.memory.share_size=4", "train.rampup_batch_size=[]"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_legal(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_overrides_beat_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("optimizer: {lr: 1e-3}\nmodel: {num_layers: 4}")
    config = load_config(tmp_path / "c.yaml", ["optimizer.lr=2e-3", "optimizer.lr=3e-3"])
    assert (config.optimizer.lr, config.model.num_layers) == (3e-3, 4)


@pytest.mark.parametrize("text", ["4e-4", "4E-4", "0.0004"])
def test_numbers_that_yaml_takes_for_strings_are_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"optimizer: {{lr: {text}}}")
    assert (
        load_config(tmp_path / "c.yaml").optimizer.lr
        == load_config(None, [f"optimizer.lr={text}"]).optimizer.lr
        == 4e-4
    )


def test_settings_may_stand_before_and_after_options(capsys: pytest.CaptureFixture[str]) -> None:
    (quickstart,) = (path for path in EXAMPLES if path.stem == "quickstart")
    assert main(["config", "train.steps=500", "--config", str(quickstart), "train.seed=7"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["train"]
    assert (printed["steps"], printed["seed"]) == (500, 7)


@pytest.mark.parametrize("text", ["2024_01_01", "off", "1e3", "[^a]+", "0x10", "a: b"])
def test_a_text_setting_takes_an_override_word_for_word(text: str) -> None:
    assert load_config(None, [f"data.tokenizer.eod_token={text}"]).data.tokenizer.eod_token == text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.memory.num_kyes=3", ["model.memory.num_kyes", "did you mean model.memory.num_keys"]),
        ("modle.num_layers=3", ["modle", "did you mean model"]),
        ("model.num_layers=abc", ["model.num_layers", "'abc'", "an integer of at least 1"]),
        ("model.num_layers=0", ["model.num_layers", "0", "at least 1"]),
        ("train.steps=1.5", ["train.steps", "1.5", "integer"]),
        ("train.steps=null", ["train.steps", "None", "integer"]),
        ("train.precision=fp8", ["train.precision", "'fp8'", "bf16, fp32"]),
        ("optimizer.lr=fast", ["optimizer.lr", "'fast'", "number"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan", "number"]),
        ("model=3", ["model", "3", "mapping"]),
        ("parallel.overlap_p2p=maybe", ["parallel.overlap_p2p", "'maybe'", "true or false"]),
        ("data.weights=[a]", ["data.weights", "a list of numbers"]),
        ("foo", ["'foo'", "section.setting=value"]),
        ("train.steps.x=3", ["train.steps"]),
    ],
)
def test_a_bad_setting_is_refused_by_name(override: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    for part in named:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "named"), [("a: [", "not valid YAML"), ("- 1", "mapping"), (None, "no such file")], ids=str
)
def test_a_bad_file_is_refused_by_name(content: str | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=named) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_an_empty_file_or_section_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model:\ntrain:\n")
    assert load_config(tmp_path / "c.yaml") == Config()


def test_every_setting_has_an_explanation() -> None:
    for name, _, field in walk(Config()):
        assert len(field.metadata["help"]) > 8, name


def test_the_printed_tree_is_yaml_of_the_same_config() -> None:
    config = load_config(
        None, ["model.memory.layers='0,2'", "train.rampup_batch_size=[2,2,8]", "logging.wandb_name='a: b'"]
    )
    printed = io.StringIO()
    print_config(config, Console(file=printed, highlight=False, width=80))
    assert config_from_dict(yaml.safe_load(printed.getvalue())) == config
