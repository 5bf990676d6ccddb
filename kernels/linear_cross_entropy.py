"""Output head and loss, in chunks, without the full table of logits; on wish with targets drawn from the model.

    z = hidden·weightᵀ      loss = mean over targets y ≥ 0 of  log Σ_v exp z_v − z_y
    ŷ = argmax_v (z_v + Gumbel_v) ~ softmax(z)

What it costs. For 8 × 1,024 tokens and GPT-2's 50,304 rows the logits are 0.8 GB in bfloat16; the plain version keeps
them, a float32 copy (1.6 GB), its log-softmax and its gradient (1.6 GB each). Drawing labels from a softmax takes as
much again. Here the tokens go by in chunks of 4,096 rows (0.4 GB): one matmul makes the chunk's logits, one kernel
replaces them by their gradient where they lie, two matmuls turn that into the gradients of hidden and weight. The
flops are the plain version's, 2·N·V·d forward and 4·N·V·d backward, since nothing is computed twice; only the order
differs: the backward pass runs within the forward one, and `backward` just multiplies by the incoming scalar.

How the kernel works. One program a row, two sweeps over its columns. The first keeps a running maximum and a running
sum of exponentials, the target's logit and, when sampling, the best z + Gumbel and its logit. The second writes
(softmax − one-hot)/n. subtle: it must load nothing but its own columns, for other warps may have written theirs
already. The noise is Philox(seed; column, row): the same whatever the block and chunk sizes. Columns from n_vocab on
are padding: probability zero.

    TRITON_INTERPRET=1 python -m kernels.linear_cross_entropy      check against the plain version, on a CPU
    python -m kernels.linear_cross_entropy                         the same on a GPU, then the table of time and memory

What it is for: drawing the labels, which neither torch.compile nor torch's own chunked head does. Measured on 25
November 2026 (NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6; 8,192 tokens, d = 1,024, 50,304 rows) with chunks of
1,024 rows:

                       given labels            drawn labels
    plain              15.1 ms    4.95 GB      21.9 ms
    torch.compile       4.70 ms   1.65 GB
    kernel              6.76 ms   0.43 GB       8.56 ms

So a training loss goes by the compiled plain version and the drawn labels by the kernel. Chunks of 4,096 rows (the
float32 table of weight gradients is read and written twice instead of eight times): not measured. """

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import run_as_program


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, count_ptr, first_row, n_vocab, n_columns, seed,
                         SAMPLE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z_ptr = logits_ptr + row.to(tl.int64) * n_columns
    target = tl.load(targets_ptr + row)
    largest, total = -float("inf"), 0.0  # max z and Σ exp(z − max) of the columns so far
    best, choice, z_choice, z_target = -float("inf"), 0, 0.0, 0.0
    for start in range(0, n_vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < n_vocab, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(z))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new))
        largest = new
        z_target += tl.sum(tl.where(column == target, z, 0.0))
        if SAMPLE:
            zero = column * 0
            random, _, _, _ = tl.philox(seed, column, zero + first_row + row, zero, zero)
            uniform = tl.maximum(tl.uint_to_uniform_float(random), 1e-10)  # in (0, 1)
            noisy = z - tl.log(-tl.log(uniform))
            if tl.max(noisy) > best:
                best = tl.max(noisy)
                choice = start + tl.argmax(noisy, 0)
                z_choice = tl.sum(tl.where(column == choice, z, 0.0))
    if SAMPLE:
        z_target = z_choice
        target = tl.where(target >= 0, choice.to(tl.int64), target)
        tl.store(targets_ptr + row, target)
    log_total = largest + tl.log(total)
    valid = target >= 0
    tl.store(losses_ptr + row, tl.where(valid, log_total - z_target, 0.0))
    if GRADIENT:
        scale = tl.where(valid, 1.0 / tl.load(count_ptr), 0.0)
        for start in range(0, n_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + column, mask=column < n_vocab, other=-float("inf")).to(tl.float32)
            gradient = (tl.exp(z - log_total) - tl.where(column == target, 1.0, 0.0)) * scale
            tl.store(z_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=column < n_columns)


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n_vocab, seed, chunk):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        with torch.autocast(device, enabled=False):  # the casts below are the ones that autocast would make, made once
            h, w = hidden.to(dtype), weight.to(dtype)
            gradient = any(ctx.needs_input_grad)
            losses = torch.empty(len(h), dtype=torch.float32, device=h.device)
            targets = targets.clone()
            count = (targets >= 0).sum().clamp(min=1).float()
            grad_h = torch.empty_like(h) if gradient else None
            grad_w = torch.zeros_like(w, dtype=torch.float32) if gradient else None
            for i in range(0, len(h), chunk):
                part = slice(i, i + chunk)
                logits = F.linear(h[part], w)  # (chunk, rows)
                cross_entropy_kernel[(len(logits),)](
                    logits, targets[part], losses[part], count, i, n_vocab, logits.size(1), seed or 0,
                    seed is not None, gradient, min(4096, triton.next_power_of_2(logits.size(1))), num_warps=8)
                if gradient:  # logits now holds their gradient
                    torch.mm(logits, w, out=grad_h[part])
                    grad_w += logits.t() @ h[part]
        if gradient:
            ctx.save_for_backward(grad_h.to(hidden.dtype), grad_w.to(weight.dtype))
        ctx.mark_non_differentiable(targets)
        return losses.sum() / count, targets

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grad_loss, grad_w * grad_loss, None, None, None, None


def linear_cross_entropy(hidden, weight, targets, n_vocab=None, seed=None, chunk=4096):
    """sophia.linear_cross_entropy with memory for `chunk` rows of logits. Differentiable once. The draws differ from
    the plain version's (another generator) and have the same distribution."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1) or targets.shape != hidden.shape[:1]:
        raise ValueError(f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
                         f"{tuple(targets.shape)} should be (tokens, d), (rows, d) and (tokens,)")
    if hidden.dtype == torch.float64 or targets.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: hidden of {hidden.dtype}, targets of {targets.dtype}; takes float32, "
                         "bfloat16 or float16, and int64")
    n_vocab = weight.size(0) if n_vocab is None else n_vocab
    return LinearCrossEntropy.apply(hidden, weight, targets, n_vocab, seed, chunk)


def check(device):
    """Loss, gradients and draws against the plain version, on sizes that are no multiple of anything."""
    import sophia

    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        hidden = torch.randn(37, 24, device=device).to(dtype).requires_grad_()
        weight = torch.randn(104, 24, device=device).mul_(0.5).to(dtype).requires_grad_()
        targets = torch.randint(99, (37,), device=device)
        targets[3] = -1
        plain, _ = sophia.linear_cross_entropy(hidden, weight, targets, 99)
        fused, _ = linear_cross_entropy(hidden, weight, targets, 99, chunk=16)
        torch.testing.assert_close(fused, plain, rtol=tolerance, atol=tolerance)
        for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (fused, plain))):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        _, drawn = linear_cross_entropy(hidden, weight, targets, 99, seed=1)
        assert drawn[3] == -1 and drawn.max() < 99
        print(f"{dtype}: loss {float(fused.detach()):.6f} and gradients = plain version's; draws inside the vocabulary")


def benchmark():
    """Time and peak memory of loss and gradients for 8 × 1,024 tokens of gpt2-medium's head."""
    import time

    import sophia

    hidden = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50304, 1024, device="cuda", dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    targets = torch.randint(50257, (8192,), device="cuda")
    print(f"{torch.cuda.get_device_name()}, 8192 tokens, d = 1024, 50304 rows, bfloat16")
    plain = sophia.linear_cross_entropy
    heads = {"plain": plain, "torch.compile": torch.compile(plain), "kernel": linear_cross_entropy,
             "auto-chunker": torch.compile(plain, options={"auto_chunker.enable": True})}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13; without padding columns
        options = torch.nn.LinearCrossEntropyOptions()
        heads["torch's own"] = lambda h, w, y, n, seed: [F.linear_cross_entropy(h, w, y, options=options)]
    for name, head in heads.items():
        for seed in (None, 0) if name in ("plain", "kernel") else (None,):
            times = []
            for _ in range(8):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.cuda.synchronize()
                start = time.perf_counter()
                torch.autograd.grad(head(hidden, weight, targets, 50257, seed)[0], (hidden, weight))
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            peak, flops = torch.cuda.max_memory_allocated() - before, 6 * 8192 * 50304 * 1024
            print(f"{name:14}{'given' if seed is None else 'drawn'} targets {min(times) * 1e3:8.2f} ms "
                  f"{flops / min(times) / 1e12:6.0f} TFLOP/s {peak / 1e9:6.2f} GB above the inputs")


if __name__ == "__main__":
    run_as_program(check, benchmark)
