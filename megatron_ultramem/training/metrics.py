"""Where metrics go: a JSONL file always, TensorBoard, Weights & Biases and Prometheus when asked for.

Names used by the trainer: loss, valid_loss, lr, value_lr, grad_norm, tokens, tokens_per_s, tflops_per_gpu, mfu,
step_time_s, memory_gib, skipped, anomaly/* and rewound_from (`anomalies.py`), the parts of a step as in time/data_s
(`stragglers.PARTS`), rank_time/*, and memory-health metrics such as memory/layer_03/rows_touched.

The JSONL file holds one object per call of `log`, with the key "step"; several lines may carry the same step (an
evaluation, for example) and then complete each other. A value that is not finite is written as null, so that every
line is valid JSON. A run resumed at step k continues the file: lines beyond k belong to the part of the run that was
lost and go to metrics_dropped.jsonl, so that metrics.jsonl stays one consistent curve.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_ultramem.config.load import config_to_dict
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, TrainingError
from megatron_ultramem.training.prometheus import PrometheusSink

METRICS_FILE = "metrics.jsonl"
DROPPED_FILE = "metrics_dropped.jsonl"
WANDB_ID_FILE = "wandb_id"


class Sink(Protocol):
    """One destination of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLogger:
    """Writes the metrics of a run into its sinks; does nothing on ranks where `enabled` is false.

    `start_step` is the step that the run starts after (0 for a fresh run). Raises ConfigError when a sink that the
    config asks for cannot be opened, TrainingError when the metrics file cannot be written.
    """

    def __init__(self, config: Config, *, start_step: int, enabled: bool) -> None:
        self._sinks: list[Sink] = []
        if not enabled:
            return
        run_dir = Path(config.train.run_dir)
        self._sinks.append(JsonlSink(run_dir, start_step))
        if config.logging.tensorboard:
            self._sinks.append(TensorBoardSink(run_dir / "tensorboard", start_step))
        if config.logging.wandb_mode != "disabled":
            self._sinks.append(WandbSink(config, run_dir))
        if config.logging.prometheus_port is not None:
            self._sinks.append(PrometheusSink(config.logging))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` (numbers, or tensors of one element) at optimizer step `step`."""
        if not self._sinks:
            return
        numbers = {name: float(value) for name, value in values.items()}
        for sink in self._sinks:
            sink.log(step, numbers)

    def rewind(self, step: int) -> None:
        """Takes back what was recorded beyond `step`, to which the run has returned, where a sink can."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Flushes and closes every sink; a second call does nothing."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []


class JsonlSink:
    """<run_dir>/metrics.jsonl, flushed after every line."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                drop_lines_after(self._path, start_step)
            self._file: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise TrainingError(f"cannot write the metrics file {self._path}: {error}") from error

    def rewind(self, step: int) -> None:
        self.close()
        self._open(step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"cannot write the metrics file {self._path}: {error}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line whose failure `log` has reported
            self._file.close()


def drop_lines_after(path: Path, last_step: int) -> None:
    """Moves the lines of a metrics file whose step is beyond `last_step`, or which are damaged, to DROPPED_FILE.

    The file is replaced atomically, and only after the dropped lines are safely in the other file.
    """
    kept: list[str] = []
    dropped: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = _step_of(line)
        (kept if step is not None and step <= last_step else dropped).append(line + "\n")
    if not dropped:
        return
    with open(path.with_name(DROPPED_FILE), "a", encoding="utf-8") as file:
        file.writelines(dropped)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    """The step of a line of the metrics file; None when the line is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


class TensorBoardSink:
    """TensorBoard event files; events beyond `start_step` of an earlier launch are purged from the curves."""

    def __init__(self, directory: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard=true, but TensorBoard cannot be imported ({error}): "
                "install the package tensorboard, or set logging.tensorboard=false"
            ) from error
        self._make = lambda step: SummaryWriter(str(directory), purge_step=step + 1 if step else None)
        self._writer: Any = self._make(start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._make(step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. The run's id is kept in the run folder, so that a resumed run continues the same curves."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        mode: Any = config.logging.wandb_mode
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"logging.wandb_mode={mode}, but Weights & Biases cannot be imported ({error}): "
                "install the package wandb, or set logging.wandb_mode=disabled"
            ) from error
        id_file = run_dir / WANDB_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run: Any = wandb.init(
                mode=mode,
                project=config.logging.wandb_project,
                name=config.logging.wandb_name or run_dir.resolve().name,
                id=run_id,
                resume="allow" if mode == "online" else None,
                dir=str(run_dir),
                config=config_to_dict(config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"logging.wandb_mode={mode}: Weights & Biases did not start ({error}); legal: disabled, offline "
                "(sync later with `wandb sync`), or online after `wandb login`"
            ) from error
        id_file.write_text(run_id + "\n")
        # Steps are a metric of their own: W&B's internal step refuses to go back when a run resumes before its end.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Curves keep both passages: Weights & Biases takes nothing back."""

    def close(self) -> None:
        self._run.finish()
