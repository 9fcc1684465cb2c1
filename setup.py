"""Packaging: the library `megatron_ultramem` and the stand-alone kernels `ultramem_kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

setup(
    name="megatron-ultramem",
    version=VERSION,
    description="Pretraining of UltraMemV2 sparse-memory language models on Megatron-Core",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels/` is a folder, not a package: a Hugging Face package that transformers looks for is called `kernels`.
    packages=find_packages(include=["megatron_ultramem", "megatron_ultramem.*"])
    + find_packages("kernels", include=["ultramem_kernels", "ultramem_kernels.*"]),
    package_dir={"megatron_ultramem": "megatron_ultramem", "ultramem_kernels": "kernels/ultramem_kernels"},
    package_data={"": ["*.cu", "*.cuh", "*.md"]},
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "omegaconf>=2.3",
        "packaging",
        "pyyaml",
        "rich",
        "psutil",  # megatron's checkpoint writer hangs without it
        "tqdm",  # imported by megatron's datasets
        "matplotlib",
        "tensorboard",
        "regex",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.20", "triton>=3.6", "nvidia-ml-py"],
        "tokenizers": ["tokenizers", "sentencepiece", "tiktoken"],
        "hf": ["transformers>=5.4", "accelerate", "safetensors", "tokenizers"],
        "eval": ["lm_eval>=0.4.13", "transformers>=5.4", "accelerate", "safetensors", "tokenizers"],
        "wandb": ["wandb"],
        "prometheus": ["prometheus-client"],
        "deepspeed": ["deepspeed"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "triton",
            "transformers>=5.4",
            "accelerate",
            "safetensors",
            "tokenizers",
            "sentencepiece",
            "tiktoken",
            "wandb",
            "prometheus-client",
        ],
    },
    entry_points={"console_scripts": ["ultramem = megatron_ultramem.cli:main"]},
)
