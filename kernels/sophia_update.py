"""One Sophia step over all parameters in one launch (and its curvature average in another).

    m ← β1·m + (1 − β1)·g        u = clip(m / max(γ·h, ε), ±clip)        θ ← θ·(1 − η·λ) − η·u        wins = #{|u| < clip}
    h ← β2·h + (1 − β2)·ĥ        ĥ = the estimate given, or B·ĝ² of a gradient ĝ

What it costs. The arithmetic is nothing; the bytes are everything. With float32 everywhere the step must read p, g, m, h and
write p, m: 24 bytes a parameter, once. Plain PyTorch reads or writes a tensor in each of its nine passes (about 96 bytes a
parameter) and launches about ten kernels for each tensor: 3,000 launches for gpt2-medium's 292 tensors. Here it is one launch
and 24 bytes. For scale: AdamW moves 28 (it writes v as well), a copy of the parameters 8. The average moves 12.

How it works. A launch cannot take a list of tensors, so it takes a table of their addresses. Each program handles BLOCK
consecutive elements of one tensor; two more tables, indexed by program, say of which tensor and from which element on.

    TRITON_INTERPRET=1 python -m kernels.sophia_update      check against the plain version, on a CPU
    python -m kernels.sophia_update                         the same on a GPU, then the timing table
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import run_as_program

BLOCK = 4096  # elements a program: 8 warps × 32 threads × 16 elements
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def address(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table."""
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def elements(row_ptr, first_ptr, column: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """This program's indices into its tensor, and which of them are inside. subtle: the compiler knows nothing of numbers that come
    out of a table. Told that addresses and sizes are multiples of 16 it moves 16 bytes an instruction instead of one element."""
    first, size = tl.load(first_ptr), tl.load(row_ptr + column)
    if ALIGNED:
        first, size = tl.multiple_of(first, 16), tl.multiple_of(size, 16)
    i = first + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit
def sophia_update_kernel(table_ptr, tensor_ptr, first_ptr, wins_ptr, lr, beta1, gamma, eps, weight_decay, clip,
                         P: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = table_ptr + 5 * tl.load(tensor_ptr + program)  # addresses of p, g, m, h, then the size
    p_ptr = address(row, 0, P, ALIGNED)
    g_ptr = address(row, 1, G, ALIGNED)
    m_ptr = address(row, 2, tl.float32, ALIGNED)
    h_ptr = address(row, 3, tl.float32, ALIGNED)
    i, inside = elements(row, first_ptr + program, 4, ALIGNED, BLOCK)

    p = tl.load(p_ptr + i, mask=inside).to(tl.float32)
    g = tl.load(g_ptr + i, mask=inside).to(tl.float32)
    m = tl.load(m_ptr + i, mask=inside)
    h = tl.load(h_ptr + i, mask=inside)
    m += (1 - beta1) * (g - m)
    u = m / tl.maximum(gamma * h, eps, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(tl.maximum(u, -clip, propagate_nan=tl.PropagateNan.ALL), clip, propagate_nan=tl.PropagateNan.ALL)
    p = p * (1 - lr * weight_decay) - lr * u
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(p_ptr + i, p.to(P), mask=inside)
    tl.store(wins_ptr + program, tl.sum(((tl.abs(u) < clip) & inside).to(tl.int32)))


@triton.jit
def hessian_ema_kernel(table_ptr, tensor_ptr, first_ptr, beta2, n_terms,
                       E: tl.constexpr, SQUARE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = table_ptr + 3 * tl.load(tensor_ptr + program)  # addresses of h and of the estimate, then the size
    h_ptr = address(row, 0, tl.float32, ALIGNED)
    e_ptr = address(row, 1, E, ALIGNED)
    i, inside = elements(row, first_ptr + program, 2, ALIGNED, BLOCK)
    h = tl.load(h_ptr + i, mask=inside)
    e = tl.load(e_ptr + i, mask=inside).to(tl.float32)
    if SQUARE:
        e = n_terms * e * e
    tl.store(h_ptr + i, h + (1 - beta2) * (e - h), mask=inside)


@lru_cache(16)
def programs(sizes, device):
    """For tensors of these sizes: (tensor, first element) of every program, two tables. They are the same at every step."""
    counts = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * BLOCK
    return tensor.to(device), first.to(device)


@lru_cache(16)
def addresses(pointers, device):
    """The table of addresses; a training loop's allocator tends to hand out the same ones at each step."""
    return torch.tensor(pointers, dtype=torch.int64).to(device)


def by_dtype(*columns):
    """Lists of tensors side by side → for each combination of dtypes, the arguments of a launch. Raises ValueError for what the
    kernels do not take: other shapes in a row, other devices, memory that is not dense, averages that are not float32."""
    groups = {}
    for row in zip(*columns, strict=True):
        first = row[0]
        for t in row:
            if t.shape != first.shape or t.device != first.device or t.stride() != first.stride() or t.dtype not in TYPES:
                raise ValueError(f"sophia kernels: {t.dtype} {tuple(t.shape)} on {t.device} beside {first.dtype} {tuple(first.shape)} on "
                                 f"{first.device}; want one shape, one layout, one device and float32, bfloat16 or float16")
        if not torch.ops.aten.is_non_overlapping_and_dense(first):
            raise ValueError(f"sophia kernels: a tensor of shape {tuple(first.shape)} and strides {first.stride()} has gaps or overlaps")
        if first.numel():
            groups.setdefault((first.device, *(t.dtype for t in row)), []).append(row)
    for (device, *dtypes), rows in groups.items():
        tensor, first = programs(tuple(row[0].numel() for row in rows), device)
        pointers = tuple(tuple(t.data_ptr() for t in row) + (row[0].numel(),) for row in rows)
        aligned = all(number % 16 == 0 for row in pointers for number in row)
        yield addresses(pointers, device), tensor, first, [TYPES[d] for d in dtypes], aligned


def sophia_update_(params, grads, momenta, hessians, lr, beta1, gamma, eps, weight_decay, clip=1.0):
    """sophia.sophia_update_ in one launch for each combination of dtypes. Momenta and hessians are float32; params and grads may
    be float32, bfloat16 or float16. Returns the win count, a 0-d int64 tensor on the device: no synchronisation."""
    total = torch.zeros((), dtype=torch.int64, device=params[0].device)
    for table, tensor, first, (p, g, m, h), aligned in by_dtype(params, grads, momenta, hessians):
        if (m, h) != (tl.float32, tl.float32):
            raise ValueError("sophia kernels: momenta and hessians must be float32")
        wins = torch.empty(len(tensor), dtype=torch.int32, device=total.device)
        sophia_update_kernel[(len(tensor),)](table, tensor, first, wins, lr, beta1, gamma, eps, weight_decay, clip, p, g, aligned,
                                             BLOCK, num_warps=8)
        total += wins.sum()
    return total


def hessian_ema_(hessians, estimates, beta2, n_terms=None):
    """sophia.hessian_ema_ in one launch for each dtype of the estimates. n_terms: None or an int (or a 0-d tensor)."""
    for table, tensor, first, (h, e), aligned in by_dtype(hessians, estimates):
        if h != tl.float32:
            raise ValueError("sophia kernels: hessians must be float32")
        hessian_ema_kernel[(len(tensor),)](table, tensor, first, beta2, float(n_terms or 0), e, n_terms is not None, aligned,
                                           BLOCK, num_warps=8)


def check(device):
    """The kernels against the plain versions, on sizes that are no multiple of anything."""
    import sophia

    shapes = [(1,), (127,), (33, 31), (4097,), (0,), (3, 5, 7)]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        make = [[torch.randn(shape).to(device, d) for shape in shapes] for d in (dtype, dtype, torch.float32, torch.float32)]
        plain, fused = ([[t.clone() for t in column] for column in make] for _ in range(2))
        settings = (1e-2, 0.9, 0.5, 1e-12, 0.1)
        wins = sophia.sophia_update_(*plain, *settings), sophia_update_(*fused, *settings)
        for ema, columns in ((sophia.hessian_ema_, plain), (hessian_ema_, fused)):
            ema(columns[3], columns[1], 0.9, 7)
        assert int(wins[0]) == int(wins[1]), wins
        for column, tolerance in zip(range(4), (1e-6 if dtype == torch.float32 else 2**-7, 0, 1e-6, 1e-6)):
            for a, b in zip(plain[column], fused[column]):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        print(f"{dtype}: kernels = plain versions, {int(wins[0])} of {sum(t.numel() for t in make[0])} coordinates not clipped")


def benchmark():
    """Times over gpt2-medium's tensors, and bytes a second as a share of what a plain copy reaches on this card."""
    import sophia

    params = list(sophia.GPT(sophia.GPTConfig(**sophia.GPT_SIZES["gpt2-medium"])).cuda().parameters())
    columns = [[p.detach() for p in params], *([torch.rand_like(p) for p in params] for _ in range(3))]
    n, settings = sum(p.numel() for p in params), (1e-5, 0.96, 0.05, 1e-12, 0.2, 1.0)
    for p, g in zip(params, columns[1]):
        p.grad = g
    adam = torch.optim.AdamW(params, 1e-5, fused=True)
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    runs = [("step, plain", 24, lambda: sophia.sophia_update_(*columns, *settings)),
            ("step, torch.compile", 24, lambda: sophia.compiled_sophia_update_(*columns, *settings)),
            ("step, kernel", 24, lambda: sophia_update_(*columns, *settings)),
            ("torch's fused AdamW", 28, adam.step),
            ("average, plain", 12, lambda: sophia.hessian_ema_(columns[3], columns[1], 0.99, 1000)),
            ("average, kernel", 12, lambda: hessian_ema_(columns[3], columns[1], 0.99, 1000))]
    print(f"{torch.cuda.get_device_name()}, gpt2-medium, {n / 1e6:.0f}M parameters, copy {copy / 1e6:.0f} GB/s")
    with torch.no_grad():
        for name, n_bytes, run in runs:
            ms = triton.testing.do_bench(run)
            print(f"{name:22}{ms:8.2f} ms {n_bytes * n / ms / 1e6:8.0f} GB/s {n_bytes * n / ms / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
