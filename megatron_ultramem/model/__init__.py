"""The transformer: Megatron's GPT model with memory layers, built per pipeline stage."""
