"""Clusters: presets, files, overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.clusters import load_cluster, presets

MINE = (
    "{memory_gib: 94, peak_tflops: 835, hbm_gb_per_s: 3900, intra_node_gb_per_s: 200, inter_node_gb_per_s: 50, "
    "gpus_per_node: 4}"
)


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "a100"])
def test_presets_have_more_memory_than_they_reserve_and_faster_links_within_a_node(name: str) -> None:
    cluster = load_cluster(name.upper())
    assert cluster == presets()[name]
    assert 70 < cluster.usable_gib < cluster.memory_gib
    assert cluster.intra_node_gb_per_s > cluster.inter_node_gb_per_s


def test_overrides_change_a_preset() -> None:
    cluster = load_cluster("h100", ["cluster.memory_gib=94", "cluster.gpus_per_node=4"])
    assert (cluster.memory_gib, cluster.gpus_per_node) == (94, 4)
    assert cluster.peak_tflops == load_cluster("h100").peak_tflops


def test_a_file_describes_a_cluster_or_changes_a_preset(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    mine = load_cluster(str(tmp_path / "mine.yaml"), ["cluster.latency_us=10"])
    assert (mine.name, mine.hbm_gb_per_s, mine.latency_us) == ("mine", 3900, 10)
    (tmp_path / "other.yaml").write_text("{preset: h200, inter_node_gb_per_s: 22.5}")
    other = load_cluster(str(tmp_path / "other.yaml"))
    assert (other.memory_gib, other.inter_node_gb_per_s) == (presets()["h200"].memory_gib, 22.5)


@pytest.mark.parametrize(
    ("source", "overrides", "said"),
    [
        ("h300", [], "--cluster h300: unknown; legal: h100, h200, b200, a100"),
        ("h100", ["cluster.memory=80"], "did you mean cluster.memory_gib"),
        ("h100", ["cluster.memory_gib=-1"], "cluster.memory_gib = -1: legal: above 0"),
        ("h100", ["cluster.gpus_per_node=2.5"], "cluster.gpus_per_node = 2.5: legal: an integer"),
        ("h100", ["cluster.hbm_gb_per_s=fast"], "cluster.hbm_gb_per_s = 'fast': legal: a number"),
        ("h100", ["cluster.memory_gib"], "cluster.memory_gib = None: legal: a number"),
        ("h100", ["cluster.memory_gib=1"], "cluster.memory_gib = 1: legal: above cluster.reserved_gib = 4"),
        ("h100", ["cluster.reserved_gib=80"], "cluster.memory_gib = 79.1: legal: above cluster.reserved_gib = 80"),
        ("missing.yaml", [], "cluster file missing.yaml: cannot be read"),
    ],
)
def test_refused(source: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_cluster(source, overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("{memory_gib: 80}", "missing peak_tflops"),
        ("{preset: h900}", "preset = 'h900'; legal: h100"),
        ("{a: [", "cannot be read"),
    ],
)
def test_files_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_cluster(str(tmp_path / "mine.yaml"))
    assert said in str(error.value)
