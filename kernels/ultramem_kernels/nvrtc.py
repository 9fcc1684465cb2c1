"""CUDA C++ compiled at first use by NVRTC, the compiler library that comes with PyTorch: no nvcc, no headers, no build.

`Module(source, defines, device)` holds one compiled source; `launch` runs one of its kernels on the current stream.
Machine code is cached on disk by a hash of the source, the options, the GPU and the compiler's version.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """NVRTC or the driver refused something; the message carries their own."""


@lru_cache(maxsize=1)
def load_compiler() -> ctypes.CDLL:
    """The NVRTC that belongs to this PyTorch."""
    major = (torch.version.cuda or "0").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    for pattern in (f"cu{major}/lib/libnvrtc.so.{major}*", f"cuda_nvrtc/lib/libnvrtc.so.{major}*"):
        names += sorted(glob.glob(str(packages / pattern)))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(f"no NVRTC found for CUDA {torch.version.cuda}; tried {', '.join(names)}")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise BuildError(f"{what}: CUDA error {code} ({(text.value or b'unknown').decode()})")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/ultramem_kernels, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "ultramem_kernels"


def compile_source(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code (cubin) of a source, from the cache or freshly compiled."""
    nvrtc = load_compiler()
    version = (ctypes.c_int * 2)()
    nvrtc.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    name = hashlib.sha256("\0".join((source, *options, f"{version[0]}.{version[1]}")).encode()).hexdigest()
    path = cache_folder() / f"{name}.cubin"
    if path.exists():
        return path.read_bytes()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"ultramem_kernels.cu", 0, None, None)
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    if code:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BuildError(f"NVRTC error {code} with {' '.join(options)}:\n{log.value.decode()}")
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    try:  # a cache that cannot be written costs a compilation, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin.raw)
        os.replace(file.name, path)  # atomic: ranks that compile at the same time never read half a file
    except OSError:
        pass
    return cubin.raw


class Module:
    """One compiled source on one device."""

    def __init__(self, source: str, defines: dict[str, object], device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        options = [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        torch.cuda.current_stream(device)  # the primary context exists from here on
        self._module = ctypes.c_void_p()
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._image = compile_source(source, tuple(options))
        with torch.cuda.device(device):
            torch.cuda.synchronize(device) if not torch.cuda.is_current_stream_capturing() else None
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), self._image), "loading a compiled kernel")

    def launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: object) -> None:
        """Runs kernel `name`. Tensors (or None) go as pointers; ints as (ctype, value) pairs or as C ints."""
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = ctypes.c_void_p()
            code = _driver().cuModuleGetFunction(ctypes.byref(kernel), self._module, name.encode())
            _check(code, f"finding kernel {name}")
            self._kernels[name] = kernel
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = _driver().cuLaunchKernel(kernel, grid[0], grid[1], 1, threads, 1, 1, 0, stream, pointers, None)
        if code:
            _check(code, f"launching kernel {name} on a grid of {grid}")


def long(value: int) -> ctypes.c_longlong:
    """An argument of C type long long."""
    return ctypes.c_longlong(value)


def _c_value(argument: object) -> ctypes._SimpleCData:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    raise TypeError(f"a kernel argument of type {type(argument).__name__}")
