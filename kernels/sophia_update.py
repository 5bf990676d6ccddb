"""One Sophia step over all parameters in one launch.

    m ← β1·m + (1 − β1)·g        u = clip(m / max(γ·h, ε), 1)        θ ← θ·(1 − η·λ) − η·u

What it costs. The arithmetic is nothing; the bytes are everything. With float32 everywhere the step must read p, g,
m, h and write p, m: 24 bytes a parameter, once. Plain PyTorch reads or writes a tensor in each of its passes (about
96 bytes a parameter) and launches about ten kernels for each tensor: 3,000 launches for gpt2-medium's 292 tensors.
Here it is one launch and 24 bytes. For scale: AdamW moves 28 (it writes v as well).

How it works. A launch cannot take a list of tensors, so it takes a table of their addresses. Each program handles BLOCK
consecutive elements of one tensor; two more tables, indexed by program, say of which tensor and from which element on.

    TRITON_INTERPRET=1 python -m kernels.sophia_update      check against the plain version, on a CPU
    python -m kernels.sophia_update                         the same on a GPU, then the timing table

Measured on 25 November 2026 (NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6, gpt2-medium's tensors, copy 3,004 GB/s),
when the kernel also counted clipped coordinates: plain 19.0 ms, torch.compile tensor by tensor 16.2, kernel 2.82 (101
% of the copy), torch's fused AdamW 3.82; 1.2 ms of Python on top in a training loop. Without the count, and with the
table of addresses looked up by addresses alone (less Python): not measured. """

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels import run_as_program

BLOCK = 4096  # elements a program: 8 warps × 32 threads × 16 elements
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointer(row_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """An address out of the table. subtle: the compiler knows nothing of numbers that come out of a table. Told that
    addresses, sizes and first elements are multiples of 16 it moves 16 bytes an instruction instead of one
    element."""
    address = tl.load(row_ptr + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def sophia_update_kernel(table_ptr, tensor_ptr, first_ptr, lr, beta1, gamma, eps, weight_decay,
                         P: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = table_ptr + 5 * tl.load(tensor_ptr + program)  # addresses of p, g, m, h, then the size
    p_ptr, g_ptr = pointer(row, 0, P, ALIGNED), pointer(row, 1, G, ALIGNED)
    m_ptr, h_ptr = pointer(row, 2, tl.float32, ALIGNED), pointer(row, 3, tl.float32, ALIGNED)
    first, size = tl.load(first_ptr + program), tl.load(row + 4)
    if ALIGNED:
        first, size = tl.multiple_of(first, 16), tl.multiple_of(size, 16)
    i = first + tl.arange(0, BLOCK)
    inside = i < size

    p = tl.load(p_ptr + i, mask=inside).to(tl.float32)
    g = tl.load(g_ptr + i, mask=inside).to(tl.float32)
    m = tl.load(m_ptr + i, mask=inside)
    h = tl.load(h_ptr + i, mask=inside)
    m += (1 - beta1) * (g - m)
    u = m / tl.maximum(gamma * h, eps, propagate_nan=tl.PropagateNan.ALL)  # a NaN must not become a step
    u = tl.minimum(tl.maximum(u, -1.0, propagate_nan=tl.PropagateNan.ALL), 1.0, propagate_nan=tl.PropagateNan.ALL)
    p = p * (1 - lr * weight_decay) - lr * u
    tl.store(m_ptr + i, m, mask=inside)
    tl.store(p_ptr + i, p.to(P), mask=inside)


@lru_cache(16)
def programs(sizes, device):
    """For tensors of these sizes: (tensor, first element) of every program, two tables."""
    counts = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * BLOCK
    return tensor.to(device), first.to(device)


@lru_cache(16)
def addresses(table, device):
    """The table on the device; a training loop's allocator tends to hand out the same addresses at each step."""
    return torch.tensor(table, dtype=torch.int64).to(device)


def sophia_update_(params, grads, momenta, hessians, lr, beta1, gamma, eps, weight_decay):
    """sophia.sophia_update_ over lists of tensors, in place, in one launch for each combination of dtypes.

    params and grads: float32, bfloat16 or float16; momenta and hessians: float32, laid out as their parameter. A
    gradient of another layout is copied first. Raises ValueError for parameters with gaps or overlaps, other dtypes,
    shapes or devices. """
    groups = {}
    for row in zip(params, grads, momenta, hessians, strict=True):
        p, g, m, h = row
        if any(t.shape != p.shape or t.device != p.device for t in row):
            raise ValueError(f"sophia_update_: {[tuple(t.shape) for t in row]} on {[str(t.device) for t in row]}")
        if p.dtype not in TYPES or g.dtype not in TYPES or not m.dtype == h.dtype == torch.float32:
            raise ValueError(f"sophia_update_: {p.dtype}, {g.dtype}, {m.dtype}, {h.dtype}; averages must be float32")
        if not torch.ops.aten.is_non_overlapping_and_dense(p):
            raise ValueError(f"sophia_update_: {tuple(p.shape)} with strides {p.stride()} has gaps or overlaps")
        same = [t.stride() == p.stride() or t.is_contiguous() and p.is_contiguous() for t in row]
        if not same[2] or not same[3]:
            raise ValueError("sophia_update_: averages of another layout than their parameter's")
        if p.numel():
            g = g if same[1] else torch.empty_like(p, dtype=g.dtype).copy_(g)
            groups.setdefault((p.device, p.dtype, g.dtype), []).append((p, g, m, h))
    for (device, *dtypes), rows in groups.items():
        tensor, first = programs(tuple(p.numel() for p, *_ in rows), device)
        table = tuple((*(t.data_ptr() for t in row), row[0].numel()) for row in rows)
        aligned = all(number % 16 == 0 for row in table for number in row)
        sophia_update_kernel[(len(tensor),)](
            addresses(table, device), tensor, first, lr, beta1, gamma, eps, weight_decay,
            *(TYPES[d] for d in dtypes), aligned, BLOCK, num_warps=8)


def check(device):
    """The kernel against the plain version, on sizes that are no multiple of anything and on a transposed gradient."""
    import sophia

    shapes = [(1,), (127,), (33, 31), (4097,), (0,), (3, 5, 7)]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        torch.manual_seed(0)
        dtypes = dtype, dtype, torch.float32, torch.float32
        plain = [[torch.randn(shape).to(device, d) for shape in shapes] for d in dtypes]
        plain[1][2] = torch.randn(31, 33).to(device, dtype).t()
        fused = [[t.clone() for t in column] for column in plain]
        for row in zip(*plain):
            sophia.sophia_update_(*row, 1e-2, 0.9, 0.5, 1e-12, 0.1)
        sophia_update_(*fused, 1e-2, 0.9, 0.5, 1e-12, 0.1)
        for a, b in zip(plain[0] + plain[2], fused[0] + fused[2]):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        print(f"{dtype}: kernel = plain version")


def benchmark():
    """Times over gpt2-medium's tensors, and bytes a second as a share of what a plain copy reaches on this card."""
    import sophia

    params = [p.detach() for p in sophia.GPT(*sophia.SIZES["gpt2-medium"][:4], 50257).cuda().parameters()]
    columns = [params, *([torch.rand_like(p) for p in params] for _ in range(3))]
    n, settings = sum(p.numel() for p in params), (1e-5, 0.96, 0.05, 1e-12, 0.2)
    for p, g in zip(params, columns[1]):
        p.grad = g
    adam = torch.optim.AdamW(params, 1e-5, fused=True)
    compiled = torch.compile(sophia.sophia_update_, dynamic=True)
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    runs = [("plain", 24, lambda: [sophia.sophia_update_(*row, *settings) for row in zip(*columns)]),
            ("torch.compile", 24, lambda: [compiled(*row, *settings) for row in zip(*columns)]),
            ("kernel", 24, lambda: sophia_update_(*columns, *settings)),
            ("torch's fused AdamW", 28, adam.step)]
    print(f"{torch.cuda.get_device_name()}, gpt2-medium, {n / 1e6:.0f}M parameters, copy {copy / 1e6:.0f} GB/s")
    with torch.no_grad():
        for name, n_bytes, run in runs:
            ms = triton.testing.do_bench(run)
            rate = n_bytes * n / ms
            print(f"{name:22}{ms:8.2f} ms {rate / 1e6:8.0f} GB/s {rate / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
