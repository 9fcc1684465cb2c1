"""Shuffle permutations on their way: we keep a seed, a Hugging Face folder keeps the permutations.

They are drawn by torch, and a later torch may draw others from the same seed; a model goes with those it was trained
with. Where a folder's are not what the seed gives here, the imported checkpoint keeps them too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_ultramem.checkpoints_convert.links import renamed
from megatron_ultramem.checkpoints_convert.tensors import Recipe, TensorReader
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError
from megatron_ultramem.memory.geometry import Pool, plan_pools
from megatron_ultramem.memory.shuffle import checksum, shuffle_permutation
from megatron_ultramem.training.checkpoint_folder import Record


def our_name(layer: int) -> str:
    return f"decoder.layers.{layer}.mlp.memory.permutation"


def their_name(layer: int) -> str:
    return f"model.layers.{layer}.memory.permutation"


def shuffled_layers(config: Config) -> dict[int, Pool]:
    """The pool of every layer that has a permutation."""
    if not config.model.memory.shuffle:
        return {}
    return {layer: pool for pool in plan_pools(config.model) for layer in pool.layers}


def recipes_to_theirs(config: Config) -> list[Recipe]:
    """Their permutations, from ours or from the seed."""
    if config.model.memory.keep_shuffle:
        return [
            renamed(our_name(layer), their_name(layer), (pool.virtual_rows,))
            for layer, pool in shuffled_layers(config).items()
        ]
    return [_drawn(config, layer, pool) for layer, pool in shuffled_layers(config).items()]


def _drawn(config: Config, layer: int, pool: Pool) -> Recipe:
    def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
        return draw(config, layer, pool)[start:stop]

    made = Recipe(their_name(layer), (pool.virtual_rows,), {}, rows, note="drawn from model.memory.shuffle_seed")
    return in_our_dtype(made, pool.virtual_rows)


def draw(config: Config, layer: int, pool: Pool) -> torch.Tensor:
    """The permutation that the seed gives."""
    seed = config.model.memory.shuffle_seed
    return shuffle_permutation(pool.virtual_rows, seed=seed, pool=pool.index, layer=layer)


def checksums(config: Config) -> dict[str, str]:
    """For run.json: by layer, '' where the checkpoint keeps the permutation itself."""
    layers = {str(layer): "" for pool in plan_pools(config.model) for layer in pool.layers}
    if not config.model.memory.keep_shuffle:
        layers |= {str(layer): checksum(draw(config, layer, pool)) for layer, pool in shuffled_layers(config).items()}
    return layers


def check_seed(config: Config, record: Record, checkpoint: object) -> None:
    """Raises CheckpointError if the seed gives other permutations here than those the checkpoint was trained with."""
    ours = checksums(config)
    wrong = [layer for layer, found in ours.items() if record.shuffles.get(layer) != found]
    if wrong:
        raise CheckpointError(
            f"checkpoint {checkpoint}: model.memory.shuffle_seed gives other permutations here (layers "
            f"{', '.join(wrong[:8])}) than where it was trained, with torch {record.versions.get('torch')}; "
            "legal: that torch"
        )


def from_theirs(config: Config, reader: TensorReader) -> tuple[Config, list[Recipe], dict[str, str]]:
    """(settings, recipes, what was read to be compared): whether the seed gives the folder's permutations.

    Raises CheckpointError if one is no permutation.
    """
    layers = shuffled_layers(config)
    differ = config.model.memory.keep_shuffle
    for layer, pool in layers.items():
        found = reader.read(their_name(layer))
        check_permutation(their_name(layer), found)
        differ = differ or not torch.equal(found, draw(config, layer, pool))
    if not differ:
        same = "equal to what model.memory.shuffle_seed gives"
        return config, [], {their_name(layer): same for layer in layers}
    memory = replace(config.model.memory, keep_shuffle=True)
    config = replace(config, model=replace(config.model, memory=memory))
    recipes = [renamed(their_name(layer), our_name(layer), (pool.virtual_rows,)) for layer, pool in layers.items()]
    return config, recipes, {}


def in_our_dtype(recipe: Recipe, rows: int) -> Recipe:
    """The recipe of a permutation, in the dtype in which we draw one of so many rows."""
    return replace(recipe, dtype=torch.int32 if rows <= torch.iinfo(torch.int32).max else torch.int64)


def check_permutation(name: str, found: torch.Tensor) -> None:
    """Raises CheckpointError if it is none."""
    rows = found.numel()
    if found.is_floating_point() or not torch.equal(found.long().sort().values, torch.arange(rows)):
        raise CheckpointError(f"{name} {list(found.shape)} is no permutation of {rows} rows")
