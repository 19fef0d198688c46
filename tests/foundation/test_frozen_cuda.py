"""The arithmetic of the packed GPU encoder, on a CPU in float32; test_gpu.py runs it where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scdlkit.foundation import _packed, frozen_cuda
from scdlkit.foundation.batching import collate, collate_packed, pack
from scdlkit.foundation.frozen_cuda import CUDAEncoder
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder


@pytest.fixture(autouse=True)
def _attention(monkeypatch, fits):
    monkeypatch.setattr(_packed, "_flash_kernel", lambda: fits.attend_by_cell)


def test_it_is_the_encoder(fits):
    cells = fits.cells(30, fits.Source(dropout=0.0)).tokens
    config = ScGPTConfig(fits.N_GENES + 2, embsize=32, nheads=4, d_hid=48, nlayers=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ScGPTEncoder(config).eval()
        for value in encoder.parameters():  # biases and norms that are not 0 and 1
            value.data += 0.2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    ids = {"cls_id": fits.N_GENES, "pad_id": fits.N_GENES + 1}
    fast = CUDAEncoder(encoder, torch.float32)
    how = {"cls_id": ids["cls_id"], "pad_value": -2, "usual": int(cells.lengths.max())}
    found = fast(collate_packed(cells, **how))
    with torch.inference_mode():
        expected = encoder.cls(*collate(cells, **ids, pad_value=-2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    alike = cells[np.flatnonzero(cells.lengths == np.bincount(cells.lengths).argmax())]
    assert alike.n_cells > 1
    of_one_length, again = (
        fast(collate_packed(alike, **{**how, "usual": usual})) for usual in (int(alike.lengths[0]), 0)
    )
    with torch.inference_mode():
        expected = encoder.cls(*collate(alike, **ids, pad_value=-2))
    for one in (of_one_length, again):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    one = fast(collate_packed(cells[np.array([7])], **how))
    torch.testing.assert_close(one[0], found[7], rtol=1e-5, atol=1e-6)


def test_packed(fits):
    cells = fits.cells(4, fits.Source(dropout=0.0)).tokens
    gene_ids, values, starts = pack(cells, cls_id=99, pad_value=-2)
    for i in range(4):
        part = slice(starts[i], starts[i + 1])
        inside = slice(cells.indptr[i], cells.indptr[i + 1])
        assert gene_ids[part].tolist() == [99, *cells.gene_ids[inside]]
        assert values[part].tolist() == [-2, *cells.bins[inside]]
    assert starts[-1] == len(gene_ids) == len(values)


def test_only_on_a_gpu_in_half_precision(fits):
    encoder = fits.Source(dropout=0.0).encoder()
    assert not frozen_cuda.can_run_packed(encoder, "fp16")


def test_states_beyond_float16_are_computed_again(fits, monkeypatch, caplog):
    from scdlkit.foundation import inference

    source = fits.Source(dropout=0.0)
    tokens = fits.cells(20, source).tokens
    ids = {"cls_id": source.cls_id, "pad_id": source.pad_id}
    expected = inference.embed_tokens(source.encoder(), tokens, **ids, device="cpu", precision="fp32", progress=False)
    frozen = inference._packed

    def overflowing(*args, precision, **options):
        for cells, output in frozen(*args, precision="fp32", **options):
            if precision == "fp16":
                output = np.array(output)
                output[cells == 3] = float("inf")
            yield cells, output

    monkeypatch.setattr(inference, "_packed", overflowing)
    monkeypatch.setattr(inference, "embedding_precision", lambda precision, device: precision)
    found = inference.embed_tokens(source.encoder(), tokens, **ids, device="cpu", precision="fp16", progress=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "1 cells have states beyond float16" in caplog.text
