"""The model as `transformers` loads it: files that are copied into a checkpoint folder and run from there.

They import torch, transformers and one another, relatively, and nothing else of this repository: whoever has the folder
needs no more. Importing this package imports none of them.
"""

import shutil
from pathlib import Path

FORMAT_VERSION = 1  # of config.json; `configuration_ultramem.py`, which travels alone, has it too
MODEL_FILES = (
    "configuration_ultramem.py",
    "modeling_ultramem.py",
    "ultramem_blocks.py",
    "ultramem_common.py",
    "ultramem_experts.py",
    "ultramem_lookup.py",
    "ultramem_memory.py",
    "ultramem_product_keys.py",
    "ultramem_retrieval.py",
)
# `auto_map` of config.json: where the Auto classes find the code.
AUTO_MAP = {
    "AutoConfig": "configuration_ultramem.UltraMemConfig",
    "AutoModel": "modeling_ultramem.UltraMemModel",
    "AutoModelForCausalLM": "modeling_ultramem.UltraMemForCausalLM",
}


def copy_model_files(folder: Path) -> None:
    """Puts the code into a checkpoint folder."""
    for name in MODEL_FILES:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
