"""Sums over rows of the products of the entries they show: gather, product and scatter in one pass.

    for each row and each pair of its columns a ≤ b:   table[:, a·d + b] += w · (x_a·x_b, 1, (x_a·x_b)²)

What it costs. Two flops a pair; the bytes and the atomics are everything. With k = 2 a row is 24 bytes (two int64 columns, two float32
values) and makes three pairs, so nine additions to the table. Plain PyTorch writes, for each batch of pairs, the cells (int64), the
weights and products (float64), what is left of them after padding, and three more products, and reads them again in three
index_adds: about 100 bytes a pair. Here nothing is written but the table: the row's 24 bytes are read once and each pair is three
atomic additions, which an L2 cache takes in as long as the table (24·d² bytes) fits it, so up to d ≈ 1,400 on an H100.

How it works. Each program takes BLOCK rows, one a lane; two loops run over the pairs of a row. Lanes that meet at one cell are the
trouble: with d = 50 a block of 256 rows holds 768 pairs for 1,275 cells, and the diagonal's are the most wanted. So a small table is
kept in several copies, program p adds to copy p mod copies, and the copies are summed at the end. float64 throughout: counts stay exact
whatever the order of the atomics, sums move in their last bits.

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
def pair_gram_kernel(table_ptr, cols_ptr, vals_ptr, weights_ptr, n_rows, k, d, cells, copies, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    table_ptr += (program % copies).to(tl.int64) * 3 * cells
    w = tl.load(weights_ptr + row, mask=inside, other=0.0) if WEIGHTED else tl.full((BLOCK,), 1.0, tl.float64)
    for i in range(k):
        a = tl.load(cols_ptr + row * k + i, mask=inside, other=-1).to(tl.int64)
        x = tl.load(vals_ptr + row * k + i, mask=inside, other=0.0).to(tl.float64)
        for j in range(i, k):
            b = tl.load(cols_ptr + row * k + j, mask=inside, other=-1).to(tl.int64)
            y = x * tl.load(vals_ptr + row * k + j, mask=inside, other=0.0).to(tl.float64)
            cell = table_ptr + a * d + b
            seen = inside & (a >= 0)  # columns ascend, −1 first: b is there where a is
            tl.atomic_add(cell, w * y, mask=seen, sem="relaxed")
            tl.atomic_add(cell + cells, w, mask=seen, sem="relaxed")
            tl.atomic_add(cell + 2 * cells, w * y * y, mask=seen, sem="relaxed")


def pair_gram_(table, cols, vals, weights=None):
    """onesided_mc.pair_gram_ in one launch. table (3, d·d) float64, contiguous; cols (rows, k) int32 or int64, ascending in each row, −1
    = nothing; vals (rows, k) float64, float32, float16 or bfloat16, or integers; weights (rows,) float64 or None. All on one device;
    columns are not checked here: PairStats.update does it."""
    d = round(table.shape[-1] ** 0.5)
    if table.dtype != torch.float64 or table.shape != (3, d * d) or not table.is_contiguous():
        raise ValueError(f"pair_gram_: table {table.dtype} {tuple(table.shape)}; want contiguous float64 (3, d·d)")
    if cols.ndim != 2 or cols.shape != vals.shape or cols.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"pair_gram_: cols {cols.dtype} {tuple(cols.shape)} and vals {tuple(vals.shape)}; want int32 or int64 (rows, k) "
                         "and as many values")
    if weights is not None and (weights.dtype != torch.float64 or weights.shape != cols.shape[:1]):
        raise ValueError(f"pair_gram_: weights {weights.dtype} {tuple(weights.shape)}; want float64 ({len(cols)},)")
    if len({t.device for t in (table, cols, vals, weights) if t is not None}) > 1:
        raise ValueError("pair_gram_: table, cols, vals and weights are on different devices")
    rows, k = cols.shape
    if rows == 0 or k == 0:
        return
    programs = triton.cdiv(rows, BLOCK)
    copies = max(1, min(programs, COPIES_BYTES // table.nbytes))
    target = table if copies == 1 else table.new_zeros(copies, *table.shape)
    w = table if weights is None else weights.contiguous()
    pair_gram_kernel[(programs,)](target, cols.contiguous(), vals.contiguous(), w, rows, k, d, d * d, copies, weights is not None, BLOCK,
                                  num_warps=4)
    if copies > 1:
        table += target.sum(0)


def check(device):
    """The kernel against the plain version: rows that are no multiple of anything, padding, weights, tables with and without copies."""
    import onesided_mc

    for d, k, n in ((7, 2, 700), (50, 5, 300), (1100, 3, 520)):
        generator = torch.Generator().manual_seed(0)
        cols = torch.rand(n, d, generator=generator).topk(k, 1).indices
        cols = torch.where(torch.rand(n, k, generator=generator) < 0.1, -1, cols).sort(1).values.to(device)
        vals, weights = torch.randn(n, k, generator=generator).to(device), torch.rand(n, generator=generator).double().to(device)
        for w in (None, weights):
            plain, fused = torch.zeros(2, 3, d * d, dtype=torch.float64, device=device)
            onesided_mc.pair_gram_(plain, cols, vals, w)
            pair_gram_(fused, cols, vals, w)
            torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
            assert w is not None or torch.equal(fused[1], plain[1])  # counts are integers
        print(f"d = {d}, k = {k}, {n} rows: kernel = plain version, {int((plain[1] > 0).sum())} cells of {d * (d + 1) // 2}")


def benchmark():
    """Times for a million rows, and the rate at which the rows are read as a share of what a plain copy reaches on this card."""
    import onesided_mc

    n = 2**20
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    compiled = torch.compile(onesided_mc.pair_gram_)
    print(f"{torch.cuda.get_device_name()}, {n:,} rows, copy {copy / 1e6:.0f} GB/s")
    for d, k in ((50, 2), (1000, 2), (1000, 5), (4000, 2)):
        cols = onesided_mc.draw_columns(n, d, k, torch.Generator("cuda").manual_seed(0)).sort(1).values
        vals, table = torch.randn(n, k, device="cuda"), torch.zeros(3, d * d, dtype=torch.float64, device="cuda")
        n_bytes = cols.nbytes + vals.nbytes
        for name, run in (("plain", onesided_mc.pair_gram_), ("torch.compile", compiled), ("kernel", pair_gram_)):
            ms = triton.testing.do_bench(lambda run=run, rows=(table, cols, vals): run(*rows))
            rate, pairs = n_bytes / ms, n * k * (k + 1) / 2 / ms
            print(f"d = {d:5}, k = {k}  {name:14}{ms:8.3f} ms {pairs / 1e6:8.2f} G pairs/s {rate / 1e6:8.0f} GB/s "
                  f"{rate / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
