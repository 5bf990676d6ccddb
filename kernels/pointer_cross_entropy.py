"""The compact head of a lexinvariant model: a softmax over the distinct symbols seen so far and one entry NEW, without its logits.

    z[t, s] = ⟨query_t, rows_s⟩ / √d  for s ≤ t that is the first occurrence of its symbol        Z_t = Σ_s e^z[t,s] + e^new_t
    loss_t  = log Z_t − z[t, target_t]                    the target has been seen, first at target_t
            = log Z_t − new_t + ln(n_vocab − n_seen_t)    it is new (target_t = −1)

What it costs. The plain version writes z, (batch, seq, seq), and reads it again for the mask, the sum, the target and backward. Here z
lives in registers, a tile at a time, and only loss and log Z are written: 8 bytes a position. A dense head would need the table of every
sequence, (batch, n_vocab, d), and logits (batch, seq, n_vocab): 8.4 and 4.2 GB for the paper's 64 × 512 with 32,128 symbols of width 1,024.

How it works. Like attention without values: a program takes BLOCK queries and walks over the tiles of keys up to them, keeping the largest
logit and the sum relative to it. Backward computes z again: with P = e^(z − log Z) and g the gradient of the loss,

    ∂query_t = g_t·(Σ_s P[t,s]·rows_s − rows_target) / √d        ∂new_t = g_t·(e^(new_t − log Z_t) − [target is new])
    ∂rows_s  = Σ_t g_t·(P[t,s] − [target_t = s])·query_t / √d    a second kernel, only where the rows are learned

    TRITON_INTERPRET=1 python -m kernels.pointer_cross_entropy      check against the plain version, on a CPU
    python -m kernels.pointer_cross_entropy                         the same on a GPU, then the timing table
"""

import math

import torch
import triton
import triton.language as tl

from kernels import run_as_program

BLOCK, CHUNK = 64, 64  # queries or keys a tile; width of the pieces of d
WIDEN = bool(triton.knobs.runtime.interpret)


@triton.jit
def tile(query_ptr, rows_ptr, t, s, seq, d, scale, WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """z of BLOCK queries t and BLOCK keys s of one sequence, (BLOCK, BLOCK) float32. WIDEN: the interpreter multiplies no bfloat16."""
    z = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(0, d, CHUNK):
        c = start + tl.arange(0, CHUNK)
        q = tl.load(query_ptr + t[:, None] * d + c[None, :], mask=(t[:, None] < seq) & (c[None, :] < d), other=0.0)
        k = tl.load(rows_ptr + s[:, None] * d + c[None, :], mask=(s[:, None] < seq) & (c[None, :] < d), other=0.0)
        if WIDEN:
            q, k = q.to(tl.float32), k.to(tl.float32)
        z = tl.dot(q, tl.trans(k), z, input_precision="ieee")
    return z * scale


@triton.jit
def seen(first_ptr, t, s, seq):
    """Which keys a query may point at: first occurrences that are not later than it."""
    first = tl.load(first_ptr + s, mask=s < seq, other=-1)
    return (first == s)[None, :] & (s[None, :] <= t[:, None])


@triton.jit
def forward_kernel(query_ptr, rows_ptr, first_ptr, target_ptr, new_ptr, n_seen_ptr, loss_ptr, log_z_ptr, seq, d, n_vocab, scale,
                   WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    sequence = tl.program_id(1).to(tl.int64) * seq
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < seq
    target = tl.load(target_ptr + sequence + t, mask=inside, other=-1)
    n_seen = tl.load(n_seen_ptr + sequence + t, mask=inside, other=1)
    new = tl.load(new_ptr + sequence + t, mask=inside, other=0.0).to(tl.float32)
    new = tl.where(n_seen == n_vocab, float("-inf"), new)
    top = new
    total = tl.where(new == float("-inf"), 0.0, 1.0)
    chosen = new - tl.log(tl.maximum(n_vocab - n_seen, 1).to(tl.float32))
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        s = start + tl.arange(0, BLOCK)
        z = tile(query_ptr + sequence * d, rows_ptr + sequence * d, t, s, seq, d, scale, WIDEN, BLOCK, CHUNK)
        z = tl.where(seen(first_ptr + sequence, t, s, seq), z, float("-inf"))
        larger = tl.maximum(top, tl.max(z, 1))
        safe = tl.where(larger == float("-inf"), 0.0, larger)  # nothing yet: e^(−inf − 0) = 0
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
        top = larger
        hit = s[None, :] == target[:, None]
        chosen = tl.where(tl.max(hit.to(tl.int32), 1) > 0, tl.sum(tl.where(hit, z, 0.0), 1), chosen)
    log_z = top + tl.log(total)
    tl.store(loss_ptr + sequence + t, log_z - chosen, mask=inside)
    tl.store(log_z_ptr + sequence + t, log_z, mask=inside)


@triton.jit
def backward_kernel(query_ptr, rows_ptr, first_ptr, target_ptr, log_z_ptr, grad_ptr, out_ptr, seq, d, scale, ROWS: tl.constexpr,
                    WIDEN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Gradient of BLOCK queries, or with ROWS of BLOCK keys: for each tile z again, then one product a piece of d."""
    sequence = tl.program_id(1).to(tl.int64) * seq
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query_ptr += sequence * d
    rows_ptr += sequence * d
    out_ptr += sequence * d
    start, end = (tl.program_id(0) * BLOCK, seq) if ROWS else (0, (tl.program_id(0) + 1) * BLOCK)
    for other in range(start, end, BLOCK):
        theirs = other + tl.arange(0, BLOCK)
        t, s = (theirs, mine) if ROWS else (mine, theirs)
        inside = t < seq
        z = tile(query_ptr, rows_ptr, t, s, seq, d, scale, WIDEN, BLOCK, CHUNK)
        log_z = tl.load(log_z_ptr + sequence + t, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + sequence + t, mask=inside, other=0.0)
        target = tl.load(target_ptr + sequence + t, mask=inside, other=-1)
        p = tl.where(seen(first_ptr + sequence, t, s, seq), tl.exp(z - log_z[:, None]), 0.0)
        p = (p - (s[None, :] == target[:, None]).to(tl.float32)) * (grad * scale)[:, None]  # (t, s)
        if ROWS:
            p = tl.trans(p)
        for start_c in range(0, d, CHUNK):
            c = start_c + tl.arange(0, CHUNK)
            other_ptr = query_ptr if ROWS else rows_ptr
            x = tl.load(other_ptr + theirs[:, None] * d + c[None, :], mask=(theirs[:, None] < seq) & (c[None, :] < d), other=0.0)
            spot = out_ptr + mine[:, None] * d + c[None, :]
            mask = (mine[:, None] < seq) & (c[None, :] < d)
            if WIDEN:
                x = x.to(tl.float32)
            tl.store(spot, tl.load(spot, mask=mask, other=0.0) + tl.dot(p.to(x.dtype), x, input_precision="ieee"), mask=mask)


class PointerCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, rows, first, target, new, n_seen, n_vocab):
        batch, seq, d = query.shape
        loss, log_z = torch.empty(2, batch, seq, device=query.device)
        query, rows, first, target, new, n_seen = (x.contiguous() for x in (query, rows, first, target, new, n_seen))
        grid = (triton.cdiv(seq, BLOCK), batch)
        forward_kernel[grid](query, rows, first, target, new, n_seen, loss, log_z, seq, d, n_vocab, 1 / math.sqrt(d), WIDEN, BLOCK, CHUNK)
        ctx.save_for_backward(query, rows, first, target, new, n_seen, log_z)
        ctx.n_vocab = n_vocab
        return loss

    @staticmethod
    def backward(ctx, grad):
        query, rows, first, target, new, n_seen, log_z = ctx.saved_tensors
        batch, seq, d = query.shape
        grad, grid, out = grad.float().contiguous(), (triton.cdiv(seq, BLOCK), batch), []
        for wanted, like in zip(ctx.needs_input_grad, (query, rows)):
            out.append(torch.zeros_like(like, dtype=torch.float32) if wanted else None)
            if wanted:
                backward_kernel[grid](query, rows, first, target, log_z, grad, out[-1], seq, d, 1 / math.sqrt(d), like is rows, WIDEN,
                                      BLOCK, CHUNK)
                out[-1] = out[-1].to(like.dtype)
        d_new = (grad * ((new.float() - log_z).exp() * (n_seen != ctx.n_vocab) - (target < 0).float())).to(new.dtype)
        return *out, None, None, d_new, None, None


def pointer_cross_entropy(query, rows, first, target, new, n_seen, n_vocab):
    """lexinvariant.pointer_cross_entropy. query, rows: (batch, seq, d) float32, bfloat16 or float16, of one dtype; first, target, n_seen:
    (batch, seq) int64; new (batch, seq) → loss (batch, seq) float32. Raises ValueError for other shapes and dtypes."""
    if query.dim() != 3 or rows.shape != query.shape or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"pointer_cross_entropy: want query and rows (batch, seq, d), float32, bfloat16 or float16; have {query.dtype} "
                         f"{tuple(query.shape)} and {rows.dtype} {tuple(rows.shape)}")
    for name, x in dict(first=first, target=target, new=new, n_seen=n_seen).items():
        if x.shape != query.shape[:2] or (name != "new" and x.dtype != torch.int64):
            raise ValueError(f"pointer_cross_entropy: want {name} {tuple(query.shape[:2])}, have {x.dtype} {tuple(x.shape)}")
    return PointerCrossEntropy.apply(query, rows.to(query.dtype), first, target, new, n_seen, n_vocab)


def sample(batch, seq, d, n_vocab, dtype, device):
    """Random symbols and vectors, with what the head must know of them."""
    import lexinvariant

    generator = torch.Generator().manual_seed(seq + d)
    symbols = torch.randint(n_vocab, (batch, seq + 1), generator=generator)
    query, rows = (torch.randn(batch, seq, d, generator=generator) for _ in range(2))
    rows = rows.gather(1, lexinvariant.pointers(symbols)[0][..., None].expand_as(rows))  # equal symbols, equal rows
    leaves = [x.to(device, dtype).requires_grad_() for x in (query, rows, torch.randn(batch, seq, generator=generator))]
    return *leaves, *(x.to(device) for x in lexinvariant.pointers(symbols))


def compare(batch, seq, d, n_vocab, dtype, device):
    """Largest error of loss and gradients, relative to the largest value, against the plain version in float64."""
    import lexinvariant

    query, rows, new, first, target, n_seen = sample(batch, seq, d, n_vocab, dtype, device)
    weight = torch.linspace(0.5, 1.5, batch * seq, device=device).view(batch, seq)
    exact = [x.detach().double().requires_grad_() for x in (query, rows, new)]
    results = []
    for head, (q, r, n) in ((pointer_cross_entropy, (query, rows, new)), (lexinvariant.pointer_cross_entropy, exact)):
        loss = head(q, r, first, target, n, n_seen, n_vocab)
        results.append([loss.detach(), *torch.autograd.grad((loss * weight).sum(), (q, r, n))])
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(0.01)) for a, b in zip(*results))


def check(device):
    for batch, seq, d, n_vocab in ((2, 65, 48, 5), (1, 1, 4, 1), (2, 40, 100, 3), (1, 130, 64, 1000)):
        for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            error = compare(batch, seq, d, n_vocab, dtype, device)
            assert error < most, (batch, seq, d, n_vocab, dtype, error)
    print("loss and gradients = plain version in float64: float32 to 1e-5, bfloat16 to 2e-2")


def benchmark():
    """Forward and backward at the paper's size, and peak memory."""
    import lexinvariant

    print(f"{torch.cuda.get_device_name()}, 64 × 512, d = 1024, 32,128 symbols, bfloat16")
    query, rows, new, first, target, n_seen = sample(64, 512, 1024, 32_128, torch.bfloat16, "cuda")
    for name, head in (("plain", lexinvariant.pointer_cross_entropy), ("torch.compile", torch.compile(lexinvariant.pointer_cross_entropy)),
                       ("kernel", pointer_cross_entropy)):
        def run(head=head):
            head(query, rows, first, target, new, n_seen, 32_128).sum().backward()

        ms = triton.testing.do_bench(run)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print(f"{name:14}{ms:9.2f} ms   peak {(torch.cuda.max_memory_allocated() - before) / 1e6:8.0f} MB")


if __name__ == "__main__":
    run_as_program(check, benchmark)
