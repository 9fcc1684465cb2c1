"""Runs the package's CUDA sources on the CPU: compiled by g++ with simt.h, the few functions of inline PTX replaced.

`emulated` stands in for `nvrtc.Module`, so that the launchers under test compute their own grids and arguments.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

COMPILER = shutil.which("g++")
# What the functions made of PTX instructions mean in C++ (bf16 only).
PLAIN = {
    "pack": "return (unsigned)round_to_bf16(low) | (unsigned)round_to_bf16(high) << 16;",
    "load_row": "return *(const uint4*)from;",
    "load_stream": "return *(const float4*)from;",
    "store_stream": "*(float4*)to = v;",
    "narrow": "\n#if WIDE\nreturn x;\n#else\nreturn round_to_bf16(x);\n#endif\n",
}


def _with_plain_functions(source: str) -> str:
    for name, body in PLAIN.items():
        match = re.search(rf"__device__ __forceinline__ [^\n]*\b{name}\([^{{]*\{{", source)
        if match is None:
            continue
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        source = source[: match.end()] + body + source[end - 1 :]
    source = re.sub(r'asm volatile\("ld\.global\.nc\.L2::cache_hint[^\n]*\n', "v = *(const uint2*)from;\n", source)
    source = re.sub(r'asm volatile\("createpolicy[^\n]*\n', "keep = 0;\n", source)
    return re.sub(r"#pragma unroll[^\n]*", "", source)


class Emulated:
    """As nvrtc.Module, with CPU tensors."""

    folder: Path  # where libraries are built; set by the test

    def __init__(self, source: str, defines: dict[str, object], device: torch.device) -> None:
        source = _with_plain_functions(source)
        self._parameters: dict[str, list[str]] = {}
        entries = ""
        for name, text in re.findall(r'extern "C" __global__[^\n]*\n(\w+)\(([^)]*)\)', source):
            parameters = [part.strip() for part in text.replace("\n", " ").split(",")]
            names = ", ".join(part.split()[-1].lstrip("*") for part in parameters)
            self._parameters[name] = parameters
            entries += f'extern "C" void run_{name}(int x, int y, int t, {text}) '
            entries += f"{{ run_grid(x, y, t, [=] {{ {name}({names}); }}); }}\n"
        number = len(list(self.folder.iterdir()))
        path, library = self.folder / f"{number}.cpp", self.folder / f"{number}.so"
        header = Path(__file__).parent / "simt.h"
        path.write_text(f'#include "{header}"\n' + source.replace('extern "C" __global__', "__global__") + entries)
        options = ["-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([str(COMPILER), *options, "-o", str(library), str(path)], check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        values = []
        for parameter, value in zip(self._parameters[name], arguments, strict=True):
            if "*" in parameter:
                values.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
            elif parameter.startswith("i64"):
                values.append(value)  # the launcher must have said that it is long
                assert isinstance(value, ctypes.c_longlong), parameter
            else:
                values.append(ctypes.c_int(value))
        getattr(self._library, f"run_{name}")(*grid, threads, *values)
