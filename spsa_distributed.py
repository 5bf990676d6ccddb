"""Fine-tuning on many machines with one real byte per gradient (Zelikman, Huang, Liang, Haber, Goodman; arXiv 2306.10015), on top of MeZO
(Malladi et al.; arXiv 2305.17333).

The problem. Data-parallel training sends 4 bytes a weight and step: 498 MB for the smallest GPT-2. Home connections cannot.

The idea. Two forward passes at θ ± εz, z random, give one number, the projected gradient g; g·z estimates the gradient. z comes from
a seed that everybody can work out from (step, machine, sample), so a machine has to send only g, and a byte is enough for it.

    g = (L(θ + εz) − L(θ − εz)) / 2ε              SPSA, on a machine's own batch; no backward pass, no memory beside inference
    c = sign(g)·(round(8·ln|g|) + 64)             the byte: 3.8e-4 ≤ |g| ≤ 2631, error at most 6.5 %; −128: no contribution
    θ ← θ − η/√n·Σ ĝ(c)·z                         over the n bytes of a step, the same on every machine, to the last bit
    z = noise(key; element, step, machine, sample)          Philox4x32-10, equal on every device (rademacher, binomial)

So the run is its log. A machine that joins replays the bytes; one that dies takes nothing with it; the weights that come out are the
initial weights and a file of n + 3 bytes a step. Two things must hold for that, and floating point grants neither by itself. Restoring
θ must be exact: weights and all changes are multiples of a grid constant q, so float32 adds them without rounding. And all must agree
which bytes a step has: a notary, a process with a TCPStore, writes that down first and publishes it then.

How to run it.

    python spsa_distributed.py                   1, 2 and 4 machines, learning rates swept; kill -9 and join with real processes (2 minutes)
    python spsa_distributed.py serve --machines 2                      the notary of a run on any number of computers; in other terminals:
    python spsa_distributed.py join --connect HOST:29500               a machine; again at any time, from anywhere
    python spsa_distributed.py replay --log out/spsa_distributed/serve/run.log           the weights out of the log
    python spsa_distributed.py train --model gpt2                      SST-2 (downloads); torchrun --nproc_per_node=N: N machines
    python spsa_distributed.py compare | comm | bench                  the byte, the grid, the gradient; bytes a step; cost of a step

What we measured (2 shared cores of an AMD EPYC, torch 2.13.0, seeds 0-2; a GPT of 102,016 weights, pretrained here, that must learn to
follow the majority of three adjectives; steps until the test cross entropy falls from .387 to .25, evaluated every 5; best of 4 learning
rates a factor of 2 apart for each row, chosen on three other seeds):

    python spsa_distributed.py                   1 machine    2 machines   4 machines   4, float32 scalars   Adam, backpropagation
    steps                                        93 ± 8       67 ± 12      25 ± 0       25 ± 0               5 ± 0
    bytes sent by a machine until then           93           67           25           100                  2,040,320

Four machines take 3.7 times fewer steps than one, for 1.1 times its batches; two gain only 1.4. A finer search of learning rates could
move that. A byte does as well as a float32. First-order training needs a twentieth of the batches: the byte buys bandwidth, not compute.
`compare`, one machine at learning rate 1e-3: to .25 in 93 steps by a byte, 93 by a float32, 90 with gaussian noise.

    python spsa_distributed.py compare           grid, float32    naive, float32    naive, bfloat16     (naive: MeZO's add and subtract)
    drift by 300 probes without an update        0                0.00016 ε         2.2 ε               (rms)
    steps to .25; cross entropy after 150        93; .230 ± .064  93; .230 ± .064   97; .206 ± .028

What did not hold: that naive bfloat16 fails. Its weights wander by twice ε and cannot be replayed, but here it learns as fast. What was
not run: GPT-2 on SST-2, and anything on a GPU. The paper's figures we could not check, and name none.

What is ours. The authors' released code computes a code of 9 bits, then sends the float as text; seeds torch's own generators, so that
all machines must be alike; hands a newcomer the whole model; and compares printed weights. Here the byte is the only thing on the wire,
noise is counter-based, a newcomer gets the log, and hashes are of all bits. `--noise gaussian` is the paper's noise; log, sin and cos
differ in the last place between devices, so use it among like machines only.

Privacy: the machines never see each other's rows, but each byte is a derivative of the loss on private rows, and T steps reveal up to 8·T
bits. This is no differential privacy. The notary has no password: run it inside a network that you trust.

What came later: HiZOO (diagonal curvature), SubZero (low-rank z), FedKSeed (few seeds), DeComFL (one z for all machines).
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import lru_cache, partial
from io import TextIOWrapper
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # c10d reports every lost connection with a stack trace; we do, in a line

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    from kernels.perturb import perturb_ as fused_perturb_
except ImportError:  # copied alone, or no Triton here: the plain version below computes the same
    fused_perturb_ = None

# ============================================================================================== noise that every device can make

MASK = 0xFFFFFFFF
TILE = 1024  # weights that share a grid constant and, but for rademacher, 256 calls of Philox
ROW = {"rademacher": 32, "binomial": 256, "gaussian": 256}  # of the 4 rows that a call's 4 words serve: see noise()
LARGEST = {"rademacher": 1.0, "binomial": 5.7, "gaussian": 5.8}  # bounds of |z|


def philox(c0, c1, c2, c3, key, rounds=10):
    """Philox4x32 (Salmon et al. 2011): a counter of four 32-bit words (int64 tensors that broadcast, or ints) and a 64-bit key → four
    32-bit words. subtle: int64 products wrap mod 2⁶⁴, yet shifting and masking them still gives the right high word."""
    k0, k1 = key & MASK, key >> 32 & MASK
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & MASK) ^ c1 ^ k0, b & MASK, (a >> 32 & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return c0, c1, c2, c3


def binomial(words):
    """(popcount − 16)/√8 of 32-bit words: mean 0, variance 1, E z⁴ = 2.9375. Bits are added in pairs, then fours, then eights."""
    x = words - (words >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 & MASK) >> 24
    return (x - 16).float() * 0.3535533905932738


def gaussian(radius, angle):
    """Box-Muller: √(−2 ln u)·(cos θ, sin θ), u = (23 bits + ½)/2²³ never 0, θ = 24 bits of a turn. |z| ≤ 5.77."""
    u = ((radius >> 9).float() + 0.5) * 2.0**-23
    r, theta = (-2 * u.log()).sqrt(), (angle >> 8).float() * (2 * math.pi * 2.0**-24)
    return r * theta.cos(), r * theta.sin()


def noise(kind, key, records, first, n_tiles):
    """z for weights 1024·first to 1024·(first + n_tiles) of the flat buffer: (R, n_tiles, 1024) float32.

    records: (R, ≥ 3) integers, a row (step, machine, sample). The counter is (group, sample·2¹⁶ + high bits of group, step, machine): no
    two of them ever meet. A group is one call, and its four words serve rows j = 0 … 3 of ROW weights each. Rademacher: group = e div 128,
    row = e div 32 mod 4, bit = e mod 32, +1 if the bit is 0. Others: group = 256·(e div 1024) + e mod 256, row = e div 256 mod 4.
    """
    groups_a_tile = TILE // 128 if kind == "rademacher" else 256
    group = torch.arange(first * groups_a_tile, (first + n_tiles) * groups_a_tile, device=records.device)
    step, machine, sample = records[:, :3].long().T.unsqueeze(-1)  # (R, 1) each
    words = torch.stack(philox(group & MASK, sample << 16 | group >> 32, step, machine, key), -1)  # (R, groups, 4)
    if kind == "rademacher":
        z = (1 - 2 * (words.int()[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1)).float()
    else:
        words = words.unflatten(1, (n_tiles, 256)).transpose(2, 3)  # (R, n_tiles, 4, 256)
        z = binomial(words) if kind == "binomial" else torch.stack(
            [z for j in (0, 2) for z in gaussian(words[:, :, j], words[:, :, j + 1])], 2)
    return z.reshape(len(records), n_tiles, TILE)


# ============================================================================================== weights on a grid


def snap(x, q):
    """q·rint(x/q) for q a power of two. subtle: adding and taking away 1.5·2²³ rounds a float32 to an integer, half to even."""
    return (x / q + 12582912.0 - 12582912.0) * q


def perturb_(flat, grid, key, kind, records, coefs):
    """w ← w + times·snap(Σ coef·z) for every sum that the records spell, in place. Definition of kernels/perturb.py.

    flat: (1024·tiles,) float32; grid: (tiles,) float32, q of each tile; records: (R, 4) integers, a row (step, machine, sample, times);
    coefs: (R,) float32. Rows with times = 0 only add coef·z to the sum, in float32 and in order; another number ends it. While |w| < 2²⁴·q
    every value is a multiple of q that float32 holds, so sums of w are exact: whatever is added can be taken away again, in any order.
    grid None: no snapping, rounding as the dtype has it (the naive way, for `compare`).
    """
    tiles, on_device = flat.view(-1, TILE), records.to(flat.device)
    for first in range(0, len(tiles), 64):  # pieces that fit the cache: no temporary is as large as the weights
        w = tiles[first : first + 64]
        total = torch.zeros_like(w, dtype=torch.float32)
        for i in range(0, len(records), 8):
            z = noise(kind, key, on_device[i : i + 8], first, len(w)).mul_(coefs[i : i + 8, None, None].to(flat.device))
            for term, times in zip(z, records[i : i + 8, 3].tolist()):
                total += term
                if times:
                    w += times * (total if grid is None else snap(total, grid[first : first + 64, None])).to(w.dtype)
                    total.zero_()


def flatten_(model, exact=True):
    """Move all weights into one buffer, tensors starting at multiples of 1024, tied ones once → (flat, grid, {name: first weight}).

    Each tensor gets the grid q = 2^(e − 24), e = ⌈log₂ max|w|⌉ + 2 and at least 0, and its weights go to the nearest multiple of q.
    """
    params = dict(model.named_parameters())
    tiles = [-(-p.numel() // TILE) for p in params.values()]
    first = dict(zip(params, (TILE * (np.cumsum(tiles) - tiles)).tolist()))
    example = next(iter(params.values()))
    flat, grid = torch.zeros(TILE * sum(tiles), dtype=example.dtype, device=example.device), torch.empty(sum(tiles), device=example.device)
    for (name, p), n in zip(params.items(), tiles):
        view = flat[first[name] : first[name] + p.numel()].view(p.shape)
        mantissa, exponent = math.frexp(max(1e-9, float(p.detach().abs().max())))  # max = mantissa·2^exponent, ½ ≤ mantissa < 1
        q = 2.0 ** (max(exponent - (mantissa == 0.5) + 2, 0) - 24)
        grid[first[name] // TILE :][:n] = q
        view.copy_((p.detach() / q).round() * q if exact else p.detach())
        p.data = view
        p.requires_grad_(False)
    return flat, grid if exact else None, first


# ============================================================================================== the byte


def code_table():
    """float32 value of each code c, at index c mod 256: 0 ↔ 0, ±1 … ±127 ↔ ±e^((|c| − 64)/8), 3.8e-4 to 2631; −128: no contribution."""
    size = [math.exp((k - 64) / 8) for k in range(1, 128)]
    table = np.array([0.0, *size, 0.0, *(-x for x in reversed(size))], "<f4")
    if zlib.crc32(table.tobytes()) != 0x92502E47:
        raise ImportError("this platform's exp() differs from others': its replicas would part from theirs")
    return table


CODES = code_table()


def encode(g):
    """A projected gradient → its code, an int from −128 to 127: round(8·ln|g|) + 64 with the sign of g. Error at most 6.5 %."""
    if not math.isfinite(g):
        return -128
    size = min(127, round(8 * math.log(abs(g))) + 64) if g else 0
    return int(math.copysign(max(size, 0), g))


def pack(values, codec):
    """Projected gradients → what goes over the wire: a byte each, or with codec float32, for comparison, four."""
    return np.array([encode(g) for g in values], np.int8).tobytes() if codec == "byte" else np.array(values, "<f4").tobytes()


def unpack(payload, codec):
    """→ list of floats; NaN is no contribution."""
    if codec == "byte":
        return [math.nan if c == 128 else float(CODES[c]) for c in payload]
    return [g if math.isfinite(g) else math.nan for g in np.frombuffer(payload, "<f4").tolist()]


WIDTH = {"byte": 1, "float32": 4}

# ============================================================================================== one replica


class Diverged(RuntimeError):
    """The run cannot go on: on every replica, at the same step."""


class Replica:
    """A model whose weights are a function of the run's header and of its log alone.

    run: dict with key (64 bits), steps, samples, eps, lr, reduce, schedule, noise, codec. What is to happen to the weights waits in a
    queue until they are needed: restoring them, the update by all machines and the next perturbation are one pass, the flip another.
    exact=False: MeZO's way, each change rounded by itself to the weights' dtype.
    """

    def __init__(self, model, run, exact=True):
        self.model, self.run, self.step, self.queue = model, run, 0, []
        self.flat, self.grid, self.first = flatten_(model, exact)
        self.silent = self.probes = self.equal = 0
        self.room = self.measure_room() if exact else math.inf
        if self.flat.is_cuda and fused_perturb_ is None:
            warn("kernels/perturb.py is not there or has no Triton: plain PyTorch moves the weights, slowly")

    def flush(self):
        if self.queue:
            records, coefs = torch.tensor([row[:4] for row in self.queue]), torch.tensor([row[4] for row in self.queue])
            apply = fused_perturb_ if fused_perturb_ and self.flat.is_cuda and self.grid is not None else perturb_
            apply(self.flat, self.grid, self.run["key"], self.run["noise"], records, coefs)
            self.queue.clear()

    def move(self, *row):
        """Queue (step, machine, sample, times, coef)."""
        self.queue.append(row)
        if self.grid is None or len(self.queue) >= 512 and row[3]:  # never inside a sum
            self.flush()

    @torch.no_grad()
    def probe(self, machine, sample, loss):
        """The projected gradient g = (L(θ + εz) − L(θ − εz))/2ε by two calls of loss(), float64. Afterwards θ is θ again, exactly."""
        z, eps = (self.step, machine, sample), self.run["eps"]
        self.move(*z, 1, eps)
        self.flush()
        plus = loss()
        self.move(*z, -2, eps)
        self.flush()
        plus, minus = float(plus), float(loss())
        self.move(*z, 1, eps)
        self.probes, self.equal = self.probes + 1, self.equal + (plus == minus)
        if self.probes == 50 and self.equal > 10:
            warn(f"{self.equal} of 50 probes had twice the same loss: raise --eps")
        return (plus - minus) / (2 * eps)

    def payload(self, machine, loss_of):
        """This step's message of a machine: K samples, coded. loss_of(machine, step, sample) is called twice for each."""
        losses = (partial(loss_of, machine, self.step, k) for k in range(self.run["samples"]))
        return pack([self.probe(machine, k, loss) for k, loss in enumerate(losses)], self.run["codec"])

    def update(self, members):
        """θ ← θ − η·s(n)·Σ g·z over the sealed messages [(machine, payload), …] of a step; s = 1/√n, 1/n or 1 by `reduce`.

        The coefficients are float64 made by × ÷ √ alone, rounded to float32 once: the same on every machine."""
        run = self.run
        probes = [(m, k, g) for m, payload in sorted(members) for k, g in enumerate(unpack(payload, run["codec"])) if g == g]
        lr = run["lr"] * (1 - self.step / run["steps"]) if run["schedule"] == "linear" else run["lr"]
        n = len(probes)
        scale = {"sqrt": math.sqrt(n), "mean": n, "sum": 1}[run["reduce"]]
        coefs = [-(lr / scale) * g for _, _, g in probes]
        if self.grid is not None:
            self.keep_on_grid(coefs)
        for i, ((m, k, _), coef) in enumerate(zip(probes, coefs)):
            self.move(self.step, m, k, int(i == n - 1), coef)
        self.silent = 0 if probes or not members else self.silent + 1
        if self.silent == 10:
            raise Diverged(f"step {self.step}: the loss was not finite on any machine for 10 steps: start anew with a lower --lr")
        self.step += 1

    def keep_on_grid(self, coefs):
        """Raise Diverged, before anything is lost, when this update could carry a weight off its grid; warn when it moves too little.

        A running bound on the largest weight says when to look at the weights themselves: rarely, and on all replicas at the same step.
        """
        reach = LARGEST[self.run["noise"]] * sum(map(abs, coefs))
        self.room -= reach
        if not self.room >= 0:
            self.flush()
            self.room = self.measure_room(reach) - reach
        size = math.sqrt(sum(c * c for c in coefs))
        if self.step % 100 == 0 and 0 < size < float(self.grid.median()) / 2:
            warn(f"step {self.step}: updates of {size:.1e} vanish between the grid points of half of the weights: raise --lr")

    def measure_room(self, reach=0.0):
        """How far any weight can move, beside a perturbation, and stay on its grid."""
        top, end = torch.linalg.vector_norm(self.flat.view(-1, TILE), math.inf, 1), self.grid * 2.0**24
        room = end - top - 2 * self.run["eps"] * LARGEST[self.run["noise"]]
        tile = int(room.argmin())  # NaN counts as the least
        if not float(room[tile]) >= reach:
            name = [name for name, first in self.first.items() if first <= tile * TILE][-1]
            raise Diverged(f"step {self.step}: {name} holds a weight of {float(top[tile]):.3g}, too near to its grid's end at "
                           f"{float(end[tile]):g}: start anew with a lower --lr")
        return float(room[tile])

    def sha256(self):
        """Of all weights in the order of named_parameters(), float32, little-endian: 64 hex digits."""
        self.flush()
        digest = hashlib.sha256()
        for p in self.model.parameters():
            digest.update(p.data.cpu().numpy())
        return digest.hexdigest()


def spsa(replica, machines, loss_of, gather):
    """The training loop: this process speaks for `machines`; gather({machine: payload}) → the sealed [(machine, payload), …] of all.
    Yields them after each step."""
    while replica.step < replica.run["steps"]:
        members = gather({m: replica.payload(m, loss_of) for m in machines})
        replica.update(members)
        yield members


# ============================================================================================== the run is its log

PROTOCOL = 1


class Log:
    """One JSON line, the header; then a record for each step: u8 how many machines (255: the same as before), u16 the id of each, their
    codes, and the low 16 bits of the CRC-32 of the whole file so far. All little-endian.

    Log(path) reads; Log(path, header) starts a new one, or goes on with an old one of the same header. steps: [[(machine, payload), …], …].
    An incomplete record at the end, left by a kill, is cut off with a warning; any other damage is refused."""

    def __init__(self, path, header=None):
        self.path, self.steps, self.members = Path(path), [], None
        if not self.path.exists():
            if header is None:
                fail(f"{path}: no such log")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_bytes(json.dumps(header).encode() + b"\n")
            os.replace(temporary, self.path)
        data = self.path.read_bytes()
        end = self.parse(data)
        if header is not None:
            same_run(header, self.header, f"the log {path}")
            if end < len(data):
                os.truncate(self.path, end)
            self.file = open(self.path, "ab")

    def parse(self, data):
        at = data.find(b"\n") + 1
        try:
            self.header = json.loads(data[:at])
            protocol = self.header["protocol"]
            self.size = WIDTH[self.header["codec"]] * self.header["samples"]
        except (ValueError, KeyError, TypeError):
            fail(f"{self.path} is not a log of this program")
        if protocol != PROTOCOL:
            fail(f"{self.path} was written by protocol {protocol}, this program speaks {PROTOCOL}")
        self.crc, end, members = zlib.crc32(data[:at]), at, None
        while end < len(data):
            at, count = end + 1, data[end]
            if count < 255:
                members = [int.from_bytes(data[i : i + 2], "little") for i in range(at, at + 2 * count, 2)]
                at += 2 * count
            stop = at + self.size * len(members or ())
            if stop + 2 > len(data):
                warn(f"{self.path}: the record of step {len(self.steps)} is incomplete and dropped")
                break
            self.crc = zlib.crc32(data[end:stop], self.crc)
            if self.crc & 0xFFFF != int.from_bytes(data[stop : stop + 2], "little") or members is None:
                fail(f"{self.path} is damaged at step {len(self.steps)} (checksum)")
            self.steps.append([(m, data[at + i * self.size : at + (i + 1) * self.size]) for i, m in enumerate(members)])
            self.members, end = members, stop + 2
        return end

    def append(self, members):
        """A sealed step, to the file before anybody may see it."""
        ids = [m for m, _ in members]
        who = b"\xff" if ids == self.members else bytes([len(ids)]) + b"".join(m.to_bytes(2, "little") for m in ids)
        record = who + b"".join(payload for _, payload in members)
        self.crc = zlib.crc32(record, self.crc)
        self.file.write(record + (self.crc & 0xFFFF).to_bytes(2, "little"))
        self.file.flush()
        self.steps.append(list(members))
        self.members = ids


def same_run(ours, theirs, where):
    """Refuse, before a weight has changed, what belongs to another run."""
    for key in ("weights", *theirs):
        if ours.get(key) != theirs.get(key):
            cure = "copy the initial weights from there and name them by --model" if key == "weights" else "not the same run"
            fail(f"{where} has {key} = {theirs.get(key)}, here it is {ours.get(key)}: {cure}")


# ============================================================================================== machines that come and go

TICK = 0.5  # seconds that a wait lasts before we look around


def open_store(host, port, master, seconds):
    return dist.TCPStore(host, port, is_master=master, wait_for_workers=False, timeout=timedelta(seconds=seconds))


def arrived(store, keys):
    """Wait a tick for all keys. True when they are there."""
    until, pause = time.monotonic() + TICK, 0.0005
    while not (there := store.check(keys)) and time.monotonic() < until:
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)
    return there


def seal(members):
    """Messages of a step → one value of the store, and back."""
    return b"".join(m.to_bytes(2, "little") + payload for m, payload in members)


def unseal(record, size):
    return [(int.from_bytes(record[i : i + 2], "little"), record[i + 2 : i + 2 + size]) for i in range(0, len(record), 2 + size)]


def notarise(store, log, machines, deadline, crash_at=None, progress=iter):
    """The notary orders the run: it waits for the messages b/{step}/{machine} of the expected machines, at most `deadline` seconds after
    the first, writes what came to the log, publishes it as r/{step}, and expects the same machines next time and those that said hello.

    A machine that is late or dead is out until it says hello again; its byte is lost, nobody is inconsistent. Returns the list of
    replicas that differed from the majority, [(machine, step), …].
    """
    steps, odd = log.header["steps"], []
    store.set("odd", "")
    for step, members in enumerate(log.steps):  # a restarted notary tells everything again
        store.set(f"r/{step}", seal(members))
    base = 1 + max((m for members in log.steps for m, _ in members), default=-1)
    store.set("base", str(base))
    store.add("next_id", base)
    store.set("head", str(len(log.steps)))
    store.set("hello", "")
    store.set("header", json.dumps(log.header))  # last: whoever sees it finds the rest
    expected, heard, wanted = {m for m, _ in log.steps[-1]} if log.steps else set(), 0, 1 if log.steps else machines

    def collect(kind, step):
        """Values kind/{step}/{machine} of the expected machines, once all are there or the deadline is over."""
        nonlocal heard
        first = None
        while True:
            hello = store.get("hello").split()
            expected.update(map(int, hello[heard:]))
            heard = len(hello)
            keys = {m: f"{kind}/{step}/{m}" for m in sorted(expected)}
            if len(keys) < wanted:
                time.sleep(0.02)
                continue
            done = arrived(store, list(keys.values()))
            there = {m: key for m, key in keys.items() if done or store.check([key])}
            first = first or (time.monotonic() if there else None)
            if done or there and time.monotonic() - first > deadline:
                return dict(zip(there, store.multi_get(list(there.values()))))

    def compare_hashes(step, sums):
        common = max(sums.values(), key=list(sums.values()).count)
        for m, digest in sums.items():
            if digest != common:
                odd.append((m, step))
                warn(f"machine {m} differs from the majority at step {step}: out")
                store.append("odd", f"{m} ")

    for step in progress(range(len(log.steps), steps)):
        messages = collect("b", step)
        wanted = 1
        if step % log.header["hash_every"] == 0:
            compare_hashes(step, {m: store.get(f"hash/{step}/{m}") for m in messages})
        good = {m: payload for m, payload in messages.items() if len(payload) == log.size and (m, step) not in odd}
        members = sorted(good.items())[:254]
        log.append(members)
        if step == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)  # the worst moment: written, not yet published
        store.set(f"r/{step}", seal(members))
        store.set("head", str(step + 1))
        for m in expected:
            store.delete_key(f"b/{step}/{m}")
        expected.intersection_update(good)
    if expected:
        compare_hashes(steps, collect("hash", steps))
    return odd


class Worker:
    """A machine of the elastic run: a client of the notary's store that outlives the notary."""

    def __init__(self, address, patience):
        self.address, self.patience = address, patience
        self.store = self.header = self.machine = None
        self.sent = self.replayed = self.reconnected = 0

    def connect(self):
        """Reach the notary within `patience` seconds, with growing pauses; check that it still runs the same run."""
        host, port = self.address
        since, pause = time.monotonic(), 0.1
        while True:
            try:
                self.store = open_store(host, port, False, min(5, max(0.5, self.patience)))
                header = json.loads(self.store.get("header"))
                break
            except (dist.DistError, ValueError) as error:
                if time.monotonic() - since > self.patience:
                    fail(f"no notary at {host}:{port} for {self.patience:g} s ({type(error).__name__}): does it run there? See --connect")
                time.sleep(pause)
                pause = min(2 * pause, 2)
        if header.get("protocol") != PROTOCOL:
            fail(f"the notary at {host}:{port} speaks protocol {header.get('protocol')}, this program {PROTOCOL}")
        if self.header is not None:
            same_run(self.header, header, f"the notary at {host}:{port}")
            self.reconnected += 1
        self.header = header

    def work(self, replica, loss_of, after_step=lambda members: None, join_at=0):
        """Replay what the others have done, then take part until the run is over. after_step(members) follows each."""
        steps, payload, member, delivered = self.header["steps"], None, False, False
        size = WIDTH[self.header["codec"]] * self.header["samples"]
        while replica.step < steps or not delivered:
            step = replica.step
            try:
                if self.store is None:
                    self.connect()
                    member = delivered = False
                    if self.machine is not None and self.machine >= int(self.store.get("base")):
                        self.machine = None  # the notary forgot a machine that had contributed nothing
                if self.machine is None:
                    while int(self.store.get("head")) < join_at:
                        arrived(self.store, [f"r/{join_at - 1}"])
                    self.machine = self.store.add("next_id", 1) - 1
                    if self.machine > 65535:
                        fail("65,536 machines have joined this run: the log has no more ids")
                head = int(self.store.get("head"))
                if head < step:
                    fail(f"the notary's log ends at step {head}, this machine has seen {step}: restart the notary from a longer log")
                if head > step:
                    for record in self.store.multi_get([f"r/{t}" for t in range(step, min(head, step + 256))]):
                        members = unseal(record, size)
                        replica.update(members)
                        member = self.machine in dict(members)
                        self.replayed += payload is None
                        after_step(members)
                        payload, delivered = None, False
                    if str(self.machine) in self.store.get("odd").decode().split():
                        fail(f"this replica (machine {self.machine}) differed from the others at step {step}: start it again, it will "
                             "join by replaying the log")
                    continue
                if not delivered:
                    if step % self.header["hash_every"] == 0 or step == steps:
                        self.store.set(f"hash/{step}/{self.machine}", replica.sha256())
                    if not member:
                        self.store.append("hello", f"{self.machine} ")
                        member = True
                    if step < steps:
                        payload = payload or replica.payload(self.machine, loss_of)
                        self.store.set(f"b/{step}/{self.machine}", payload)
                        self.sent += len(payload)
                    delivered = True
                if step < steps:
                    arrived(self.store, [f"r/{step}"])
            except dist.DistNetworkError:
                self.store = None
                if step == steps:  # the notary has heard from all that it waited for, and has left
                    break

# ============================================================================================== the model


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257 padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    bias: bool = False  # in linear layers and layer norms; OpenAI's weights have them
    scale_attn_by_layer: bool = False  # divide attention logits of layer i by i + 1 as well


GPT_SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, block_size=128),
    "30M": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


class SelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer = config.n_head, layer
        self.scale = (config.n_embd // config.n_head) ** -0.5 / (layer + 1 if config.scale_attn_by_layer else 1)

    def forward(self, x, cache=None):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        if cache is not None:  # (batch, head, seq, head_dim) of every token so far, this layer's pair at cache[layer]
            if len(cache) > self.layer:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer : self.layer + 1] = [(k, v)]
        n_query, n_key = q.size(2), k.size(2)
        mask = None
        if 1 < n_query < n_key:  # several new tokens after a cached prefix: query i sees keys up to its own position
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=x.device).tril(n_key - n_query)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n_query == n_key, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, head tied to the token embedding. Module names are nanoGPT's."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"GPT: width {config.n_embd} is not a multiple of {config.n_head} heads")
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, idx, cache=None):
        """idx: (batch, seq) int64 → (batch, seq, n_embd), all but the head. cache: a list, empty at first, that keeps every
        layer's keys and values; later calls pass only the new tokens."""
        start = cache[0][0].size(2) if cache else 0
        if start + idx.size(1) > self.config.block_size:
            raise ValueError(f"GPT: {start + idx.size(1)} tokens exceed the context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start : start + idx.size(1)]
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def forward(self, idx, cache=None):
        """idx: (batch, seq) int64 → logits (batch, seq, vocab_size)."""
        return self.lm_head(self.trunk(idx, cache))

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's public weights of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded once (0.5 to 6 GB)."""
        if not name.startswith("gpt2"):
            fail(f"there are public weights of {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}, none of {name}")
        url = f"https://huggingface.co/openai-community/{name}/resolve/main/model.safetensors"
        return cls(GPTConfig(**GPT_SIZES[name], vocab_size=50257, bias=True)).load_openai(read_safetensors(download(url)))

    def load_openai(self, weights):
        """Copy OpenAI's tensors, {name: tensor}, into this model (bias=True, vocab_size=50257). KeyError names a missing one."""
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        with torch.no_grad():
            for name, p in self.transformer.named_parameters():
                w = weights[name]
                if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    w = w.t()  # OpenAI's Conv1D keeps (in, out)
                if w.shape != p.shape:
                    raise ValueError(f"GPT: {name} is {tuple(w.shape)} in the file and {tuple(p.shape)} in the model")
                p.copy_(w)
        return self


# ============================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an int or a float from low to high, both included."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse says: invalid int value
    return parse


def set_up(args):
    """Seeds, device, dtype and torchrun's process group → (device, dtype, rank, world)."""
    rank, world, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if args.device == "auto" else args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here, {best} can ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    dtype = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}.get(args.dtype) or getattr(torch, args.dtype)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    torch.set_float32_matmul_precision("high")
    return device, dtype, rank, world


def download(url, sha256=""):
    """Fetch url into the cache, once, and return its path. A broken download goes on where it stopped; a file counts only when
    its length and, where given, its sha256 (a prefix will do) are right."""
    path = CACHE / url.split("://")[1]
    part = path.with_name(path.name + ".part")
    if path.exists():
        return path
    part.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply, open(part, "ab" if reply.status == 206 else "wb") as file:
            length = int(reply.headers.get("Content-Length") or 0) + file.tell()
            with tqdm(total=length, initial=file.tell(), unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        if getattr(error, "code", 0) == 416:  # nothing is left to send, yet the file never passed the checks below
            part.unlink()
        fail(f"no download of {url} ({error}): try again, or fetch it elsewhere and put it at {path}")
    if part.stat().st_size < length:
        fail(f"{url} broke off at {part.stat().st_size:,} of {length:,} bytes: run the command again to go on")
    with open(part, "rb") as file:
        if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
            part.unlink()
            fail(f"{url} has another sha256 than {sha256}: removed")
    os.replace(part, path)
    return path


def save_checkpoint(path, state):
    """torch.save under a temporary name, then rename: a killed run leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path, device="cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds here
        fail(f"{path} is not a checkpoint of this program ({str(error).splitlines()[0]})")


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, a JSON header, then raw memory."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
              "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
    raw = np.memmap(path, np.uint8, "c")
    try:
        start = 8 + int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8:start].tobytes())
        header.pop("__metadata__", None)
        return {name: torch.from_numpy(raw[start + about["data_offsets"][0] : start + about["data_offsets"][1]])
                .view(dtypes[about["dtype"]]).view(about["shape"]) for name, about in header.items()}
    except (ValueError, KeyError, RuntimeError) as error:
        fail(f"{path} is not a whole safetensors file ({error})")


def save_results(folder, args, figures):
    """folder/results.json: the command, git revision, versions, device, seed and every figure of the table. Returns its path."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()} CPU"
    about = dict(command=" ".join(["python", *sys.argv]), revision=git.stdout.strip() or "unknown", torch=torch.__version__,
                 python=platform.python_version(), device=device, seed=args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    strict = json.loads(json.dumps(dict(**about, **figures)), parse_constant=str)  # JSON has no NaN and no Infinity
    (folder / "results.json").write_text(json.dumps(strict, indent=1))
    return folder / "results.json"


def print_table(header, rows):
    """Rows of strings and numbers as aligned plain text, first column left, the others right."""
    rows = [[f"{x:.3f}" if isinstance(x, float) and x == x else "–" if x != x else str(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep="  ")


def get_tokenizer(name):
    """→ (name, encode: str → integer array, decode: ids → str). "auto" is gpt2 where tiktoken has or can fetch it, else bytes."""
    if name != "bytes":
        try:
            import tiktoken

            gpt2 = tiktoken.get_encoding("gpt2")
            return "gpt2", lambda text: np.array(gpt2.encode_ordinary(text), np.uint16), gpt2.decode
        except Exception as error:  # tiktoken lets through whatever its downloader raises
            if name == "gpt2":
                fail(f"--tokenizer gpt2 needs tiktoken and its one-time download ({type(error).__name__}); bytes needs neither")
            print(f"no gpt2 tokenizer ({type(error).__name__} in its one-time download): bytes instead", file=sys.stderr)
    return "bytes", lambda text: np.frombuffer(text.encode(), np.uint8), lambda ids: bytes(ids).decode(errors="replace")


def figure(out, name, args, draw, **size):
    """draw(axes) on a matplotlib figure saved as out/name → its path, or "no figure" with --no_plot."""
    if args.no_plot:
        return "no figure (--no_plot)"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(constrained_layout=True, **size)
    draw(axes)
    fig.savefig(out / name, dpi=120)
    plt.close(fig)
    return out / name


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


# ============================================================================================== the task: label words as classes

NEUTRAL, BAD, GOOD = (words.split() for words in (
    "the was and is but . it film plot cast song book show role pace", "bad dull cold flat slow silly boring stale",
    "good fine warm bright sharp witty moving fresh"))
TINY_IDS = {word: i for i, word in enumerate([*NEUTRAL, *BAD, *GOOD, "terrible", "great"])}
TINY = dict(n_layer=2, n_head=4, n_embd=64, block_size=20, vocab_size=len(TINY_IDS))
TINY_FILE = Path("out/spsa_distributed/tiny.pt")
PROMPTS = {  # what follows the sentence, what stands before a label word, label words of classes 0 and 1
    "mezo": (" It was", " ", "terrible,great"), "justonebyte": ("\nsentiment:\n", "", "negative,positive")}
SST2 = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"


def tiny_reviews(n, *counter):
    """n sentences of three adjectives, each of the sentence's mood with probability ¾ → texts, labels ("1" where most adjectives are good,
    else "0"), and which adjectives are good, (n, 3) of 0 and 1."""
    rng = np.random.default_rng(counter)
    mood = rng.integers(2, size=(n, 1))
    good = np.where(rng.random((n, 3)) < 0.75, mood, 1 - mood)
    nouns, adjectives = np.array(NEUTRAL[7:])[rng.integers(8, size=(n, 2))], np.array([BAD, GOOD])[good, rng.integers(8, size=(n, 3))]
    texts = [f"the {x} was {a} and the {y} is {b} but {c} ." for (x, y), (a, b, c) in zip(nouns, adjectives)]
    return texts, [str(label) for label in (good.sum(1) > 1).astype(int)], good


def pretrain_tiny(quiet):
    """The offline language model: 500 steps on 32,000 sentences with a verdict, "it was great" or "terrible", that follows the first
    adjective six times in ten, the second or third twice each, and is turned round once in five. So the prompt is natural to the model,
    but the task, to follow the majority, is not solved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are small: a second thread would only get in the way
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    texts, _, good = tiny_reviews(32_000, 0, 0)
    rng = np.random.default_rng((0, 1))
    verdict = good[np.arange(len(good)), rng.choice(3, len(good), p=(0.6, 0.2, 0.2))] ^ (rng.random(len(good)) < 0.2)
    rows = torch.tensor([[TINY_IDS[w] for w in f"{text} it was {('terrible', 'great')[v]}".split()] for text, v in zip(texts, verdict)])
    for step, batch in enumerate(tqdm(rows.split(64), "pretraining the tiny model", disable=quiet)):
        opt.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 50, (500 - step) / 450)
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        opt.step()
        opt.zero_grad()
    torch.set_num_threads(threads)
    save_model(TINY_FILE, model)


def save_model(path, model):
    save_checkpoint(path, dict(config=asdict(model.config), model=model.state_dict()))


def load_model(name, quiet=True):
    """tiny (pretrained when its file is not there), gpt2… (OpenAI's weights, a download), or a file of `replay` or `train`."""
    if name.startswith("gpt2"):
        return GPT.from_pretrained(name)
    if name == "tiny" and not TINY_FILE.exists():
        pretrain_tiny(quiet)
    path = TINY_FILE if name == "tiny" else Path(name)
    if not path.is_file():
        fail(f"--model {name}: no such file, and none of tiny, {', '.join(size for size in GPT_SIZES if size.startswith('gpt2'))}")
    saved = load_checkpoint(path)
    if set(saved) != {"config", "model"}:
        fail(f"{path} holds no model of this program")
    model = GPT(GPTConfig(**saved["config"]))
    model.load_state_dict(saved["model"])
    return model


def labelled_rows(file, name, text_column, label_column):
    """A table with a header, of tabs or of commas → [(line number, text, label), …]."""
    tabs = "\t" in file.readline()
    file.seek(0)
    reader = csv.DictReader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    columns = reader.fieldnames or []
    label_column = label_column or ("label" if "label" in columns else (columns or [""])[-1])
    text_column = text_column or next((c for c in ("sentence", "text", *columns) if c in columns and c != label_column), "text")
    for flag, column in (("text", text_column), ("label", label_column)):
        if column not in columns:
            fail(f"--data {name} has no column {column!r} but {', '.join(columns) or 'nothing'}: name one by --{flag}_column")
    rows = []
    try:
        for row in reader:
            if row[text_column] is None or row[label_column] is None:
                have = sum(value is not None for value in row.values())
                fail(f"--data {name} line {reader.line_num} has {have} columns, the header {len(columns)}")
            rows.append((reader.line_num, row[text_column].strip(), row[label_column].strip()))
    except csv.Error as error:
        fail(f"--data {name} line {reader.line_num}: {error}")
    return rows


def load_rows(data, text_column, label_column):
    """→ (training rows, test rows) of SST-2 or of a table, whose test rows are a random fifth, at most 1000."""
    if data == "sst2":
        path = download(SST2)
        try:
            with zipfile.ZipFile(path) as archive:
                return [labelled_rows(TextIOWrapper(archive.open(f"SST-2/{part}.tsv"), "utf-8"), part, "sentence", "label")
                        for part in ("train", "dev")]
        except (zipfile.BadZipFile, KeyError) as error:
            fail(f"{path} is not SST-2 ({error}): remove it")
    if not Path(data).is_file():
        fail(f"--data {data}: no such file, and not sst2")
    with open(data, newline="", encoding="utf-8", errors="replace") as file:
        rows = labelled_rows(file, data, text_column, label_column)
    if len(rows) < 10:
        fail(f"--data {data}: {len(rows)} rows are too few, want 10")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    n_test = min(1000, len(rows) // 5)
    return rows[n_test:], rows[:n_test]


class Problem:
    """Classification by a language model: the sentence, a suffix, and the likeliest of the label words.

    data: None (generated sentences for the tiny model, SST-2 for others), sst2, or a table. Each machine has up to 1000 training rows of
    its own. Loss: cross entropy among the label words at the last token, so only their rows of the head are multiplied.
    """

    def __init__(self, model, device, data=None, prompt="mezo", labels=None, text_column=None, label_column=None, seed=0):
        self.model, self.device, self.seed, self.private, self.cut = model.to(device).eval(), device, seed, {}, 0
        self.name = data or ("generated" if model.config.vocab_size == len(TINY_IDS) else "sst2")
        self.suffix, before, words = PROMPTS[prompt]
        if model.config.vocab_size == len(TINY_IDS):
            self.tokenize, decode = lambda text: [TINY_IDS[word] for word in text.lower().split()], lambda ids: [*TINY_IDS][ids[0]]
        else:
            _, encode, decode = get_tokenizer("gpt2")
            self.tokenize = lambda text: encode(text).tolist()
        if self.name == "generated":
            rows = None
            test = [(i, *row) for i, row in enumerate(zip(*tiny_reviews(400, 0, 2)[:2]))]
            found = ["0", "1"]
        else:
            rows, test = load_rows(self.name, text_column, label_column)
            found = sorted({label for _, _, label in rows + test}, key=lambda s: (float(s) if s.replace(".", "").isdigit() else 0, s))
        words = [word.strip() for word in (labels or words).split(",")]
        if all("=" in word for word in words):
            self.classes = dict(word.split("=", 1) for word in words)
        elif len(words) == len(found):
            self.classes = dict(zip(found, words))
        else:
            fail(f"--data {self.name} has {len(found)} classes ({', '.join(found[:9])}), --labels {len(words)} words ({','.join(words)})")
        empty = [label for label in self.classes if label not in found]
        if empty:
            fail(f"--data {self.name} has no row of class {empty[0]!r}: it has {', '.join(found[:9])}")
        pieces = {word: self.ids_of(before + word, "--labels" if labels else "--prompt") for word in self.classes.values()}
        for word, ids in pieces.items():
            if len(ids) != 1:
                fail(f"--labels: {word!r} is not one token but {' + '.join(repr(decode([i])) for i in ids)}: take another word")
        if len(self.classes) < 2 or len(pieces) < len(self.classes):
            fail(f"--labels {','.join(words)}: want two classes or more, and another word for each")
        self.label_ids = torch.tensor([ids[0] for ids in pieces.values()], device=device)
        self.test, self.train = self.encode(test), rows and self.encode(rows)

    def ids_of(self, text, where):
        try:
            return self.tokenize(text)
        except KeyError as error:
            fail(f"{where}: the tiny model does not know the word {error}: take --model gpt2")

    def encode(self, rows):
        """[(line, text, label), …] → ids (n, seq), padded on the right, last (n,), the index of the last token, class (n,): int64.
        Too long a sentence loses its beginning, never the prompt. (A causal model needs no padding mask.)"""
        classes, suffix = list(self.classes), self.ids_of(self.suffix, "--prompt")
        room, ids = self.model.config.block_size - len(suffix), []
        for line, text, label in rows:
            if label not in self.classes:
                fail(f"--data {self.name} line {line}: label {label!r} is none of {', '.join(classes)}: say by --labels {label}=WORD,…")
            sentence = self.ids_of(text, f"--data {self.name} line {line}")
            self.cut += len(sentence) > room
            ids.append(sentence[-room:] + suffix)
        longest = max(map(len, ids))
        return (torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=self.device),
                torch.tensor([len(row) - 1 for row in ids], device=self.device),
                torch.tensor([classes.index(label) for _, _, label in rows], device=self.device))

    def batch(self, machine, step, sample, size):
        """Random rows of a machine's own data; the draw depends on (seed, machine, step, sample) alone."""
        if machine not in self.private:
            counter = self.seed, 3, machine
            if self.train is None:
                self.private[machine] = self.encode([(i, *row) for i, row in enumerate(zip(*tiny_reviews(1000, *counter)[:2]))])
            else:
                n = len(self.train[0])
                picks = torch.from_numpy(np.random.default_rng(counter).choice(n, min(1000, n), replace=False)).to(self.device)
                self.private[machine] = [t[picks] for t in self.train]
        rows = self.private[machine]
        picks = torch.from_numpy(np.random.default_rng((self.seed, 4, machine, step, sample)).integers(len(rows[0]), size=size))
        return [t[picks.to(self.device)] for t in rows]

    def logits(self, ids, last):
        """(n, classes): label words after the last token."""
        hidden = self.model.trunk(ids[:, : int(last.max()) + 1])[torch.arange(len(ids), device=self.device), last]  # (n, d)
        return F.linear(hidden, self.model.lm_head.weight[self.label_ids]).float()

    def loss(self, ids, last, classes):
        return F.cross_entropy(self.logits(ids, last), classes)

    @torch.no_grad()
    def evaluate(self):
        """→ (cross entropy in nats, accuracy) on the test rows."""
        logits = torch.cat([self.logits(ids, last) for ids, last in zip(*(t.split(100) for t in self.test[:2]))])
        return float(F.cross_entropy(logits, self.test[2])), float((logits.argmax(1) == self.test[2]).float().mean())


# ============================================================================================== one run: torchrun, or alone

SETTINGS = dict(  # of a run, fixed by its header: for the tiny model; for GPT-2 (MeZO's, but one learning rate and no search)
    steps=(200, 20_000), batch_size=(32, 16), lr=(1e-3, 1e-6), samples=(1, 1), eps=(1e-3, 1e-3), reduce=("sqrt",) * 2,
    schedule=("constant",) * 2, noise=("rademacher",) * 2, codec=("byte",) * 2, prompt=("mezo",) * 2, hash_every=(100, 1000))


def open_run(args, device, header=None):
    """→ (problem, replica) for a new run, or for the run of this header, whose settings and initial weights must be ours."""
    for key in SETTINGS:
        if header and getattr(args, key) not in (None, header[key]):
            fail(f"--{key} {getattr(args, key)}: this run has {header[key]}, fixed by its header")
    name = args.model or (header or {}).get("model", "tiny")
    model, n = load_model(name, args.quiet), len(TINY_IDS)
    run = dict(header or {key: getattr(args, key) or value[model.config.vocab_size != n] for key, value in SETTINGS.items()})
    problem = Problem(model, device, args.data, run["prompt"], args.labels or run.get("labels"), args.text_column, args.label_column,
                      args.seed)
    if problem.cut:
        warn(f"{problem.cut} sentences were longer than the context and lost their beginning")
    if header is None:
        run.update(protocol=PROTOCOL, key=args.seed, model=str(name), labels=",".join(map("=".join, problem.classes.items())))
    replica = Replica(model, run)
    shapes = json.dumps([(name, list(p.shape)) for name, p in model.named_parameters()])
    ours = dict(run, weights=replica.sha256(), order=hashlib.sha256(shapes.encode()).hexdigest())
    if header is not None:
        same_run(ours, header, "the header")
    run.update(ours)
    return problem, replica


def probe_loss(problem, size, dtype, crash_at=None):
    """loss_of(machine, step, sample) for Replica.payload, on the machine's own rows."""

    def loss_of(machine, step, sample):
        if step == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)  # the weights are perturbed at this moment
        with torch.autocast(problem.device.type, dtype, enabled=dtype != torch.float32):
            return problem.loss(*problem.batch(machine, step, sample, size))

    return loss_of


def gather_codes(rank, world, device, count):
    """gather() for torchrun: every rank's message to every rank. count: a list of one int, bytes this rank has handed to the transport."""

    def gather(own):
        mine = torch.frombuffer(bytearray(own[rank]), dtype=torch.int8).to(device)
        everyone = torch.empty(world * len(mine), dtype=torch.int8, device=device)
        dist.all_gather_into_tensor(everyone, mine)
        count[0] += mine.nbytes
        return list(enumerate(row.numpy().tobytes() for row in everyone.cpu().view(world, -1)))

    return gather


def train(args):
    """Fine-tune: one machine, or under torchrun as many as ranks. One collective of `samples` bytes a step. A restart replays the log."""
    device, dtype, rank, world = set_up(args)
    out = Path(args.out or "out/spsa_distributed/train")
    if world > 1 and rank > 0 and args.model in (None, "tiny"):
        dist.barrier()  # rank 0 may have to make the tiny model first
    problem, replica = open_run(args, device)
    if world > 1 and rank == 0 and args.model in (None, "tiny"):
        dist.barrier()
    run, steps, log = replica.run, replica.run["steps"], None
    again = args.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if rank == 0:
        path = Path(args.log or out / "run.log")
        if path.exists() and not again:
            os.replace(path, path.with_name("previous.log"))
        log = Log(path, run)
    if world > 1:
        shared = [log and (log.steps, run["weights"])]
        dist.broadcast_object_list(shared)
        old, weights = shared[0]
        if weights != run["weights"]:
            fail(f"rank {rank} starts from weights {run['weights']}, rank 0 from {weights}")
    for members in log.steps if world == 1 else old:
        replica.update(members)
    first, count = replica.step, [0]
    zero_shot = problem.evaluate()
    curve, start = [(first, *zero_shot)], time.perf_counter()
    gather = gather_codes(rank, world, device, count) if world > 1 else lambda own: list(own.items())
    try:
        loop = spsa(replica, [rank], probe_loss(problem, run["batch_size"], dtype), gather)
        for members in tqdm(loop, "train", steps, initial=first, disable=args.quiet or rank > 0):
            if rank == 0:
                log.append(members)
            if replica.step % run["hash_every"] == 0 or replica.step == steps:
                compare_ranks(replica, world)
            if replica.step % (args.eval_every or max(1, steps // 20)) == 0 or replica.step == steps:
                replica.flush()
                curve.append((replica.step, *problem.evaluate()))
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped after {replica.step} steps: the same command with --resume goes on from {log.path}")
        raise SystemExit(130) from None
    seconds = time.perf_counter() - start
    if rank == 0:
        save_model(out / "weights.pt", replica.model)
        codes = np.frombuffer(b"".join(payload for members in log.steps for _, payload in members), np.int8)
        figures = dict(
            run=run, machines=world, cross_entropy=curve[-1][1], accuracy=curve[-1][2], before=curve[0][1:], sha256=replica.sha256(),
            bytes_sent_a_machine=count[0], log_bytes=log.path.stat().st_size, steps_a_s=(replica.step - first) / seconds, curve=curve)
        if run["codec"] == "byte":
            figures |= dict(codes_zero=int((codes == 0).sum()), codes_saturated=int((abs(codes.astype(int)) == 127).sum()),
                            codes_none=int((codes == -128).sum()))
        print_table((f"{run['model']}, {problem.name}", "cross entropy", "accuracy"),
                    [(f"after {step} steps", ce, accuracy) for step, ce, accuracy in (curve[0], curve[-1])])
        print(f"{world} machine{'s' * (world > 1)}, {count[0]:,} bytes sent by each, log of {log.path.stat().st_size:,} bytes, weights "
              f"{figures['sha256'][:16]}" + f" on all {world} ranks" * (world > 1))
        print(log.path, out / "weights.pt", save_results(out, args, figures), plot_fine_tuning(out, args, curve), sep="\n")
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def compare_ranks(replica, world):
    """Stop all ranks when a replica differs from the majority."""
    sums = [replica.sha256()] * world
    if world > 1:
        dist.all_gather_object(sums, sums[0])
    common = max(sums, key=sums.count)
    odd = [rank for rank, digest in enumerate(sums) if digest != common]
    if odd:
        raise Diverged(f"step {replica.step}: the replica of rank {odd[0]} differs from the others; the same command with --resume replays "
                       "the log")


# ============================================================================================== one run: machines that come and go


def serve(args):
    """The notary: orders a run for machines that `join`. With the log of a run that was broken off it goes on."""
    out = Path(args.out or "out/spsa_distributed/serve")
    path = Path(args.log or out / "run.log")
    header = Log(path).header if path.exists() else None
    device, *_ = set_up(args)
    _, replica = open_run(args, device, header)
    try:
        store = open_store("127.0.0.1", args.port, True, 10)
    except dist.DistError as error:
        fail(f"--port {args.port} cannot be had ({str(error).splitlines()[0]}): take another, or 0 for any free one")
    log, steps = Log(path, replica.run), replica.run["steps"]
    del replica  # the notary needs no weights
    if len(log.steps) == steps:
        fail(f"{path} is a finished run of {steps} steps: name another --log, or see what it made by: replay --log {path}")
    print(f"notary of {path} at port {store.port}, {len(log.steps)} of {steps} steps done, waiting for {args.machines or 1} machine(s): "
          f"python spsa_distributed.py join --connect HOST:{store.port}", flush=True)
    try:
        odd = notarise(store, log, args.machines or 1, args.deadline, args.crash_at,
                       partial(tqdm, desc="serve", disable=args.quiet))
    except KeyboardInterrupt:
        print(f"\nstopped after {len(log.steps)} steps: the same command goes on from {path}; machines wait for --patience seconds")
        raise SystemExit(130) from None
    members = [[m for m, _ in step] for step in log.steps]
    print(f"{steps} steps by {len(set(sum(members, [])))} machines, {sum(map(len, members)) * log.size:,} bytes of gradients, log of "
          f"{path.stat().st_size:,} bytes, replicas {'differ: ' + str(odd) if odd else 'equal'}")
    print(path, save_results(out, args, dict(run=log.header, members=members, odd=odd, log_bytes=path.stat().st_size)),
          plot_members(out, args, members), sep="\n")


def join(args):
    """A machine: learns the run from its notary, replays its log, takes part. Its rows of --data never leave it."""
    host, _, port = args.connect.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        fail(f"--connect {args.connect}: want HOST:PORT, a port from 1 to 65535")
    worker = Worker((host, int(port)), args.patience)
    worker.connect()
    device, dtype, *_ = set_up(args)
    problem, replica = open_run(args, device, worker.header)
    run, log = replica.run, args.log and Log(args.log, replica.run)
    for members in log.steps if log else ():
        replica.update(members)
    with tqdm(desc="join", total=run["steps"], initial=replica.step, disable=args.quiet) as bar:

        def after_step(members):
            bar.update()
            if log:
                log.append(members)

        try:
            worker.work(replica, probe_loss(problem, run["batch_size"], dtype, args.crash_at), after_step, args.join_at)
        except KeyboardInterrupt:
            fail(f"stopped at step {replica.step}: the others go on; the same command joins again")
    digest, (ce, accuracy) = replica.sha256(), problem.evaluate()
    out = Path(args.out or f"out/spsa_distributed/join-{worker.machine}")
    print(f"machine {worker.machine}: {replica.probes} probes, {worker.sent:,} bytes of gradients sent, {worker.replayed} steps replayed, "
          f"{worker.reconnected} reconnections; cross entropy {ce:.3f}, accuracy {accuracy:.3f}, weights {digest[:16]}")
    save_model(out / "weights.pt", replica.model)
    print(out / "weights.pt", save_results(out, args, dict(
        run=run, machine=worker.machine, sha256=digest, probes=replica.probes, bytes_sent=worker.sent, steps_replayed=worker.replayed,
        reconnected=worker.reconnected, cross_entropy=ce, accuracy=accuracy)), sep="\n")


def replay(args):
    """The fine-tuned weights out of the initial ones and the log: no data, no forward pass."""
    if not args.log:
        fail("replay needs --log FILE, the run.log of train or serve")
    log = Log(args.log)
    device, *_ = set_up(args)
    problem, replica = open_run(args, device, log.header)
    before, start = problem.evaluate(), time.perf_counter()
    for members in tqdm(log.steps, "replay", disable=args.quiet):
        replica.update(members)
    digest, seconds = replica.sha256(), time.perf_counter() - start
    out, (ce, accuracy) = Path(args.out or "out/spsa_distributed/replay"), problem.evaluate()
    print_table((f"{log.header['model']}, {problem.name}", "cross entropy", "accuracy"),
                [("initial weights", *before), (f"after {len(log.steps)} steps", ce, accuracy)])
    print(f"{Path(args.log).stat().st_size:,} bytes of log in {seconds:.1f} s; weights {digest[:16]}")
    save_model(out / "weights.pt", replica.model)
    print(out / "weights.pt", save_results(out, args, dict(run=log.header, steps=len(log.steps), sha256=digest, seconds=seconds,
                                                           cross_entropy=ce, accuracy=accuracy)), sep="\n")


def drill(args, out):
    """Real processes on this computer: a notary and two machines; one machine is killed between the two forward passes of a probe; a
    third joins later by replaying the log; the notary is killed between writing a step and publishing it, and restarted from its log.
    → dict of what came out, after comparing every replica with a replay of the log."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    steps, dies, joins, notary_dies = DRILL
    children, until = {}, time.monotonic() + 240
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}  # torchrun's, not theirs

    def start(name, *flags):
        command = [sys.executable, __file__, *map(str, flags), "--device", "cpu", "--seed", str(args.seed), "--quiet", "--no_plot", "--out",
                   str(out / name)]
        with open(out / f"{name}.txt", "w") as file:
            children[name] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**env, "OMP_NUM_THREADS": "1"})

    def ended(name, code):
        if children[name].wait(max(1, until - time.monotonic())) != code:
            said = (out / f"{name}.txt").read_text().strip().split("\n")[-1]
            raise RuntimeError(f"{name} ended with {children[name].returncode}, not {code}: {said}")

    def port():
        while time.monotonic() < until and children["notary"].poll() is None:
            if found := re.search(r"at port (\d+)", (out / "notary.txt").read_text()):
                return found[1]
            time.sleep(0.05)
        raise RuntimeError(f"the notary did not start: {(out / 'notary.txt').read_text().strip()}")

    try:
        serve = ("serve", "--log", out / "run.log", "--steps", steps, "--hash_every", steps // 3, "--deadline", 2, "--lr", 2e-3)
        start("notary", *serve, "--port", 0, "--machines", 2, "--crash_at", notary_dies)
        address = f"127.0.0.1:{port()}"
        start("machine-a", "join", "--connect", address)
        start("machine-b", "join", "--connect", address, "--crash_at", dies)
        start("machine-c", "join", "--connect", address, "--join_at", joins)
        ended("machine-b", -signal.SIGKILL)
        ended("notary", -signal.SIGKILL)
        start("notary-again", *serve, "--port", address.split(":")[1])
        for name in ("machine-a", "machine-c", "notary-again"):
            ended(name, 0)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        fail(f"the drill of real processes failed, see {out}: {error}")
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    log = Log(out / "run.log")
    replica = Replica(load_model("tiny"), log.header)
    for members in log.steps:
        replica.update(members)
    machines = [json.loads((out / name / "results.json").read_text()) for name in ("machine-a", "machine-c")]
    ids = [m["machine"] for m in machines]
    members = [[m for m, _ in members] for members in log.steps]
    sums = {f"machine {m['machine']}": m["sha256"] for m in machines} | {"replay of the log": replica.sha256()}
    return dict(hashes=sums, equal=len(set(sums.values())) == 1, members=members, killed=min(set(sum(members, [])) - set(ids)),
                machines=ids, log_bytes=log.path.stat().st_size, **{key: [m[key] for m in machines] for key in (
                    "probes", "bytes_sent", "steps_replayed", "reconnected", "cross_entropy", "accuracy")})


# ============================================================================================== the experiments


def one_run(job):
    """One fine-tuning of the tiny model, by n machines in one process: the steps of n processes, to the last bit.

    job: optimizer (spsa or adam), machines, lr, seed, steps, target, stop (at the target); and settings of the run. → dict(reached, curve,
    …): the first evaluation, every 5 steps, with a cross entropy below the target, or None; curve [(step, cross entropy, accuracy), …].
    """
    torch.set_flush_denormal(True)
    n, every, batch = job["machines"], 5, SETTINGS["batch_size"][0]
    model = load_model("tiny").to(getattr(torch, job.get("dtype", "float32")))
    problem, start, step = Problem(model, torch.device("cpu"), seed=job["seed"]), time.perf_counter(), 0
    curve, reached = [(0, *problem.evaluate())], None
    if job["optimizer"] == "adam":
        bytes_a_step, steps = 4 * sum(p.numel() for p in model.parameters()), adam(problem, n, batch, job["lr"])
    else:
        run = {**{key: value[0] for key, value in SETTINGS.items()}, "key": job["seed"], **job}
        replica, bytes_a_step = Replica(model, run, job.get("exact", True)), run["samples"] * WIDTH[run["codec"]]
        steps = spsa(replica, range(n), probe_loss(problem, batch, torch.float32), lambda own: list(own.items()))
    try:
        for step, members in zip(range(1, job["steps"] + 1), steps):
            if step % every == 0:
                if members:
                    replica.flush()
                curve.append((step, *problem.evaluate()))
                ce = curve[-1][1]
                reached = step if reached is None and ce < job["target"] else reached
                if job["stop"] and (reached or ce > 1.5 * curve[0][1]) or not math.isfinite(ce):  # there, or lost
                    break
    except Diverged:
        pass
    return dict(reached=reached, curve=[c for c in curve if math.isfinite(c[1])], bytes_a_step=bytes_a_step, probes=n * step,
                seconds=time.perf_counter() - start)


def adam(problem, n, batch, lr):
    """First-order fine-tuning on the same rows: data-parallel Adam of n machines, step by step."""
    opt = torch.optim.Adam(problem.model.parameters(), lr)
    for step in itertools.count():
        problem.loss(*map(torch.cat, zip(*(problem.batch(m, step, 0, batch) for m in range(n))))).backward()
        opt.step()
        opt.zero_grad()
        yield None


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(1)


@contextmanager
def job_pool(args, n_jobs):
    """Yields run(jobs) → results of one_run in order: shared out among torchrun's ranks, or among the cores."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), start_worker) if world == 1 else None

    def run(jobs):
        results = []
        for result in (pool.map(one_run, jobs) if pool else map(one_run, jobs[dist.get_rank() :: world])):
            results.append(result)
            bar.update(world)
        if world > 1:
            shares = [None] * world
            dist.all_gather_object(shares, results)
            results = [shares[i % world][i // world] for i in range(len(jobs))]
        return results

    with tqdm(total=n_jobs, desc=args.task, unit="run", disable=args.quiet or world > 1 and dist.get_rank() > 0) as bar:
        with pool or nullcontext():
            yield run


MACHINES, TARGET, MAX_STEPS = (1, 2, 4), 0.25, 200
RATES = {"spsa": (5e-4, 1e-3, 2e-3, 4e-3), "adam": (1e-4, 3e-4, 1e-3, 3e-3)}  # tried for every number of machines
DRILL = (60, 15, 20, 35)  # steps; when a machine is killed, another joins, the notary is killed


def demo(args):
    """The paper's claim, small: 1, 2 and 4 machines fine-tune a language model with a byte a step each, and stay equal come what may.

    The learning rate is swept for each number of machines by the same trials, on --seeds seeds; then --seeds others."""
    _, _, rank, world = set_up(args)
    out, steps = Path(args.out or "out/spsa_distributed/demo"), args.steps or MAX_STEPS
    if rank == 0:
        pretrain_tiny(args.quiet)
    if world > 1:
        dist.barrier()
    before = Problem(load_model("tiny"), torch.device("cpu")).evaluate()
    arms, seeds = [*(("spsa", n) for n in MACHINES), ("adam", 1)], range(args.seed, args.seed + args.seeds)
    tune = [seed + 1000 for seed in seeds]
    shared = dict(steps=steps, target=args.target, stop=True)
    with job_pool(args, len(arms) * 4 * len(tune) + (len(arms) + 1) * len(seeds)) as run:
        trials = [dict(shared, optimizer=kind, machines=n, lr=lr, seed=seed) for kind, n in arms for lr in RATES[kind] for seed in tune]
        cost = {}  # of (kind, n): of a rate: steps to the target, of all seeds; not reached counts as twice the longest run and more
        for job, result in zip(trials, run(trials)):
            tried = cost.setdefault((job["optimizer"], job["machines"]), {})
            tried[job["lr"]] = tried.get(job["lr"], 0) + (result["reached"] or 2 * steps + result["curve"][-1][1])
        finals = [(kind, n, "byte", min(cost[kind, n], key=cost[kind, n].get)) for kind, n in arms]
        finals.insert(3, ("spsa", MACHINES[-1], "float32", finals[2][3]))
        results = iter(run([dict(shared, optimizer=kind, machines=n, codec=codec, lr=lr, seed=seed)
                            for kind, n, codec, lr in finals for seed in seeds]))
        groups = [[next(results) for _ in seeds] for _ in finals]
    if rank == 0:
        drilled = drill(args, out / "drill")
        lines = report_demo(args, before, finals, groups, drilled)
        table = [dict(zip(("optimizer", "machines", "codec", "lr"), final), runs=group) for final, group in zip(finals, groups)]
        tuning = [dict(optimizer=kind, machines=n, steps_of_all_seeds=tried) for (kind, n), tried in cost.items()]
        figures = dict(before=before, target=args.target, table=table, tuning=tuning, drill=drilled, verdicts=lines)
        print(*lines, save_results(out, args, figures), plot_demo(out, args, finals, groups, drilled), sep="\n")
        if not drilled["equal"]:
            raise SystemExit(1)
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def report_demo(args, before, finals, groups, drilled):
    """Print the table → the sentences below it, each only as far as the table bears it."""
    ddof, rows, steps = int(args.seeds > 1), [], {}
    for (kind, n, codec, lr), group in zip(finals, groups):
        reached = [r["reached"] for r in group]
        done = None not in reached
        steps[kind, n, codec] = np.array(reached) if done else None
        mean = np.mean(reached) if done else math.nan
        rows.append(("Adam, backpropagation" if kind == "adam" else f"SPSA, {codec}", n, f"{lr:g}{'*' * (lr in RATES[kind][::3])}",
                     f"{mean:.0f} ± {np.std(reached, ddof=ddof):.0f}" if done else f"{len(group) - reached.count(None)} of {len(group)}",
                     *(f"{x:,.0f}" if done else "–" for x in (mean * n, mean * group[0]["bytes_a_step"])),
                     *(float(np.mean(x)) for x in ([r["curve"][-1][2] for r in group], [r["seconds"] for r in group]))))
    print(f"The tiny model before: cross entropy {before[0]:.3f}, accuracy {before[1]:.3f}. Steps until {args.target:g}, evaluated every "
          f"5, mean ± sd of {args.seeds} seeds:")
    print_table(("fine-tuning", "machines", "lr (* edge)", "steps", "batches", "bytes sent a machine", "accuracy", "s a run"), rows)
    lines, one, last = [], steps["spsa", 1, "byte"], MACHINES[-1]
    for n in MACHINES[1:]:
        some = steps["spsa", n, "byte"]
        lines.append(f"{n} machines against one: " + (
            "not every seed reached the target, so no speed-up is claimed." if one is None or some is None else
            f"{one.mean() / some.mean():.1f} times fewer steps, {n * some.mean() / one.mean():.1f} times the batches."))
    some, exact, first = steps["spsa", last, "byte"], steps["spsa", last, "float32"], steps["adam", 1, "byte"]
    if some is not None and exact is not None:
        gap = some - exact
        lines.append(f"{last} machines, a byte instead of a float32: {gap.mean():+.1f} ± {gap.std(ddof=ddof):.1f} steps (paired).")
    if some is not None and first is not None:
        size = groups[-1][0]["bytes_a_step"]
        lines.append(f"Adam takes {first.mean():.0f} steps of one batch; its gradients, sent as data-parallel training does, are {size:,} "
                     f"bytes a step and in all {size * first.mean() / some.mean():,.0f} times what a machine sent here.")
    counts, a, c = list(map(len, drilled["members"])), *drilled["machines"]
    return lines + [
        f"Real processes, {len(counts)} steps: machine {drilled['killed']} killed (kill -9) inside a probe at step {DRILL[1]}; machine {c} "
        f"joined after replaying {drilled['steps_replayed'][1]} steps; notary killed at step {DRILL[3]}, restarted from its log.",
        f"Machines {a} and {c} made {' and '.join(map(str, drilled['probes']))} probes and handed "
        f"{' and '.join(map(str, drilled['bytes_sent']))} bytes of gradients to the transport; the log of {sum(counts)} gradients has "
        f"{drilled['log_bytes']:,} bytes. SHA-256 of all weights:",
        *(f"    {name:18} {digest}" for name, digest in drilled["hashes"].items()),
        "    all equal" if drilled["equal"] else "    THEY DIFFER"]


@lru_cache
def idle_drift(dtype, exact):
    """What 300 probes without an update do to the weights of the tiny model → (rms change in units of ε, share of the weights that a
    perturbation does not move at all)."""
    model = load_model("tiny").to(dtype)
    replica = Replica(model, {**{key: value[0] for key, value in SETTINGS.items()}, "key": 0}, exact)
    start = torch.cat([p.detach().flatten().float() for p in model.parameters()])
    for step in range(300):
        for times in (1, -2, 1):
            replica.move(step, 0, 0, times, 1e-3)
            replica.flush()
            if step == 0 and times == -2:
                still = torch.cat([p.flatten().float() for p in model.parameters()]) == start
    change = torch.cat([p.flatten().float() for p in model.parameters()]) - start
    return float(change.square().mean().sqrt()) / 1e-3, float(still.float().mean())


def compare(args):
    """What the byte, the grid and the missing gradient each cost: one machine, equal steps, --seeds seeds."""
    device, _, rank, world = set_up(args)
    out, steps = Path(args.out or "out/spsa_distributed/compare"), args.steps or 150
    if rank == 0:
        load_model("tiny", args.quiet)
    if world > 1:
        dist.barrier()
    spsa_arm, lr = dict(optimizer="spsa", lr=args.lr or 1e-3), args.lr or 1e-3
    arms = {
        "first-order Adam": dict(optimizer="adam", lr=lr),
        "SPSA, float32 scalars": dict(spsa_arm, codec="float32"),
        "SPSA, one byte": spsa_arm,
        "SPSA, one byte, gaussian": dict(spsa_arm, noise="gaussian"),
        "one byte, naive float32": dict(spsa_arm, exact=False),
        "one byte, naive bfloat16": dict(spsa_arm, exact=False, dtype="bfloat16"),
    }
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [dict(machines=1, steps=steps, target=args.target, stop=False, seed=seed, **arm) for arm in arms.values() for seed in seeds]
    with job_pool(args, len(jobs)) as run:
        results = iter(run(jobs))
    if rank == 0:
        rows, table = [], []
        for name, arm in arms.items():
            group = [next(results) for _ in seeds]
            reached = [r["reached"] for r in group]
            ends = np.array([r["curve"][-1][1:] for r in group])
            dtype, exact = getattr(torch, arm.get("dtype", "float32")), arm.get("exact", True)
            drift = None if arm["optimizer"] == "adam" else idle_drift(dtype, exact)
            rows.append((name, f"{len(reached) - reached.count(None)} of {len(reached)}" if None in reached else f"{np.mean(reached):.0f}",
                         ends[:, 0].mean().item(), ends[:, 0].std(ddof=int(len(seeds) > 1)).item(), ends[:, 1].mean().item(),
                         f"{group[0]['bytes_a_step']:,}", *((f"{d:.2g}" for d in drift) if drift else "––")))
            table.append(dict(arm=name, settings=arm, runs=group, drift=drift))
        print_table((f"1 machine, {steps} steps", f"steps to {args.target:g}", "cross entropy", "± sd", "accuracy", "bytes a step",
                     "idle drift/ε", "do not move"), rows)
        print("idle drift: root mean square change of the weights by 300 probes without an update",
              "do not move: share of the weights that +εz leaves where they were",
              save_results(out, args, dict(table=table)), plot_compare_arms(out, args, table), sep="\n")
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def wire_bytes(shapes, samples=1, rank=4):
    """Bytes that each machine sends in a step, by scheme, for parameters of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    n = sum(sizes)
    power = sum(4 * rank * (shape[0] + size // shape[0]) if len(shape) > 1 else 4 * size for shape, size in zip(shapes, sizes))
    return {"DDP, float32 gradients": 4 * n, "DDP, bfloat16 gradients": 2 * n, "1-bit Adam, compressed phase": n / 8,
            f"PowerSGD, rank {rank}": power, "DiLoCo, 500 local steps": 4 * n / 500, "a seed and a float32 scalar": 8,
            "one byte a probe": samples}


def in_words(n_bytes):
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:g} B"


def comm(args):
    """What a machine sends in a step and in a run, computed from the shapes of GPT-2's tensors."""
    out, samples, table = Path(args.out or "out/spsa_distributed/comm"), args.samples or 1, {}
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        with torch.device("meta"):
            model = GPT(GPTConfig(**GPT_SIZES[name], vocab_size=50257, bias=True))
        table[name] = wire_bytes([tuple(p.shape) for p in model.parameters()], samples)
    print_table(("sent by a machine in a step", *table),
                [(scheme, *(in_words(row[scheme]) for row in table.values())) for scheme in table["gpt2"]])
    run, ddp = args.steps or 20_000, table["gpt2"]["DDP, float32 gradients"]
    print(f"SPSA needs many more steps. gpt2, whole runs: {run:,} steps of it are {in_words(run * samples)}; 1,000 steps of Adam by DDP "
          f"{in_words(1000 * ddp)}. A probe is two forward passes, 4 FLOP a parameter and token; a gradient is 6.")
    print(save_results(out, args, dict(table=table)), plot_comm(out, args, table), sep="\n")


def bench(args):
    """What a step costs beside its forward passes: two passes over the weights here, n + 3 in MeZO's way; and whole probes a second."""
    device, dtype, *_ = set_up(args)
    out, name = Path(args.out or "out/spsa_distributed/bench"), args.model or ("gpt2" if device.type == "cuda" else "tiny")
    if name != "tiny" and name not in GPT_SIZES:
        fail(f"--model {name}: bench takes {', '.join(GPT_SIZES)}")
    config = GPTConfig(**TINY) if name == "tiny" else GPTConfig(**GPT_SIZES[name])
    model = GPT(config).to(device).eval()
    replica = Replica(model, {**{key: value[0] for key, value in SETTINGS.items()}, "key": 0})
    flat, rows, n_weights = replica.flat, [], sum(p.numel() for p in model.parameters())

    def milliseconds(function):
        times = []
        for _ in range(6):
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:]) * 1e3

    def step(n, kind):
        replica.run["noise"] = kind
        replica.move(0, 0, 0, 1, 1e-3)  # restore, n updates, perturb: one pass
        for m in range(n):
            replica.move(0, m, 0, int(m == n - 1), 1e-9)
        replica.move(1, 0, 0, 1, 1e-3)
        replica.flush()
        replica.move(1, 0, 0, -2, 1e-3)  # flip: another
        replica.flush()

    def idiom(n):
        for _ in range(n + 3):
            flat.data = flat.data + 1.0 * torch.randn_like(flat) * 0.0

    def in_place(n):
        for _ in range(n + 3):
            flat.add_(torch.randn_like(flat), alpha=0.0)

    counts = (1, 8, 64) if device.type == "cuda" else (1, 8)
    for n in counts:
        for label, n_bytes, function in [
                ("p.data = p.data + s·z·ε", 32 * (n + 3), partial(idiom, n)), ("p.add_(z, alpha)", 16 * (n + 3), partial(in_place, n)),
                *((f"this file, {kind}", 16, partial(step, n, kind)) for kind in ROW)]:
            ms = milliseconds(function)
            rows.append((f"{label}, {n} machine{'s' * (n > 1)}", ms, n_bytes, n_bytes * n_weights / ms / 1e6))
    replica.run["noise"] = "rademacher"
    ids = torch.randint(config.vocab_size, (args.batch_size or 16, min(64, config.block_size)), device=device)

    def loss():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return F.linear(model.trunk(ids)[:, -1], model.lm_head.weight[:2]).float().logsumexp(-1).mean()

    ms = milliseconds(lambda: replica.probe(0, 0, loss))
    print_table((f"weights of a step, {name}, {n_weights / 1e6:.1f}M, {device.type}", "ms", "bytes a weight", "GB/s"), rows)
    print(f"a probe with batch {ids.size(0)} × {ids.size(1)} tokens in {dtype}: {ms:.2f} ms, {1e3 / ms:.2f} probes a second")
    print(save_results(out, args, dict(table=rows, probe_ms=ms)))


# ============================================================================================== figures


def plot_demo(out, args, finals, groups, drilled):
    def draw(axes):
        shown = [(f"Adam, backpropagation, lr {lr:g}" if kind == "adam" else f"{n} machine{'s' * (n > 1)}, {codec}, lr {lr:g}", group,
                  "k" if kind == "adam" else f"C{n // 2}", "--" if codec == "float32" else "-")
                 for (kind, n, codec, lr), group in zip(finals, groups)]
        for label, group, color, style in shown:
            for i, run in enumerate(group):
                axes[0].plot(*list(zip(*run["curve"]))[:2], color=color, ls=style, lw=1.2, alpha=0.8, label=None if i else label)
        axes[0].axhline(args.target, color="grey", lw=0.8, ls=":")
        axes[0].set(xlabel="steps", ylabel="test cross entropy, nats", title="Until the target (dotted), one line a seed")
        axes[0].legend(fontsize=8)
        bars = [(label, group[0]["bytes_a_step"] * np.mean([run["curve"][-1][0] for run in group]), c) for label, group, c, _ in shown]
        axes[1].barh([label.split(", lr")[0] for label, *_ in bars], [sent for _, sent, _ in bars], color=[color for *_, color in bars])
        for i, (_, sent, _) in enumerate(bars):
            axes[1].text(sent, i, f" {in_words(round(sent))}", va="center", fontsize=8)
        axes[1].set(xscale="log", xlabel="bytes a machine sends until the target", title="On the wire (Adam: as data parallel)",
                    xlim=(1, 1e3 * max(sent for _, sent, _ in bars)))
        axes[1].invert_yaxis()
        draw_members(axes[2], drilled["members"])
        for step, text, height in ((DRILL[1], f"machine {drilled['killed']} killed", 2.5), (DRILL[3], "notary killed, restarted", -0.6)):
            axes[2].axvline(step, color="grey", lw=0.8, ls=":")
            axes[2].text(step, height, f" {text}", fontsize=8, va="center")
        axes[2].set(title=f"Real processes: replicas {'equal' if drilled['equal'] else 'DIFFER'} at the end", ylim=(-1, 3))

    return figure(out, "demo.png", args, draw, ncols=3, figsize=(15, 4.2))


def draw_members(ax, members):
    points = [(step, m) for step, ids in enumerate(members) for m in ids]
    ax.scatter(*zip(*points), s=8)
    ax.set(xlabel="steps", ylabel="machine", title="Whose byte was in which step")
    ax.set_yticks(sorted({m for _, m in points})[:40])


def plot_members(out, args, members):
    return figure(out, "members.png", args, lambda ax: draw_members(ax, members), figsize=(7, 3.5))


def plot_fine_tuning(out, args, curve):
    def draw(ax):
        steps, ce, accuracy = zip(*curve)
        ax.plot(steps, ce, label="cross entropy, nats")
        ax.plot(steps, accuracy, label="accuracy")
        ax.set(xlabel="steps", title="Fine-tuning by bytes, test rows", ylim=(0, None))
        ax.legend()

    return figure(out, "train.png", args, draw, figsize=(6, 4))


def plot_compare_arms(out, args, table):
    def draw(ax):
        for i, row in enumerate(table):
            for j, run in enumerate(row["runs"]):
                ax.plot(*list(zip(*run["curve"]))[:2], color=f"C{i}", lw=1, label=None if j else row["arm"])
        ax.set(xlabel="steps", ylabel="test cross entropy, nats", title="One machine, one line a seed")
        ax.legend(fontsize=8)

    return figure(out, "compare.png", args, draw, figsize=(7, 4.4))


def plot_comm(out, args, table):
    def draw(ax):
        for i, (name, row) in enumerate(table.items()):
            ax.barh(np.arange(len(row)) + 0.2 * i - 0.3, list(row.values()), 0.2, label=name)
        ax.set_yticks(range(len(table["gpt2"])), list(table["gpt2"]))
        ax.set(xscale="log", xlabel="bytes a machine sends in a step", title="Communication, computed from the tensors' shapes")
        ax.invert_yaxis()
        ax.legend()

    return figure(out, "comm.png", args, draw, figsize=(9, 4.2))


# ============================================================================================== command line

TASKS = {"demo": demo, "train": train, "serve": serve, "join": join, "replay": replay, "compare": compare, "comm": comm, "bench": bench}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1, 10**9)
    flag("task", nargs="?", choices=TASKS, default="demo", help="demo (the default): the claim, small, with real processes; train: one "
         "run, alone or under torchrun; serve, join: a run that machines enter and leave; replay: weights out of a log; compare: what "
         "byte, grid and missing gradient cost; comm: bytes a step beside other schemes; bench: cost of a step")
    flag("--model", help="train, serve: tiny (default), gpt2, gpt2-medium, gpt2-large, gpt2-xl (OpenAI's weights, a download) or a "
         "weights.pt of this program; join, replay: the run's; bench: a size, untrained")
    flag("--data", help="train, serve, join: sst2 (a download; the default but for tiny), or a table with a header, by tabs or commas; "
         "each machine trains on up to 1000 rows of it; a fifth is for the test (default for tiny: generated sentences)")
    flag("--text_column", help="of the table (sentence, text, or the first)")
    flag("--label_column", help="of the table (label, or the last)")
    flag("--labels", help="a word for each class: terrible,great in the order of the sorted labels, or no=terrible,yes=great")
    flag("--prompt", choices=PROMPTS, help="mezo (default): '… It was' great or terrible; justonebyte: 'sentiment:' positive or negative")
    flag("--steps", type=count, help="updates (tiny: 200; GPT-2: 20,000, MeZO's; demo: at most 200; compare: 150)")
    flag("--batch_size", type=count, help="rows a probe (tiny: 32; GPT-2: 16)")
    flag("--samples", type=number(int, 1, 65535), help="probes of a machine in a step, and so its bytes (1; the authors' script: 8 and 16)")
    flag("--lr", type=number(float, 1e-12, 1e3), help="learning rate (tiny, compare: 1e-3; GPT-2: 1e-6; MeZO: 1e-6, 1e-7)")
    flag("--eps", type=number(float, 1e-9, 1), help="ε of the probe (1e-3)")
    flag("--reduce", choices=("sqrt", "mean", "sum"), help="divide the sum over n probes by √n (default, the authors'), n or 1")
    flag("--schedule", choices=("constant", "linear"), help="of the learning rate; linear: to 0 (constant)")
    flag("--noise", choices=ROW, help="rademacher (default) and binomial are equal on all devices; gaussian is the paper's")
    flag("--codec", choices=WIDTH, help="what is sent: byte (default), or float32 for comparison")
    flag("--hash_every", type=count, help="steps between comparisons of all replicas' weights (tiny: 100; GPT-2: 1000)")
    flag("--machines", type=number(int, 1, 254), help="serve: start when so many have joined (1)")
    flag("--port", type=number(int, 0, 65535), default=29500, help="serve: on all addresses of this computer, no password; 0: a free one")
    flag("--deadline", type=number(float, 0.01, 1e6), default=30.0, help="serve: seconds to wait for others after a first message")
    flag("--connect", default="127.0.0.1:29500", help="join: HOST:PORT of the notary")
    flag("--patience", type=number(float, 0, 1e6), default=60.0, help="join: seconds without a notary before giving up")
    flag("--log", help="train, serve: the log (run.log in --out); replay: the log to replay; join: keep a log here too")
    flag("--crash_at", type=number(int, 0), help="serve, join: kill -9 this process at the worst moment of a step (the drill of demo)")
    flag("--join_at", type=number(int, 0), default=0, help="join: not before so many steps are done (the drill of demo)")
    flag("--resume", action="store_true", help="train: go on from the log in --out")
    flag("--eval_every", type=count, help="train: steps between evaluations (a twentieth of --steps)")
    flag("--seeds", type=count, default=3, help="demo, compare: number of seeds, from --seed on")
    flag("--target", type=number(float, 0.01, 10), default=TARGET, help="demo, compare: cross entropy to reach")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu (demo and compare: the cores of the CPU)")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of forward passes; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of the noise and of each machine's rows; join: of its rows")
    flag("--out", help="folder for results, figures, weights (out/spsa_distributed/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.resume and args.task != "train":
        fail("--resume goes with train alone" + ("; serve goes on with its --log by itself" if args.task == "serve" else ""))
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
    except Diverged as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
