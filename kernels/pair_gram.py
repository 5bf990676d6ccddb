"""Sums over rows of the products of the entries they show: gather, product and scatter in one pass.

    for each row and each ordered pair (a, b) of the columns it shows:   table[:, a, b] += x_a·x_b, 1, x_a²

What it costs. Two flops a pair; the bytes and the atomics are everything. With k = 2 a row is 24 bytes (two int64
columns, two float32 values) and makes four ordered pairs, so twelve additions to the table. Plain PyTorch writes, for
each ordered pair, the cell (int64) and three products (float64), and reads them again in three index_adds. Here nothing
is written but the table: the row's 24 bytes are read once and each pair is three atomic additions, which an L2 cache
takes in as long as the table (24·d² bytes) fits it, so up to d ≈ 1,400 on an H100.

How it works. Each program takes BLOCK rows, one a lane; two loops run over the ordered pairs of a row. Lanes that meet
at one cell are the trouble: with d = 50 a block of 256 rows holds 1,024 pairs for 2,500 cells, and the diagonal's are
the most wanted. So a small table is kept in several copies, program p adds to copy p mod copies, and the copies are
summed at the end. float64 throughout: counts stay exact whatever the order of the atomics; sums move in the last bits.

Measured. The version before this one kept a ≤ b and Σ (x_a·x_b)²: nine additions a row at k = 2. On an H100 (torch
2.11.0+cu130, triton 3.6.0, 25 November 2026), a million rows, d = 50 / 1,000 / 4,000, k = 2, it took 0.13 / 0.14 / 0.28
ms; plain 1.08 / 0.80 / 0.98 ms, torch.compile the same. This version: not measured.

    TRITON_INTERPRET=1 python -m kernels.pair_gram      check against the plain version, on a CPU
    python -m kernels.pair_gram                         the same on a GPU, then the timing table
"""

import torch
import triton
import triton.language as tl

from kernels import run_as_program

BLOCK = 256  # rows a program
COPIES_BYTES = 2**23  # for all copies of a small table together: they must stay in the L2 cache


@triton.jit
def pair_gram_kernel(table_ptr, columns_ptr, values_ptr, n_rows, k, d, cells, copies, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    table_ptr += (program % copies).to(tl.int64) * 3 * cells
    for i in range(k):
        a = tl.load(columns_ptr + row * k + i, mask=inside, other=-1).to(tl.int64)
        x = tl.load(values_ptr + row * k + i, mask=inside, other=0.0).to(tl.float64)
        for j in range(k):
            b = tl.load(columns_ptr + row * k + j, mask=inside, other=-1).to(tl.int64)
            y = tl.load(values_ptr + row * k + j, mask=inside, other=0.0).to(tl.float64)
            cell, seen = table_ptr + a * d + b, (a >= 0) & (b >= 0)
            tl.atomic_add(cell, x * y, mask=seen, sem="relaxed")
            tl.atomic_add(cell + cells, tl.full((BLOCK,), 1.0, tl.float64), mask=seen, sem="relaxed")
            tl.atomic_add(cell + 2 * cells, x * x, mask=seen, sem="relaxed")


def pair_gram_(table, columns, values):
    """onesided_mc.pair_gram_ in one launch. table (3, d, d) float64, contiguous; columns (rows, k) int32 or int64, −1 =
    nothing here; values (rows, k) floats or integers. All on one device; columns beyond d: PairStats.update looks."""
    square = table.ndim == 3 and table.shape == (3, *table.shape[2:] * 2)
    if table.dtype != torch.float64 or not square or not table.is_contiguous():
        raise ValueError(f"pair_gram_: table {table.dtype} {tuple(table.shape)}; want contiguous float64 (3, d, d)")
    if columns.ndim != 2 or columns.shape != values.shape or columns.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pair_gram_: columns {columns.dtype} {tuple(columns.shape)}, values {tuple(values.shape)}: "
                         "want int32 or int64 (rows, k) and as many values")
    if len({t.device for t in (table, columns, values)}) > 1:
        raise ValueError("pair_gram_: table, columns and values are on different devices")
    (rows, k), d = columns.shape, table.shape[1]
    if rows == 0 or k == 0:
        return
    programs = triton.cdiv(rows, BLOCK)
    copies = max(1, min(programs, COPIES_BYTES // table.nbytes))
    target = table if copies == 1 else table.new_zeros(copies, *table.shape)
    columns, values = columns.contiguous(), values.contiguous()
    pair_gram_kernel[(programs,)](target, columns, values, rows, k, d, d * d, copies, BLOCK, num_warps=4)
    if copies > 1:
        table += target.sum(0)


def rows_of(n, d, k, seed=0):
    """columns (n, k) int64, a tenth of them −1, and values (n, k) float32, something in the padding too."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(n, d, generator=generator).topk(k, 1).indices
    return torch.where(torch.rand(n, k, generator=generator) < 0.1, -1, columns), torch.randn(n, k, generator=generator)


def check(device):
    """The kernel against the plain version: odd numbers of rows, padding, tables with and without copies."""
    import onesided_mc

    for d, k, n in ((7, 2, 700), (50, 5, 300), (1100, 3, 520)):
        columns, values = (t.to(device) for t in rows_of(n, d, k))
        plain, fused = torch.zeros(2, 3, d, d, dtype=torch.float64, device=device)
        onesided_mc.pair_gram_(plain, columns, values.double())
        pair_gram_(fused, columns, values)
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
        assert torch.equal(fused[1], plain[1])  # counts are integers
        print(f"d = {d}, k = {k}, {n} rows: kernel = plain version, {int((plain[1] > 0).sum())} cells of {d * d}")


def benchmark():
    """Times for a million rows; the rate at which rows are read as a share of what a plain copy reaches here."""
    import onesided_mc

    n = 2**20
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    compiled = torch.compile(onesided_mc.pair_gram_)
    print(f"{torch.cuda.get_device_name()}, {n:,} rows, copy {copy / 1e6:.0f} GB/s")
    for d, k in ((50, 2), (1000, 2), (1000, 5), (4000, 2)):
        columns = torch.stack([torch.randperm(d, device="cuda")[:k] for _ in range(2**10)]).repeat(n // 2**10, 1)
        values, table = torch.randn(n, k, device="cuda"), torch.zeros(3, d, d, dtype=torch.float64, device="cuda")
        n_bytes = columns.nbytes + values.nbytes
        for name, run in (("plain", onesided_mc.pair_gram_), ("torch.compile", compiled), ("kernel", pair_gram_)):
            ms = triton.testing.do_bench(lambda run=run, rows=(table, columns, values): run(*rows))
            rate, pairs = n_bytes / ms, n * k * k / ms
            print(f"d = {d:5}, k = {k}  {name:14}{ms:8.3f} ms {pairs / 1e6:8.2f} G pairs/s {rate / 1e6:8.0f} GB/s "
                  f"{rate / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
