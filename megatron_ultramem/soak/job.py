"""The runs of a soak: a small model on two ranks of this machine, started by our launcher with automatic restart."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.checkpoint_folder import list_checkpoints
from megatron_ultramem.training.preprocess import preprocess

MARK = "ULTRAMEM_SOAK"  # in the environment of every process of a job
RANKS = 2
SAVE_INTERVAL = 3


def make_corpus(folder: Path) -> Path:
    """Prefix of a byte-tokenised data set of short documents of made-up words, always the same."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(60)]
    files = []
    for number in range(40):
        files.append(folder / f"{number}.txt")
        files[-1].write_text(" ".join(generator.choices(words, k=generator.randrange(5, 60))))
    preprocess(files, folder / "words", TokenizerConfig())
    return folder / "words"


def settings(corpus: Path, run_dir: Path, steps: int, *, async_save: bool) -> list[str]:
    """A model whose tables are sharded over both ranks, with everything that has a state of its own; and limits that
    find faults within seconds."""
    return [
        "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.ffn_hidden_size=64",
        "model.max_sequence_length=32", "model.hidden_dropout=0.1", "model.memory.num_keys=12",
        "model.memory.key_dim=8", "model.memory.top_m=6", "model.memory.value_dim=16", "model.memory.pre_value_dim=16",
        f"parallel.memory_parallel_size={RANKS}", "parallel.memory_placement=rows", "parallel.timeout_minutes=0.5",
        f"data.paths=[{corpus}]", "data.split='100,0,0'", "data.sequence_length=32", "optimizer.lr=1e-3",
        "optimizer.value_lr_times=4.0", "schedule.warmup_steps=2", f"train.steps={steps}", "train.global_batch_size=8",
        "train.precision=fp32", "train.device=cpu", "train.eval_steps=0", f"train.run_dir={run_dir}",
        f"checkpoint.interval={SAVE_INTERVAL}", "checkpoint.keep_last=0",
        f"checkpoint.async_save={str(async_save).lower()}", "faults.heartbeat_seconds=0.5", "faults.silent_seconds=8",
        "logging.interval=1", "logging.progress=false", "logging.tensorboard=false",
    ]  # fmt: skip


class Job:
    """A run, its launcher and its ranks.

    Args:
        token: marks the processes of this job.
    """

    def __init__(self, settings: list[str], run_dir: Path, log: Path, token: str) -> None:
        self.settings, self.run_dir, self.log, self.token = settings, run_dir, log, token
        self.checkpoints = run_dir / "checkpoints"
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the launcher, which restarts its ranks as often as it takes."""
        command = [sys.executable, "-m", "megatron_ultramem", "train", "--ranks", str(RANKS)]
        command += ["--max-restarts", "1000000", *self.settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self.token}
        self.starts += 1
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def ended(self) -> int | None:
        """Exit code of the launcher, once it has ended."""
        assert self._process is not None
        return self._process.poll()

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that are there at this moment."""
        assert self._process is not None
        found = {}
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.NoSuchProcess:
            return {}
        for child in children:
            try:
                environment = child.environ()
            except psutil.Error:
                continue
            if "RANK" in environment and child.status() != psutil.STATUS_ZOMBIE:
                found[int(environment["RANK"])] = child.pid
        return found

    def step(self) -> int:
        """The last step in the metrics."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text(errors="replace").splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):  # a line that a full disk cut short
                continue
        return 0

    def saved(self) -> list[Path]:
        return list_checkpoints(self.checkpoints)

    def kill(self) -> None:
        """Ends every process of the job."""
        for process in self.processes():
            process.kill()
        if self._process is not None:
            self._process.wait()

    def processes(self) -> list[psutil.Process]:
        """Every process of the job that is still there, however it came to be."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found
