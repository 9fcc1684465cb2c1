"""The metrics endpoint, asked over HTTP."""

from __future__ import annotations

import math
import socket
import urllib.request
from pathlib import Path

import pytest

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.training.metrics import MetricsLogger
from tests.distributed.workers import free_port

pytest.importorskip("prometheus_client")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.train.run_dir = str(tmp_path / "run")
    config.logging.tensorboard = False
    config.logging.prometheus_port = free_port()
    return config


def scrape(config: Config, address: str = "127.0.0.1") -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://{address}:{config.logging.prometheus_port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f"/{name}={value}" for name, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_newest_metrics_are_served_until_the_run_ends(config: Config) -> None:
    logger = MetricsLogger(config, start_step=0, enabled=True)
    logger.log(1, {"loss": 2.5, "memory/layer_03/rows_touched": 0.25, "memory/layer_12/rows_touched": 0.5})
    logger.log(2, {"loss": 2.25, "time/data_s": 0.125, "grad_norm": math.nan})
    found = scrape(config)
    assert math.isnan(found.pop("ultramem_grad_norm"))
    assert found == {
        "ultramem_step": 2.0,
        "ultramem_loss": 2.25,
        "ultramem_time_data_s": 0.125,
        "ultramem_memory_rows_touched/layer=3": 0.25,
        "ultramem_memory_rows_touched/layer=12": 0.5,
    }
    logger.close()
    with pytest.raises(OSError):
        scrape(config)


def test_it_is_off_unless_asked_for(config: Config) -> None:
    assert Config().logging.prometheus_port is None
    port, config.logging.prometheus_port = config.logging.prometheus_port, None
    logger = MetricsLogger(config, start_step=0, enabled=True)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    logger.close()


def test_it_listens_at_the_loopback_interface_alone_unless_told(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    # Every address of 127.0.0.0/8 is this machine's; only the one that is listened at answers.
    logger = MetricsLogger(config, start_step=0, enabled=True)
    assert "ultramem_step" not in scrape(config)
    with pytest.raises(OSError):
        scrape(config, "127.0.0.2")
    logger.close()
    assert not caplog.records
    config.logging.prometheus_address = "0.0.0.0"
    logger = MetricsLogger(config, start_step=0, enabled=True)
    scrape(config, "127.0.0.2")
    logger.close()
    assert "without a password" in caplog.text


def test_a_port_that_is_taken_is_one_clear_error(config: Config) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", config.logging.prometheus_port or 0))
        taken.listen()
        with pytest.raises(
            ConfigError, match=rf"logging.prometheus_port={config.logging.prometheus_port}, .* legal: a"
        ):
            MetricsLogger(config, start_step=0, enabled=True)
