"""Text generation from a checkpoint: `Generator.load(path).generate(prompts, Sampling(...))`."""

from megatron_ultramem.inference.generate import Completion, Generator
from megatron_ultramem.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling"]
