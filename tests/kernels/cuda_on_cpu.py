"""Runs the package's CUDA sources on the CPU: compiled by g++ with simt.h, the few functions of inline PTX replaced.

`emulated` stands in for `nvrtc.Module`, so that the launchers under test compute their own grids and arguments.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

COMPILER = shutil.which("g++")
C_TYPES = {"P": ctypes.c_void_p, "q": ctypes.c_longlong, "i": ctypes.c_int, "f": ctypes.c_float}
# What the functions made of PTX instructions mean in C++ (bf16 only).
PLAIN = {
    "pack": "return (unsigned)round_to_bf16(low) | (unsigned)round_to_bf16(high) << 16;",
    "copy16": "*to = real ? *(const uint4*)from : make_uint4(0, 0, 0, 0);",
    "copy4": "*to = real ? *from : 0.0f;",
    "copy8": "to[0] = real ? from[0] : 0.0f, to[1] = real ? from[1] : 0.0f;",
    "end_of_stage": "",
    "await_oldest_stage": "",
    "keep_policy": "return 0;",
    "load_kept": "return *(const uint2*)from;",
    "load_stream": "return *(const float4*)from;",
    "store_stream": "*(float4*)to = v;",
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
            entries += f'extern "C" void run_{name}(int grid_x, int grid_y, int block, {text}) '
            entries += f"{{ run_grid(grid_x, grid_y, block, [=] {{ {name}({names}); }}); }}\n"
        number = len(list(self.folder.iterdir()))
        path, library = self.folder / f"{number}.cpp", self.folder / f"{number}.so"
        header = Path(__file__).parent / "simt.h"
        path.write_text(f'#include "{header}"\n' + source.replace('extern "C" __global__', "__global__") + entries)
        options = ["-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([str(COMPILER), *options, "-o", str(library), str(path)], check=True)
        self._library = ctypes.CDLL(str(library))

    def kernel(self, name: str, signature: str) -> Callable[..., None]:
        """As nvrtc.Module; the signature must be that of the source."""
        first_words = [p.split()[0] for p in self._parameters[name]]
        letters = "".join(
            "P" if "*" in p else {"i64": "q", "int": "i", "float": "f"}[word]
            for p, word in zip(self._parameters[name], first_words, strict=True)
        )
        assert signature == letters, f"{name} takes {letters}"
        types = [C_TYPES[letter] for letter in letters]
        function = getattr(self._library, f"run_{name}")

        def run(grid: tuple[int, int], threads: int, *arguments: float) -> None:
            function(*grid, threads, *(kind(value) for kind, value in zip(types, arguments, strict=True)))

        return run
