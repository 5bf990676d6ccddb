"""kernels/pair_gram.py against loops over the rows and the plain version: under the interpreter on a CPU, compiled on a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import onesided_mc  # noqa: E402
from kernels import pair_gram as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows(n, d, k, padding=0.2, seed=0):
    """cols ascending with −1 first, vals with something in the padding that must not count, weights."""
    generator = torch.Generator().manual_seed(seed)
    cols = torch.rand(n, d, generator=generator).topk(k, 1).indices
    cols = torch.where(torch.rand(n, k, generator=generator) < padding, -1, cols).sort(1).values
    return cols.to(DEVICE), torch.randn(n, k, generator=generator).to(DEVICE), torch.rand(n, generator=generator).double().to(DEVICE)


def by_hand(cols, vals, weights, d):
    table = np.zeros((3, d * d))
    for columns, values, w in zip(cols.tolist(), vals.double().tolist(), [1.0] * len(cols) if weights is None else weights.tolist()):
        shown = [(c, x) for c, x in zip(columns, values) if c >= 0]
        for i, (a, x) in enumerate(shown):
            for b, y in shown[i:]:
                table[:, a * d + b] += w * x * y, w, w * (x * y) ** 2
    return torch.from_numpy(table).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, d, k", [(1, 2, 2), (300, 7, 2), (513, 50, 3), (97, 5, 5), (40, 700, 4)])
def test_against_loops(n, d, k, weighted, dtype):
    cols, vals, weights = rows(n, d, k)
    vals, weights = vals.to(dtype), weights if weighted else None
    table = torch.ones(3, d * d, dtype=torch.float64, device=DEVICE)  # it adds: what is there stays
    kernel.pair_gram_(table, cols, vals, weights)
    torch.testing.assert_close(table - 1, by_hand(cols, vals, weights, d), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cols_dtype", [torch.int32, torch.int64])
def test_against_plain(cols_dtype):
    """The sizes have several programs, copies of the table, and a tail."""
    cols, vals, _ = rows(700, 9, 4, seed=1)
    plain, fused = torch.zeros(2, 3, 81, dtype=torch.float64, device=DEVICE)
    onesided_mc.pair_gram_(plain, cols, vals)
    kernel.pair_gram_(fused, cols.to(cols_dtype), vals)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(fused[1], plain[1]) and fused[1].sum() > 0


def test_one_copy_of_a_large_table(monkeypatch):
    cols, vals, weights = rows(600, 11, 2, seed=2)
    several, one = torch.zeros(2, 3, 121, dtype=torch.float64, device=DEVICE)
    kernel.pair_gram_(several, cols, vals, weights)
    monkeypatch.setattr(kernel, "COPIES_BYTES", 0)
    kernel.pair_gram_(one, cols, vals, weights)
    torch.testing.assert_close(one, several, rtol=1e-12, atol=1e-12)


def test_integers_and_strides():
    """Genotypes are int8, and a caller's halves are every other row."""
    cols, _, _ = rows(64, 6, 3, seed=3)
    vals = torch.randint(0, 3, (64, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int8)
    table = torch.zeros(3, 36, dtype=torch.float64, device=DEVICE)
    kernel.pair_gram_(table, cols[1::2], vals[1::2])
    assert torch.equal(table, by_hand(cols[1::2], vals[1::2], None, 6))  # integers: exact


def test_no_rows():
    table = torch.zeros(3, 9, dtype=torch.float64, device=DEVICE)
    kernel.pair_gram_(table, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, device=DEVICE))
    assert not table.any()


def test_what_it_refuses():
    cols, vals, weights = rows(8, 3, 2)
    good = dict(table=torch.zeros(3, 9, dtype=torch.float64, device=DEVICE), cols=cols, vals=vals, weights=weights)
    for name, bad, words in [("table", good["table"].float(), "table torch.float32"), ("table", good["table"][:, :8], "(3, 8)"),
                             ("table", good["table"].T.contiguous().T, "contiguous"), ("cols", cols.float(), "cols torch.float32"),
                             ("vals", vals[:, :1], "vals (8, 1)"), ("weights", weights.float(), "weights torch.float32"),
                             ("weights", weights[1:], "(7,)"), ("vals", vals.to("meta"), "devices")]:
        with pytest.raises(ValueError) as error:
            kernel.pair_gram_(**{**good, name: bad})
        assert words in str(error.value), (words, str(error.value))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_statistics_use_the_kernel():
    cols, vals, weights = rows(5000, 40, 3)
    on_gpu = onesided_mc.PairStats(40, device="cuda").update(cols, vals, weights)
    on_cpu = onesided_mc.PairStats(40).update(cols.cpu(), vals.cpu(), weights.cpu())
    torch.testing.assert_close(on_gpu.flat.cpu(), on_cpu.flat, rtol=1e-12, atol=1e-12)
