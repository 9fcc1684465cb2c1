"""Upcycling: a dense model of Hugging Face with memory layers added, as the start of a run.

What the memory layers add is zero at first, because the last matrix of each (or, where a kind has none, its values) is:
the logits are those of the dense model, bit for bit, and gradients reach that matrix in the first step and everything
else from the second on. All other parameters are drawn as for a run that starts afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ultramem.checkpoints_convert import shuffles
from megatron_ultramem.checkpoints_convert.account import check_sources
from megatron_ultramem.checkpoints_convert.checkpoint_target import Import
from megatron_ultramem.checkpoints_convert.from_huggingface import (
    FROM_ROPE_BASE,
    Folder,
    check_vocabulary,
    complete_settings,
    in_precision,
    rotary_buffers,
)
from megatron_ultramem.checkpoints_convert.links import Same
from megatron_ultramem.checkpoints_convert.names import FP32, model_links
from megatron_ultramem.checkpoints_convert.names_of_memory import memory_links, table_links
from megatron_ultramem.checkpoints_convert.tensors import Recipe, TensorReader
from megatron_ultramem.config.load import config_from_dict, read_yaml, walk
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.build import LAYERS
from megatron_ultramem.memory.geometry import Pool, plan_pools
from megatron_ultramem.memory.init import fill_
from megatron_ultramem.memory.kinds import replaces_ffn
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.planning.parameters import pad_vocabulary

# Settings of the model that a recipe may have otherwise than the source: its weights mean the same under them.
_FREE = (
    "model.backend",
    "model.max_sequence_length",
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.init_std",
    "model.memory.",
    "model.moe.aux_loss_coeff",
    "model.moe.z_loss_coeff",
    "model.moe.dispatcher",
    "model.moe.grouped_gemm",
)


def import_upcycled(folder: Folder, home: Path, recipe: Path, overrides: Sequence[str]) -> Import:
    """The model of `folder` with the memory layers of a file of settings.

    Args:
        home: folder of the checkpoint, at the end.
        recipe: YAML: `model.memory`, and the settings of the run that starts from it.
        overrides: `section.setting=value` on top of it.

    Raises:
        ConfigError: the recipe has no memory layers, ones that take the place of an FFN, or another model than the
            folder.
        CheckpointError: as for any import.
    """
    model = {name: value for name, value in folder.settings["model"].items() if name != "memory"}
    settings = {**folder.settings, "model": model}
    wishes = read_yaml(recipe)
    config, tokenizer = complete_settings(settings, folder.path, home, overrides, wishes, folder.conversion)
    _check_recipe(folder, config, recipe)
    check_vocabulary(folder, config, tokenizer)
    drawn = _Drawn(config)
    added = drawn.recipes()
    rows = pad_vocabulary(config.model, folder.vocab_size)
    links = model_links(config.model, rows, expert_files=folder.expert_files)
    recipes = [made for link in links if link not in drawn.links for made in link.to_ours()]
    derived = rotary_buffers(folder)
    tensors = folder.reader.tensors
    check_sources(recipes, tensors, folder.path, derived)
    recipes = in_precision(recipes, folder.precision, tensors) + added
    compared = dict.fromkeys(derived, FROM_ROPE_BASE)
    return Import(config, folder.vocab_size, tokenizer, folder.reader, recipes, compared)


def _check_recipe(folder: Folder, config: Config, recipe: Path) -> None:
    source = config_from_dict({"model": folder.settings["model"]}, check=False)
    if plan_pools(source.model):
        raise ConfigError(f"{folder.path} has memory layers already; legal: a model without, or `convert from-hf`")
    if not plan_pools(config.model):
        raise ConfigError(f"{recipe} has no memory layers (model.memory.layers = {config.model.memory.layers!r})")
    if replaces_ffn(config.model.memory):
        raise ConfigError(
            f"{recipe}: model.memory.kind = {config.model.memory.kind} takes the place of FFNs that the source has; "
            "legal: model.memory.replaces_ffn = false, or a kind beside the FFN"
        )
    theirs = {name: value for name, value, _ in walk(source)}
    different = [
        f"{name} = {value!r} (there {theirs[name]!r})"
        for name, value, _ in walk(config)
        if name.startswith("model.") and not name.startswith(_FREE) and theirs[name] != value
    ]
    if different:
        raise ConfigError(f"{recipe} describes another model than {folder.path}: {', '.join(different)}")


class _Drawn:
    """The parameters of the memory layers, as a run that starts afresh would draw them, but for zeros at the end."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, config.model
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.links: list[Same] = []
        self._newest: tuple[int, dict[str, torch.Tensor]] = (-1, {})

    def recipes(self) -> list[Recipe]:
        """Of all memory layers and pools; fills `links` with what they replace."""
        made = []
        for pool in plan_pools(self.model):
            tables = self._tables(pool)
            layers = [(layer, link) for layer in pool.layers for link in memory_links(self.model, layer, pool)]
            # A kind without a last matrix has rows as wide as the model: they are what must be zero.
            has_last = any(link.ours.endswith(_LAST) for _, link in layers)
            made += [self._of_layer(layer, pool, tables, link) for layer, link in layers]
            table_of = table_links(self.model, pool)
            made += [
                self._of_pool(tables, link, zero=not has_last and link.ours.endswith(".values")) for link in table_of
            ]
            self.links += [link for _, link in layers] + table_of
        if self.model.memory.keep_shuffle:
            made += [self._permutation(layer, pool) for layer, pool in shuffles.shuffled_layers(self.config).items()]
        return made

    def _tables(self, pool: Pool) -> ValuePool:
        """The pool's tables without their numbers."""
        return ValuePool(
            self.model.memory,
            pool,
            hidden_size=self.model.hidden_size,
            num_layers=self.model.num_layers,
            ffn_ratio=self.model.ffn_hidden_size / self.model.hidden_size,
            dtype=self.dtype,
            device="meta",
        )

    def _of_layer(self, layer: int, pool: Pool, tables: ValuePool, link: Same) -> Recipe:
        name = link.ours.partition(".mlp.memory.")[2]
        zero = link.ours.endswith(_LAST)

        def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            drawn = self._layer(layer, pool, tables)[name][start:stop]
            return torch.zeros_like(drawn) if zero else drawn

        dtype = torch.float32 if link.ours.endswith(FP32) else self.dtype
        return Recipe(link.ours, link.shape, {}, rows, dtype, "zeros" if zero else "drawn")

    def _layer(self, layer: int, pool: Pool, tables: ValuePool) -> dict[str, torch.Tensor]:
        """Parameters and buffers of one layer; the newest one is kept, because its tensors are written in turn."""
        if self._newest[0] != layer:
            built = LAYERS[self.model.memory.kind](
                self.model.memory,
                hidden_size=self.model.hidden_size,
                layer=layer,
                pool=pool,
                table=tables,
                norm_eps=self.model.norm_eps,
                dtype=self.dtype,
            )
            built.reset_parameters(self.config.train.seed)
            self._newest = (layer, built.state_dict())
        return self._newest[1]

    def _of_pool(self, tables: ValuePool, link: Same, *, zero: bool) -> Recipe:
        name = link.ours.rpartition(".")[2]
        rule = getattr(tables, name).initializer

        def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            block = torch.zeros((stop - start, *link.shape[1:]), dtype=self.dtype)
            if zero:
                return block
            seed, where = self.config.train.seed, f"pools.{tables.pool.index}.{name}"
            return fill_(block, rule, seed, where, global_shape=link.shape, offset=(start, 0))

        return Recipe(link.ours, link.shape, {}, rows, self.dtype, "zeros" if zero else "drawn")

    def _permutation(self, layer: int, pool: Pool) -> Recipe:
        def rows(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            return shuffles.draw(self.config, layer, pool)[start:stop]

        made = Recipe(shuffles.our_name(layer), (pool.virtual_rows,), {}, rows, note="drawn")
        return shuffles.in_our_dtype(made, pool.virtual_rows)


_LAST = ".memory.value_proj.weight"
