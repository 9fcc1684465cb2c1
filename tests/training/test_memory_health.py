"""The probe captures one micro-batch and agrees with measuring each layer directly, over real process groups too."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.memory.health import memory_health
from megatron_ultramem.memory.layer import UltraMemV2
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.training.memory_health import MemoryHealthProbe

HIDDEN = 16


def make_layer(number: int) -> UltraMemV2:
    config = MemoryConfig(num_keys=12, key_dim=8, top_m=4, value_dim=8, pre_value_dim=4)
    pool = plan_pools(ModelConfig(num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, memory=config))[number]
    table = ValuePool(config, pool, hidden_size=HIDDEN, num_layers=2, ffn_ratio=3.0)
    layer = UltraMemV2(config, hidden_size=HIDDEN, layer=number, pool=pool, table=table)
    table.reset_parameters(seed=1)
    layer.reset_parameters(seed=1)
    return layer


def tokens(seed: int) -> torch.Tensor:
    """Activations [S, B, H] as Megatron's layers see them."""
    return torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(seed))


def expected(layer: UltraMemV2, x: torch.Tensor) -> dict[str, float]:
    metrics = memory_health(layer, x.reshape(-1, HIDDEN))
    found = {}
    for name, value in metrics.items():
        if value.numel() == 1:
            found[f"memory/layer_{layer.layer:02d}/{name}"] = value.item()
        else:
            for index, element in enumerate(value.tolist()):
                found[f"memory/layer_{layer.layer:02d}/{name}_{index}"] = element
    return found


def test_metrics_are_those_of_the_first_micro_batch():
    layer = make_layer(1)
    probe = MemoryHealthProbe([layer])
    with probe.watch():
        layer(tokens(0))
        layer(tokens(1))
    assert probe.collect() == pytest.approx(expected(layer, tokens(0)))


def test_a_copy_is_kept_so_that_freeing_or_changing_the_input_does_no_harm():
    layer, x = make_layer(0), tokens(0)
    probe = MemoryHealthProbe([layer])
    with probe.watch():
        layer(x)
        x.zero_()
    assert probe.collect() == pytest.approx(expected(layer, tokens(0)))


def test_activation_recompute_does_not_replace_the_captured_input():
    layer, calls = make_layer(0), []
    layer.register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    probe = MemoryHealthProbe([layer])
    with probe.watch():
        x = tokens(0).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(calls) == 2
    assert probe.collect() == pytest.approx(expected(layer, tokens(0)))


def test_nothing_is_hooked_outside_of_a_due_step():
    layer = make_layer(0)
    probe = MemoryHealthProbe([layer])
    with probe.watch(due=False):
        assert not layer._forward_pre_hooks
    with probe.watch(due=True):
        assert layer._forward_pre_hooks
    assert not layer._forward_pre_hooks


def test_collecting_without_a_forward_names_the_layers():
    with pytest.raises(RuntimeError, match=r"memory layers \[1\] saw no tokens"):
        MemoryHealthProbe([make_layer(1)]).collect()


def test_a_model_without_memory_layers_has_no_metrics():
    probe = MemoryHealthProbe([torch.nn.Linear(2, 2)])
    with probe.watch():
        pass
    assert probe.collect() == {}


def _rank_main(rank: int, store: str, results: str) -> None:
    """Rank = 2 * stage + data rank; stage s holds layer s."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    stage, replica = divmod(rank, 2)
    data_groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pipeline_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer = make_layer(stage)
    probe = MemoryHealthProbe([layer])
    with probe.watch():
        layer(tokens(replica))
    found = probe.collect(data_groups=[data_groups[stage], None], pipeline_group=pipeline_groups[replica])
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_over_data_and_pipeline_parallel_ranks_every_rank_gets_the_mean_of_every_layer(tmp_path):
    mp.spawn(_rank_main, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=4)
    wanted = {}
    for stage in range(2):
        layer = make_layer(stage)
        first, second = (expected(layer, tokens(replica)) for replica in range(2))
        wanted |= {name: (first[name] + second[name]) / 2 for name in first}
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == sorted(wanted)
        assert found == pytest.approx(wanted)
