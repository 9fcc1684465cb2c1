"""The newest metrics for Prometheus, at http://<logging.prometheus_address>:<logging.prometheus_port>/metrics.

Gauges called ultramem_<metric>, such as ultramem_loss; metrics of a memory layer carry its number as the label `layer`.
Nothing but numbers is served: no settings, no environment. Nothing checks who asks, so the address is the loopback
interface unless the settings say otherwise.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Mapping
from typing import Any

from megatron_ultramem.config.schema import LoggingConfig
from megatron_ultramem.errors import ConfigError

_LAYER = re.compile(r"(.*/)layer_(\d+)/(.*)")
logger = logging.getLogger(__name__)


class PrometheusSink:
    """A sink of `MetricsLogger`, served by a thread of its own. Raises ConfigError where it cannot be."""

    def __init__(self, config: LoggingConfig) -> None:
        port, address = config.prometheus_port, config.prometheus_address
        assert port is not None
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigError(
                f"logging.prometheus_port={port}, but prometheus_client cannot be imported ({error}): "
                "install the package prometheus-client, or set logging.prometheus_port=null"
            ) from error
        self._gauge: Any = prometheus_client.Gauge
        self._registry = prometheus_client.CollectorRegistry()  # of its own: the global one tells of this process
        self._gauges: dict[str, Any] = {}
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, address, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"logging.prometheus_port={port}, logging.prometheus_address={address}: cannot be listened at "
                f"({error}); legal: a free port, and an address of this machine"
            ) from error
        if not ipaddress.ip_address(str(self._server.server_address[0])).is_loopback:
            logger.warning("metrics are served to whoever can reach %s:%d, without a password", address, port)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for metric, value in {**values, "step": float(step)}.items():
            match = _LAYER.fullmatch(metric)
            name = "ultramem_" + re.sub(r"\W", "_", f"{match[1]}{match[3]}" if match else metric)
            if name not in self._gauges:
                labels = ["layer"] if match else []
                self._gauges[name] = self._gauge(name, metric.split("/")[-1], labels, registry=self._registry)
            gauge = self._gauges[name]
            (gauge.labels(layer=str(int(match[2]))) if match else gauge).set(value)

    def rewind(self, step: int) -> None:
        """Nothing to take back: gauges hold the newest values."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
