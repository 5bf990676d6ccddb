"""kernels/pair_gram.py against loops over the rows and the plain version: interpreted on a CPU, compiled on a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import onesided_mc  # noqa: E402
from kernels import pair_gram as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_hand(columns, values, d):
    table = np.zeros((3, d, d))
    for row, x in zip(columns.tolist(), values.double().tolist()):
        shown = [(column, value) for column, value in zip(row, x) if column >= 0]
        for a, value in shown:
            for b, other in shown:
                table[:, a, b] += value * other, 1, value**2
    return torch.from_numpy(table).to(DEVICE)


def rows_of(n, d, k, seed=0):
    return (t.to(DEVICE) for t in kernel.rows_of(n, d, k, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n, d, k", [(1, 2, 2), (300, 7, 2), (513, 50, 3), (97, 5, 5), (40, 700, 4)])
def test_against_loops(n, d, k, dtype):
    columns, values = rows_of(n, d, k)
    table = torch.ones(3, d, d, dtype=torch.float64, device=DEVICE)  # it adds: what is there stays
    kernel.pair_gram_(table, columns, values.to(dtype))
    torch.testing.assert_close(table - 1, by_hand(columns, values.to(dtype), d), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("columns_dtype", [torch.int32, torch.int64])
def test_against_plain(columns_dtype, monkeypatch):
    """The sizes have several programs, copies of the table or one, and a tail."""
    columns, values = rows_of(700, 9, 4, seed=1)
    plain, fused, one_copy = torch.zeros(3, 3, 9, 9, dtype=torch.float64, device=DEVICE)
    onesided_mc.pair_gram_(plain, columns, values.double())
    kernel.pair_gram_(fused, columns.to(columns_dtype), values)
    monkeypatch.setattr(kernel, "COPIES_BYTES", 0)
    kernel.pair_gram_(one_copy, columns.to(columns_dtype), values)
    for table in fused, one_copy:
        torch.testing.assert_close(table, plain, rtol=1e-12, atol=1e-12)
        assert torch.equal(table[1], plain[1]) and table[1].sum() > 0


def test_integers_and_strides():
    """Genotypes are int8, and a caller's halves are every other row."""
    columns, _ = rows_of(64, 6, 3, seed=3)
    values = torch.randint(-1, 2, (64, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int8)
    table = torch.zeros(3, 6, 6, dtype=torch.float64, device=DEVICE)
    kernel.pair_gram_(table, columns[1::2], values[1::2])
    assert torch.equal(table, by_hand(columns[1::2], values[1::2], 6))  # integers: exact


def test_no_rows():
    table = torch.zeros(3, 3, 3, dtype=torch.float64, device=DEVICE)
    kernel.pair_gram_(table, torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, device=DEVICE))
    assert not table.any()


def test_what_it_refuses():
    columns, values = rows_of(8, 3, 2)
    good = dict(table=torch.zeros(3, 3, 3, dtype=torch.float64, device=DEVICE), columns=columns, values=values)
    table = good["table"]
    for name, bad, words in [("table", table.float(), "table torch.float32"), ("table", table[:, :2], "(3, 2, 3)"),
                             ("table", table[0], "(3, 3)"), ("table", table.mT, "contiguous"),
                             ("columns", columns.float(), "columns torch.float32"),
                             ("values", values[:, :1], "values (8, 1)"), ("values", values.to("meta"), "devices")]:
        with pytest.raises(ValueError) as error:
            kernel.pair_gram_(**{**good, name: bad})
        assert words in str(error.value), (words, str(error.value))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_statistics_use_the_kernel():
    columns, values = rows_of(5000, 40, 3)
    on_gpu = onesided_mc.PairStats(40, device="cuda").update(columns, values)
    on_cpu = onesided_mc.PairStats(40).update(columns.cpu(), values.cpu())
    torch.testing.assert_close(on_gpu.table.cpu(), on_cpu.table, rtol=1e-12, atol=1e-12)
