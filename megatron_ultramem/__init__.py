"""Pretraining of UltraMemV2 sparse-memory language models on Megatron-Core."""

__version__ = "0.1.0"
