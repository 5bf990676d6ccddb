"""Random numbers without a state: a block cipher of few rounds turns a counter into four random words, the same on
every device.

    philox(c0, c1, c2, c3; k0, k1) → x0, x1, x2, x3        ten rounds, k0 += 0x9E3779B9, k1 += 0xBB67AE85 between them:
    c0, c1, c2, c3 ← hi(c2·0xCD9E8D57) ^ c1 ^ k0, lo(c2·0xCD9E8D57), hi(c0·0xD2511F53) ^ c3 ^ k1, lo(c0·0xD2511F53)

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). A sequential
generator must be asked in order, and torch's CPU and CUDA generators give different numbers for one seed. Here the
caller says which number it wants: put what identifies it (call, step, machine, …) into the counter and the seed into
the key. Any element can be had alone, again, and elsewhere.

What it costs. Twenty 32 × 32 → 64 bit products, forty exclusive ors and eighteen additions for four words: about twenty
integer instructions a word, and no bytes at all. Numbers made in registers beat numbers read from memory wherever they
are used only once.

Two distributions of mean 0 and variance 1. The first is an integer until its last operation, so it is equal to the last
bit on every device; the second goes through log, sin and cos, which differ in the last place from device to device.

    rademacher    ±1 by one bit: 128 numbers a call                                                          E z⁴ = 1
    gaussian      Box-Muller: two words are a radius √(−2 ln u) and an angle; at most 5.77, never infinite   E z⁴ = 3

This file holds device functions for other kernels to call, and one kernel that lays their results open for the check.

    TRITON_INTERPRET=1 python -m kernels.philox      known answers and the plain version, on a CPU
    python -m kernels.philox                         the same on a GPU, then the rates
"""

import torch
import triton
import triton.language as tl

from kernels import run_as_program

KNOWN = {  # (counter, key, rounds): words; from the known-answer file of the authors' library Random123
    ((0, 0, 0, 0), 0, 10): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((2**32 - 1,) * 4, 2**64 - 1, 10): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 10): (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ((0, 0, 0, 0), 0, 7): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
}


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """uint32 counters and keys, blocks or scalars that broadcast → four uint32 words."""
    for _ in tl.static_range(ROUNDS):
        a, b = c0, c2
        c0 = tl.umulhi(b, 0xCD9E8D57) ^ c1 ^ k0
        c1 = b * 0xCD9E8D57
        c2 = tl.umulhi(a, 0xD2511F53) ^ c3 ^ k1
        c3 = a * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def rademacher(word, bit, coef):
    """coef·z of float32: +coef where this bit of the uint32 word is 0, −coef where it is 1.

    subtle: no product and no conversion, the bit goes up to the place of the sign and is xored in."""
    sign = (word << (31 - bit)) & 0x80000000
    return (coef.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def gaussian(radius, angle):
    """Box-Muller of two uint32 words → two independent normals. u = (23 bits + ½)/2²³ is never 0; an angle has 24."""
    u = ((radius >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    r = tl.sqrt(-2.0 * tl.log(u))
    theta = (angle >> 8).to(tl.float32) * 3.7450702829238413e-07  # 2π·2⁻²⁴
    return r * tl.cos(theta), r * tl.sin(theta)


@triton.jit
def words_kernel(counter_ptr, words_ptr, z_ptr, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    c0 = tl.load(counter_ptr + 6 * i, mask=inside).to(tl.uint32)
    c1 = tl.load(counter_ptr + 6 * i + 1, mask=inside).to(tl.uint32)
    c2 = tl.load(counter_ptr + 6 * i + 2, mask=inside).to(tl.uint32)
    c3 = tl.load(counter_ptr + 6 * i + 3, mask=inside).to(tl.uint32)
    k0 = tl.load(counter_ptr + 6 * i + 4, mask=inside).to(tl.uint32)
    k1 = tl.load(counter_ptr + 6 * i + 5, mask=inside).to(tl.uint32)
    x0, x1, x2, x3 = philox(c0, c1, c2, c3, k0, k1, ROUNDS)
    z0, z1 = gaussian(x0, x1)
    tl.store(words_ptr + 4 * i, x0.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * i + 1, x1.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * i + 2, x2.to(tl.int64), mask=inside)
    tl.store(words_ptr + 4 * i + 3, x3.to(tl.int64), mask=inside)
    one = tl.full([BLOCK], 1.0, tl.float32)
    tl.store(z_ptr + 4 * i, rademacher(x0, tl.zeros([BLOCK], tl.uint32), one), mask=inside)
    tl.store(z_ptr + 4 * i + 1, rademacher(x3, tl.full([BLOCK], 31, tl.uint32), one), mask=inside)
    tl.store(z_ptr + 4 * i + 2, z0, mask=inside)
    tl.store(z_ptr + 4 * i + 3, z1, mask=inside)


def random_words(counters, rounds=10):
    """counters: (n, 6) int64, each 0 ≤ c < 2³²: c0, c1, c2, c3, k0, k1 → words (n, 4) int64, and (n, 4) float32 made
    of them: rademacher (bit 0 of x0, bit 31 of x3), gaussian (x0, x1), both. For checks: other kernels call the
    device functions."""
    if counters.dtype != torch.int64 or counters.dim() != 2 or counters.size(1) != 6 or not counters.is_contiguous():
        raise ValueError(f"philox: want contiguous int64 (n, 6), have {counters.dtype} {tuple(counters.shape)}")
    n = len(counters)
    words = torch.empty(n, 4, dtype=torch.int64, device=counters.device)
    z = torch.empty(n, 4, device=counters.device)
    if n:
        words_kernel[(triton.cdiv(n, 256),)](counters, words, z, n, rounds, 256)
    return words, z


def check(device):
    """Random123's known answers; then random counters against the plain version."""
    import spsa_distributed

    for (counter, key, rounds), answer in KNOWN.items():
        row = torch.tensor([[*counter, key & 0xFFFFFFFF, key >> 32]], device=device)
        assert random_words(row, rounds)[0].tolist() == [list(answer)], (counter, key, rounds)
    print(f"{len(KNOWN)} known answers of Random123")
    counters = torch.randint(2**32, (1001, 6), generator=torch.Generator().manual_seed(0)).to(device)
    key = int(counters[0, 4]) | int(counters[0, 5]) << 32
    counters[:, 4:] = counters[0, 4:]
    words, z = random_words(counters)
    plain = spsa_distributed.philox(*counters[:, :4].cpu().numpy().astype("u8").T, key)
    assert words.cpu().numpy().tolist() == plain.tolist()
    signs = spsa_distributed.rademacher(plain)
    assert torch.equal(z[:, :2].cpu(), signs[:, [0, 127]])
    gap = (z[:, 2:].cpu() - spsa_distributed.gaussian(plain)[:, :2]).abs().max()
    assert gap < 2e-6, gap
    print(f"1001 counters: words and rademacher equal to the plain version, gaussian within {float(gap):.1e}")


def benchmark():
    """What one number costs when it is made in registers: rates by perturb's kernel, which does little else."""
    from kernels import perturb

    perturb.benchmark()


if __name__ == "__main__":
    run_as_program(check, benchmark)
