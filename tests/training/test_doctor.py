"""The doctor on this machine, and on made-up installations that a fresh interpreter really looks at."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_ultramem.doctor import ABSENT, MEGATRON, OK, PROBLEM, collect, import_error, render, summarise_links

TOPOLOGY = """\
\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\t{link}\tNV18\tSYS\t0-31\t0
GPU1\tNV18\t X \tNV18\tNV18\tSYS\t0-31\t0
GPU2\t{link}\tNV18\t X \tNV18\tSYS\t0-31\t0
GPU3\tNV18\tNV18\tNV18\t X \tSYS\t0-31\t0
NIC0\tSYS\tSYS\tSYS\tSYS\t X \t\t

Legend:
  X    = Self
"""


def named(findings, name):
    return next(finding for finding in findings if finding.name == name)


def in_fresh_interpreter(folder) -> dict[str, dict]:
    """Findings, by name, of an interpreter that finds the packages in `folder` first."""
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from megatron_ultramem.cli import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    path = ":".join([str(folder), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_versions_of_what_runs_here_are_reported():
    findings = collect()
    assert named(findings, "PyTorch").found == torch.__version__
    assert named(findings, "Megatron-Core").status == OK
    assert named(findings, "Python").found == sys.version.split()[0]
    assert "GiB" in named(findings, "RAM").found


@pytest.mark.parametrize(
    ("version", "status"), [("0.15.0", PROBLEM), ("0.16.1", OK), ("0.19.2", OK), ("0.20.0", PROBLEM)]
)
def test_versions_of_megatron_are_judged_as_the_package_requires_them(tmp_path, monkeypatch, version, status):
    required = re.search(r'"megatron-core(.*)"', (Path(__file__).parents[2] / "setup.py").read_text())
    assert required is not None and required[1] == MEGATRON
    metadata = tmp_path / f"megatron_core-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = named(collect(), "Megatron-Core")
    assert (found.found, found.status) == (version, status)
    assert (MEGATRON in found.effect) == (status == PROBLEM)


def test_everything_looked_for_is_reported_with_what_it_changes():
    findings = collect()
    names = {finding.name for finding in findings}
    assert {"CUDA", "Transformer Engine", "Apex (NVIDIA)", "Triton", "DeepSpeed", "FlashAttention", "tokenizers",
            "SentencePiece", "tiktoken", "Weights & Biases", "CPU"} <= names  # fmt: skip
    assert all(finding.status in (OK, ABSENT, PROBLEM) and finding.found and finding.effect for finding in findings)


def test_the_table_shows_every_finding():
    findings = collect()
    out = io.StringIO()
    render(findings, Console(file=out, width=400))
    for finding in findings:
        assert finding.name in out.getvalue() and finding.found in out.getvalue()


def test_broken_and_wrong_packages_are_told_from_missing_ones(tmp_path):
    engine = tmp_path / "transformer_engine"
    engine.mkdir()
    (engine / "__init__.py").write_text("")
    (engine / "pytorch.py").write_text("raise ImportError('libcudnn.so.9: cannot open shared object file')")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    found = in_fresh_interpreter(tmp_path)
    assert found["Transformer Engine"]["status"] == PROBLEM
    assert "does not import: ImportError: libcudnn.so.9: cannot open shared" in found["Transformer Engine"]["found"]
    assert found["Apex (NVIDIA)"]["status"] == PROBLEM
    assert "another project" in found["Apex (NVIDIA)"]["effect"]


def test_nvidias_apex_is_known_by_its_compiled_extensions(tmp_path):
    (tmp_path / "amp_C.py").write_text("")
    found = in_fresh_interpreter(tmp_path)
    assert found["Apex (NVIDIA)"]["status"] == OK
    assert "amp_C" in found["Apex (NVIDIA)"]["found"]


def test_a_torch_that_does_not_import_is_reported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cuda.so: undefined symbol')")
    found = in_fresh_interpreter(tmp_path)
    assert found["PyTorch"]["status"] == PROBLEM
    assert "undefined symbol" in found["PyTorch"]["found"]


@pytest.mark.parametrize(
    ("link", "status", "text"), [("NV18", OK, "NVLink: NV18 x 6 pairs"), ("SYS", OK, "NV18 x 5 pairs, SYS x 1 pairs")]
)
def test_links_are_counted_once_for_each_pair(link, status, text):
    finding = summarise_links("GPUs", TOPOLOGY.format(link=link))
    assert (finding.status, finding.found) == (status, text)


def test_import_error_of_a_fresh_interpreter():
    assert import_error("json") is None
    assert import_error("no_such_module_anywhere") == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"


@pytest.mark.gpu
def test_gpus_are_listed_with_memory_and_capability():
    gpu = named(collect(), "GPU 0")
    assert torch.cuda.get_device_name(0) in gpu.found and "compute capability" in gpu.found
