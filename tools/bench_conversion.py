#!/usr/bin/env python3
"""Measures `ultramem convert` on a model that need not fit into memory: time, and the peak memory of the process.

    python tools/bench_conversion.py --config examples/configs/ultramemv2_1b_7b.yaml --work /big/disk

The model is built on the meta device, where tensors have shapes alone, and its checkpoint is filled with random numbers
block by block. Then it goes to Hugging Face and back, each in a process of its own, without the logit comparison, which
needs a model in memory. Both ends must be the same checkpoint bit for bit. The folder --work needs three times the size
of the model; what was written there is deleted. Results go to benchmarks/results/conversion_<hardware>.json.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_ultramem.checkpoints_convert.checkpoint_target import Import, write_model
from megatron_ultramem.checkpoints_convert.links import renamed
from megatron_ultramem.checkpoints_convert.megatron_reader import CheckpointReader
from megatron_ultramem.checkpoints_convert.tensors import TensorInfo, make, row_blocks
from megatron_ultramem.checkpoints_convert.tokenizer_files import Found
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.memory.init import Normal, fill_
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results
from megatron_ultramem.training.tokenizers import build_tokenizer

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MIB = 2**20
# What Python, torch and transformers take: the peak of converting a model of next to nothing.
TINY = [
    "model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=2", "model.ffn_hidden_size=32",
    "model.max_sequence_length=32", "data.sequence_length=32", "model.memory.num_keys=8", "model.memory.key_dim=8",
    "model.memory.top_m=4", "model.memory.value_dim=8", "model.memory.pre_value_dim=8", "model.memory.init=released",
]  # fmt: skip
# The high-water mark of this process alone: what the system reports of a child includes its parent's before exec.
CONVERT = """
import sys
from megatron_ultramem.cli import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder with room for the model three times")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    args = parser.parse_args()
    quiet_dependencies()
    work: Path = args.work / "bench_conversion"
    try:
        # The initialisation is not used, and the derived one would be simulated.
        config = load_config(args.config, ["model.memory.init=released", *args.overrides], check=False)
        prepare("auto")
        rows = measure(config, args.config.stem, work)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for row in rows:
        print(f"{row.metric:24} {row.value:12,.1f} {row.unit}")
    print(write_results(args.output, "conversion", rows))
    return 0


def measure(config: Config, case: str, work: Path) -> list[Row]:
    """Figures of a conversion there and back."""
    work.mkdir(parents=True)
    tiny = load_config(None, TINY)
    fill_checkpoint(tiny, meta_tensors(tiny), work / "tiny")
    _, imports = run_convert("to-hf", work / "tiny", work / "tiny-theirs")

    tensors = meta_tensors(config)
    fill_checkpoint(config, tensors, work / "ours")
    sizes = [info.nbytes for info in tensors.values()]
    rows = [
        Row(case, "parameters", sum(info.nbytes // info.dtype.itemsize for info in tensors.values()), ""),
        Row(case, "checkpoint_mib", sum(sizes) / MIB, "MiB"),
        Row(case, "largest_tensor_mib", max(sizes) / MIB, "MiB"),
        Row(case, "tiny_model_peak_mib", imports / MIB, "MiB"),
    ]
    for direction, source, target in (("to-hf", "ours", "theirs"), ("from-hf", "theirs", "back")):
        seconds, peak = run_convert(direction, work / source, work / target)
        name = direction.replace("-", "_")
        rows += [Row(case, f"{name}_peak_mib", peak / MIB, "MiB"), Row(case, f"{name}_seconds", seconds, "s")]
    assert_equal(work / "ours", work / "back")
    return rows


def meta_tensors(config: Config) -> dict[str, TensorInfo]:
    """Every tensor of the model's checkpoint, from Megatron's own model on the meta device."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.training.checkpoint_state import model_state
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    initialize_distributed(config, prepare("auto"))
    try:
        meta = torch.device("meta")
        with meta:
            _, chunks = build_chunks(config, vocabulary(config), "local", meta, draw_parameters=False)
        state = model_state(chunks)
        apply_factories(state)
        return {
            shard.key: TensorInfo(tuple(shard.global_shape), shard.dtype)
            for shard in nested_values(state)
            if isinstance(shard, ShardedTensor)
        }
    finally:
        destroy_distributed()


def vocabulary(config: Config) -> int:
    return config.model.vocab_size or build_tokenizer(config.data.tokenizer).vocab_size


class RandomTensors:
    """A source of random numbers, the same at every reading."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor; every range has numbers of its own."""
        info = self.tensors[name]
        block = torch.empty(((info.shape[0] if stop is None else stop) - start, *info.shape[1:]), dtype=info.dtype)
        return fill_(block, Normal(0.02), 0, f"{name}/{start}")


def fill_checkpoint(config: Config, tensors: dict[str, TensorInfo], folder: Path) -> None:
    """Writes random numbers, a block at a time."""
    folder.mkdir()
    found = Found(config.data.tokenizer, None, build_tokenizer(config.data.tokenizer))
    recipes = [renamed(name, name, info.shape) for name, info in tensors.items()]
    source = Import(config, vocabulary(config), found, RandomTensors(tensors), recipes)
    write_model(folder, source, [make(recipe, source.reader) for recipe in recipes], lambda nbytes: None)


def run_convert(direction: str, source: Path, target: Path) -> tuple[float, int]:
    """Converts in a process of its own; returns its seconds and its peak memory (resident set) in bytes."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CONVERT, "convert", direction, str(source), str(target), "--no-verify"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{direction} failed")
    return time.perf_counter() - start, int(done.stdout.splitlines()[-1]) * 1024


def assert_equal(first: Path, second: Path) -> None:
    """Compares two checkpoints block by block."""
    ours, theirs = CheckpointReader(first), CheckpointReader(second)
    assert ours.tensors == theirs.tensors
    for name, info in ours.tensors.items():
        for start, stop in row_blocks(info):
            assert torch.equal(ours.read(name, start, stop), theirs.read(name, start, stop)), (name, start)


if __name__ == "__main__":
    raise SystemExit(main())
