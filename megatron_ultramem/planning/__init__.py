"""What a model costs before it is built: parameters, FLOPs, device peaks. Nothing here imports torch."""
