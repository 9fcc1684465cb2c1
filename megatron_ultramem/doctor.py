"""`ultramem doctor`: what this machine has, and what each finding changes for the user.

Packages are looked up by their metadata and files, without importing them. Torch is imported, because only it knows
its CUDA; Transformer Engine is imported in a process of its own, because an installation that does not fit the torch
beside it is found by its metadata and then fails when training starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as python_platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

OK, ABSENT, PROBLEM = "ok", "absent", "problem"
MEGATRON = ">=0.16.1,<0.20"  # versions of Megatron-Core, as in setup.py


@dataclass(frozen=True)
class Finding:
    """One thing looked for. `status` is ok, absent (optional and not there) or problem (needs attention)."""

    group: str
    name: str
    status: str
    found: str
    effect: str


def collect() -> list[Finding]:
    """All findings of this machine, in the order in which they are shown. Starts no process group, allocates nothing
    on a GPU, and does not raise for anything that is missing or broken."""
    return [*_software(), *_optional_packages(), *_gpus(), *_host()]


def render(findings: list[Finding], console: Console | None = None) -> None:
    """Prints a table: name, what was found, what it changes."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("What", no_wrap=True)
    table.add_column("Found", overflow="fold", ratio=2)
    table.add_column("What it changes", overflow="fold", ratio=3)
    marks = {OK: Text("✓", "green"), ABSENT: Text("–", "dim"), PROBLEM: Text("✗", "bold red")}
    group = ""
    for finding in findings:
        if finding.group != group:
            if group:
                table.add_row()
            group = finding.group
            table.add_row("", Text(group, "bold cyan"))
        found = Text(finding.found, {OK: "", ABSENT: "dim", PROBLEM: "red"}[finding.status])
        table.add_row(marks[finding.status], Text(finding.name), found, Text(finding.effect))
    (console or Console()).print(table)


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _software() -> list[Finding]:
    group = "Software"
    findings = [Finding(group, "Python", OK, python_platform.python_version(), sys.executable)]
    try:
        import torch
    except Exception as error:  # a broken torch raises whatever its libraries raise
        why = "not installed" if not _importable("torch") else f"does not import: {first_line(error)}"
        return [*findings, Finding(group, "PyTorch", PROBLEM, why, "nothing runs without it")]
    findings.append(Finding(group, "PyTorch", OK, torch.__version__, "runs everything"))
    cuda = torch.version.cuda
    if cuda is None:
        findings.append(Finding(group, "CUDA", ABSENT, "torch is built without CUDA", "training runs on CPU with gloo"))
    elif not torch.cuda.is_available():
        effect = "training runs on CPU with gloo; on a machine with a GPU, check its driver with nvidia-smi"
        findings.append(Finding(group, "CUDA", PROBLEM, f"{cuda}, but no usable GPU", effect))
    else:
        findings.append(Finding(group, "CUDA", OK, cuda, "training runs on the GPUs"))
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
        effect = "collectives between GPUs" if nccl else "no training on more than one GPU"
        findings.append(Finding(group, "NCCL", OK if nccl else PROBLEM, nccl or "not in this torch", effect))
        findings.append(_cudnn(group))
    return [*findings, _megatron(group)]


def _megatron(group: str) -> Finding:
    version = version_of("megatron-core")
    if version is None:
        effect = f"`ultramem train` and `generate` do not run; supported: {MEGATRON}"
        return Finding(group, "Megatron-Core", PROBLEM, "not installed", effect)
    if version not in SpecifierSet(MEGATRON):
        return Finding(group, "Megatron-Core", PROBLEM, version, f"training may fail; supported: {MEGATRON}")
    return Finding(group, "Megatron-Core", OK, version, "layers, parallelism, optimizer, checkpoints")


# (name shown, distribution, module, with it, without it)
_PACKAGES = (
    (
        "Triton",
        "triton",
        "triton",
        "on a GPU: fused kernels of the memory layers (model.memory.kernels), torch.compile",
        "memory layers run in plain PyTorch (model.memory.kernels=reference): slower on a GPU, same results",
    ),
    (
        "DeepSpeed",
        "deepspeed",
        "deepspeed",
        "nothing: no setting of this version uses it",
        "nothing: no setting of this version uses it",
    ),
    (
        "FlashAttention",
        "flash-attn",
        "flash_attn",
        "Transformer Engine may choose it for attention",
        "attention uses cuDNN's or PyTorch's kernels; nothing is lost",
    ),
    (
        "tokenizers",
        "tokenizers",
        "tokenizers",
        "data.tokenizer.kind=huggingface works",
        "data.tokenizer.kind=huggingface is refused",
    ),
    (
        "SentencePiece",
        "sentencepiece",
        "sentencepiece",
        "data.tokenizer.kind=sentencepiece works",
        "data.tokenizer.kind=sentencepiece is refused",
    ),
    (
        "tiktoken",
        "tiktoken",
        "tiktoken",
        "data.tokenizer.kind=tiktoken works",
        "data.tokenizer.kind=tiktoken is refused",
    ),
    (
        "TensorBoard",
        "tensorboard",
        "tensorboard",
        "logging.tensorboard=true works",
        "set logging.tensorboard=false; metrics.jsonl is written all the same",
    ),
    (
        "Weights & Biases",
        "wandb",
        "wandb",
        "logging.wandb_mode=offline or online works",
        "logging.wandb_mode must stay disabled",
    ),
    (
        "Prometheus",
        "prometheus-client",
        "prometheus_client",
        "logging.prometheus_port works",
        "logging.prometheus_port must stay null",
    ),
    (
        "NVML",
        "nvidia-ml-py",
        "pynvml",
        "`ultramem preflight` reads memory errors, throttling and temperature of GPUs",
        "`ultramem preflight` measures GPUs, but does not read their error counters",
    ),
)


def _cudnn(group: str) -> Finding:
    import torch

    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:  # two cuDNNs on one machine: what was loaded is not what torch was built with
        return Finding(group, "cuDNN", PROBLEM, str(error).split(". ")[0], "attention may fail: see LD_LIBRARY_PATH")
    effect = "fused attention of Transformer Engine" if version else "Transformer Engine lacks its fused attention"
    return Finding(group, "cuDNN", OK if version else ABSENT, str(version or "not found"), effect)


def _optional_packages() -> list[Finding]:
    group = "Optional packages"
    findings = [_transformer_engine(group), _apex(group)]
    for name, distribution, module, present, absent in _PACKAGES:
        version = version_of(distribution)
        if version is None and not _importable(module):
            findings.append(Finding(group, name, ABSENT, "not found", absent))
        else:
            findings.append(Finding(group, name, OK, version or "found, version unknown", present))
    return findings


def _transformer_engine(group: str) -> Finding:
    name = "Transformer Engine"
    if not _importable("transformer_engine"):
        effect = "local layers (model.backend=local): no FP8, no fused norms, no grouped GEMM, no context parallel"
        return Finding(group, name, ABSENT, "not found", effect)
    version = version_of("transformer-engine") or "version unknown"
    error = import_error("transformer_engine.pytorch")
    if error is not None:
        effect = "unusable until it imports; set model.backend=local, or install the build that fits this torch"
        return Finding(group, name, PROBLEM, f"{version}, does not import: {error}", effect)
    return Finding(group, name, OK, version, "model.backend=transformer_engine: fused norms, grouped GEMM, FP8, CP")


def import_error(module: str) -> str | None:
    """None if a fresh interpreter can import `module`, else the last line of what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_line(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the interpreter ended with status {done.returncode}"


# Compiled extensions of NVIDIA's Apex, each built only when it is asked for.
_APEX_EXTENSIONS = (
    ("amp_C", "fused clipping and Adam helpers"),
    ("fused_weight_gradient_mlp_cuda", "gradient accumulation inside the weight-gradient GEMM"),
    ("fused_layer_norm_cuda", "fused LayerNorm of the local backend"),
)


def _apex(group: str) -> Finding:
    """NVIDIA's Apex is known by its compiled extensions: the registry's package of that name is another project."""
    built = [(module, use) for module, use in _APEX_EXTENSIONS if _importable(module)]
    if built:
        found = f"{version_of('apex') or 'version unknown'} with " + ", ".join(module for module, _ in built)
        return Finding(group, "Apex (NVIDIA)", OK, found, "; ".join(use for _, use in built))
    effect = "PyTorch's optimizer kernels and no fused gradient accumulation: slower, same results"
    if _importable("apex"):
        return Finding(
            group,
            "Apex (NVIDIA)",
            PROBLEM,
            f"a package apex {version_of('apex') or ''} without NVIDIA's compiled extensions".replace("  ", " "),
            f"{effect}. The package apex of the registry is another project, and may break imports that look for "
            "NVIDIA's: uninstall it, and build NVIDIA's from its source",
        )
    return Finding(group, "Apex (NVIDIA)", ABSENT, "not found", effect)


def _gpus() -> list[Finding]:
    group = "GPUs"
    try:
        import torch

        from megatron_ultramem.planning.devices import peak_bf16_flops

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    except Exception as error:
        return [Finding(group, "GPUs", PROBLEM, f"cannot be read: {first_line(error)}", "training runs on CPU")]
    if not properties:
        return [Finding(group, "GPUs", ABSENT, "none", "CPU with gloo: for tests and the quickstart")]
    findings = []
    for index, gpu in enumerate(properties):
        peak = peak_bf16_flops(gpu.name)
        notes = [f"bf16 peak {peak / 1e12:.0f} TFLOP/s: MFU is shown" if peak else "peak unknown: no MFU"]
        if (gpu.major, gpu.minor) < (8, 0):
            notes.append("no native bf16: set train.precision=fp32")
        elif (gpu.major, gpu.minor) < (8, 9):
            notes.append("no FP8")
        found = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        findings.append(Finding(group, f"GPU {index}", OK, found, "; ".join(notes)))
    if len(properties) > 1:
        findings.append(_links(group))
    return findings


def _links(group: str) -> Finding:
    """How the GPUs of this host reach each other, as `nvidia-smi topo -m` tells."""
    matrix = _output_of("nvidia-smi", "topo", "-m")
    if matrix is None:
        return Finding(group, "Links", ABSENT, "unknown (nvidia-smi did not tell)", "bandwidth between GPUs is unknown")
    return summarise_links(group, matrix)


def summarise_links(group: str, matrix: str) -> Finding:
    """From the text of `nvidia-smi topo -m`: the kinds of links between different GPUs, each with how many pairs."""
    kinds: dict[str, int] = {}
    rows = [line.split() for line in matrix.splitlines() if line.startswith("GPU")]
    for row, cells in enumerate(rows):
        # The upper triangle: each pair once. Columns after the GPUs are network cards and affinities.
        for cell in cells[2 + row : 1 + len(rows)]:
            kinds[cell] = kinds.get(cell, 0) + 1
    found = ", ".join(f"{kind} x {pairs} pairs" for kind, pairs in sorted(kinds.items())) or "none"
    if kinds and all(kind.startswith("NV") for kind in kinds):
        return Finding(group, "Links", OK, f"NVLink: {found}", "TP, EP and memory-parallel within the host are fast")
    effect = "not every pair has NVLink: prefer DP and PP, and keep TP within linked pairs"
    return Finding(group, "Links", OK, found, effect)


def _host() -> list[Finding]:
    group = "Host"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding(group, "CPU", OK, f"{cores} cores usable", "ranks on CPU, preprocessing and data workers")]
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings.append(Finding(group, "RAM", OK, f"{ram:.0f} GiB", "models on CPU, checkpoints on their way to disk"))
    return findings


def _output_of(*command: str) -> str | None:
    """What a command prints; None when it is missing, fails, or takes more than 20 seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
