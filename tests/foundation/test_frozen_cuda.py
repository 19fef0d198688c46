"""The arithmetic of the packed GPU encoder, on a CPU in float32; test_gpu.py runs it where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scdlkit.foundation import frozen_cuda
from scdlkit.foundation.batching import collate, pack
from scdlkit.foundation.frozen_cuda import CUDAEncoder
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder


@pytest.fixture(autouse=True)
def _attention(monkeypatch):
    """Attention of one cell after another, as no CPU has the kernel."""

    def attend(q, k, v, query_starts, key_starts, most_queries, most_keys):
        assert query_starts.dtype == key_starts.dtype == torch.int32
        assert most_queries == query_starts.diff().max() and most_keys == key_starts.diff().max()
        parts = []
        for i in range(len(key_starts) - 1):
            queries, keys = slice(*query_starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
            heads = (part.transpose(0, 1)[None] for part in (q[queries], k[keys], v[keys]))
            parts.append(F.scaled_dot_product_attention(*heads)[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(frozen_cuda, "_flash_kernel", lambda: attend)


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
    found = fast(fast.batch(cells, ids["cls_id"]))
    with torch.inference_mode():
        expected = encoder.cls(*collate(cells, **ids, pad_value=-2))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    alike = cells[np.flatnonzero(cells.lengths == np.bincount(cells.lengths).argmax())]
    assert alike.n_cells > 1
    of_one_length = fast(fast.batch(alike, ids["cls_id"]))
    with torch.inference_mode():
        expected = encoder.cls(*collate(alike, **ids, pad_value=-2))
    torch.testing.assert_close(of_one_length, expected, rtol=1e-4, atol=1e-5)
    one = fast(fast.batch(cells[np.array([7])], ids["cls_id"]))
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
