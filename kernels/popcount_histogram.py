"""How many people failed t times, and how often each model failed, from packed outcomes.

    hist[g, t] = #{i in group g: popcount(words[i]) = t}        columns[g, j] = #{i in group g: bit j of words[i] is set}

What it costs. Outcomes of k models are ⌈k/32⌉ words of 32 bits a person, 4·⌈k/32⌉ bytes; with 10⁸ people and 100 models that is 1.6 GB,
and it must be read once. One byte an outcome would be 10 GB for the row sums and 10 GB again for the column sums. The plain version
stays packed too, but each of its thirty operations reads or writes a tensor.

How it works. A row's ones are counted in registers: neighbouring bits are added, then pairs, then nibbles, all of them at once. Counting
a column needs no transposing: (word >> s) & 0x01010101 keeps every eighth bit, and a sum of such words is four counters of 8 bits side by
side, which hold for 255 rows. So a program reads 255 tiles of BLOCK rows, adds to 8 such sums for each word of each of its BLOCK threads,
and only then takes the counters apart. One atomic add for each bin and column and program. Rows, and the columns of each word and
group, are counted by neighbouring programs, so that all but the first find the rows in the cache.

    TRITON_INTERPRET=1 python -m kernels.popcount_histogram      check against the plain version, on a CPU
    python -m kernels.popcount_histogram                         the same on a GPU, then the timing table
"""

import torch
import triton
import triton.language as tl

from kernels import run_as_program

BLOCK = 256  # people at a time; a program takes up to 255 such tiles


@triton.jit
def count_rows(words_ptr, group_ptr, hist_ptr, n, first, n_tiles, k, n_bins, WORDS: tl.constexpr, GROUPED: tl.constexpr,
               BINS: tl.constexpr, BLOCK: tl.constexpr):
    hist = tl.zeros([BINS], dtype=tl.int32)
    for tile in range(n_tiles):
        row = first + tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < n
        t = tl.zeros([BLOCK], dtype=tl.int32)
        for word in tl.static_range(WORDS):
            x = tl.load(words_ptr + row * WORDS + word, mask=inside, other=0)
            x = x - ((x >> 1) & 0x55555555)
            x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
            t += (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
        if GROUPED:
            t += tl.load(group_ptr + row, mask=inside, other=0).to(tl.int32) * (k + 1)
        hist += tl.histogram(tl.where(inside, t, n_bins), BINS)  # rows past the end fall in a bin that nobody reads
    bins = tl.arange(0, BINS)
    tl.atomic_add(hist_ptr + bins, hist.to(tl.int64), mask=(bins < n_bins) & (hist > 0))


@triton.jit
def popcount_histogram_kernel(words_ptr, group_ptr, hist_ptr, columns_ptr, n, n_tiles, k, n_bins, n_groups, WORDS: tl.constexpr,
                              GROUPED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(1).to(tl.int64) * n_tiles * BLOCK
    if tl.program_id(0) == 0:
        count_rows(words_ptr, group_ptr, hist_ptr, n, first, n_tiles, k, n_bins, WORDS, GROUPED, BINS, BLOCK)
    word = tl.program_id(0) % WORDS  # the first axis of the grid: a group and a word; neighbours read the same rows
    group = tl.program_id(0) // WORDS
    shift = tl.arange(0, 8)
    lanes = tl.zeros([BLOCK, 8], dtype=tl.int32)
    for tile in range(n_tiles):
        row = first + tile * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < n
        if GROUPED:
            inside = inside & (tl.load(group_ptr + row, mask=inside, other=-1) == group)
        x = tl.load(words_ptr + row * WORDS + word, mask=inside, other=0)
        lanes += (x[:, None] >> shift[None, :]) & 0x01010101
    for byte in tl.static_range(4):
        model = 32 * word + 8 * byte + shift
        counts = tl.sum((lanes >> 8 * byte) & 255, 0)
        tl.atomic_add(columns_ptr + group * k + model, counts.to(tl.int64), mask=(model < k) & (counts > 0))


def popcount_histogram(words, k, group=None, n_groups=1):
    """ecosystem.popcount_histogram in one launch. words: (n, ⌈k/32⌉) int32, contiguous; group: (n,) int32 or int64, or None. Returns hist
    (n_groups, k + 1) and columns (n_groups, k), int64. Raises ValueError for other shapes and dtypes."""
    n, width = words.shape
    if words.dtype != torch.int32 or not words.is_contiguous() or width != triton.cdiv(k, 32):
        raise ValueError(f"popcount_histogram: want contiguous int32 words (n, {triton.cdiv(k, 32)}) for {k} models, have {words.dtype} "
                         f"{tuple(words.shape)}")
    grouped = n_groups > 1
    if grouped and (group is None or group.shape != (n,) or group.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"popcount_histogram: {n_groups} groups need an int32 or int64 group for each of the {n} rows")
    n_bins = n_groups * (k + 1)
    hist = torch.zeros(n_groups, k + 1, dtype=torch.int64, device=words.device)
    columns = torch.zeros(n_groups, k, dtype=torch.int64, device=words.device)
    if n:
        n_tiles = min(255, triton.cdiv(n, BLOCK * 1024))  # small inputs: fewer rows a program, so that all multiprocessors work
        grid = (n_groups * width, triton.cdiv(n, n_tiles * BLOCK))
        popcount_histogram_kernel[grid](words, group if grouped else words, hist, columns, n, n_tiles, k, n_bins, n_groups, width, grouped,
                                        triton.next_power_of_2(n_bins + 1), BLOCK)
    return hist, columns


def sample(n, k, n_groups, device):
    """Packed outcomes in which every model has another error, and groups."""
    import ecosystem

    generator = torch.Generator().manual_seed(n + k)
    failed = torch.rand(n, k, generator=generator) < torch.linspace(0.02, 0.98, k)
    words = torch.from_numpy(ecosystem.pack_bits(failed.numpy()).copy()).to(device)
    return failed, words, torch.randint(n_groups, (n,), generator=generator).to(device)


def check(device):
    """The kernel against the plain version, on sizes that are no multiple of anything."""
    import ecosystem

    many = 300_000 if device == "cuda" else 600
    for n, k, n_groups in ((1, 1, 1), (1000, 31, 1), (777, 32, 3), (2051, 33, 2), (513, 100, 1), (many, 64, 4)):
        _, words, group = sample(n, k, n_groups, device)
        for a, b in zip(popcount_histogram(words, k, group, n_groups), ecosystem.popcount_histogram(words, k, group, n_groups)):
            assert torch.equal(a, b), (n, k, n_groups)
    print("kernel = plain version, to the last integer")


def benchmark():
    """Times on 10⁸ people, and bytes a second as a share of what a plain copy reaches on this card."""
    import ecosystem

    n = 10**8
    source, target = torch.empty(2, 2**28, device="cuda")
    copy = 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source))  # bytes a ms
    print(f"{torch.cuda.get_device_name()}, {n:,} people, copy {copy / 1e6:.0f} GB/s")
    compiled = torch.compile(ecosystem.popcount_histogram)
    for k in (3, 32, 100):
        words = torch.randint(-(2**31), 2**31, (n, triton.cdiv(k, 32)), dtype=torch.int32, device="cuda")
        if k % 32:
            words[:, -1] &= 2 ** (k % 32) - 1
        for name, run in (("plain", ecosystem.popcount_histogram), ("torch.compile", compiled), ("kernel", popcount_histogram)):
            ms = triton.testing.do_bench(lambda run=run, words=words, k=k: run(words, k))
            print(f"{k:4} models, {name:14}{ms:9.2f} ms {words.nbytes / ms / 1e6:8.0f} GB/s {words.nbytes / ms / copy:6.0%} of the copy")


if __name__ == "__main__":
    run_as_program(check, benchmark)
