"""Megatron's datasets: checked before they are built, and read from an exact position."""

from megatron_ultramem.training.data.checks import check_data
from megatron_ultramem.training.data.datasets import Datasets, SampleCounts, build_datasets, sample_counts
from megatron_ultramem.training.data.iterator import BatchIterator

__all__ = ["BatchIterator", "Datasets", "SampleCounts", "build_datasets", "check_data", "sample_counts"]
