"""The mixture of a Backpack's senses, forward and backward, without the weights of every sense in memory.

    P_lij = softmax_{j ≤ i}(scale·⟨query_li, key_lj⟩)    o_i = Σ_l Σ_{j ≤ i} P_lij·C_jl    C_jl = table[index_j, l]

What it costs. The plain version writes scores and probabilities, (batch, n_sense, seq, seq), and the gathered senses.
Here only o and a log-sum a query and sense are written; the 2·n_sense·seq²·d flops a sequence are the same (half of
them causal), the narrow scores are computed again for every piece of d. Measured on 25 November 2026 (NVIDIA H200,
torch 2.11, triton 3.6; d = 768, 16 senses, bfloat16, forward and backward); written shorter and not measured since:

    32 × 512 tokens    plain 7.39 ms, 2.30 GB   torch.compile  2.26 ms, 1.42 GB   kernel  4.40 ms, 0.48 GB
    8 × 2,048 tokens   plain 23.2 ms, 8.75 GB   torch.compile 11.05 ms, 4.45 GB   kernel 11.19 ms, 0.48 GB

It wins memory, a third to a ninth, and no time: backpack.py takes it from 2,048 positions on.

How it works. Attention, but heads (senses) are summed, keys narrow, values wide. First lse_li = log Σ_j exp(s_lij);
then a program has BLOCK queries and CHUNK columns of o and adds up exp(s − lse)·C over senses and tiles of keys, with
nothing to rescale. Backward, G = ∂L/∂o: dP_lij = ⟨G_i, C_jl⟩, δ_li = Σ_j P·dP, dS = P·(dP − δ). One sweep finds δ and
∂query = scale·(Σ_j P·dP·key_j − δ·Σ_j P·key_j); another ∂key = scale·Σ_i dS·query_i, and ∂C_jl = Σ_i P·G_i, added to
the token's row: tokens repeat, so these sums are atomic, float32, in no fixed order.

    TRITON_INTERPRET=1 python -m kernels.sense_mix      check on a CPU; without it on a GPU, then the table
"""

from itertools import product

import torch
import triton
import triton.language as tl

from kernels import run_as_program

WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))  # to float32: the interpreter multiplies no bfloat16


@triton.jit
def load(ptr, rows, columns, stride, inside, n_columns):
    """ptr[rows, columns], zero outside."""
    x = tl.load(ptr + rows[:, None] * stride + columns[None, :], inside[:, None] & (columns[None, :] < n_columns), 0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def scores(q, k, i, j, seq, scale):
    """scale·q·kᵀ for queries i and keys j, (BLOCK, BLOCK) float32; −inf where j > i or outside."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where((j[None, :] <= i[:, None]) & (j[None, :] < seq), s, float("-inf"))


@triton.jit
def weights(q, k, i, j, lse, seq, scale):
    """P, (BLOCK, BLOCK) float32; 0 where j > i or outside. lse: pointers to those of the queries."""
    lse = tl.load(lse, mask=i < seq, other=float("inf"))
    return tl.exp(scores(q, k, i, j, seq, scale) - lse[:, None])


@triton.jit
def lse_kernel(query, key, lse, seq, n_sense, e, scale, E: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of queries, sense, sequence): log-sum of the scores, (batch, n_sense, seq)."""
    sense, sequence, stride = tl.program_id(1), tl.program_id(2).to(tl.int64), n_sense * e
    i, c, base = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E), sequence * seq * stride + sense * e
    q = load(query + base, i, c, stride, i < seq, e)
    top, total = tl.full([BLOCK], float("-inf"), dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        s = scores(q, load(key + base, j, c, stride, j < seq, e), i, j, seq, scale)
        larger = tl.maximum(top, tl.max(s, 1))  # finite from the first tile on: key 0 is in every prefix
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(s - larger[:, None]), 1)
        top = larger
    tl.store(lse + (sequence * n_sense + sense) * seq + i, top + tl.log(total), mask=i < seq)


@triton.jit
def output_kernel(query, key, table, index, lse, out, seq, n_sense, e, d, scale,
                  E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of queries, piece of d, sequence): o, all senses in one accumulator."""
    sequence, stride, c = tl.program_id(2).to(tl.int64), n_sense * e, tl.arange(0, E)
    i, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    o = tl.zeros([BLOCK, CHUNK], dtype=tl.float32)
    for sense in range(n_sense):
        base = sequence * seq * stride + sense * e
        q = load(query + base, i, c, stride, i < seq, e)
        for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
            j, at = start + tl.arange(0, BLOCK), (sequence * n_sense + sense) * seq + i
            p = weights(q, load(key + base, j, c, stride, j < seq, e), i, j, lse + at, seq, scale)
            row = tl.load(index + sequence * seq + j, mask=j < seq, other=0)
            senses = load(table + sense * d, row, columns, n_sense * d, j < seq, d)
            o = tl.dot(p.to(senses.dtype), senses, o, input_precision="ieee")
    tl.store(out + (sequence * seq + i[:, None]) * d + columns[None, :], o.to(out.dtype.element_ty),
             mask=(i[:, None] < seq) & (columns[None, :] < d))


@triton.jit
def products(grad, table, i, row, j, seq, d, stride, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """dP: ⟨G_i, C_j⟩ of one sense, (BLOCK, BLOCK) float32, over all of d. row: of the tokens j in the table."""
    dp = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, d, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        senses = load(table, row, columns, stride, j < seq, d)
        dp = tl.dot(load(grad, i, columns, d, i < seq, d), tl.trans(senses), dp, input_precision="ieee")
    return dp


@triton.jit
def query_kernel(query, key, table, index, lse, grad, d_query, delta, seq, n_sense, e, d, scale,
                 E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of queries, sense, sequence): ∂query = scale·(a − δ·r), and δ."""
    sense, sequence, stride = tl.program_id(1), tl.program_id(2).to(tl.int64), n_sense * e
    i, c, base = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E), sequence * seq * stride + sense * e
    q, at = load(query + base, i, c, stride, i < seq, e), (sequence * n_sense + sense) * seq + i
    a, r = tl.zeros([BLOCK, E], dtype=tl.float32), tl.zeros([BLOCK, E], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = load(key + base, j, c, stride, j < seq, e)
        p = weights(q, k, i, j, lse + at, seq, scale)
        row = tl.load(index + sequence * seq + j, mask=j < seq, other=0)
        dp = p * products(grad + sequence * seq * d, table + sense * d, i, row, j, seq, d, n_sense * d, BLOCK, CHUNK)
        a = tl.dot(dp.to(k.dtype), k, a, input_precision="ieee")
        r = tl.dot(p.to(k.dtype), k, r, input_precision="ieee")
        total += tl.sum(dp, 1)
    tl.store(delta + at, total, mask=i < seq)
    tl.store(d_query + base + i[:, None] * stride + c[None, :], scale * (a - total[:, None] * r),
             mask=(i[:, None] < seq) & (c[None, :] < e))


@triton.jit
def key_kernel(query, key, table, index, lse, grad, d_key, delta, d_table, seq, n_sense, e, d, scale,
               E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Program (block of keys, sense, sequence): ∂key, and Σ_i P·G_i added to the tokens' rows of ∂table."""
    sense, sequence, stride = tl.program_id(1), tl.program_id(2).to(tl.int64), n_sense * e
    j, c, base = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, E), sequence * seq * stride + sense * e
    k, row = load(key + base, j, c, stride, j < seq, e), tl.load(index + sequence * seq + j, mask=j < seq, other=0)
    dk, grad = tl.zeros([BLOCK, E], dtype=tl.float32), grad + sequence * seq * d
    for start in range(tl.program_id(0) * BLOCK, seq, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q, at = load(query + base, i, c, stride, i < seq, e), (sequence * n_sense + sense) * seq + i
        p = weights(q, k, i, j, lse + at, seq, scale)
        dp = products(grad, table + sense * d, i, row, j, seq, d, n_sense * d, BLOCK, CHUNK)
        ds = p * (dp - tl.load(delta + at, mask=i < seq, other=0.0)[:, None])
        dk = tl.dot(tl.trans(ds).to(q.dtype), q, dk, input_precision="ieee")
    tl.store(d_key + base + j[:, None] * stride + c[None, :], scale * dk, mask=(j[:, None] < seq) & (c[None, :] < e))
    for piece in range(0, d, CHUNK):
        columns, dc = piece + tl.arange(0, CHUNK), tl.zeros([BLOCK, CHUNK], dtype=tl.float32)
        for start in range(tl.program_id(0) * BLOCK, seq, BLOCK):
            i = start + tl.arange(0, BLOCK)
            q, at = load(query + base, i, c, stride, i < seq, e), (sequence * n_sense + sense) * seq + i
            p, g = weights(q, k, i, j, lse + at, seq, scale), load(grad, i, columns, d, i < seq, d)
            dc = tl.dot(tl.trans(p).to(g.dtype), g, dc, input_precision="ieee")
        tl.atomic_add(d_table + (row[:, None] * n_sense + sense) * d + columns[None, :], dc,
                      mask=(j[:, None] < seq) & (columns[None, :] < d))


class SenseMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, table, index, scale):
        query, key, table, index = tensors = [x.contiguous() for x in (query, key, table, index)]
        (batch, seq, n_sense, e), d = query.shape, table.size(2)
        lse, out = query.new_empty(batch, n_sense, seq, dtype=torch.float32), table.new_empty(batch, seq, d)
        block, chunk = (32, 64) if query.dtype == torch.float32 else (64, 128)  # more would not fit most cards' SM
        width = max(16, triton.next_power_of_2(e))  # keys padded with zeros to what tl.dot takes
        tiles = triton.cdiv(seq, block)
        lse_kernel[tiles, n_sense, batch](query, key, lse, seq, n_sense, e, scale, width, block)
        ctx.sizes = seq, n_sense, e, d, scale, width, block, chunk
        output_kernel[tiles, triton.cdiv(d, chunk), batch](*tensors, lse, out, *ctx.sizes)
        ctx.save_for_backward(*tensors, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, table, index, lse = ctx.saved_tensors
        d_query, d_key = torch.empty(2, *query.shape, device=query.device)
        d_table, delta = torch.zeros_like(table, dtype=torch.float32), torch.empty_like(lse)
        tensors, (seq, n_sense, *_, block, _) = (*ctx.saved_tensors, grad.to(table.dtype).contiguous()), ctx.sizes
        grid = triton.cdiv(seq, block), n_sense, len(query)
        query_kernel[grid](*tensors, d_query, delta, *ctx.sizes)
        key_kernel[grid](*tensors, d_key, delta, d_table, *ctx.sizes)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_table.to(table.dtype), None, None


def sense_mix(query, key, table, index, scale):
    """backpack.sense_mix for as many queries as keys. query, key: (batch, seq, n_sense, e); table: (rows, n_sense,
    d), all float32, bfloat16 or float16, of one dtype; index: (batch, seq) int64 → (batch, seq, d). Differentiable
    once. Raises ValueError for other shapes and dtypes. An index outside 0..rows − 1 is not looked for."""
    known = torch.float32, torch.bfloat16, torch.float16
    if (query.dim() != 4 or key.shape != query.shape or table.dim() != 3 or table.size(1) != query.size(2)
            or index.shape != query.shape[:2] or index.dtype != torch.int64 or query.dtype not in known
            or not query.dtype == key.dtype == table.dtype):
        have = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (query, key, table, index))
        raise ValueError("sense_mix: want query and key (batch, seq, n_sense, e), table (rows, n_sense, d), of one "
                         f"dtype, float32, bfloat16 or float16, and index (batch, seq) int64; have {have}")
    return SenseMix.apply(query, key, table, index, scale)


def draw(batch, seq, n_sense, e, d, rows, dtype, device):
    """Arguments of sense_mix with tokens that repeat."""
    torch.manual_seed(0)
    shapes = (batch, seq, n_sense, e), (batch, seq, n_sense, e), (rows, n_sense, d)
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.randint(rows, (batch, seq), device=device), e**-0.5


CASES = ((2, 70, 3, 5, 20, 7), (1, 1, 1, 1, 1, 1), (1, 33, 1, 40, 40, 3), (2, 32, 4, 16, 100, 50))  # sizes of draw


def check(device):
    """Output and gradients: root-mean-square error against float64 at most the plain version's in the same dtype."""
    from backpack import sense_mix as plain

    rms = lambda x: float(x.double().square().mean().sqrt())
    for case, (dtype, rounding) in product(CASES, ((torch.float32, 1e-5), (torch.bfloat16, 2**-8))):
        *tensors, index, scale = draw(*case, dtype, device)
        exact, results = [x.detach().double().requires_grad_() for x in tensors], []
        for mix, inputs in ((sense_mix, tensors), (plain, tensors), (plain, exact)):
            out = mix(*inputs, index, scale)
            weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
            results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)])
        for mine, other, truth in zip(*results):
            allowed = max(rms(other - truth), rounding * max(rms(truth), 0.01))
            assert rms(mine - truth) <= allowed, (case, dtype, rms(mine - truth), allowed)
    print("output and gradients are no farther from float64 than the plain version's: float32 and bfloat16")


def benchmark():
    """Forward and backward at the small model's width, and peak memory above the inputs."""
    from backpack import sense_mix as plain

    print(f"{torch.cuda.get_device_name()}, d = 768, 16 senses, bfloat16")
    for batch, seq in ((32, 512), (8, 2048)):
        *tensors, index, scale = draw(batch, seq, 16, 48, 768, 4096, torch.bfloat16, "cuda")
        for name, mix in (("plain", plain), ("torch.compile", torch.compile(plain)), ("kernel", sense_mix)):
            run = lambda mix=mix: torch.autograd.grad(mix(*tensors, index, scale).sum(), tensors)  # noqa: B023
            run()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peak = (torch.cuda.max_memory_allocated() - before) / 1e9
            print(f"{batch} × {seq:5}  {name:14}{triton.testing.do_bench(run):9.2f} ms {peak:7.2f} GB")


if __name__ == "__main__":
    run_as_program(check, benchmark)
