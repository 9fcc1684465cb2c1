"""CUDA C++ compiled at first use by NVRTC, the compiler library that comes with PyTorch: no nvcc, no headers, no build.

`Module(source, defines, device)` holds one compiled source; its `kernel(name, signature)` runs on the current stream.
Machine code is cached on disk by a hash of the source, the options, the GPU and the compiler's version.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import os
import struct
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from ultramem_kernels.settings import settings

NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
# Names in the sources.
C_TYPES = {
    torch.int32: "int",
    torch.int64: "i64",
    torch.float32: "float",
    torch.bfloat16: "half_t",
    torch.float16: "half_t",
}


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


def compile_source(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code (cubin) of a source, from the cache or freshly compiled."""
    nvrtc = load_compiler()
    version = (ctypes.c_int * 2)()
    nvrtc.nvrtcVersion(ctypes.byref(version, 0), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    name = hashlib.sha256("\0".join((source, *options, f"{version[0]}.{version[1]}")).encode()).hexdigest()
    path = settings.folder() / f"{name}.cubin"
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


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def device_supported(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 8.0 or higher."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def pointer(tensor: torch.Tensor | None) -> int:
    """Its address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def read_source(*paths: Path) -> str:
    """Texts of the files, with halves.cuh in front."""
    return "\n".join(path.read_text() for path in (Path(__file__).parent / "halves.cuh", *paths))


class Kernel:
    """One kernel of a compiled source, ready to run.

    `kernel(grid, threads, *arguments)` launches it on the current stream of its device; grid is (x, y). Arguments go by
    the kernel's signature, one letter each as in `struct`: P pointer (an address, 0 for none), i int, q long long,
    f float.
    """

    __slots__ = ("_device", "_function", "_launch", "_name", "_pack", "_size", "_size_at")

    def __init__(self, function: ctypes.c_void_p, name: str, signature: str, device: int) -> None:
        packer = struct.Struct("@" + signature)
        self._function, self._name, self._device, self._pack = function, name, device, packer.pack
        self._size = ctypes.c_size_t(packer.size)
        self._size_at = ctypes.addressof(self._size)
        self._launch = _launcher()

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: float) -> None:
        if torch._C._cuda_getDevice() != self._device:
            with torch.cuda.device(self._device):
                self(grid, threads, *arguments)
            return
        packed = _Arguments(1, self._pack(*arguments), 2, self._size_at, None)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        arguments_at = ctypes.byref(packed)
        code = self._launch(self._function, grid[0], grid[1], 1, threads, 1, 1, 0, stream, None, arguments_at)
        if (
            code == NO_CONTEXT
        ):  # the first use of the GPU in this thread (autograd has its own): the runtime makes it current
            torch.cuda.set_device(self._device)
            code = self._launch(self._function, grid[0], grid[1], 1, threads, 1, 1, 0, stream, None, arguments_at)
        if code:
            _check(code, f"launching kernel {self._name} on a grid of {grid}")


class _Arguments(ctypes.Structure):
    """CU_LAUNCH_PARAM_BUFFER_POINTER, buffer, CU_LAUNCH_PARAM_BUFFER_SIZE, address of its size, CU_LAUNCH_PARAM_END."""

    _fields_ = [("_1", ctypes.c_void_p), ("buffer", ctypes.c_char_p), ("_2", ctypes.c_void_p),
                ("size", ctypes.c_void_p), ("_0", ctypes.c_void_p)]  # fmt: skip


@lru_cache(maxsize=1)
def _launcher() -> Any:
    launch = _driver().cuLaunchKernel
    sizes = [ctypes.c_uint] * 7
    launch.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_Arguments)]
    return launch


class Module:
    """One compiled source on one device."""

    def __init__(self, source: str, defines: dict[str, object], device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        options = [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17"]
        options += [f"-D{name}={value}" for name, value in defines.items()]
        torch.cuda.current_stream(device)  # the primary context exists from here on
        self._module = ctypes.c_void_p()
        self._device = torch.cuda.current_device() if device.index is None else device.index
        self._image = compile_source(source, tuple(options))
        with torch.cuda.device(device):
            torch.cuda.synchronize(device) if not torch.cuda.is_current_stream_capturing() else None
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), self._image), "loading a compiled kernel")

    def kernel(self, name: str, signature: str) -> Kernel:
        """The kernel `name`; `signature` as in `Kernel`."""
        function = ctypes.c_void_p()
        code = _driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode())
        _check(code, f"finding kernel {name}")
        return Kernel(function, name, signature, self._device)
