"""The cluster that this machine is a node of, for benchmarks that compare predictions with what they measure."""

from __future__ import annotations

from megatron_ultramem.errors import UserError
from megatron_ultramem.planning.clusters import Cluster, load_cluster, presets
from megatron_ultramem.results import hardware_name


def cluster_of_this_machine(name: str | None = None) -> Cluster:
    """The preset or .yaml file of that name, or the preset of this machine's GPU; raises UserError if there is none."""
    if name is not None:
        return load_cluster(name)
    gpu = hardware_name().lower()
    known = next((preset for preset in presets() if preset in gpu), None)
    if known is None:
        raise UserError(
            f"--cluster: no preset describes {hardware_name()}; name one of {', '.join(presets())} or a file"
        )
    return load_cluster(known)
