"""Compiles the GPU's loops for A100, H100 and smaller GPUs, which needs Triton and no GPU; prints what each kernel takes there.

A process of its own, because a process interprets either all kernels of Triton or none.
"""

from __future__ import annotations

import importlib
import json
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
WARP = 32
# compute capability, half precision and width: scGPT's, one that is no power of two, and a wide one
CASES = (80, torch.bfloat16, 512), (90, torch.float16, 512), (90, torch.bfloat16, 96), (86, torch.bfloat16, 4096)


class Compiler:
    """Stands where a kernel is: compiles it for the arguments it is asked to run on."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.kernel, self.target = kernel, target

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **options: Any) -> None:
        given = dict(zip(self.kernel.arg_names, args, strict=False))
        given.update((name, options.pop(name)) for name in self.kernel.arg_names if name in options)
        types, constants, attributes = {}, {}, {}
        for parameter in self.kernel.params:
            value, at = given[parameter.name], (parameter.num,)
            if parameter.is_constexpr:
                types[parameter.name], constants[at] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[parameter.name], attributes[at] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                types[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(self.kernel, types, constants, attributes)
        found = triton.compile(source, target=self.target, options=options)
        line = {
            "kernel": self.kernel.__name__,
            "capability": self.target.arch,
            "half": types[self.kernel.arg_names[0]],
            "width": given["WIDTH"],
            "shared": found.metadata.shared,
            "cubin": len(found.asm["cubin"]),
        }
        print(json.dumps(line), flush=True)


def call(dtype: torch.dtype, width: int) -> None:
    """Every loop once."""
    x, one, seed = torch.zeros(64, width, dtype=dtype), torch.ones(width), torch.ones((), dtype=torch.int32)
    loops.add_and_norm(x, x, one, one, one, 1e-5, seed, 0.1)
    loops.add_and_norm(x, x, None, one, one, 1e-5, seed, 0.1)
    loops.add_and_norm_back(x, x, one, 1e-5, seed, 0.1)
    loops.relu_dropout(x, one, seed, 0.1)
    loops.relu_dropout_back(x, x, 0.1)
    loops.dropout(x, seed, 0.1)
    loops.side_by_side([x, x, x])
    layer_norm.layer_norm_(x, one, one, 1e-5)


if __name__ == "__main__":
    loops, layer_norm = (
        importlib.import_module(f"scdlkit.foundation.{name}") for name in ("_block_triton", "_layer_norm_triton")
    )
    launched = {
        loops: (
            "_add_and_norm",
            "_add_and_norm_back",
            "_relu_dropout",
            "_relu_dropout_back",
            "_dropped",
            "_side_by_side",
        ),
        layer_norm: ("_normalise",),
    }
    for capability, dtype, width in CASES:
        target = GPUTarget("cuda", capability, WARP)
        with patch("torch.cuda.device_of", nullcontext), patch("torch.cuda.device", nullcontext):
            for module, names in launched.items():
                for name in names:
                    patch.object(module, name, Compiler(getattr(module, name), target)).start()
            call(dtype, width)
            patch.stopall()
