"""Every recipe has the parameters that its header names, is what the planner counts, and can be laid out as it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_ultramem import platform
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.clusters import load_cluster, presets
from megatron_ultramem.planning.evaluate import Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.parameters import count_parameters

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
OTHERS = ("quickstart", "upcycle_llama")  # no recipes of published models
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in OTHERS)
FAMILIES = {
    "227M/1.2B": ["olmoe_227m_1b", "memory_plus_227m_1b", "ultramem_227m_1b", "ultramemv2_227m_1b", "dense_227m"],
    "1B/7B": ["olmoe_1b_7b", "ultramemv2_1b_7b"],
    "430M/5B": ["ultramemv2_430m_5b"],
    "500M/6.8B": [f"ultramemv2_500m_6_8b{sharing}" for sharing in ("", "_ring9", "_block6")],
    "2.5B/25B": ["ultramemv2_2_5b_25b"],
    "2.5B/60B": ["ultramemv2_2_5b_60b_top768", "moe_2_5b_60b"],
    "2.5B/120B": ["ultramemv2_2_5b_120b_top256", "moe_2_5b_120b"],
}
UNITS = {"M": 1e6, "B": 1e9}
COUNTS = re.compile(r"^# Counts \((.*?)\): ([\d.]+)([MB]) active(?:, ([\d.]+)([MB]) total)?\.", re.MULTILINE)
REALLY = re.compile(r"Really active are ([\d.]+)([MB]) of ([\d.]+)([MB])")
LAYOUT = re.compile(r"^#   (\d+) GPUs(?: \((.+)\))?: (.+)$", re.MULTILINE)


def header(recipe: str) -> str:
    return (FOLDER / f"{recipe}.yaml").read_text().partition("\nmodel:")[0]


def recipe(name: str, *settings: str) -> Config:
    return load_config(FOLDER / f"{name}.yaml", settings)


def named_counts(name: str) -> tuple[str, float, float | None]:
    """Way of counting, active and total parameters that the header names."""
    found = COUNTS.search(header(name))
    assert found, f"{name} names no counts"
    how, active, active_unit, total, total_unit = found.groups()
    return how, float(active) * UNITS[active_unit], float(total) * UNITS[total_unit] if total else None


def test_every_family_is_there_and_nothing_else() -> None:
    assert sorted(name for family in FAMILIES.values() for name in family) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_counts_are_within_one_percent_of_the_named_ones(name: str) -> None:
    model = recipe(name).model
    counts = count_parameters(model, model.vocab_size)
    how, active, total = named_counts(name)
    embedding = counts.embedding if model.tie_embeddings else counts.embedding // 2
    ours = {
        "as table 10": (counts.published.active, counts.published.total),
        "as table 10, without the embedding": (counts.published.active - embedding, counts.published.total),
        "all parameters": (counts.active, counts.total),
    }[how]
    assert ours[0] == pytest.approx(active, rel=0.01)
    assert total is None or ours[1] == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_the_model_really_has_where_the_paper_counts_otherwise(name: str) -> None:
    model = recipe(name).model
    counts = count_parameters(model, model.vocab_size)
    _, active, total = named_counts(name)
    said = REALLY.search(header(name))
    if said is None:
        assert counts.active == pytest.approx(active, rel=0.01)
        assert total is None or counts.total == pytest.approx(total, rel=0.01)
        return
    for number, unit, real in ((*said.groups()[:2], counts.active), (*said.groups()[2:], counts.total)):
        assert number == f"{real / UNITS[unit]:.{len(number.partition('.')[2])}f}"


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names], ids=lambda x: x
)
def test_the_header_names_the_counts_of_the_family(family: str, name: str) -> None:
    wanted = [float(part[:-1]) * UNITS[part[-1]] for part in family.split("/")]
    _, active, total = named_counts(name)
    # 1B/7B and 227M/1.2B are the paper's short names of 1.07B/6.7B and 1.18B.
    assert active == pytest.approx(wanted[0], rel=0.08)
    assert total is None or total == pytest.approx(wanted[1], rel=0.05)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Config], torch.nn.Module]]:
    """Builds the whole model of a recipe on one rank and the meta device: shapes without numbers."""
    where = platform.prepare()
    from megatron_ultramem.model.build import build_chunks
    from megatron_ultramem.training.distributed import destroy_distributed, initialize_distributed

    def build(config: Config) -> torch.nn.Module:
        initialize_distributed(config, where)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
        _, (chunk,) = build_chunks(
            config, config.model.vocab_size, "local", torch.device("meta"), draw_parameters=False
        )
        return chunk

    yield build
    monkeypatch.undo()
    destroy_distributed()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("moe_") else name for name in RECIPES]
)
def test_the_planner_counts_what_megatron_builds(name: str, built) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    config = recipe(name)
    m, model = config.model, built(config)
    params = dict(model.named_parameters())
    assert all(param.is_meta for param in params.values())

    def numel(part: str) -> int:
        return sum(param.numel() for name, param in params.items() if part in name)

    counts = count_parameters(m, m.vocab_size)
    assert counts.total == numel("")
    assert counts.tables == numel("decoder.pools.")
    assert counts.memory_dense == numel(".mlp.memory.")
    assert counts.embedding == numel("embedding.")
    assert counts.attention == numel("self_attention.")
    tables_read = sum(
        m.memory.num_heads * m.memory.top_m * sum(table.shape[1] for table in layer.table.parameters())
        for layer in model.modules()
        if hasattr(layer, "shuffle_checksum")
    )
    experts = [module.experts for module in model.modules() if isinstance(module, MoELayer)]
    all_experts = sum(param.numel() for module in experts for param in module.parameters())
    inactive = counts.tables - tables_read + all_experts * (m.moe.num_experts - m.moe.top_k) // m.moe.num_experts
    assert counts.active == counts.total - inactive


def layouts(name: str) -> list[tuple[int, str, list[str]]]:
    """(GPUs, their kind or GiB, settings) of every layout that the header names."""
    return [(int(gpus), kind or "H100", text.split()) for gpus, kind, text in LAYOUT.findall(header(name))]


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_layout_is_legal_and_fits_the_named_gpus(name: str) -> None:
    named = layouts(name)
    assert {8, 256} <= {gpus for gpus, _, _ in named}
    for gpus, kind, settings in named:
        config = recipe(name, *settings)
        assert validate_world(config, gpus) >= 1
        cluster = load_cluster(kind.lower() if kind.lower() in presets() else "b200")
        config = on_cluster(config, cluster)
        evaluator = Evaluator(config, config.model.vocab_size, cluster)
        found = evaluator.evaluate(config, gpus)
        assert found.fits == (kind.lower() in presets()), (gpus, kind)
        if not found.fits:
            assert f"{found.memory.required / GIB:.0f} GiB" == kind


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ultramemv2_227m_1b", ["parallel.pipeline_parallel_size=2"], ["would split pool 0 of 20 memory layers"]),
        ("memory_plus_227m_1b", ["parallel.pipeline_parallel_size=4"], ["would split pool 0 of 4 memory layers"]),
        ("ultramemv2_500m_6_8b_block6", ["parallel.pipeline_parallel_size=8"], ["would split pool 0 of 6"]),
        (
            "ultramem_227m_1b",
            ["parallel.pipeline_parallel_size=5"],
            ["reads layer 0 (pipeline stage 0) joins layer 4 (pipeline stage 1)"],
        ),
        ("moe_2_5b_60b", ["parallel.expert_parallel_size=48"], ["does not divide model.moe.num_experts = 256"]),
        ("ultramemv2_2_5b_120b_top256", ["parallel.memory_parallel_size=7"], ["7 ranks do not divide"]),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_laid_out_says_why(name: str, settings: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(name, *settings)
    for words in [*said, "legal"]:
        assert words in str(caught.value)


def test_a_recipe_on_the_wrong_number_of_gpus_says_which_would_do() -> None:
    with pytest.raises(ConfigError, match="legal: a multiple of"):
        validate_world(recipe("ultramemv2_227m_1b"), 7)
    with pytest.raises(ConfigError, match="does not divide the 12 ranks of a pipeline stage"):
        validate_world(recipe("moe_2_5b_60b", "parallel.expert_parallel_size=8"), 12)
