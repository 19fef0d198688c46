"""The GPU's loops compile for A100, H100 and smaller GPUs, which needs no GPU: what Triton interprets may not be what it can compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

# bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}


def test_loops_compile(tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which comes with PyTorch for CUDA")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1")
    command = [sys.executable, Path(__file__).with_name("compile_loops.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = defaultdict(set)
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["cubin"] > 0
        assert line["shared"] <= SHARED[line["capability"]]
        compiled[line["kernel"]].add((line["capability"], line["half"], line["width"]))
    kernels = "add_and_norm add_and_norm_back relu_dropout relu_dropout_back dropped side_by_side normalise".split()
    assert compiled == dict.fromkeys(
        (f"_{name}" for name in kernels),
        {(80, "*bf16", 512), (90, "*fp16", 512), (90, "*bf16", 96), (86, "*bf16", 4096)},
    )
