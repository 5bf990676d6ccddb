"""Fine-tuning on many machines with one byte per gradient (Zelikman, Huang, Liang, Haber, Goodman; arXiv 2306.10015),
on top of MeZO (Malladi et al.; arXiv 2305.17333).

The problem. Data-parallel training sends 4 bytes a weight and step: 498 MB for the smallest GPT-2.

The idea. Two forward passes at θ ± εz, z random, give one number, the projected gradient g; g·z estimates the gradient.
z comes from a seed that everybody can work out from (step, machine), so a machine has to send only g, and a byte is
enough for it.

    g = (L(θ + εz) − L(θ − εz)) / 2ε          a machine's projected gradient, on a batch of its own (Replica.gradient)
    c = sign(g)·(round(8·ln|g|) + 64)         its byte: 3.8e-4 ≤ |g| ≤ 2631, error at most 6.5 %; −128: none (encode)
    θ ← θ − 1/√n·Σ clip(η·ĝ(c), ±κ)·z         over a step's n bytes; none moves a weight farther than κ·|z| (apply)
    z = noise(key; element, step, machine)    Philox4x32-10; a machine is 64 random bits for life (noise)

So the run is its log: whoever applies the same bytes to the same initial weights has the same weights, to the last bit.
Floating point grants that only on a grid (flatten_, perturb_), where what a probe adds can be taken away again. A
notary collects the messages of a step (machine, step, hash of its weights, byte), writes them to its log as one record,
and only then sends that record to everybody. At every 50th step a record names the weights by their hash: a snapshot
of that name may come from anybody, and a newcomer replays what follows. Every machine holds all records, and gives back
what the log lost. There is no password: run it in a network that you trust.

    python spsa_distributed.py                                      the table and a drill with real processes
    python spsa_distributed.py serve --machines 2                   a notary; in other terminals, on any computers:
    python spsa_distributed.py join --connect HOST:29500            a machine; again at any time
    python spsa_distributed.py replay --log out/spsa_distributed/serve/run.log --steps 100      the weights then
    python spsa_distributed.py train --machines 4                   without a notary, or torchrun --nproc_per_node=2 …
    python spsa_distributed.py train --model gpt2 --data SST-2/train.tsv --lr 1e-6 --steps 20000 --batch_size 16

What was measured (one thread of a busy AMD EPYC, torch 2.13, seeds 0-2; a GPT of 101,888 weights, pretrained here to
follow one adjective of three, that must learn to follow the majority; steps until the test cross entropy is below .25,
looked at after every step; rates a factor of √2 apart by other seeds, three or more for each row, not all seven):

    python spsa_distributed.py   1 machine    2 machines    4 machines    4, float32    MeZO       Adam, backpropagation
    steps                         78 ± 23      49 ± 8        35 ± 6        36 ± 6        86 ± 11    5 ± 1
    batches                       78           99            139           143           86         5
    bytes of gradients            78           49            35            143           343        2,037,760

Four machines take 2.2 times fewer steps than one, for 1.8 times its batches. A byte does as well as a float32, and one
machine as well as naive MeZO; its best rate, .016, is the highest that was tried (with κ it acts on the sign of most
bytes). Backpropagation needs 16 times fewer batches than one machine: the byte buys bandwidth, not compute.
A step's noise and update of a million weights on a CPU (TRITON_INTERPRET=1 python -m kernels.perturb): 11.2 ms against
19.5 for MeZO's idiom, of 8 machines 18.2 against 53.0; gaussian 73.6 and 181.7.

Bytes. The gradient is one byte. A machine's message has 27 with who, when, on what weights and a checksum; a record of
n machines has 18 + 9·n, and TCP/IP adds its own. Other schemes for GPT-2's 124,439,808 weights, a step, by arithmetic:
data-parallel float32 497.8 MB, bfloat16 248.9 MB, 1-bit Adam 15.6 MB, DiLoCo with 500 local steps 1.0 MB.

What did not hold, and what was not run: GPT-2 on SST-2, and anything on a GPU since the counter changed. Of two
machines that differ the notary cannot know which is right; the majority, then the first counts. Privacy: machines never
see each other's rows, but T steps reveal up to 8·T bits of them; this is no differential privacy. Probes are float32;
under bfloat16 autocast take --eps 1e-2. Gaussian noise, the paper's, differs between devices in the last place and is
slower on a CPU than torch.randn; use it among like machines.

Try (`train --steps 60 --lr 0.016`: cross entropy .215, accuracy .895): `--machines 1`: .260, .920. `--noise gaussian`:
.149, .980. `--clip 100`: 1.165, .565, the rate is too high without the clip.
"""

import argparse
import asyncio
import csv
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import secrets
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

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

# ==================================================================================== the method: the byte

NOTHING = -128  # no contribution: the loss was not finite, or the run is over
SIZES = [math.exp((k - 64) / 8) for k in range(1, 128)]  # 3.8e-4 … 2631
CODES = np.array([0.0, *SIZES, 0.0, *(-size for size in reversed(SIZES))], "<f4")  # of code c at index c mod 256
if zlib.crc32(CODES.tobytes()) != 0x92502E47:
    raise ImportError("this platform's exp() differs from others': its replicas would part from theirs")


def encode(g):
    """A projected gradient → its byte, −128 … 127: round(8·ln|g|) + 64 with the sign of g. Error at most 6.5 %."""
    if not math.isfinite(g):
        return NOTHING
    size = min(127, round(8 * math.log(abs(g))) + 64) if g else 0
    return int(math.copysign(max(size, 0), g))


def decode(code):
    """The byte's float32 value; of NOTHING 0."""
    return float(CODES[code & 255])


# ==================================================================================== the method: noise

MASK = 0xFFFFFFFF
TILE = 1024  # weights that share a grid constant
PIECE = 512  # tiles at a time: 2 MB of weights stay in the cache


def philox(c0, c1, c2, c3, key, rounds=10):
    """Philox4x32 (Salmon et al. 2011): counter words (ints or uint64 arrays below 2³²), 64-bit key → (…, 4) uint32."""
    k0, k1 = key & MASK, key >> 32
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & MASK, a >> 32 ^ c3 ^ k1, a & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return np.stack([c0, c1, c2, c3], -1).astype("<u4")


def rademacher(words):
    """(calls, 4) uint32 → (calls, 128) float32 of ±1, one bit each, the lowest first: +1 where it is 0."""
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.view(np.int8)).float()


def gaussian(words):
    """Box-Muller: (calls, 4) uint32 → (calls, 4) of √(−2 ln u)·(cos θ, sin θ); u of 23 bits is never 0, θ has 24."""
    words = torch.from_numpy(words.astype(np.int64))
    radius = (-2 * (((words[:, 0::2] >> 9).float() + 0.5) * 2.0**-23).log()).sqrt()
    theta = (words[:, 1::2] >> 8).float() * (2 * math.pi * 2.0**-24)
    return torch.stack([radius * theta.cos(), radius * theta.sin()], 2).flatten(1)


NOISE = {"rademacher": (rademacher, 8), "gaussian": (gaussian, 256)}  # calls of Philox for a tile


def noise(kind, key, step, machine, first, n_tiles):
    """z of n_tiles tiles of the weights from the tile `first`: (n_tiles, 1024) float32. Any tile can be had alone.

    The counter is (call, step, machine low, machine high). Gaussian: z number j of call i is at 256·j + i of its tile.
    """
    draw, calls = NOISE[kind]
    call = np.arange(first * calls, (first + n_tiles) * calls, dtype=np.uint64)
    z = draw(philox(call, step, machine & MASK, machine >> 32, key)).view(n_tiles, calls, -1)
    return (z.transpose(1, 2) if kind == "gaussian" else z).reshape(n_tiles, TILE)


# ==================================================================================== the method: weights on a grid

MORE, PROBE, FLIP, UPDATE = 0, 1, -2, 2  # after coef·z: more of the sum; w += sum; w −= 2·sum; w += sum, for good


def snap(x, q):
    """The multiple of q = 2^k that is nearest to x, half to even, within 2²²·q. x: float32, overwritten."""
    return x.div_(q).clamp_(-(2.0**22), 2.0**22).round_().mul_(q)


def flatten_(model):
    """Move the weights into one buffer, a tensor starting at a multiple of 1024, onto their tile's grid → flat, grid.

    q = 2^(e − 24), 2^e > 2·max|w| of the tile and at least 1. Sums of multiples of q below 2²⁴·q are exact in float32.
    """
    params = list(model.parameters())
    sizes = [-(-p.numel() // TILE) * TILE for p in params]
    flat = torch.cat([F.pad(p.detach().float().flatten(), (0, size - p.numel())) for p, size in zip(params, sizes)])
    tiles = flat.view(-1, TILE)
    _, exponent = np.frexp(tiles.abs().amax(1).cpu().numpy())  # max|w| < 2^exponent
    grid = torch.from_numpy(np.ldexp(np.float32(1), np.maximum(exponent, -2) - 22)).to(flat.device)
    tiles.copy_((tiles / grid[:, None]).round_() * grid[:, None])
    for p, part in zip(params, flat.split(sizes)):
        p.data = part[: p.numel()].view_as(p)
        p.requires_grad_(False)
    return flat, grid


def perturb_(flat, grid, key, kind, moves):
    """w ← w + snap(Σ coef·z) for every sum that the moves spell, in one read and one write of the weights, in place.

    flat: (1024·tiles,) float32; grid: (tiles,) float32, powers of two; key: 64 bits; moves: [(step, machine, then,
    coef), …], a row adds coef·z(step, machine) to the sum. An UPDATE leaves |w| ≤ 2²³·q, half of what the grid holds,
    and no probe is larger than 2²²·q: whatever the bytes were, what a probe adds is taken away exactly. (The definition
    of kernels/perturb.py.)
    """
    tiles = flat.view(-1, TILE)
    for first in range(0, len(tiles), PIECE):
        w, q = tiles[first : first + PIECE], grid[first : first + PIECE, None]
        total = torch.zeros_like(w)
        for step, machine, then, coef in moves:
            total += noise(kind, key, step, machine, first, len(w)).to(w.device) * coef
            if then == UPDATE:
                w.add_(snap(total, q)).clamp_(-(2.0**23) * q, 2.0**23 * q)
            elif then:
                w.add_(snap(total, q), alpha=then)
            if then:
                total.zero_()


# ==================================================================================== the method: a replica

HEAD, MEMBER, CRC = struct.Struct("<I8sH"), struct.Struct("<Qb"), struct.Struct("<I")


class Record(NamedTuple):
    """The one form: in the log, from the notary to all and, with its own members, from a machine to the others."""

    step: int
    hash: bytes  # 8 bytes of the SHA-256 of the weights before the latest named step, this one included
    members: tuple  # ((machine, code), …), machines ascending

    def pack(self):
        members = b"".join(MEMBER.pack(*member) for member in self.members)
        body = HEAD.pack(self.step, self.hash, len(self.members)) + members
        return body + CRC.pack(zlib.crc32(body))


def body_size(head):
    """Bytes of a record that follow its head."""
    return int.from_bytes(head[12:], "little") * MEMBER.size + CRC.size


def unpack(data):
    """The bytes of one record → it. Raises ValueError for what is not whole, damaged, or has a machine twice."""
    try:
        step, digest, _ = HEAD.unpack_from(data)
        record = Record(step, digest, tuple(MEMBER.iter_unpack(data[HEAD.size : -CRC.size])))
    except struct.error:
        raise ValueError("sent half a record") from None
    machines = [machine for machine, _ in record.members]
    if record.pack() != data or machines != sorted(set(machines)):
        raise ValueError("sent a damaged record")
    return record


def read_record(read):
    """The next record of a file or a socket: read(n) → n bytes. Raises ValueError."""
    head = read(HEAD.size)
    return unpack(head + read(body_size(head)))


def named(run, step):
    """Whether a new hash names the weights before this step: every so many steps, and at the end."""
    return step % run["every"] == 0 or step == run["steps"]


def hash_of(flat):
    return hashlib.sha256(flat.cpu().numpy()).digest()[:8]


class Replica:
    """A function of the initial weights, the run and its records alone, equal to the last bit wherever it is computed.

    run: a dict with key, steps, eps, lr, clip, noise, every (SETTINGS). What will happen to the weights waits in a
    queue until they are needed: restoring them, the update by n machines and the next perturbation are one pass, the
    flip is another.
    """

    def __init__(self, model, run):
        self.model, self.run, self.step, self.queue, self.saved = model, run, 0, [], []
        self.flat, self.grid = flatten_(model)
        self.hash = hash_of(self.flat)

    def flush(self):
        if self.queue:
            move = fused_perturb_ if fused_perturb_ and self.flat.is_cuda else perturb_
            move(self.flat, self.grid, self.run["key"], self.run["noise"], self.queue)
            self.queue = []

    @torch.no_grad()
    def gradient(self, machine, loss_of):
        """g = (L(θ + εz) − L(θ − εz)) / 2ε by two calls of loss_of(machine, step). θ is restored, to the last bit."""
        losses, eps = [], self.run["eps"]
        for then in (PROBE, FLIP):
            self.queue.append((self.step, machine, then, eps))
            self.flush()
            losses.append(float(loss_of(machine, self.step)))
        self.queue.append((self.step, machine, PROBE, eps))
        return (losses[0] - losses[1]) / (2 * eps)

    def probe(self, machines, loss_of):
        """The message of these machines: who, at which step, on which weights, and their bytes.

        After the last step there is nothing to probe: that record names the final weights.
        """
        over = self.step == self.run["steps"]
        codes = [NOTHING if over else encode(self.gradient(machine, loss_of)) for machine in machines]
        return Record(self.step, self.hash, tuple(zip(machines, codes)))

    def update(self, record):
        """The step that a record says. The hashes are compared first: whoever parted from the run stops here."""
        if record[:2] != (self.step, self.hash):
            fail(f"the run has weights {record.hash.hex()} at step {record.step}, here they are {self.hash.hex()} at "
                 f"{self.step}: start again, by replaying the log")
        self.apply([(machine, decode(code)) for machine, code in record.members if code != NOTHING])

    def apply(self, gradients):
        """θ ← θ − 1/√n·Σ clip(η·ĝ, ±κ)·z over [(machine, ĝ), …]. Coefficients are float64 by × ÷ √ alone."""
        clip, n = self.run["clip"], len(gradients)
        for i, (machine, g) in enumerate(gradients, 1):
            coef = -max(-clip, min(clip, self.run["lr"] * g)) / math.sqrt(n)
            self.queue.append((self.step, machine, UPDATE if i == n else MORE, coef))
        self.step += 1
        if named(self.run, self.step):
            self.flush()
            self.hash = hash_of(self.flat)

    def save(self, folder):
        """A snapshot is named by its hash, so that it may come from anybody by any way. The last two are kept."""
        self.saved.append(folder / f"{self.hash.hex()}.f32")
        self.flat.cpu().numpy().tofile(self.saved[-1])
        for old in self.saved[:-2]:
            old.unlink(missing_ok=True)


def replica_of(model, run, records, folder=None):
    """The replica after these records: from the latest snapshot that they name, else from the initial weights."""
    replica = Replica(model, run)
    if records and records[0].hash != replica.hash:
        fail(f"the run began with the weights {records[0].hash.hex()}, here they are {replica.hash.hex()}: copy the "
             "model's file from where the run began and name it by --model")
    for record in reversed(records if folder else ()):
        path = folder / f"{record.hash.hex()}.f32"
        if named(run, record.step) and path.exists():
            flat = torch.from_numpy(np.fromfile(path, "<f4"))
            if hash_of(flat) == record.hash:  # else it is damaged, or somebody else's
                replica.flat.copy_(flat)
                replica.step, replica.hash = record.step, record.hash
                say(f"snapshot of step {record.step}, then {len(records) - record.step} records")
                break
    for record in records[replica.step :]:
        replica.update(record)
    return replica


# ==================================================================================== the run is its log

SETTINGS = {  # of a run, the same for all who take part: type, default, meaning
    "key": (int, 1, "of the noise, 64 bits (%(default)s)"),
    "steps": (int, 300, "updates (300; MeZO: 20,000); replay: records (all)"),
    "batch_size": (int, 32, "rows a probe (%(default)s; MeZO: 16)"),
    "lr": (float, 2e-3, "learning rate η (%(default)s; for GPT-2 take MeZO's 1e-6)"),
    "eps": (float, 1e-3, "ε of a probe (%(default)s, MeZO's)"),
    "clip": (float, 8e-3, "κ: no byte moves a weight by more than κ·|z| (%(default)s)"),
    "noise": (str, "rademacher", "equal on all devices; gaussian is the paper's (%(default)s)"),
    "every": (int, 50, "steps between hashes and snapshots of the weights (%(default)s)"),
    "model": (str, "tiny", "tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl (OpenAI's, a download) or a weights.pt"),
    "suffix": (str, " It was", "what stands between sentence and word (%(default)r, MeZO's)"),
    "labels": (str, "0=terrible,1=great", "a word for each label (%(default)s)"),
}
RUN = {name: default for name, (_, default, _) in SETTINGS.items()}


def check_run(run):
    """Raises ValueError for anything but a dict of all settings, of their types and in their ranges."""
    if not isinstance(run, dict) or set(run) != set(SETTINGS):
        raise ValueError("has no run of this program")
    for name, value in run.items():
        kind = SETTINGS[name][0]
        if type(value) is not kind or kind is not str and not 0 < value < 2**64:
            raise ValueError(f"has {name} = {value}")
    if run["noise"] not in NOISE:
        raise ValueError(f"has noise = {run['noise']}")
    return run


def read_log(path):
    """→ run (None: there is no whole one yet), records, and where the last whole record ends."""
    with open(path, "rb") as file:
        line, records = file.readline(), []
        if not line.endswith(b"\n"):
            return None, records, 0
        try:
            run, end = check_run(json.loads(line)), file.tell()
        except ValueError as error:
            fail(f"{path} is no log of this program: it {error}")
        try:
            while (record := read_record(file.read)).step == len(records):
                records.append(record)
                end = file.tell()
        except ValueError:  # the end; or an append torn by a crash; or zeros that a file system left
            pass
    return run, records, end


class Log:
    """A JSON line, the run; then a record for each step, on the disk before anybody sees it. One writer at a time.

    With the log of a run that broke off it goes on. What is no whole record at the end is cut off, and said."""

    def __init__(self, path, run):
        self.file, self.run = open(path, "ab"), run
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel opens it when its holder dies
        except BlockingIOError:
            fail(f"{path} is in use by another process")
        old, self.records, end = read_log(path)
        if torn := os.path.getsize(path) - end:
            say(f"{path}: {torn} bytes behind step {len(self.records) - 1} are no whole record: cut off")
            self.file.truncate(end)
        if old not in (None, run):
            fail(f"{path} has another run, {old}: want the same settings or another log")
        if old is None:
            self.write(json.dumps(run).encode() + b"\n")

    def write(self, data):
        self.file.write(data)
        self.file.flush()
        os.fsync(self.file.fileno())

    def append(self, record):
        self.write(record.pack())
        self.records.append(record)


# ==================================================================================== the notary

# A machine says its id and how many records it holds. The notary says the length of the run in JSON and how many
# records there are, and then sends them: the run, all records, and from then on each record as it is sealed.
HELLO = struct.Struct("<QI")


async def notarise(log, host, port, machines=1, deadline=30.0, patience=60.0):
    """Puts the bytes in order: collects the messages of the open step, logs them as a record, sends it to everybody.

    It waits for those whose last message came within `deadline` seconds of the first one of its step. Whoever is later,
    or gone, is not waited for until a message of its comes in time. Whoever sends anything wrong is named and dropped.
    At the end it stays until all have it, or `patience` seconds, and returns who has not.
    """
    run, records, links, messages, first = log.run, log.records, {}, {}, {}  # machine → link, message; step → time
    waited_for, away = {machine for record in records[-1:] for machine, _ in record.members}, set()

    async def attend(reader, writer):
        """One connection: hello; the run and its records so far; then the machine's messages until it leaves."""
        machine, name = None, str(writer.get_extra_info("peername"))

        async def receive():
            head = await reader.readexactly(HEAD.size)
            return unpack(head + await reader.readexactly(body_size(head)))

        try:
            machine, held = HELLO.unpack(await asyncio.wait_for(reader.readexactly(HELLO.size), 10))
            if held > run["steps"] + 1:
                raise ValueError("does not speak this protocol")
            about, sealed, name = json.dumps(run).encode(), len(records), f"machine {machine:016x}"
            writer.write(HELLO.pack(len(about), sealed) + about + b"".join(record.pack() for record in records))
            links[machine] = writer
            for _ in range(sealed, held):
                recover(await receive())
            while True:
                take(machine, await receive())
        except (ValueError, TimeoutError) as error:
            say(f"{name} {error or 'said nothing'}: dropped")
        except (EOFError, OSError):  # it left
            away.discard(machine)
        except asyncio.CancelledError:  # we leave
            pass
        finally:
            writer.close()
            if links.get(machine) is writer:
                del links[machine]
                waited_for.discard(machine)

    def recover(record):
        """A record that a machine holds beyond those that our log had."""
        if record.step == len(records) <= run["steps"]:
            say(f"the record of step {record.step} was lost here and comes back from a machine")
            seal(record)
        elif record not in records[record.step : record.step + 1]:
            raise ValueError(f"holds another record of step {record.step}")

    def take(machine, message):
        """A machine's message of the open step; or of an older one, too late."""
        now, step = time.monotonic(), len(records)
        if [member for member, _ in message.members] != [machine] or message.step > step:
            raise ValueError(f"sent step {message.step} for {len(message.members)} machines in step {step}")
        if message.step == step:
            messages[machine] = message
            first.setdefault(step, now)
        in_time = now - first.get(message.step, -math.inf) <= deadline
        (waited_for.add if in_time else waited_for.discard)(machine)

    def seal(record):
        log.append(record)  # first the disk, then the others
        messages.clear()
        for writer in links.values():
            writer.write(record.pack())

    server = await asyncio.start_server(attend, host, port)
    say(f"notary at port {server.sockets[0].getsockname()[1]} with {len(records)} records")
    while (step := len(records)) <= run["steps"]:
        await asyncio.sleep(0.001)  # while it attends to the machines
        missing = waited_for - messages.keys()
        over = time.monotonic() > first.get(step, math.inf) + deadline
        if len(messages) >= (machines if step == 0 else 1) and (over or not missing):
            waited_for -= missing
            hashes = [message.hash for message in messages.values()]  # only those on the same weights count,
            common = max(hashes, key=hashes.count) if named(run, step) else records[-1].hash  # the majority's
            for machine in missing | {machine for machine, message in messages.items() if message.hash != common}:
                say(f"step {step}: machine {machine:016x} {'was late' if machine in missing else 'has other weights'}")
            members = [message.members[0] for message in messages.values() if message.hash == common]
            seal(Record(step, common, tuple(sorted(members))))
    away |= {machine for record in records for machine, _ in record.members}
    until = time.monotonic() + patience
    while away and time.monotonic() < until:  # whoever has the end leaves
        await asyncio.sleep(0.01)
    return away


# ==================================================================================== a machine


def take_part(host, port, build, folder, patience=60.0, machine=None):
    """A machine: replays the run so far, takes part until its end → its id, its replica and its problem.

    build(run) → a problem with the initial model and loss_of(machine, step). folder: of snapshots, shared or not. It
    outlives the notary by `patience` seconds. What the notary sends is checked as well.
    """
    machine, replica, held, heard = machine or secrets.randbits(64), None, [], True

    def read(n):
        data = b""
        while len(data) < n:
            more = link.recv(n - len(data))
            if not more:
                raise ConnectionError("the notary closed the connection")
            data += more
        return data

    while replica is None or replica.step <= replica.run["steps"]:
        try:
            with socket.create_connection((host, port), patience / 2 + 1) as link:
                link.sendall(HELLO.pack(machine, len(held)))
                size, sealed = HELLO.unpack(read(HELLO.size))
                if size > 2**16:
                    raise ValueError("does not speak this protocol")
                run = check_run(json.loads(read(size)))
                news = [read_record(read) for _ in range(sealed)]
                if replica is None or run != replica.run or news[: len(held)] != held[:sealed]:  # new, or another run
                    problem = build(run)
                    replica, held = replica_of(problem.model, run, news, folder), news
                link.sendall(b"".join(record.pack() for record in held[sealed:]))  # lost there: back from here
                news, delivered = news[len(held) :], None
                while replica.step <= run["steps"]:
                    heard = True
                    if not news and not select.select([link], [], [], 0)[0] and delivered != replica.step:
                        link.sendall(replica.probe([machine], problem.loss_of).pack())
                        delivered = replica.step
                    record = news.pop(0) if news else read_record(read)
                    if record.step == replica.step:  # not one that came back from here
                        replica.update(record)
                        held.append(record)
                        if named(run, replica.step):
                            replica.save(folder)
                            say(f"step {replica.step}: weights {replica.hash.hex()}")
        except ValueError as error:
            fail(f"{host}:{port} {error}")
        except OSError as error:
            if heard:
                heard, until = False, time.monotonic() + patience
                say(f"no notary at {host}:{port} ({error}): trying for {patience:g} s")
            elif time.monotonic() > until:
                fail(f"no notary at {host}:{port} for {patience:g} s")
            time.sleep(0.2)
    return machine, replica, problem


# ==================================================================================== the model

SIZES_OF = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
            "gpt2-xl": (48, 25, 1600)}
OPENAI = {"h.layers.": "h.", "h.norm.": "ln_f.", "self_attn.in_proj_": "attn.c_attn.", "linear1.": "mlp.c_fc.",
          "self_attn.out_proj.": "attn.c_proj.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2."}
HUB = "https://huggingface.co/openai-community/{}/resolve/main/pytorch_model.bin"


class GPT2(nn.Module):
    """GPT-2 out of torch's layers: learned positions, pre-norm blocks, head tied to the embedding (not in forward)."""

    def __init__(self, n_layer, n_head, width, seq=1024, n_vocab=50257):
        super().__init__()
        self.shape = n_layer, n_head, width, seq, n_vocab
        self.wte, self.wpe = nn.Embedding(n_vocab, width), nn.Embedding(seq, width)
        block = nn.TransformerEncoderLayer(width, n_head, 4 * width, 0.0, partial(F.gelu, approximate="tanh"),
                                           batch_first=True, norm_first=True)
        self.h = nn.TransformerEncoder(block, n_layer, nn.LayerNorm(width), enable_nested_tensor=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids):
        """(batch, seq) int64 → (batch, seq, width)."""
        seq = ids.size(1)
        future = torch.ones(seq, seq, dtype=torch.bool, device=ids.device).triu(1)
        return self.h(self.wte(ids) + self.wpe.weight[:seq], future, is_causal=True)

    def load_openai(self, weights):
        """Copy {OpenAI's name: tensor}."""
        for name, p in self.named_parameters():
            for ours, theirs in OPENAI.items():
                name = name.replace(ours, theirs)
            p.data.copy_(weights[name].t() if ".c_" in name and p.dim() > 1 else weights[name])  # theirs: (in, out)
        return self


def load_model(name):
    """tiny (made here when out/spsa_distributed/tiny.pt is missing), gpt2 … gpt2-xl (OpenAI's), or a weights.pt."""
    if name == "tiny" and int(os.environ.get("LOCAL_RANK", 0)) == 0 and not TINY_FILE.exists():
        pretrain()
    if dist.is_initialized():
        dist.barrier()
    try:
        if name in SIZES_OF:
            weights = torch.hub.load_state_dict_from_url(HUB.format(name), weights_only=True)
            return GPT2(*SIZES_OF[name]).load_openai(weights)
        saved = torch.load(TINY_FILE if name == "tiny" else name, "cpu", weights_only=True)
        model = GPT2(*saved["shape"])
        model.load_state_dict(saved["model"])
        return model
    except Exception as error:  # torch raises a dozen kinds here
        fail(f"--model {name}, of tiny, {', '.join(SIZES_OF)} or a weights.pt, cannot be had: {str(error)[:99]}")


def save_model(path, model):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(dict(shape=model.shape, model=model.state_dict()), temporary)
    os.replace(temporary, path)
    print(path)


# ==================================================================================== the same in every file


def fail(message):
    """For what a user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(args):
    """args.task(args), with a folder. What a user can mend ends in one line (exit code 2), Ctrl-C in none (130)."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.task(args)
        sys.stdout.flush()
        if "RANK" in os.environ:  # subtle: a rank aborted now and then while torch took its threads down
            os._exit(0)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def set_up(args):
    """Seeds, device and torchrun's process group → (device, rank, world)."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", device.index or local))
            torch.set_float32_matmul_precision("high")
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be had here: {error}")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # a denormal slows a CPU matmul tenfold
    return device, rank, world


def save_results(folder, args, **figures):
    """folder/results.json: the command, versions, device and every figure of the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {torch.get_num_threads()} threads"
    about = dict(command=sys.argv, args=vars(args), python=sys.version, torch=torch.__version__, device=device)
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else getattr(x, "__name__", str(x))
    (folder / "results.json").write_text(json.dumps(about | figures, indent=1, default=plain))
    print(folder / "results.json")


def figure(path, args, draw, size=(7, 4.5)):
    """draw(fig) on a matplotlib figure of this size in inches, saved as path."""
    if args.no_plot:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=size, layout="constrained")
    draw(fig)
    fig.savefig(path, dpi=120)
    plt.close(fig)
    print(path)


def say(message):
    print(message, file=sys.stderr, flush=True)


# ==================================================================================== the task: label words as classes

WORDS = ("bad dull cold flat slow silly boring stale good fine warm bright sharp witty moving fresh "
         "it was terrible great").split()
TINY, TINY_FILE = (2, 4, 64, 8, len(WORDS)), Path("out/spsa_distributed/tiny.pt")


def tiny_reviews(n, *counter, one=False):
    """n reviews of three adjectives, each of the review's mood with probability ¾ → [(text, label), …], label "1" where
    most adjectives are good; with `one`: where one of them is, of six in ten the first, and then one in five is turned
    round."""
    rng = np.random.default_rng(counter)
    good = rng.integers(2, size=(n, 1)) ^ (rng.random((n, 3)) < 0.25)
    labels = good.sum(1) // 2
    if one:
        labels = good[np.arange(n), rng.choice(3, n, p=(0.6, 0.2, 0.2))] ^ (rng.random(n) < 0.2)
    words = np.array(WORDS)[8 * good + rng.integers(8, size=(n, 3))]
    return [(" ".join(row), str(label)) for row, label in zip(words, labels)]


def pretrain():
    """The offline model: Adam on reviews whose label follows one adjective, mostly the first."""
    torch.manual_seed(0)
    problem = Problem(GPT2(*TINY), RUN | dict(batch_size=256), tiny_reviews(20_000, 0, one=True))
    for _ in tqdm(zip(range(200), adam(problem)), "pretraining the tiny model", 200, disable=None):
        pass
    save_model(TINY_FILE, problem.model)


def read_sentences(path):
    """A table with the columns sentence and label, by commas, tabs or semicolons → [(sentence, label), …] in random
    order. subtle: in some tables by tabs, SST-2 too, a quote is a character like any other."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8: iconv -f UTF-16 (or LATIN1) -t UTF-8 {path} > new{path.suffix}")
    header = text.split("\n")[0]
    delimiter, rows = max("\t;,", key=header.count), []
    try:
        table = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if delimiter != "\t":
            fail(f"{path}: {error}")
        table = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_NONE))
    for i, row in enumerate(table, 1):
        if None in row or None in row.values() or not {"sentence", "label"} <= set(row):
            fail(f"{path} row {i}: want columns sentence and label, by commas, tabs or semicolons, in each row as many "
                 f"cells as in the header, which is {header[:99]!r}")
        pair = row["sentence"].strip(), row["label"].strip()
        if all(pair):
            rows.append(pair)
    say(f"{path}: {len(rows)} rows, {len(table) - len(rows)} more without sentence or label")
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


class Problem:
    """Classification by a language model: the sentence, a suffix, and the likeliest of the label words.

    Loss: cross entropy among the label words at the last token, so only their rows of the head are multiplied. Too long
    a sentence loses its beginning. rows: [(sentence, label), …], the first tenth for the test, at most 1000; seed: of
    the batches.
    """

    def __init__(self, model, run, rows, seed=0):
        self.model, self.run, self.seed, (*_, seq, n_vocab) = model.eval(), run, seed, model.shape
        tokenize = lambda text: [WORDS.index(word) for word in text.lower().split()]
        if n_vocab != len(WORDS):
            import tiktoken

            tokenize = tiktoken.get_encoding("gpt2").encode_ordinary
        classes = dict(pair.partition("=")[::2] for pair in run["labels"].split(","))
        suffix, space = tokenize(run["suffix"]), "" if run["suffix"][-1:].isspace() else " "
        n_test = min(1000, len(rows) // 10)
        try:
            self.label_ids = [token for word in classes.values() for (token,) in [tokenize(space + word)]]
            coded = [((tokenize(text) + suffix)[-seq:], [*classes].index(label)) for text, label in rows]
            if not n_test or not 1 < len(set(self.label_ids)) == len(classes):
                raise ValueError("ten rows, two labels and different words are the least")
        except ValueError as error:
            hint = " (the tiny model knows its own words alone: --model gpt2)" * (n_vocab == len(WORDS))
            fail(f"--labels {run['labels']}, words of one token each, and {len(rows)} rows do not match: {error}{hint}")
        self.test, self.train = coded[:n_test], coded[n_test:]

    def logits(self, rows):
        """[(ids, class), …] → logits (n, classes) of the label words after the last token, class (n,)."""
        device = self.model.wte.weight.device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], True).to(device)  # (n, seq)
        last, labels = torch.tensor([(len(ids) - 1, label) for ids, label in rows], device=device).T
        hidden = self.model(ids)[torch.arange(len(ids), device=device), last]  # (n, width); padding is in the future
        return F.linear(hidden, self.model.wte.weight[self.label_ids]).float(), labels

    def loss_of(self, machine, step):
        """Of random rows of a machine: the draw depends on (seed, machine, step) alone, whoever asks."""
        picks = np.random.default_rng((self.seed, machine, step)).integers(len(self.train), size=self.run["batch_size"])
        return F.cross_entropy(*self.logits([self.train[i] for i in picks]))

    @torch.no_grad()
    def evaluate(self):
        """→ (cross entropy in nats, accuracy) on the test rows."""
        parts = [self.logits(self.test[i : i + 100]) for i in range(0, len(self.test), 100)]
        logits, labels = map(torch.cat, zip(*parts))
        return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


# ==================================================================================== one run


def run_of(args):
    """The run that the flags describe."""
    try:
        return check_run({name: getattr(args, name) for name in SETTINGS})
    except ValueError as error:
        fail(f"this run {error}")


def open_problem(args, run, device):
    """The problem of this run, with its initial model, on this machine's rows."""
    rows = read_sentences(args.data) if args.data else tiny_reviews(2000, 1)
    return Problem(load_model(args.model or run["model"]).to(device), run, rows, args.seed)


def train(args):
    """Fine-tune by --machines bytes a step, alone or shared out among torchrun's ranks: the same weights."""
    device, rank, world = set_up(args)
    run, path, log = run_of(args), args.out / "run.log", None
    if rank == 0:
        log = Log(path, run)
    shared, messages = [log and log.records], [None] * world
    if world > 1:
        dist.broadcast_object_list(shared)
    problem = open_problem(args, run, device)
    replica = replica_of(problem.model, run, shared[0], args.out)
    for _ in tqdm(range(replica.step, run["steps"] + 1), "train", disable=None if rank == 0 else True):
        messages[0] = replica.probe(range(rank, args.machines, world), problem.loss_of)
        if world > 1:
            dist.all_gather_object(messages, messages[0])
        members = sorted(member for message in messages for member in message.members)
        record = messages[0]._replace(members=tuple(members))
        if rank == 0:
            log.append(record)
        replica.update(record)  # whoever differs from rank 0 stops here
        if rank == 0 and named(run, replica.step):
            replica.save(args.out)
    if rank == 0:
        ce, accuracy = problem.evaluate()
        print(f"cross entropy {ce:.3f}, accuracy {accuracy:.3f}, weights {replica.hash.hex()}\n{path}")
        save_model(args.out / "weights.pt", problem.model)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def serve(args):
    """The notary of a run for machines that `join`: no model, no data. With the log of a run it goes on.

    There is no password: whoever reaches the port can take part. Run it inside a network that you trust."""
    log = Log(args.log or args.out / "run.log", run_of(args))
    away = asyncio.run(notarise(log, args.host, args.port, args.machines, args.deadline, args.patience))
    print(f"weights {log.records[-1].hash.hex()}; without the end: {', '.join(f'{m:016x}' for m in away) or 'nobody'}")
    print(log.file.name)


def join(args):
    """A machine: learns the run from its notary, replays its log, takes part. Its rows of --data never leave it."""
    host, _, port = args.connect.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        fail(f"--connect {args.connect}: want HOST:PORT")
    device, *_ = set_up(args)
    build = partial(open_problem, args, device=device)
    machine, replica, problem = take_part(host.strip("[]"), int(port), build, args.out, args.patience)
    ce, accuracy = problem.evaluate()
    print(f"machine {machine:016x}: cross entropy {ce:.3f}, accuracy {accuracy:.3f}, weights {replica.hash.hex()}")
    save_model(args.out / f"{machine:016x}.pt", replica.model)


def replay(args):
    """The weights after a log, or its first --steps records, out of the initial ones: no data, no forward pass."""
    run, records, _ = read_log(args.log)
    if not run or not 0 <= (args.steps or 0) <= len(records):
        fail(f"{args.log} has {len(records)} records")
    replica = replica_of(load_model(args.model or run["model"]), run, records[: args.steps])
    replica.flush()
    print(f"weights {hash_of(replica.flat).hex()} after {replica.step} records; every hash that the log names was met")
    save_model(args.out / "weights.pt", replica.model)


# ==================================================================================== the experiments

RATES = [1e-3 * 2 ** (k / 2) for k in range(2, 9)]
TARGET, MAX_STEPS = 0.25, 200


def spsa(problem, machines=1, byte=True):
    """n machines in one process; byte=False: they send float32, for comparison."""
    replica = Replica(problem.model, problem.run)
    while True:
        gradients = [(machine, replica.gradient(machine, problem.loss_of)) for machine in range(machines)]
        replica.apply([(machine, decode(encode(g)) if byte else g) for machine, g in gradients])
        replica.flush()
        yield


def mezo(problem):
    """MeZO as published: torch's generator; n + 3 passes over the weights, each rounded by itself."""
    params, eps = list(problem.model.requires_grad_(False).parameters()), problem.run["eps"]

    def move(step, scale):
        torch.manual_seed(1000 * problem.seed + step)
        for p in params:
            p.data = p.data + scale * torch.randn_like(p)

    for step in itertools.count():
        losses = []
        for scale in (eps, -2 * eps):
            move(step, scale)
            losses.append(float(problem.loss_of(0, step)))
        move(step, eps)
        move(step, -problem.run["lr"] * (losses[0] - losses[1]) / (2 * eps))
        yield


def adam(problem):
    """First-order fine-tuning by backpropagation, on the batches of machine 0."""
    opt = torch.optim.Adam(problem.model.parameters(), problem.run["lr"])
    for step in itertools.count():
        problem.loss_of(0, step).backward()
        opt.step()
        opt.zero_grad()
        yield


ARMS = {  # method; batches, and bytes of gradients a machine, in a step; the best of RATES tried on seeds 1000, 1001
    "1 machine": (spsa, 1, 1, 6), "2 machines": (partial(spsa, machines=2), 2, 1, 6),
    "4 machines": (partial(spsa, machines=4), 4, 1, 6), "4, float32": (partial(spsa, machines=4, byte=False), 4, 4, 6),
    "MeZO": (mezo, 1, 4, 2), "Adam, backpropagation": (adam, 1, 4 * 101_888, 1)}


def race(arms, args):
    """Fine-tune by every (arm, rate) with every seed, a row each → [(arm, rate, [test cross entropy before the first
    step and after each, until TARGET; a list a seed])]."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # matrices are small: a second thread would only get in the way
    load_model("tiny")
    raced = []
    print(f"Steps until the test cross entropy is below {TARGET}: mean and sd of {args.seeds} seeds, nan: not all")
    print(f"{'':25}{'rate':>6} {'steps':>8} {'±':>8} {'batches':>8} {'bytes of gradients a machine':>30}")
    for name, lr in arms:
        (method, batches, sent, _), curves = ARMS[name], []
        for seed in range(args.seed, args.seed + args.seeds):
            problem = Problem(load_model("tiny"), RUN | dict(lr=lr, key=seed), tiny_reviews(2000, 1), seed)
            curves.append([problem.evaluate()[0]])
            for _ in zip(range(MAX_STEPS), method(problem)):
                curves[-1].append(problem.evaluate()[0])
                if not TARGET < curves[-1][-1] < 1.5 * curves[-1][0]:  # there, or lost
                    break
        steps = np.array([len(curve) - 1 if curve[-1] < TARGET else math.nan for curve in curves])
        mean = steps.mean()
        print(f"{name:25}{lr:6.4f} {mean:8.0f} {steps.std():8.0f} {mean * batches:8.0f} {mean * sent:30,.0f}")
        raced.append((name, lr, curves))
    return raced


def demo(args):
    """1, 2 and 4 machines fine-tune a model with a byte a step each; then real processes are killed, join and agree."""
    raced = race([(name, RATES[best]) for name, (*_, best) in ARMS.items()], args)
    report = drill(args.out / "drill")
    print(report)
    save_results(args.out, args, drill=report, raced=raced)
    figure(args.out / "demo.png", args, partial(draw, raced))


def compare(args):
    """Every arm of the demo at every rate, a factor of √2 apart: where the demo's rates come from."""
    save_results(args.out, args, raced=race(list(itertools.product(ARMS, RATES)), args))


def drill(folder):
    """A run by real processes: a machine is killed, then the notary; a newcomer waits for it; it starts again."""
    shutil.rmtree(folder, ignore_errors=True)
    children = []

    def start(flags):
        command = [sys.executable, __file__, *flags.split(), "--out", folder]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                         env=os.environ | dict(OMP_NUM_THREADS="1")))
        return children[-1]

    def says(child, text):
        """The next line of this process with the text: none comes when it has ended."""
        return next(line for line in child.stdout if text in line)

    serving = "serve --host 127.0.0.1 --machines 2 --deadline 2 --port "
    try:
        notary = start(serving + "0")
        port = says(notary, "at port").split()[3]
        joining = f"join --device cpu --connect 127.0.0.1:{port}"
        a, b = start(joining), start(joining)
        says(a, "step 50")
        b.kill()
        says(a, "step 100")
        notary.kill()
        newcomer = start(joining)
        says(newcomer, "no notary")
        start(serving + port)
        ends = [says(child, "accuracy") + child.communicate()[0] for child in (a, newcomer)]
    except StopIteration:
        return f"THE DRILL FAILED: {[child.communicate()[0][-200:] for child in children if child.poll()]}"
    finally:
        for child in children:
            child.kill()
    run, records, _ = read_log(folder / "run.log")
    replica = replica_of(load_model("tiny"), run, records[:-1])  # raises where any named hash differs
    return (f"Real processes, one killed, the notary killed and started again, a newcomer:\n{''.join(ends)}"
            f"replay of the log of {(folder / 'run.log').stat().st_size:,} bytes: weights {replica.hash.hex()}")


def draw(raced, fig):
    ax = fig.subplots()
    for i, (name, _, curves) in enumerate(raced):
        for curve in curves:
            ax.plot(curve, color=f"C{i}", lw=1.2, label=name if curve is curves[0] else None)
    ax.axhline(TARGET, color="grey", lw=0.8, ls=":")
    ax.set(xlabel="steps", ylabel="test cross entropy, nats", title="Until the target (dotted), one line a seed")
    ax.legend()


# ==================================================================================== command line


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "demo")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Without TASK: demo.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = SETTINGS | {
        "data": (Path, None, "table with columns sentence and label, a tenth of it for the test (tiny: generated)"),
        "machines": (int, 4, "train: bytes a step; serve: start when so many are there (%(default)s)"),
        "host": (str, None, "address to listen at (all of this computer)"),
        "port": (int, 29500, "to listen at; 0: a free one (%(default)s)"),
        "deadline": (float, 30.0, "seconds to wait for others after a step's first message (%(default)s)"),
        "patience": (float, 60.0, "seconds without a notary, or for those away at the end (%(default)s)"),
        "log": (Path, None, "the run's log (run.log in --out)"),
        "connect": (str, "127.0.0.1:29500", "HOST:PORT of the notary (%(default)s)"),
        "seeds": (int, 3, "number of seeds, from --seed on (%(default)s)"),
        "seed": (int, 0, "of the batches (%(default)s)"),
        "device": (str, None, "cuda or cpu (cuda where there is one)"),
        "out": (Path, None, "folder for results, weights and snapshots (%(default)s)"),
    }

    def task(function, names, **defaults):
        sub = tasks.add_parser(function.__name__, help=function.__doc__.split("\n")[0], description=function.__doc__)
        sub.error = fail
        for name in names.split():
            kind, default, meaning = flags[name]
            sub.add_argument(f"--{name}", type=kind, default=default, help=meaning)
        sub.set_defaults(task=function, out=Path(f"out/spsa_distributed/{function.__name__}"), **defaults)

    run_flags = " ".join(SETTINGS)
    task(demo, "seeds seed out", no_plot=False)
    task(compare, "seeds seed out")
    task(train, f"{run_flags} machines data seed device out")
    task(serve, f"{run_flags} machines log host port deadline patience out")
    task(join, "connect model data patience seed device out", model=None)
    task(replay, "log steps model out", model=None, steps=None)
    args = parser.parse_args(argv)
    for name in ("machines", "seeds"):
        if not getattr(args, name, 1) > 0:
            fail(f"--{name} {getattr(args, name)} must be above 0")
    return args


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
