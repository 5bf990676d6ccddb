"""Every machine's update, the end of the last perturbation and the start of the next, in one read and one write of the
weights.

    w ← w + then·snap(Σ coef·z), and so on        snap(x) = q·rint(x/q), |x| ≤ 2²²·q;   z = noise(key; step, machine)

A move is (step, machine, then, coef). Moves with then = 0 only add coef·z to the sum; another number ends it: 1 and −2
move the weights by the snapped sum, 2 (an update) too, and then keeps |w| ≤ 2²³·q. So

    +ε, then −2ε, then back     (t, m, 1, ε), (t, m, −2, ε), (t, m, 1, ε): exactly symmetric, exactly undone
    the update of n machines    (t, m₁, 0, c₁), …, (t, mₙ, 2, cₙ) with c = −η·g/√n
    a replay of T steps         T updates, one after another

What it costs. The usual way regenerates z once for each use and adds it tensor by tensor: p.data = p.data + s·z·ε reads
or writes z, two products and p, 32 bytes a weight, and a step of n machines has n + 3 of them: 128 bytes for one
machine, 352 for eight. Here the noise lives in registers and a step has two passes (restore + update + perturb; flip)
of 8 bytes: 16, for any n, and no memory beside the weights. What grows with n is arithmetic, n + 3 streams of noise.

Measured on an H100 on 25 November 2026, before the counter had 64 bits of machine and before the sign was xored in;
gpt2's 124M weights, a whole step, ms. The loop has changed: not measured since.

    machines    p.data + s·z·ε    add_(z, alpha)    kernel, rademacher    kernel, gaussian
    1           5.74              3.08              0.75                  2.51
    8           15.8              8.49              1.14                  5.92
    64          96.3              51.7              4.44                  33.1

How it works. Philox gives four words a call. Elements lie in rows of ROW with four rows to a call, so that word j of a
call belongs to row j and the four rows are four coalesced loads. Rademacher: ROW = 32, a call serves 32 · 4 elements,
one bit each. Gaussian: ROW = 256, 256 calls side by side serve 1024. Products and sums are rounded one by one (no fused
multiply-add), as PyTorch rounds them: with rademacher noise the weights are those of the plain version on any device,
to the last bit.

    TRITON_INTERPRET=1 python -m kernels.perturb      check against the plain version, and its time, on a CPU
    python -m kernels.perturb                         the same on a GPU, then the timing table
"""

import time

import torch
import triton
import triton.language as tl

from kernels import run_as_program
from kernels.philox import gaussian, philox, rademacher

TILE = 1024  # elements that share a grid constant
TILES = 4  # of them in a program: 128 threads × 32 elements
KINDS = {"rademacher": 0, "gaussian": 1}


@triton.jit
def snap(x, q):
    """q·rint(x/q), q a power of two, within 2²²·q. subtle: float32 rounds to an integer, half to even, when 1.5·2²³ is
    added and taken away."""
    x = tl.minimum(tl.maximum(x / q, -4194304.0), 4194304.0)
    return ((x + 12582912.0) - 12582912.0) * q


@triton.jit
def noise(call, lane, step, low, high, k0, k1, coef, KIND: tl.constexpr):
    """coef·z of the four rows that one Philox call serves: four blocks."""
    x0, x1, x2, x3 = philox(call, step, low, high, k0, k1)
    if KIND == 0:
        z0, z1 = rademacher(x0, lane, coef), rademacher(x1, lane, coef)
        return z0, z1, rademacher(x2, lane, coef), rademacher(x3, lane, coef)
    else:
        z0, z1 = gaussian(x0, x1)
        z2, z3 = gaussian(x2, x3)
        return coef * z0, coef * z1, coef * z2, coef * z3


@triton.jit
def moved(w, total, q, times, bound):
    """w + times·snap(total), within bound·q (2²⁴·q: no bound at all)."""
    return tl.minimum(tl.maximum(w + times * snap(total, q), -bound * q), bound * q)


@triton.jit(do_not_specialize=["n_moves", "k0", "k1"])
def perturb_kernel(w_ptr, grid_ptr, move_ptr, coef_ptr, n_moves, k0, k1, n_rows, KIND: tl.constexpr,
                   ROW: tl.constexpr, ROWS: tl.constexpr, ROWS_A_TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of four rows of ROW elements each
    lane = tl.arange(0, ROW)[None, :]
    inside = (row < n_rows)[:, None]
    call = (row[:, None] if KIND == 0 else row[:, None] * ROW + lane).to(tl.uint32)
    q = tl.load(grid_ptr + row // ROWS_A_TILE, mask=row < n_rows, other=1.0)[:, None]
    at = w_ptr + row[:, None] * (4 * ROW) + lane
    w0 = tl.load(at, mask=inside)
    w1 = tl.load(at + ROW, mask=inside)
    w2 = tl.load(at + 2 * ROW, mask=inside)
    w3 = tl.load(at + 3 * ROW, mask=inside)
    zero = tl.zeros([ROWS, ROW], dtype=tl.float32)
    s0, s1, s2, s3 = zero, zero, zero, zero
    k0, k1 = k0.to(tl.uint32), k1.to(tl.uint32)
    for i in range(n_moves):
        step = tl.load(move_ptr + 4 * i).to(tl.uint32)
        low = tl.load(move_ptr + 4 * i + 1).to(tl.uint32)
        high = tl.load(move_ptr + 4 * i + 2).to(tl.uint32)
        then = tl.load(move_ptr + 4 * i + 3).to(tl.float32)
        coef = tl.load(coef_ptr + i)
        z0, z1, z2, z3 = noise(call, lane.to(tl.uint32), step, low, high, k0, k1, coef, KIND)
        s0 += z0
        s1 += z1
        s2 += z2
        s3 += z3
        if then != 0:
            times = tl.where(then == 2, 1.0, then)
            bound = tl.where(then == 2, 8388608.0, 16777216.0)
            w0 = moved(w0, s0, q, times, bound)
            w1 = moved(w1, s1, q, times, bound)
            w2 = moved(w2, s2, q, times, bound)
            w3 = moved(w3, s3, q, times, bound)
            s0, s1, s2, s3 = zero, zero, zero, zero
    tl.store(at, w0, mask=inside)
    tl.store(at + ROW, w1, mask=inside)
    tl.store(at + 2 * ROW, w2, mask=inside)
    tl.store(at + 3 * ROW, w3, mask=inside)


def perturb_(flat, grid, key, kind, moves):
    """spsa_distributed.perturb_ in one launch. flat: (1024·tiles,) float32, contiguous; grid: (tiles,) float32,
    powers of two; key: 64 bits; kind: rademacher or gaussian; moves: [(step, machine, then, coef), …]. Else
    ValueError."""
    if flat.dtype != torch.float32 or flat.dim() != 1 or len(flat) % TILE or not flat.is_contiguous():
        raise ValueError(f"perturb: want contiguous float32 weights (1024·n,), have {flat.dtype} {tuple(flat.shape)}")
    if (grid.dtype, grid.shape, grid.device) != (torch.float32, (len(flat) // TILE,), flat.device):
        raise ValueError(f"perturb: want a float32 grid ({len(flat) // TILE},) on {flat.device}, have {grid.dtype} "
                         f"{tuple(grid.shape)} on {grid.device}")
    if kind not in KINDS or not 0 <= key < 2**64:
        raise ValueError(f"perturb: noise {kind!r} with key {key}: want one of {', '.join(KINDS)} and 64 bits")
    rows = [(step, machine & 0xFFFFFFFF, machine >> 32, then) for step, machine, then, _ in moves]
    if any(not 0 <= word < 2**32 for row in rows for word in row[:3]) or {row[3] for row in rows} - {0, 1, -2, 2}:
        raise ValueError("perturb: want moves (step of 32 bits, machine of 64 bits, then of 0, 1, −2 and 2, coef)")
    if not len(grid) or not rows:
        return
    words = torch.tensor(rows, dtype=torch.int64).to(flat.device)
    coefs = torch.tensor([move[3] for move in moves], dtype=torch.float32).to(flat.device)
    row = 32 if kind == "rademacher" else 256
    a_tile = TILE // (4 * row)
    perturb_kernel[(triton.cdiv(len(grid), TILES),)](
        flat, grid.contiguous(), words, coefs, len(rows), key & 0xFFFFFFFF, key >> 32, len(grid) * a_tile, KINDS[kind],
        row, TILES * a_tile, a_tile, num_warps=4, enable_fp_fusion=False)


def sample(n_tiles, n_machines, device, seed=0):
    """Weights on their grid, and the moves of a step: restore, the update of n machines, the next perturbation."""
    generator = torch.Generator().manual_seed(seed)
    grid = 2.0 ** torch.randint(-26, -22, (n_tiles,), generator=generator)
    flat = ((torch.randn(n_tiles, TILE, generator=generator) * 2**20).round() * grid[:, None]).flatten()
    coefs = (1e-3 * torch.randn(n_machines, generator=generator)).tolist()
    machines = [2**63 + 2**31 + 7 * m for m in range(n_machines)]
    update = [(6, m, 2 if m == machines[-1] else 0, coef) for m, coef in zip(machines, coefs)]
    return flat.to(device), grid.to(device), [(6, machines[0], 1, 1e-3), *update, (7, machines[0], 1, 1e-3)]


def check(device):
    """The kernel against the plain version, and all in one pass against pass by pass."""
    import spsa_distributed

    for kind in KINDS:
        for n_tiles, n_machines in ((1, 1), (7, 3)):
            flat, grid, moves = sample(n_tiles, n_machines, device)
            plain, single = flat.clone(), flat.clone()
            perturb_(flat, grid, 2**63 + 5, kind, moves)
            spsa_distributed.perturb_(plain, grid, 2**63 + 5, kind, moves)
            for part in (moves[:1], moves[1:-1], moves[-1:]):
                perturb_(single, grid, 2**63 + 5, kind, part)
            assert torch.equal(flat, single), kind
            gap = ((flat - plain).view(n_tiles, TILE).abs() / grid[:, None]).max()
            assert gap <= (2 if kind == "gaussian" else 0), (kind, gap)
        print(f"{kind}: kernel = plain version {'within two grid points' if kind == 'gaussian' else 'to the last bit'}")


def benchmark():
    """One step of gpt2's 124M weights: two passes here, n + 3 in place, n + 3 with temporaries (MeZO's idiom)."""
    n_tiles = 124_439_808 // TILE
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    print(f"{torch.cuda.get_device_name()}, {n_tiles * TILE / 1e6:.0f}M weights, copy {copy / 1e6:.0f} GB/s")
    for n in (1, 8, 64):
        flat, grid, moves = sample(n_tiles, n, "cuda")
        flip = [(7, moves[0][1], -2, 1e-3)]

        def idiom(flat=flat, n=n):
            for _ in range(n + 3):
                flat.data = flat.data + 1.0 * torch.randn_like(flat) * 1e-3

        def in_place(flat=flat, n=n):
            for _ in range(n + 3):
                flat.add_(torch.randn_like(flat), alpha=1e-3)

        runs = [("p.data = p.data + s·z·ε", 32 * (n + 3), idiom), ("add_(z, alpha)", 16 * (n + 3), in_place)]
        for kind in KINDS:
            runs.append((f"kernel, {kind}", 16, lambda a=(flat, grid, 5, kind), b=moves, c=flip:
                         (perturb_(*a, b), perturb_(*a, c))))
        for name, n_bytes, run in runs:
            ms = triton.testing.do_bench(run)
            print(f"{n:3} machines  {name:26}{ms:9.2f} ms a step {n_bytes * len(flat) / ms / 1e6:7.0f} GB/s "
                  f"{n_bytes * len(flat) / ms / copy:6.0%} of the copy")


def on_a_cpu():
    """A step of a million weights by the plain version and by MeZO's idiom, ms of CPU, the least of three."""
    import spsa_distributed

    def least(function):
        times = []
        for _ in range(3):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return 1e3 * min(times)

    torch.set_num_threads(1)
    for n in (1, 8):
        flat, grid, moves = sample(1024, n, "cpu")
        flip = [(7, moves[0][1], -2, 1e-3)]

        def idiom(flat=flat, n=n):
            for _ in range(n + 3):
                flat.data = flat.data + 1.0 * torch.randn_like(flat) * 1e-3

        for kind in KINDS:
            steps = lambda a=(flat, grid, 5, kind), b=moves, c=flip: [spsa_distributed.perturb_(*a, d) for d in (b, c)]
            print(f"{n} machines, a million weights on a CPU, plain version, {kind}: {least(steps):.1f} ms a step")
        print(f"{n} machines, p.data = p.data + s·z·ε: {least(idiom):.1f} ms a step")


if __name__ == "__main__":
    run_as_program(check, benchmark)
    on_a_cpu()
