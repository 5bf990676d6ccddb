"""Every machine's update, the end of the last perturbation and the start of the next, in one read and one write of the weights.

    w ← w + times₁·snap(Σ c·z) + times₂·snap(Σ c·z) + …        snap(x) = q·rint(x/q);   z = noise(key; step, machine, sample, element)

A row of the table `records` is (step, machine, sample, times), and `coefs` holds its c. Rows with times = 0 only add c·z to the sum;
a row with another number ends the sum: snapped to the tensor's grid q and multiplied by times, it moves the weights. So

    +ε, then −2ε, then back     (t, m, k, 1), (t, m, k, −2), (t, m, k, 1), each with c = ε: exactly symmetric, exactly undone
    the update of n machines    (t, 0, 0, 0), …, (t, n−1, 0, 1) with cⱼ = −η·gⱼ/√n
    a replay of T steps         T updates, one after another

What it costs. The usual way regenerates z once for each use and adds it tensor by tensor: p.data = p.data + s·z·ε reads or writes z, two
products and p, 32 bytes a parameter, and a step of n machines has n + 3 of them: 128 bytes for one machine, 352 for eight. Here the
noise lives in registers and a step has two passes (restore + update + perturb; flip) of 8 bytes: 16, for any n, and no memory beside the
weights. What grows with n is arithmetic: n + 3 noise streams a step, each of roughly 10 instructions a parameter (rademacher: a thread
makes 2 calls of Philox for its 32 elements), 40 (binomial: 8 calls) or 80 (gaussian). On a GPU: not measured.

How it works. Philox gives four words a call. Elements lie in rows of ROW with four rows to a call, so that word j of a call belongs to
row j and the four rows are four coalesced loads. Rademacher: ROW = 32, a call serves 32 · 4 elements, one bit each. Others: ROW = 256,
256 calls side by side serve 1024. Products and sums are rounded one by one (no fused multiply-add), as PyTorch rounds them: with
rademacher or binomial noise the weights are those of the plain version on any device, to the last bit.

    TRITON_INTERPRET=1 python -m kernels.perturb      check against the plain version, on a CPU
    python -m kernels.perturb                         the same on a GPU, then the timing table
"""

import torch
import triton
import triton.language as tl

from kernels import run_as_program
from kernels.philox import binomial, gaussian, philox, rademacher

TILE = 1024  # elements that share a grid constant
TILES = 4  # of them in a program: 128 threads × 32 elements
KINDS = {"rademacher": 0, "binomial": 1, "gaussian": 2}


@triton.jit
def snap(x, q):
    """q·rint(x/q) for q a power of two. subtle: adding and taking away 1.5·2²³ rounds a float32 to an integer, half to even."""
    return ((x / q + 12582912.0) - 12582912.0) * q


@triton.jit
def noise(group, lane, step, machine, sample, k0, k1, KIND: tl.constexpr):
    """The noise of the four rows that one Philox call serves: four blocks."""
    c1 = (sample << 16) | (group >> 32).to(tl.uint32)
    x0, x1, x2, x3 = philox(group.to(tl.uint32), c1, step, machine, k0, k1)
    if KIND == 0:
        return rademacher(x0, lane), rademacher(x1, lane), rademacher(x2, lane), rademacher(x3, lane)
    elif KIND == 1:
        return binomial(x0), binomial(x1), binomial(x2), binomial(x3)
    else:
        z0, z1 = gaussian(x0, x1)
        z2, z3 = gaussian(x2, x3)
        return z0, z1, z2, z3


@triton.jit(do_not_specialize=["n_records", "k0", "k1"])
def perturb_kernel(w_ptr, grid_ptr, record_ptr, coef_ptr, n_records, k0, k1, n_rows, KIND: tl.constexpr, ROW: tl.constexpr,
                   ROWS: tl.constexpr, ROWS_A_TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of four rows of ROW elements each
    lane = tl.arange(0, ROW)[None, :]
    inside = (row < n_rows)[:, None]
    group = row[:, None] if KIND == 0 else row[:, None] * ROW + lane
    q = tl.load(grid_ptr + row // ROWS_A_TILE, mask=row < n_rows, other=1.0)[:, None]
    at = w_ptr + row[:, None] * (4 * ROW) + lane
    w0 = tl.load(at, mask=inside)
    w1 = tl.load(at + ROW, mask=inside)
    w2 = tl.load(at + 2 * ROW, mask=inside)
    w3 = tl.load(at + 3 * ROW, mask=inside)
    zero = tl.zeros([ROWS, ROW], dtype=tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    for i in range(n_records):
        step = tl.load(record_ptr + 4 * i).to(tl.uint32)
        machine = tl.load(record_ptr + 4 * i + 1).to(tl.uint32)
        sample = tl.load(record_ptr + 4 * i + 2).to(tl.uint32)
        times = tl.load(record_ptr + 4 * i + 3).to(tl.float32)
        coef = tl.load(coef_ptr + i)
        z0, z1, z2, z3 = noise(group, lane.to(tl.uint32), step, machine, sample, k0, k1, KIND)
        s0 += coef * z0
        s1 += coef * z1
        s2 += coef * z2
        s3 += coef * z3
        if times != 0:
            w0 += times * snap(s0, q)
            w1 += times * snap(s1, q)
            w2 += times * snap(s2, q)
            w3 += times * snap(s3, q)
            s0, s1, s2, s3 = zero, zero, zero, zero
    tl.store(at, w0, mask=inside)
    tl.store(at + ROW, w1, mask=inside)
    tl.store(at + 2 * ROW, w2, mask=inside)
    tl.store(at + 3 * ROW, w3, mask=inside)


def perturb_(flat, grid, key, kind, records, coefs):
    """spsa_distributed.perturb_ in one launch. flat: (1024·tiles,) float32, contiguous; grid: (tiles,) float32 powers of two; key: 64 bits;
    kind: rademacher, binomial or gaussian; records: (R, 4) integers; coefs: (R,) float32. Raises ValueError for anything else."""
    if flat.dtype != torch.float32 or flat.dim() != 1 or len(flat) % TILE or not flat.is_contiguous():
        raise ValueError(f"perturb: want contiguous float32 weights (1024·tiles,), have {flat.dtype} {tuple(flat.shape)}")
    if grid.dtype != torch.float32 or grid.shape != (len(flat) // TILE,) or grid.device != flat.device or not grid.is_contiguous():
        raise ValueError(f"perturb: want a float32 grid ({len(flat) // TILE},) on {flat.device}, have {grid.dtype} {tuple(grid.shape)} on "
                         f"{grid.device}")
    if records.dim() != 2 or records.size(1) != 4 or coefs.shape != (len(records),) or records.is_floating_point():
        raise ValueError(f"perturb: want integer records (R, 4) and coefs (R,), have {tuple(records.shape)} and {tuple(coefs.shape)}")
    if kind not in KINDS or not 0 <= key < 2**64:
        raise ValueError(f"perturb: noise {kind!r} with key {key}: want one of {', '.join(KINDS)} and 64 bits")
    if not len(grid) or not len(records):
        return
    row = 32 if kind == "rademacher" else 256
    a_tile = TILE // (4 * row)
    perturb_kernel[(triton.cdiv(len(grid), TILES),)](
        flat, grid, records.to(flat.device, torch.int32).contiguous(), coefs.to(flat.device, torch.float32).contiguous(), len(records),
        key & 0xFFFFFFFF, key >> 32, len(grid) * a_tile, KINDS[kind], row, TILES * a_tile, a_tile, num_warps=4, enable_fp_fusion=False)


def sample(n_tiles, n_machines, device, seed=0):
    """Weights on their grid, and the records of a step: restore, the update of n machines, the next perturbation."""
    generator = torch.Generator().manual_seed(seed)
    grid = 2.0 ** torch.randint(-26, -22, (n_tiles,), generator=generator)
    flat = ((torch.randn(n_tiles, TILE, generator=generator) * 2**20).round() * grid[:, None]).flatten()
    records = [(6, 3, 0, 1)] + [(6, m, 0, int(m == n_machines - 1)) for m in range(n_machines)] + [(7, 3, 1, 1)]
    coefs = torch.cat([torch.full((1,), 1e-3), 1e-3 * torch.randn(n_machines, generator=generator), torch.full((1,), 1e-3)])
    return flat.to(device), grid.to(device), torch.tensor(records, dtype=torch.int32), coefs


def check(device):
    """The kernel against the plain version, and all in one pass against pass by pass."""
    import spsa_distributed

    for kind in KINDS:
        for n_tiles, n_machines in ((1, 1), (7, 3)):
            flat, grid, records, coefs = sample(n_tiles, n_machines, device)
            plain, single = flat.clone(), flat.clone()
            perturb_(flat, grid, 2**63 + 5, kind, records, coefs)
            spsa_distributed.perturb_(plain, grid, 2**63 + 5, kind, records, coefs)
            for part in (slice(0, 1), slice(1, n_machines + 1), slice(n_machines + 1, None)):
                perturb_(single, grid, 2**63 + 5, kind, records[part], coefs[part])
            assert torch.equal(flat, single), kind
            gap = ((flat - plain).view(n_tiles, TILE).abs() / grid[:, None]).max()
            assert gap <= (2 if kind == "gaussian" else 0), (kind, gap)
        print(f"{kind}: kernel = plain version{' within two grid points' if kind == 'gaussian' else ', to the last bit'}")


def benchmark():
    """One step of gpt2's 124M weights: two passes here, n + 3 in place, n + 3 with temporaries (MeZO's idiom)."""
    n_tiles = 124_439_808 // TILE
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    print(f"{torch.cuda.get_device_name()}, {n_tiles * TILE / 1e6:.0f}M weights, copy {copy / 1e6:.0f} GB/s")
    for n in (1, 8, 64):
        flat, grid, records, coefs = sample(n_tiles, n, "cuda")
        flip, epsilon = records[-1:] * torch.tensor([1, 1, 1, -2]), coefs[-1:]

        def idiom(flat=flat, n=n):
            for _ in range(n + 3):
                flat.data = flat.data + 1.0 * torch.randn_like(flat) * 1e-3

        def in_place(flat=flat, n=n):
            for _ in range(n + 3):
                flat.add_(torch.randn_like(flat), alpha=1e-3)

        runs = [("p.data = p.data + s·z·ε", 32 * (n + 3), idiom), ("add_(z, alpha)", 16 * (n + 3), in_place)]
        for kind in KINDS:
            runs.append((f"kernel, {kind}", 16, lambda a=(flat, grid, 5, kind), b=(records, coefs), c=(flip, epsilon):
                         (perturb_(*a, *b), perturb_(*a, *c))))
        for name, n_bytes, run in runs:
            ms = triton.testing.do_bench(run)
            print(f"{n:3} machines  {name:26}{ms:9.2f} ms a step {n_bytes * len(flat) / ms / 1e6:7.0f} GB/s "
                  f"{n_bytes * len(flat) / ms / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
