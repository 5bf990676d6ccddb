"""The mixture of a Backpack's senses, forward and backward, without weights, senses or outputs of every head in memory.

    P_l[i, j] = softmax_{j ≤ i}(scale·⟨query_li, key_lj⟩)        o_i = Σ_l Σ_{j ≤ i} P_l[i, j]·C_jl,  C_jl = table[index_j, l]

What it costs. The plain version writes scores, mask and probabilities, (batch, n_sense, seq, seq) each, and the
gathered senses (batch, seq, n_sense, d). For the paper's small model a sequence of 512 has 8 MB of each of the first
and 13 MB of the second in 16 bits; the first grow with seq². Here only o and one log-sum a query and sense are
written. The products with the senses, 2·n_sense·seq²·d flops a sequence (half of it causal), are the plain version's;
the scores, over e = d/n_sense, are computed again for every piece of d.

Measured on 25 November 2026 (NVIDIA H200, torch 2.11, triton 3.6; d = 768, 16 senses, bfloat16, forward and backward):

                    32 × 512 tokens        8 × 2,048 tokens
    plain           7.39 ms   2.30 GB      23.2 ms    8.75 GB
    torch.compile   2.26 ms   1.42 GB      11.05 ms   4.45 GB
    kernel          4.40 ms   0.48 GB      11.19 ms   0.48 GB

It wins memory, a third to a ninth, and against the compiled plain version no time: backpack.py takes it from 2,048
positions on.

How it works. Attention, but the heads (senses) are summed, keys are narrow (e) and values wide (d). So two passes:
the first finds lse_li = log Σ_j exp(s_lij). Then a program has BLOCK queries and CHUNK columns of o, and adds up
exp(s − lse)·C over all senses and tiles of keys, with one accumulator and nothing to rescale. Backward, with G =
∂L/∂o, the same for all senses:

    dP_lij = ⟨G_i, C_jl⟩      δ_li = Σ_j P·dP      dS = P·(dP − δ)      ∂query_li = scale·Σ_j dS·key_lj      ∂key_lj = scale·Σ_i dS·query_li

∂query needs no δ beforehand: Σ_j dS·key = A − δ·R with A = Σ_j P·dP·key_j and R = Σ_j P·key_j, all three gathered in
one sweep, which also leaves δ for the last kernel: ∂key, and ∂C_jl = Σ_i P·G_i, added to the row of the token. Tokens
repeat, so these sums are atomic: in float32, in no fixed order.

    TRITON_INTERPRET=1 python -m kernels.sense_mix      check against the plain version, on a CPU
    python -m kernels.sense_mix                         the same on a GPU, then the table of time and memory
"""

from functools import partial

import torch
import triton
import triton.language as tl

from kernels import run_as_program

WIDEN = bool(triton.knobs.runtime.interpret)


def tile_sizes(dtype):
    """→ (BLOCK queries or keys a tile, CHUNK columns of d a piece). float32 tiles of the larger kind would not fit an SM of most cards."""
    return (32, 64) if dtype == torch.float32 else (64, 128)


@triton.jit
def load_tile(ptr, rows, columns, row_stride, inside, n_columns, WIDEN: tl.constexpr):
    """ptr[rows, columns], zero outside. WIDEN: to float32, since the interpreter multiplies no bfloat16."""
    x = tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=inside[:, None] & (columns[None, :] < n_columns), other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def scores(q, k, i, j, seq, scale):
    """scale·q·kᵀ for queries i and keys j, (BLOCK, BLOCK) float32; −inf where j > i or outside."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where((j[None, :] <= i[:, None]) & (j[None, :] < seq), s, float("-inf"))


@triton.jit
def lse_kernel(query_ptr, key_ptr, lse_ptr, seq, n_sense, e, scale, WIDEN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of queries, sense, sequence): log-sum of the scores, (batch, n_sense, seq)."""
    sense, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
    stride, base = n_sense * e, sequence * seq * n_sense * e + sense * e
    q = load_tile(query_ptr + base, i, c, stride, i < seq, e, WIDEN)
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = scores(q, load_tile(key_ptr + base, j, c, stride, j < seq, e, WIDEN), i, j, seq, scale)
        larger = tl.maximum(top, tl.max(s, 1))  # finite from the first tile on: key 0 is in every prefix
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(s - larger[:, None]), 1)
        top = larger
    tl.store(lse_ptr + (sequence * n_sense + sense) * seq + i, top + tl.log(total), mask=i < seq)


@triton.jit
def output_kernel(query_ptr, key_ptr, table_ptr, index_ptr, lse_ptr, out_ptr, seq, n_sense, e, d, scale, WIDEN: tl.constexpr,
                  E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of queries, piece of d, sequence): o, all senses in one accumulator."""
    sequence = tl.program_id(2).to(tl.int64)
    i, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    stride, base = n_sense * e, sequence * seq * n_sense * e
    o = tl.zeros([BLOCK, CHUNK], dtype=tl.float32)
    for sense in range(n_sense):
        q = load_tile(query_ptr + base + sense * e, i, c, stride, i < seq, e, WIDEN)
        lse = tl.load(lse_ptr + (sequence * n_sense + sense) * seq + i, mask=i < seq, other=0.0)
        for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
            j = start + tl.arange(0, BLOCK)
            s = scores(q, load_tile(key_ptr + base + sense * e, j, c, stride, j < seq, e, WIDEN), i, j, seq, scale)
            row = tl.load(index_ptr + sequence * seq + j, mask=j < seq, other=0)
            senses = load_tile(table_ptr + sense * d, row, columns, n_sense * d, j < seq, d, WIDEN)
            o = tl.dot(tl.exp(s - lse[:, None]).to(senses.dtype), senses, o, input_precision="ieee")
    tl.store(out_ptr + (sequence * seq + i[:, None]) * d + columns[None, :], o.to(out_ptr.dtype.element_ty),
             mask=(i[:, None] < seq) & (columns[None, :] < d))


@triton.jit
def products(grad_ptr, table_ptr, i, row, j, seq, d, stride, WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """dP: ⟨G_i, C_j⟩ of one sense, (BLOCK, BLOCK) float32, over all of d. row: of the tokens j in the table."""
    dp = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, d, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        g = load_tile(grad_ptr, i, columns, d, i < seq, d, WIDEN)
        senses = load_tile(table_ptr, row, columns, stride, j < seq, d, WIDEN)
        dp = tl.dot(g, tl.trans(senses), dp, input_precision="ieee")
    return dp


@triton.jit
def query_kernel(query_ptr, key_ptr, table_ptr, index_ptr, lse_ptr, grad_ptr, d_query_ptr, delta_ptr, seq, n_sense, e, d, scale,
                 WIDEN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of queries, sense, sequence): ∂query = scale·(A − δ·R), and δ."""
    sense, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
    stride, base = n_sense * e, sequence * seq * n_sense * e + sense * e
    at = (sequence * n_sense + sense) * seq + i
    q = load_tile(query_ptr + base, i, c, stride, i < seq, e, WIDEN)
    lse = tl.load(lse_ptr + at, mask=i < seq, other=0.0)
    grad_ptr += sequence * seq * d
    a, r = tl.zeros([BLOCK, E], dtype=tl.float32), tl.zeros([BLOCK, E], dtype=tl.float32)
    delta = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = load_tile(key_ptr + base, j, c, stride, j < seq, e, WIDEN)
        p = tl.exp(scores(q, k, i, j, seq, scale) - lse[:, None])
        row = tl.load(index_ptr + sequence * seq + j, mask=j < seq, other=0)
        dp = p * products(grad_ptr, table_ptr + sense * d, i, row, j, seq, d, n_sense * d, WIDEN, BLOCK, CHUNK)
        a = tl.dot(dp.to(k.dtype), k, a, input_precision="ieee")
        r = tl.dot(p.to(k.dtype), k, r, input_precision="ieee")
        delta += tl.sum(dp, 1)
    tl.store(delta_ptr + at, delta, mask=i < seq)
    tl.store(d_query_ptr + base + i[:, None] * stride + c[None, :], scale * (a - delta[:, None] * r),
             mask=(i[:, None] < seq) & (c[None, :] < e))


@triton.jit
def key_kernel(query_ptr, key_ptr, table_ptr, index_ptr, lse_ptr, delta_ptr, grad_ptr, d_key_ptr, d_table_ptr, seq, n_sense, e, d, scale,
               WIDEN: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of keys, sense, sequence): ∂key, and Σ_i P·G_i added to the tokens' rows of ∂table."""
    sense, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    j, c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E)
    stride, base = n_sense * e, sequence * seq * n_sense * e + sense * e
    k = load_tile(key_ptr + base, j, c, stride, j < seq, e, WIDEN)
    row = tl.load(index_ptr + sequence * seq + j, mask=j < seq, other=0)
    grad_ptr += sequence * seq * d
    d_key = tl.zeros([BLOCK, E], dtype=tl.float32)
    for start in range(tl.program_id(0) * BLOCK, seq, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = (sequence * n_sense + sense) * seq + i
        q = load_tile(query_ptr + base, i, c, stride, i < seq, e, WIDEN)
        lse, delta = tl.load(lse_ptr + at, mask=i < seq, other=0.0), tl.load(delta_ptr + at, mask=i < seq, other=0.0)
        p = tl.where(i[:, None] < seq, tl.exp(scores(q, k, i, j, seq, scale) - lse[:, None]), 0.0)
        ds = p * (products(grad_ptr, table_ptr + sense * d, i, row, j, seq, d, n_sense * d, WIDEN, BLOCK, CHUNK) - delta[:, None])
        d_key = tl.dot(tl.trans(ds).to(q.dtype), q, d_key, input_precision="ieee")
    tl.store(d_key_ptr + base + j[:, None] * stride + c[None, :], scale * d_key, mask=(j[:, None] < seq) & (c[None, :] < e))
    for start_c in range(0, d, CHUNK):
        columns = start_c + tl.arange(0, CHUNK)
        d_senses = tl.zeros([BLOCK, CHUNK], dtype=tl.float32)
        for start in range(tl.program_id(0) * BLOCK, seq, BLOCK):
            i = start + tl.arange(0, BLOCK)
            q = load_tile(query_ptr + base, i, c, stride, i < seq, e, WIDEN)
            lse = tl.load(lse_ptr + (sequence * n_sense + sense) * seq + i, mask=i < seq, other=0.0)
            p = tl.exp(scores(q, k, i, j, seq, scale) - lse[:, None])
            g = load_tile(grad_ptr, i, columns, d, i < seq, d, WIDEN)
            d_senses = tl.dot(tl.trans(p).to(g.dtype), g, d_senses, input_precision="ieee")
        tl.atomic_add(d_table_ptr + (row[:, None] * n_sense + sense) * d + columns[None, :], d_senses,
                      mask=(j[:, None] < seq) & (columns[None, :] < d))


class SenseMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, table, index, scale):
        query, key, table, index = (x.contiguous() for x in (query, key, table, index))
        batch, seq, n_sense, e = query.shape
        d = table.size(2)
        lse = torch.empty(batch, n_sense, seq, device=query.device)
        out = torch.empty(batch, seq, d, device=query.device, dtype=table.dtype)
        (block, chunk), width = tile_sizes(query.dtype), max(16, triton.next_power_of_2(e))  # keys padded with zeros to what tl.dot takes
        tiles = triton.cdiv(seq, block)
        lse_kernel[(tiles, n_sense, batch)](query, key, lse, seq, n_sense, e, scale, WIDEN, width, block)
        output_kernel[(tiles, triton.cdiv(d, chunk), batch)](query, key, table, index, lse, out, seq, n_sense, e, d, scale, WIDEN, width,
                                                            block, chunk)
        ctx.save_for_backward(query, key, table, index, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, table, index, lse = ctx.saved_tensors
        batch, seq, n_sense, e = query.shape
        d, grad = table.size(2), grad.to(table.dtype).contiguous()
        d_query, d_key = torch.empty(2, *query.shape, device=query.device)
        d_table, delta = torch.zeros_like(table, dtype=torch.float32), torch.empty_like(lse)
        block, chunk = tile_sizes(query.dtype)
        grid = (triton.cdiv(seq, block), n_sense, batch)
        sizes = (seq, n_sense, e, d, ctx.scale, WIDEN, max(16, triton.next_power_of_2(e)), block, chunk)
        query_kernel[grid](query, key, table, index, lse, grad, d_query, delta, *sizes)
        key_kernel[grid](query, key, table, index, lse, delta, grad, d_key, d_table, *sizes)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_table.to(table.dtype), None, None


def sense_mix(query, key, table, index, scale):
    """backpack.sense_mix for as many queries as keys. query, key: (batch, seq, n_sense, e); table: (rows, n_sense,
    d), all float32, bfloat16 or float16, of one dtype; index: (batch, seq) int64 → (batch, seq, d). Differentiable
    once. Raises ValueError for other shapes and dtypes. An index outside 0..rows − 1 is not looked for."""
    if query.dim() != 4 or key.shape != query.shape or table.dim() != 3 or table.size(1) != query.size(2):
        raise ValueError(f"sense_mix: want query and key (batch, seq, n_sense, e) and table (rows, n_sense, d); have {tuple(query.shape)}, "
                         f"{tuple(key.shape)} and {tuple(table.shape)}")
    if index.shape != query.shape[:2] or index.dtype != torch.int64:
        raise ValueError(f"sense_mix: want index {tuple(query.shape[:2])} int64, have {tuple(index.shape)} {index.dtype}")
    if not query.dtype == key.dtype == table.dtype or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"sense_mix: want query, key and table of one dtype, float32, bfloat16 or float16; have {query.dtype}, "
                         f"{key.dtype} and {table.dtype}")
    return SenseMix.apply(query, key, table, index, scale)


def draw(batch, seq, n_sense, e, d, rows, dtype, device):
    """Arguments of sense_mix with tokens that repeat, on sizes of the caller's choice."""
    torch.manual_seed(0)
    query, key = (torch.randn(batch, seq, n_sense, e, device=device).to(dtype).requires_grad_() for _ in range(2))
    table = torch.randn(rows, n_sense, d, device=device).to(dtype).requires_grad_()
    return query, key, table, torch.randint(rows, (batch, seq), device=device), e**-0.5


def errors(*sizes):
    """Root-mean-square errors of the output and of three gradients against the plain version in float64, over each
    one's root mean square: of the kernel, and of the plain version in the same dtype."""
    import backpack

    *tensors, index, scale = draw(*sizes)
    exact, results = [x.detach().double().requires_grad_() for x in tensors], []
    for mix, inputs in ((sense_mix, tensors), (backpack.sense_mix, tensors), (backpack.sense_mix, exact)):
        out = mix(*inputs, index, scale)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)])
    rms = lambda x: float(x.double().square().mean().sqrt())
    return [[rms(a.double() - b) / max(rms(b), 0.01) for a, b in zip(low, results[-1])] for low in results[:-1]]


CASES = ((2, 70, 3, 5, 20, 7), (1, 1, 1, 1, 1, 1), (1, 33, 1, 40, 40, 3), (2, 32, 4, 16, 100, 50))  # batch, seq, n_sense, e, d, rows
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # what storing the result costs


def check(device):
    for case in CASES:
        for dtype, rounding in ROUNDING.items():
            for mine, plain in zip(*errors(*case, dtype, device)):
                assert mine <= max(plain, rounding), (case, dtype, mine, plain)
    print("output and gradients are no farther from float64 than the plain version: float32 and bfloat16")


def forward_and_backward(mix, tensors, index, scale):
    return torch.autograd.grad(mix(*tensors, index, scale).sum(), tensors)


def benchmark():
    """Forward and backward at the small model's width, and peak memory above the inputs."""
    import backpack

    print(f"{torch.cuda.get_device_name()}, d = 768, 16 senses, bfloat16")
    mixes = {"plain": backpack.sense_mix, "torch.compile": torch.compile(backpack.sense_mix), "kernel": sense_mix}
    for batch, seq in ((32, 512), (8, 2048)):
        *tensors, index, scale = draw(batch, seq, 16, 48, 768, 4096, torch.bfloat16, "cuda")
        for name, mix in mixes.items():
            run = partial(forward_and_backward, mix, tensors, index, scale)
            run()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            print(f"{batch} × {seq:5}  {name:14}{triton.testing.do_bench(run):9.2f} ms {peak:7.2f} GB")


if __name__ == "__main__":
    run_as_program(check, benchmark)
