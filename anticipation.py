"""Anticipatory Music Transformer (Thickstun, Hall, Donahue, Liang; arXiv 2306.08620): music around what is fixed.

The problem. Music is a sequence of events (time, duration, note). Some are fixed by the user, a melody or the bars
around a gap; the others are to be generated. Put all fixed ones in front, and they stand far from where they matter.
Sort them in as if they happened δ seconds early, and nobody can sample: the right place depends on an event that has
not been drawn yet.

The idea. Put a control of time s right after the first event whose time reaches s − δ. The past alone decides that
place (a stopping time), so a sampler draws events, pauses there, inserts the control and goes on.

    place of u_s = 1 + min{ i : t_i ≥ s − δ }, and the very front if s ≤ δ          definition 3.1, algorithm 1; δ = 5 s
    events no more than Δ* = 1 s apart (RESTs fill longer gaps) ⇒ told at least δ − Δ* ahead            section 3.3
    row = z, then triplets of ids (time, duration, note); controls in a second copy of the ids          appendix C
    z = 1 if the copy has controls, else 0; times count from the first in the row

The rest is a plain GPT-2 under cross-entropy: only the order of the data is new. Times that count from the row make it
possible; in the usual encoding by time steps ("interarrival") an event cannot be moved.

How to run it.

    python anticipation.py                                   a band whose right part is known: table, MIDI, sound
    python anticipation.py infill out/anticipation/demo/anticipatory_infill_bar_4.mid --span 4:6
    python anticipation.py accompany X.mid --melody track:1 --ckpt hub:music-small-800k      the authors' (download)
    python anticipation.py continue X.mid … ; infill X.mid --span 8:12 --instruments 33 … ; plot X.mid --wav
    python anticipation.py tokenize DIR; … train; … eval     train on your files; --ckpt fine-tunes; also by torchrun

Continue, accompany and infill are one operation: generate in [a, b) given the rest and the parts that are kept. What is
new goes into your own file, on tracks of its own; every other message stays as it is.

What the paper reports. Lakh MIDI test set, bits a second: small models of 100k steps, interarrival 85.9, arrival 80.4,
with anticipation 80.7; at 800k steps 75.7 without and 75.0 with (table 1). Accompaniments against the human's, wins,
ties, losses in 60 judgements: anticipatory 18/31/11, autoregressive 5/10/45, retrieval 2/6/52 (table 3).

What we measured. A band has a right answer instead of listeners: chords come from a known chain, piano, bass and drums
follow from them, and the melody settles each bar's chord with its third note. 48 pieces a seed that no model has seen,
sampled with top-p 0.95 (`python anticipation.py --seed 0`, then 1, 2; torch 2.13.0, one CPU thread, 140 to 173 s):

    seeds 0, 1, 2                        right bass roots                                note F1
    accompany bars 3-5   anticipatory    1.000  1.000  1.000                             1.000  1.000  1.000
                         autoregressive  0.479  0.465  0.500                             0.731  0.731  0.750
                         retrieval       0.125  0.118  0.097                             0.484  0.509  0.473
                         likeliest chord 0.382  0.389  0.417
    infill bar 4         anticipatory    1.000  1.000  1.000                             1.000  1.000  1.000
    (melody kept)        autoregressive  0.500  0.396  0.396                             0.759  0.688  0.690
    infill bar 4         anticipatory    0.250  0.229  0.208                             0.576  0.559  0.548
    (melody out too)     autoregressive  0.125  0.250  0.208                             0.516  0.573  0.548
                         likeliest chord 0.417  0.417  0.458

What did not hold. Where the melody is out too, only the chain and the bars around speak for a chord, and the model is
hardly better than one that does not see what comes after; the likeliest chord would be right nearly twice as often.
The autoregressive baseline is algorithm 2 made fair: it hears one melody note before it chooses a chord, and
melody notes that it draws itself are dropped (kept, they are the copies that the paper describes).

What is ours in the demo: 4 bins a second, δ = 2 s, 0.47M weights, no loss on controls, attention not divided by the
layer's number, and copies with the melody, or all after some bar, or both, as controls. `train` has the paper's: 10 %
none, 10 % spans, 40 % random events, 40 % instruments; its rows are cut by number from copies made on the fly, not from
a shuffled 104 GB file. RESTs cannot be drawn as times or durations, nor more than 64 triplets at one instant; a full
window moves seldom ("hop") unless told --window exact. A file with a program that a model lacks is refused: the demo's
models have four. A model without controls only continues. `eval` takes the test split, `train` the validation split.

Reading goes by mido, tracks merged by ticks: 1.9 times the obvious loop (20 files, 66,810 notes), bit for bit the same;
all of Lakh takes core-hours, once. GPU: not measured. The authors' weights: loading is tested on files of their layout,
nothing was downloaded.

Try:
    p=[0.1, 0.9, 0, 0] in BandRows and --pieces 24     no spans to learn from: infill bar 4 root 0.208, F1 0.386
    python anticipation.py infill out/anticipation/demo/anticipatory_infill_bar_4.mid --span 4:6     12 notes out, 12 in
    delta=0 in MINI and --pieces 24     nothing is told ahead: accompany root 0.111, F1 0.440; infill bar 4 0.125, 0.481
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import wave
from collections import OrderedDict, defaultdict, deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from operator import itemgetter
from pathlib import Path

import mido
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

# ==================================================================================== the method: where controls go

TIME, DUR, NOTE, CTRL = range(4)  # columns of events, (n, 4) int64: onset, duration in bins; note; 1 = a control
REST, SEP, DRUMS = -1, -2, 128  # a note is 128·program + pitch, program 128 drums; or REST, or SEP


@dataclass(frozen=True)
class Vocabulary:
    """What a model can say (appendix C): ids of event times, durations, notes, REST; the same again for controls; SEP,
    z = 0, z = 1. The defaults are the paper's: 55,028 ids, rows of 1,024 = one flag z and 341 triplets."""

    resolution: int = 100  # bins a second
    max_time: int = 10_000  # bins in a row
    max_duration: int = 1_000  # durations are 0 … max_duration − 1 bins
    programs: tuple = tuple(range(129))  # of General MIDI, in order; 128 = drums
    context: int = 1024  # ids in a row
    delta: int = 500  # δ: bins by which a control is told early
    density: int = 100  # Δ*: the longest gap between events in bins; RESTs fill longer ones

    def __post_init__(self):
        first_note = self.max_time + self.max_duration
        rest = first_note + 128 * len(self.programs)
        slots = (0, self.max_time), (self.max_time, first_note), (first_note, rest + 1)  # ids of time, duration, note
        vars(self).update(first_note=first_note, rest=rest, control=rest + 1, sep=2 * rest + 1, size=2 * rest + 4,
                          slots=slots, triplets=(self.context - 1) // 3)


def pad(events, end, density):
    """RESTs wherever more than `density` bins (Δ*) pass without an event, and up to `end` (section 3.3).

    events: (n, 4) by time. subtle: of events from which the controls were taken, so that no melody fills a gap."""
    out, previous = [], 0
    for event in [*events.tolist(), [end, 0, None, 0]]:
        while event[TIME] > previous + density:
            previous += density
            out.append([previous, 0, REST, 0])
        if event[NOTE] is not None:
            out.append(event)
            previous = event[TIME]
    return np.array(out, np.int64).reshape(-1, 4)


def anticipate(events, controls, delta):
    """Definition 3.1: events (n, 4) and controls (m, 4), both by time → (sequence, controls still waiting at its end).

    A control of time s stands before the first event whose predecessor has time ≥ s − δ (before the first event: 0).
    What came before decides this place, a stopping time; so a sampler knows when to pause and insert."""
    last = np.append(0, events[:-1, TIME])[: len(events)]  # the time reached before each event
    place = np.searchsorted(last, controls[:, TIME] - delta)
    told = place < len(events)
    return np.insert(events, place[told], controls[told], axis=0), controls[~told]


def interleave(events, is_control, vocab):
    """A piece as a model reads it: events (n, 4) by time, is_control (n,) bool → (m, 4), padded, controls in place."""
    controls = events[is_control] + [0, 0, 0, 1]
    sequence, waiting = anticipate(pad(events[~is_control], events[-1, TIME], vocab.density), controls, vocab.delta)
    return np.concatenate([sequence, waiting])


def triplet_ids(triplets, vocab):
    """Triplets (n, 4), times relative to the row → ids (3·n,) int64. ValueError: what the vocabulary cannot say; a time
    too large would read as a duration."""
    t, d, note, control = triplets.T
    program = np.where(note < 0, vocab.programs[0], note >> 7)
    place = np.searchsorted(vocab.programs, program)
    ids = np.stack([t, vocab.max_time + d, vocab.first_note + 128 * place + (note & 127)], 1)
    ids += control[:, None] * vocab.control
    ids[note == REST, 2] = vocab.rest
    ids[note == SEP] = vocab.sep
    if ((t < 0) | (t >= vocab.max_time) | (d >= vocab.max_duration) | ~np.isin(program, vocab.programs)).any():
        raise ValueError("a time, a duration or a program is not in the vocabulary")
    return ids.ravel()


def interarrival_ids(strokes):
    """The encoding without anticipation (definition 2.3, vocabulary 34,025) of a Song's strokes → ids, without SEP.

    Ids 1 … 999: a step of so many bins of 10 ms; 1,000 + note: a note begins; 17,512 + note: it ends. As the authors do
    it: each step is rounded by itself, so what is below 5 ms is lost and the clock drifts."""
    ids, previous = [], 0.0
    for second, note, begins in strokes:
        step = min(999, round(100 * (second - previous)))
        ids += [step] * (step > 0) + [(1000 if begins else 17_512) + note]
        previous = second
    return ids


# ==================================================================================== the method: MIDI files


@dataclass
class Song:
    """A MIDI file as events, with what it takes to write new music into it."""

    file: mido.MidiFile
    events: np.ndarray  # (n, 4) int64 in order of onset, then of tracks
    parts: np.ndarray  # (n, 3): track, channel and program of each event
    places: np.ndarray  # (n, 2): of its two messages, counted track after track; −1: its end is missing
    clock: np.ndarray  # (m, 2): ticks and seconds
    strokes: list  # (second, note, does it begin?) of every note message


def read_song(path, vocab=None):
    """A MIDI file → Song. OSError says what is wrong with the file.

    The authors' rules, bit for bit: time is a running float64 sum over the messages of all tracks, rounded half to even
    to bins; an end belongs to the oldest open note of its program, pitch and channel; a note without end lasts 250 ms;
    durations are cut to the vocabulary's. Data bytes over 127 are clipped."""
    vocab, data = vocab or Vocabulary(), Path(path).read_bytes()
    try:
        if re.search(rb"[\x80-\xff]{4096}", data):  # mido would take its time
            raise ValueError("a number of more than 4,096 bytes")
        file = mido.MidiFile(file=io.BytesIO(data), clip=True)
        if file.type == 2 or file.ticks_per_beat <= 0:
            raise ValueError("independent tracks (type 2), or SMPTE time")
        messages, place = [], -1
        for number, track in enumerate(file.tracks):
            tick = 0
            for message in track:
                place += 1
                tick += message.time
                if message.type != "end_of_track":
                    messages.append((tick, place, number, message))
        messages.sort(key=itemgetter(0))  # stable: ties in order of tracks
        now, last, scale = 0.0, 0, 500_000 * 1e-6 / file.ticks_per_beat
        program, open_notes, clock, strokes, rows = [0] * 16, defaultdict(deque), [(0, 0.0)], [], []
        for tick, place, number, m in messages:
            now += (tick - last) * scale
            last = tick
            if m.type in ("note_on", "note_off"):
                played = DRUMS if m.channel == 9 else program[m.channel]
                note, begins = 128 * played + m.note, m.type == "note_on" and m.velocity > 0
                waiting = open_notes[note, m.channel]
                strokes.append((now, note, begins))
                if begins:
                    waiting.append((len(rows), now))
                    time, quarter = round(vocab.resolution * now), vocab.resolution // 4
                    rows.append([time, quarter, note, 0, number, m.channel, played, place, -1])
                elif waiting:
                    i, begun = waiting.popleft()
                    rows[i][DUR] = min(vocab.max_duration - 1, round(vocab.resolution * (now - begun)))
                    rows[i][-1] = place
            elif m.type == "program_change":
                program[m.channel] = m.program
            elif m.type == "set_tempo":
                scale = m.tempo * 1e-6 / file.ticks_per_beat
                clock.append((tick, now))
        if not rows:
            raise ValueError("it has no notes")
        clock.append((last + 1e6, now + 1e6 * scale))
        rows = np.array(rows, np.int64)
    except Exception as error:  # mido raises a dozen kinds
        raise OSError(f"{path} cannot be read as MIDI: {str(error) or type(error).__name__}") from error
    return Song(file, rows[:, :4], rows[:, 4:7], rows[:, 7:], np.array(clock), strokes)


def read_midi(path, vocab=None):
    """A MIDI file → events (n, 4) int64 in order of onset. Rules and errors: read_song's."""
    return read_song(path, vocab).events


def write_midi(path, events, resolution=100, song=None, removed=None):
    """Write events on tracks of their own, one a program: into a new file, or into a song's, whose other messages stay
    as they are, but for its notes in `removed`, (n,) bool. Velocity is 72: it is not modelled.

    A new program gets a channel that nothing uses or else, with 15 in use, the one that has it in the song; OSError if
    there is none. A note ends where its key is struck again; ends stand before what begins at the same tick."""
    file, clock, place = mido.MidiFile(ticks_per_beat=50), np.array([(0, 0), (1e8, 1e6)]), -1  # 10 ms a tick
    used, owners = {9}, {}  # channels; which one a program has
    if song:
        clock, file.ticks_per_beat = song.clock, song.file.ticks_per_beat
        gone = set(song.places[removed].ravel().tolist())
        owners = {program: channel for _, channel, program in song.parts.tolist()}
        for track in song.file.tracks:
            file.tracks.append(kept := mido.MidiTrack())
            late = 0
            for message in track:
                used.add(getattr(message, "channel", 9))
                place += 1
                late += message.time
                if place not in gone:
                    kept.append(message.copy(time=late))
                    late = 0
    seconds = np.stack([events[:, TIME], events[:, TIME] + events[:, DUR]]) / resolution
    begins, ends = np.rint(np.interp(seconds, clock[:, 1], clock[:, 0])).astype(int).tolist()
    next_begin, strokes = {}, defaultdict(list)  # strokes of a program: (tick, 1 = begins, pitch)
    for i in np.argsort(begins, kind="stable")[::-1].tolist():
        note = int(events[i, NOTE])
        if begins[i] < (again := next_begin.get(note, math.inf)):  # the same key twice in one tick is one note
            next_begin[note] = begins[i]
            strokes[note >> 7] += [(min(max(ends[i], begins[i] + 1), again), 0, note & 127), (begins[i], 1, note & 127)]
    for program in sorted(strokes):
        channel = 9 if program == DRUMS else min({*range(16)} - used, default=owners.get(program))
        if channel is None:
            raise OSError(f"no MIDI channel is free for program {program}: a file has 15, and one for drums")
        track, now = mido.MidiTrack([mido.Message("program_change", channel=channel, program=program & 127)]), 0
        for tick, on, pitch in sorted(strokes[program]):
            track.append(mido.Message("note_on", channel=channel, note=pitch, velocity=72 * on, time=tick - now))
            now = tick
        used.add(channel)
        file.tracks.append(track)
    file.save(path)
    print(path)

# ==================================================================================== the method: training data


def why_not(events, resolution=100):
    """The paper's filter (appendix E), in its order: "" or the rule that a piece breaks, with the value."""
    n, seconds = len(events), events[:, TIME].max() / resolution
    n_programs = len(np.unique(events[:, NOTE] >> 7))
    rules = ((n < 100, f"{n} notes, fewer than 100"), (seconds < 10, f"{seconds:.1f} s, shorter than 10"),
             (seconds > 3600, f"{seconds:.0f} s, longer than 3600"),
             (n_programs > 16, f"{n_programs} instruments, more than 16"))
    return next((text for broken, text in rules if broken), "")


PRIOR = "none", "spans", *["random"] * 4, *["instruments"] * 4  # appendix D: of ten copies of a piece


def choose_controls(events, kind, rng, vocab):
    """Which events of a copy are controls (appendix D) → (n,) bool. kind: "none"; "spans" of δ seconds, the waits for
    them exponential with mean 20 s; "random" ones, a share of 0.1 … 0.9; all of some, never of all, "instruments"."""
    times, programs, mask = events[:, TIME], events[:, NOTE] >> 7, np.zeros(len(events), bool)
    wait = lambda i: int(np.searchsorted(times, times[i] + int(rng.exponential(20 * vocab.resolution))))
    if kind == "spans":
        i = wait(0)
        while i < len(events):
            j = int(np.searchsorted(times, times[i] + vocab.delta))
            mask[i:j] = True
            i = wait(j) if j < len(events) else j
    elif kind == "random":
        mask = rng.random(len(events)) < rng.integers(1, 10) / 10
    elif kind == "instruments" and len(present := np.unique(programs)) > 1:
        mask = np.isin(programs, rng.choice(present, rng.integers(1, len(present)), replace=False))
    return mask


def row_of(sequence, anticipates, vocab):
    """A cut of a stream of triplets → its row: z, then ids, or None if a time does not fit. Before the first SEP times
    count from the first of them, after it from the beginning of their piece."""
    seps, sequence = np.flatnonzero(sequence[:, NOTE] == SEP), sequence.copy()
    first = seps[0] if len(seps) else len(sequence)
    sequence[:first, TIME] -= sequence[:first, TIME].min(initial=2**40) if first else 0
    if sequence[:, TIME].max() < vocab.max_time:
        return np.append(vocab.sep + 1 + anticipates, triplet_ids(sequence, vocab))


START = np.array([[0, 0, SEP, 0]])  # of a piece in a stream


def as_events(notes):
    """Notes (n, 3) as on disk → events (n, 4) int64, no controls."""
    return np.insert(np.array(notes, np.int64), 3, 0, axis=1)


class Rows:
    """Training rows by number: row i depends on (seed, i) alone, so a resumed run or one on more ranks sees the same.

    A row is a cut at a random place of a random copy of a random piece; where that ends, another begins. Ours: the
    authors write thirty copies of each piece to disk, end to end, and shuffle. The cut comes first, then the controls:
    of the notes from a row's length before the row to one after it. notes: (all, 3) time, duration, note, may be mapped
    from a file; bounds: where the pieces begin, and the end."""

    def __init__(self, notes, bounds, vocab, seed):
        self.notes, self.bounds, self.vocab, self.seed = notes, bounds, vocab, seed

    def draw(self, rng, anywhere):
        """→ (a stream from a note on, at which its row begins; whether it has controls)."""
        n, size = int(rng.integers(self.bounds[-1])), self.vocab.triplets
        piece = np.searchsorted(self.bounds, n, side="right")
        first, last = self.bounds[piece - 1 : piece + 1].tolist()
        begin = int(rng.integers(last - first)) if anywhere else 0
        lead = max(0, begin - size)
        events = as_events(self.notes[first + lead : min(last, first + begin + size)])
        mask = choose_controls(events, PRIOR[rng.integers(len(PRIOR))], rng, self.vocab)
        stream = interleave(events, mask, self.vocab)
        return (stream if lead else np.concatenate([START, stream]))[begin - lead :], bool(mask.any())

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        while True:
            stream, anticipates = self.draw(rng, anywhere=True)
            while len(stream) < self.vocab.triplets:
                stream = np.concatenate([stream, self.draw(rng, anywhere=False)[0]])
            if (row := row_of(stream[: self.vocab.triplets], anticipates, self.vocab)) is not None:
                return row


# ==================================================================================== the model


@dataclass
class MusicConfig:
    vocab_size: int = 55_028
    context: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1  # on embeddings and residual branches
    scale_by_layer: bool = True  # attention logits of layer i over i + 1: without it the released weights are noise
    std: float = 0.02  # of the first weights


SIZES = {  # layers, heads, width and peak learning rate: the paper's, and one for a CPU
    "mini": (3, 4, 96, 6e-3), "small": (12, 12, 768, 6e-4), "medium": (24, 16, 1024, 3e-4),
    "large": (36, 20, 1280, 2e-4),
}


class MusicBlock(nn.Module):
    """A block of GPT-2, with its names; attention over √d_head·(layer + 1)."""

    def __init__(self, config, layer):
        super().__init__()
        d, self.drop = config.n_embd, nn.Dropout(config.dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d)))
        up, down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=nn.GELU("tanh"), c_proj=down))
        self.n_head = config.n_head
        self.scale = (d // config.n_head) ** -0.5 / (layer + 1 if config.scale_by_layer else 1)

    def forward(self, x, past=None):
        """x (batch, seq, width); past: keys and values of the tokens before → (x, keys and values with these)."""
        split = self.attn["c_attn"](self.ln_1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in split)  # (batch, head, seq, d_head)
        if past is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v)))
        n, m = q.size(2), k.size(2)
        mask = None if n in (1, m) else torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n == m, scale=self.scale)
        x = x + self.drop(self.attn["c_proj"](y.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.ln_2(x))), (k, v)


class MusicGPT(nn.Module):
    """GPT-2 with a tied head. ids (batch, seq) int64 → (logits (batch, seq, vocab_size), past for the next call)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = (nn.Embedding(n, config.n_embd) for n in (config.vocab_size, config.context))
        self.h = nn.ModuleList(MusicBlock(config, i) for i in range(config.n_layer))
        self.ln_f, self.drop = nn.LayerNorm(config.n_embd), nn.Dropout(config.dropout)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=config.std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, past=None, last=False):
        """past: of the tokens before these; last: logits of the last position alone, (batch, 1, vocab_size)."""
        start = past[0][0].size(2) if past else 0
        ids, present = ids.to(self.wte.weight.device), []
        x = self.drop(self.wte(ids) + self.wpe.weight[start : start + ids.size(1)])
        for i, block in enumerate(self.h):
            x, kv = block(x, past[i] if past else None)
            present.append(kv)
        return F.linear(self.ln_f(x[:, -1:] if last else x), self.wte.weight), present

    @torch.no_grad()
    def load_gpt2(self, weights):
        """Copy GPT-2's tensors, whose matrices are (in, out). KeyError, RuntimeError: one is missing, does not fit."""
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        for name, p in self.named_parameters():
            turned = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
            p.copy_(weights[name].t() if turned else weights[name])


# ==================================================================================== sampling

MOST_AT_ONCE = 64  # triplets that may be drawn at one instant: a model in a rut would stay there for ever


def nucleus(logits, allowed, temperature, top_p, generator):
    """Draw an index: softmax of the allowed logits (n,) at a temperature (0: the likeliest), cut to the likeliest whose
    mass first reaches top_p."""
    logits = logits.masked_fill(~allowed, -math.inf)
    if temperature == 0:
        return int(logits.argmax())
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])


class Sampler:
    """The triplets so far, `history`, and draws of the next from a model (ids, past, last) → (logits, past).

    Times count from the earliest of the window, so moving the window renews every id: the cache holds as long as what
    it has read is how the ids begin. window: "exact" moves it by a triplet at each step once it is full, with 339
    triplets, as the authors do; "hop" by a quarter."""

    def __init__(self, model, vocab, flag, history, programs, window="hop", top_p=0.95, temperature=1.0, seed=0):
        self.model, self.vocab, self.flag, self.history = model, vocab, flag, history
        self.share = 1 if window == "exact" else 0.75  # of a full window that stays when it moves
        self.options = temperature, top_p, torch.Generator().manual_seed(seed)
        self.notes = [128 * program + pitch for program in vocab.programs for pitch in range(128)] + [REST]
        self.plays = torch.tensor([note == REST or note >> 7 in programs for note in self.notes])
        self.latest = deque(maxlen=MOST_AT_ONCE)
        self.first, self.read, self.past = 0, [], None  # where the window begins; ids whose keys and values `past` has

    def run(self, ids, past):
        logits, past = self.model(torch.tensor([ids]), past, last=True)
        return logits[0, -1].float().cpu(), past

    def full(self, share, earliest):
        """Has the window more than a share of the triplets that fit, or of the time?"""
        times = [event[TIME] for event in self.history[self.first :]] + [earliest]
        too_long = max(times) - min(times) + self.vocab.density >= share * self.vocab.max_time
        return too_long or len(times) - 1 > share * (self.vocab.triplets - 2)  # one is to come; the authors': 339

    @torch.no_grad()
    def draw(self, earliest):
        """→ [time, duration, note, 0], not before `earliest`, by one of the programs or a REST; not in history yet."""
        vocab, earliest = self.vocab, earliest + (self.latest.count(earliest) == MOST_AT_ONCE)
        if self.full(1, earliest):
            while self.full(self.share, earliest):
                self.first += 1
        window = np.array(self.history[self.first :], np.int64).reshape(-1, 4)
        zero = int(window[:, TIME].min(initial=earliest))
        ids = [self.flag, *triplet_ids(window - [zero, 0, 0, 0], vocab).tolist()]
        if ids[: len(self.read)] != self.read:
            self.read, self.past = [], None
        if fresh := ids[len(self.read) :]:
            self.logits, self.past = self.run(fresh, self.past)
        self.read, logits, past, drawn = ids, self.logits, self.past, []
        allowed = torch.cat([torch.arange(vocab.first_note) >= earliest - zero, self.plays])  # any duration
        for slot, (low, high) in enumerate(vocab.slots):
            drawn.append(nucleus(logits[low:high], allowed[low:high], *self.options))
            if slot < NOTE:
                logits, past = self.run([low + drawn[-1]], past)
        time, duration, note = drawn[TIME] + zero, drawn[DUR], self.notes[drawn[NOTE]]
        self.latest.append(time)
        return [time, 0 if note == REST else duration, note, 0]


def merge(first, second):
    """Two lists of events (n, 4) as one by time; the first goes first in ties."""
    both = np.concatenate([first, second])
    return both[np.argsort(both[:, TIME], kind="stable")]


def generate(model, vocab, inputs, controls, start, end, programs=None, progress=lambda time: 0, **options):
    """Algorithm 1: continue, infill or accompany → new events (n, 4) in [start, end), in bins.

    inputs (k, 4): those before start are the prompt; those from end on are told δ early, and so are the controls (m,
    4), the parts that are kept. What lies between is not looked at. programs: those that may play; options:
    Sampler's."""
    future = merge(controls, inputs[inputs[:, TIME] >= end])
    future[:, CTRL] = 1
    prompt = pad(inputs[inputs[:, TIME] < start], start, vocab.density)
    history, waiting = anticipate(prompt, future, vocab.delta)
    flag = vocab.sep + 1 + bool(len(future))
    sampler = Sampler(model, vocab, flag, history.tolist(), programs or vocab.programs, **options)
    waiting, now, new = deque(waiting.tolist()), int(prompt[:, TIME].max(initial=0)), []
    while True:
        while waiting and now >= waiting[0][TIME] - vocab.delta:
            sampler.history.append(waiting.popleft())
        event = sampler.draw(max(start, now))
        now = event[TIME]
        if now >= end:
            return np.array(new, np.int64).reshape(-1, 4)
        sampler.history.append(event)
        if event[NOTE] != REST:
            new.append(event)
        progress(now)


def follow_events(model, vocab, inputs, melody, start, end, **options):
    """Algorithm 2, the baseline without anticipation, made fair → new events (n, 4) in [start, end).

    The melody's notes up to a drawn event's time go in before it, as events. A drawn note of the melody's own program
    is dropped: kept, such notes are the copies and dissonances that the paper describes."""
    known = merge(melody, inputs)
    prompt = pad(known[known[:, TIME] < start], start, vocab.density)
    sampler = Sampler(model, vocab, vocab.sep + 1, prompt.tolist(), vocab.programs, **options)
    waiting, now, new = deque(melody[melody[:, TIME] >= start].tolist()), start, []
    while True:
        event = sampler.draw(now)
        if event[TIME] >= end:
            return np.array(new, np.int64).reshape(-1, 4)
        while waiting and waiting[0][TIME] <= event[TIME]:
            sampler.history.append(waiting.popleft())
            now = sampler.history[-1][TIME]
        if event[NOTE] >> 7 not in melody[:, NOTE] >> 7:
            now = event[TIME]
            sampler.history.append(event)
            if event[NOTE] != REST:
                new.append(event)


# ==================================================================================== the same in every file

CACHE = Path(os.environ.get("NANOPAPERS_CACHE", "~/.cache/nanopapers")).expanduser()

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


def download(url, sha256=None):
    """Fetch a file once → its path in the cache. Under torchrun rank 0 does, others wait. OSError: not to be had."""
    path = CACHE / url.split("://")[1]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), sha256)  # to another name first; sha256: its first digits
        except Exception as error:  # whatever it was, the file is not there
            print(f"{url}: {error}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
    if not path.exists():
        raise OSError(f"no {path}: fetch {url} by other means and put it there")
    return path


def save_results(folder, args, **figures):
    """folder/results.json: the command, versions, device and every figure of the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU, {torch.get_num_threads()} threads"
    about = dict(command=sys.argv, args=vars(args), python=sys.version, torch=torch.__version__, device=device)
    plain = lambda x: x.tolist() if hasattr(x, "tolist") else getattr(x, "__name__", str(x))
    (folder / "results.json").write_text(json.dumps(about | figures, indent=1, default=plain))
    print(folder / "results.json")


def print_table(header, rows):
    """Rows of strings and numbers as aligned text, the first column left. NaN: what the data do not identify."""
    text = lambda x: str(x) if not isinstance(x, float) else "undefined" if x != x else f"{x:.3f}"
    cells = [[text(x) for x in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:])), sep="  ")


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

# ==================================================================================== training


def collate(rows, silent=None):
    """Rows of ids → ids, targets (batch, seq) int64; −1 = no target: filled up; with silent = vocabulary, controls."""
    ids = nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, -1)
    targets = ids[:, 1:].clone()
    if silent:
        targets[(targets >= silent.control) & (targets < silent.sep)] = -1
    return ids[:, :-1].clamp(0), targets


def music_loss(model, ids, targets):
    """Mean cross-entropy over the targets that are not −1."""
    logits = model(ids)[0].float()  # (batch, seq, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), ignore_index=-1)


def music_updates(model, opt, rows, steps, batch, lr, warmup, first=0, stop=(), quiet=False, name="train", silent=None):
    """Section 4: linear warm-up, then a cosine to 0; gradients clipped to norm 1. Update s takes rows s·batch to (s +
    1)·batch − 1, whoever has them. After each yields (updates done, loss, is something in a rank's list `stop`?)."""
    device, rank, world = model.wte.weight.device, 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    if batch < 1 or batch % world:
        fail(f"--batch_size {batch} is not a multiple of {world} ranks")
    micro = math.gcd(batch // world, 8)  # rows a forward pass
    passes, on_gpu = batch // (micro * world), device.type == "cuda"
    loss_of = torch.compile(music_loss) if on_gpu else music_loss
    numbers = (range(i, i + micro) for i in range(first * batch + rank * micro, steps * batch, world * micro))
    workers = min(8, os.cpu_count()) if on_gpu else 0
    batches = iter(DataLoader(rows, batch_sampler=numbers, collate_fn=partial(collate, silent=silent),
                              num_workers=workers))
    model.train()
    for step in tqdm(range(first, steps), name, steps, initial=first, disable=quiet or rank > 0):
        for group in opt.param_groups:
            group["lr"] = lr * min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        torch.manual_seed(step * world + rank)  # of dropout, so that a resumed run is the same
        total = torch.tensor([0.0, len(stop)], device=device)
        for _ in range(passes):
            with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
                loss = loss_of(model, *next(batches)) / (passes * world)
            loss.backward()
            total[0] += loss.detach()
        if world > 1:  # once an update, so no DistributedDataParallel
            for x in (total, *(p.grad for p in model.parameters())):
                dist.all_reduce(x)
        if not math.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            fail(f"step {step + 1}: the gradient is not finite: start anew with a lower --lr")
        opt.step()
        opt.zero_grad()
        yield step + 1, float(total[0]), bool(total[1])


def make_adamw(model, beta2=0.999):
    return torch.optim.AdamW(model.parameters(), 0.0, (0.9, beta2), weight_decay=0.1, fused=True)


def save_music(path, model, vocab, anticipatory, **more):
    """To another name first: a killed run leaves the old checkpoint whole."""
    state = dict(model=model.state_dict(), config=asdict(model.config), vocab=asdict(vocab), anticipatory=anticipatory)
    torch.save(state | more, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


HUB = "https://huggingface.co/stanford-crfm/{}/resolve/main/{}"


def open_music(name, device="cpu"):
    """A checkpoint of this file, or hub:NAME, the authors' weights → (model, vocabulary, has it seen controls?)."""
    try:
        if name.startswith("hub:"):
            if not re.fullmatch(r"\w[\w.-]*", name[4:]):
                fail(f"--ckpt {name}: a name has letters, digits, dots and dashes, as hub:music-small-800k")
            about = json.loads(download(HUB.format(name[4:], "config.json")).read_text())
            path = download(HUB.format(name[4:], "pytorch_model.bin"))
            vocab, anticipatory = Vocabulary(), "-ar-" not in name
            shape = [about[key] for key in ("n_positions", "n_layer", "n_head", "n_embd")]
            by_layer = about.get("scale_attn_by_inverse_layer_idx", False)
            model = MusicGPT(MusicConfig(vocab.size, *shape, scale_by_layer=by_layer))
            model.load_gpt2(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        else:
            saved = torch.load(name, map_location="cpu", weights_only=True)
            model, anticipatory = MusicGPT(MusicConfig(**saved["config"])), saved["anticipatory"]
            vocab = Vocabulary(**saved["vocab"] | dict(programs=tuple(saved["vocab"]["programs"])))
            model.load_state_dict(saved["model"])
    except FileNotFoundError:
        fail(f"no checkpoint {name}: run python anticipation.py first, or give --ckpt FILE or hub:music-small-800k")
    except OSError:
        raise
    except Exception as error:  # torch.load raises a dozen kinds
        fail(f"{name} is no checkpoint of this program (one with interarrival ids is none): {error!r:.200}")
    return model.to(device).eval(), vocab, anticipatory


# ==================================================================================== a band whose right part is known

MINI = Vocabulary(4, 56, 9, (0, 32, 73, DRUMS), 289, delta=8, density=4)  # 4 bins a second, 120 beats a minute
MELODY, BAR, BARS = 73, 8, 6  # program; bins a bar, 2 s; bars a piece
PATTERNS = ((0, 36), (4, 38)), ((0, 36), (2, 42), (4, 38)), ((0, 36), (4, 36), (6, 38))  # drums: (bin, pitch)
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])
CHAIN = np.array([  # which chord follows which; triads on C D E F G A
    [0.06, 0.14, 0.10, 0.28, 0.32, 0.10], [0.08, 0.06, 0.10, 0.14, 0.48, 0.14], [0.08, 0.14, 0.06, 0.30, 0.08, 0.34],
    [0.26, 0.16, 0.06, 0.06, 0.36, 0.10], [0.40, 0.06, 0.10, 0.10, 0.06, 0.28], [0.10, 0.30, 0.10, 0.32, 0.12, 0.06]])


def band(rng):
    """A piece → events (n, 4), the melody first among ties, and its chords (BARS,).

    The melody plays the notes of the bar's chord in any order, so the third alone settles which it is, then a neighbour
    of the third. Given the melody all else is determined, but for which of three drum patterns the piece has."""
    chords, pattern, notes = [int(rng.integers(6))], PATTERNS[rng.integers(3)], []
    while len(chords) < BARS:
        chords.append(int(rng.choice(6, p=CHAIN[chords[-1]])))
    for now, chord in zip(range(0, BARS * BAR, BAR), chords):
        tones = SCALE[(chord + np.array([0, 2, 4])) % 7]
        order = rng.permutation(tones)
        neighbour = SCALE[(np.searchsorted(SCALE, order[2]) + rng.choice((-1, 1))) % 7]
        notes += [(now + 2 * k, 2, 128 * MELODY + 72 + pitch) for k, pitch in enumerate((*order, neighbour))]
        notes += [(now, BAR, 48 + tones[0] + (pitch - tones[0]) % 12) for pitch in tones]  # piano, in root position
        notes += [(now + 4 * k, 4, 128 * 32 + 36 + tones[0] + 7 * k) for k in (0, 1)]  # bass: root, fifth
        notes += [(now + k, 1, 128 * DRUMS + pitch) for k, pitch in pattern]
    notes.sort(key=lambda note: (note[0], note[2] >> 7 != MELODY, note[2]))
    return np.insert(np.array(notes), 3, 0, axis=1), np.array(chords)


class BandRows:
    """Row i is a new piece, by (seed, i) alone. Copies of the anticipatory model: a tenth without controls; the others
    have as controls the melody, the melody and all after some bar, or all after some bar."""

    def __init__(self, seed, anticipatory):
        self.seed, self.anticipatory = seed, anticipatory

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        events, _ = band(rng)
        melody, after = events[:, NOTE] >> 7 == MELODY, events[:, TIME] >= BAR * rng.integers(2, BARS)
        masks = [melody & False, melody, melody | after, after]
        mask = masks[rng.choice(4, p=[0.1, 0.3, 0.4, 0.2])] if self.anticipatory else masks[0]
        return row_of(interleave(events, mask, MINI), mask.any(), MINI)


QUESTIONS = {  # name: first bar, past the last, is the melody kept, does the rest of the piece stay
    "accompany, bars 3-5": (2, 5, True, False), "infill bar 4": (3, 4, True, True),
    "infill bar 4 and melody": (3, 4, False, True),
}


def score(new, events, chords, first, last):
    """→ (share of bars whose bass begins on the chord's root and nowhere else; F1 of the notes but the melody's, right
    if program, pitch and bin are)."""
    played, right = ({(t, note) for t, _, note, _ in e.tolist() if first <= t // BAR < last and note >> 7 != MELODY}
                     for e in (new, events))
    basses = [{n % 128 % 12 for t, n in played if t == bar * BAR and n >> 7 == 32} for bar in range(first, last)]
    roots = [bass == {SCALE[chords[bar]]} for bar, bass in zip(range(first, last), basses)]
    return float(np.mean(roots)), 2 * len(played & right) / max(1, len(played) + len(right))


def learn(name, args):
    """Train a model on the band; for the autoregressive one no copy has controls."""
    torch.manual_seed(args.seed)
    n_layer, n_head, width, lr = SIZES["mini"]
    model = MusicGPT(MusicConfig(MINI.size, MINI.context, n_layer, n_head, width, 0.0, scale_by_layer=False, std=0.05))
    told = name == "anticipatory"
    for _ in music_updates(model, make_adamw(model, 0.99), BandRows(args.seed, told), args.steps, 8, lr, 20, name=name,
                           quiet=args.quiet, silent=MINI if told else None):  # ours: no loss on controls
        pass
    save_music(args.out / f"{name}.pt", model, MINI, told)
    return model.eval()


def fill(model, play, events, known, kept, first, last, seed):
    """Bars first … last − 1 by a model, from what is known of a piece; what is kept are its controls."""
    return play(model, MINI, events[known], events[kept], first * BAR, last * BAR, seed=seed)


def retrieve(events, known, kept, first, last, seed):
    """As many bars from another place of the piece: the paper's baseline."""
    places = [bar for bar in range(BARS - (last - first) + 1) if bar != first]
    return events + [(first - np.random.default_rng((seed, 2)).choice(places)) * BAR, 0, 0, 0]


def demo(args):
    """Section 3 where the right answer is known: two models, trained alike, accompany and infill pieces new to them."""
    if set_up(args)[2] > 1:
        fail("the demo is for one process; train is for torchrun")
    torch.set_num_threads(1)  # for small matrices a second one costs more than it brings
    if min(args.steps, args.pieces) < 1:
        fail("--steps and --pieces must be above 0")
    pieces = [band(np.random.default_rng((args.seed, 1, k))) for k in range(args.pieces)]
    players = {"anticipatory": partial(fill, learn("anticipatory", args), generate),
               "autoregressive": partial(fill, learn("autoregressive", args), follow_events), "retrieval": retrieve}
    table, pictures = [], {}
    for name, play in players.items():
        row = [name]
        for question, (first, last, keep_melody, rest) in QUESTIONS.items():
            scores = []
            for k, (events, chords) in enumerate(pieces):
                bar, kept = events[:, TIME] // BAR, keep_melody & (events[:, NOTE] >> 7 == MELODY)
                known = ((bar < first) | rest & (bar >= last)) & ~kept
                new = play(events, known, kept, first, last, k)
                scores.append(score(new, events, chords, first, last))
                if k == 0:
                    parts = dict(kept=events[kept], given=events[known], new=new)
                    pictures[re.sub(r"\W+", "_", f"{name} {question}")] = parts
            row += np.mean(scores, 0).tolist()
        table.append(row)
    guesses = []  # the likeliest chord, given the one before and, where it stays, the one after
    for first, last, _, rest in QUESTIONS.values():
        right = [(CHAIN[chords[bar - 1]] * (CHAIN[:, chords[bar + 1]] if rest else 1)).argmax() == chords[bar]
                 for _, chords in pieces for bar in range(first, last)]
        guesses += [float(np.mean(right)), ""]
    table.append(["the chain's best guess", *guesses])
    print_table([f"{args.pieces} pieces", *[word for name in QUESTIONS for word in (f"{name}: root", "F1")]], table)
    chosen = {name: pictures[name] for name in (*list(pictures)[:2], list(pictures)[3])}
    for name, parts in chosen.items():
        write_midi(args.out / f"{name}.mid", np.concatenate(list(parts.values())), MINI.resolution)
    save_results(args.out, args, questions=QUESTIONS, table=table)
    show_parts(args, chosen, "demo.png", MINI.resolution)


# ==================================================================================== files, training, evaluation


def read_one(path):
    """→ (path, split by the paper's rule for Lakh, notes (n, 3) int32, "" or why not). In a process of its own."""
    name = path.stem if re.fullmatch("[0-9a-f]{32}", path.stem) else hashlib.md5(path.read_bytes()).hexdigest()
    split = {"e": "valid", "f": "test"}.get(name[0], "train")
    try:
        events = read_midi(path)
    except OSError as error:
        return path, split, None, str(error)
    reason = why_not(events)
    return path, split, events[:, :3].astype(np.int32), reason and f"{path}: {reason}"


def tokenize(args):
    """A folder of MIDI files → for each split notes and bounds of pieces, with the paper's filter (appendix E)."""
    paths = sorted(p for p in args.path.rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    splits, files = ({name: [] for name in ("train", "valid", "test")} for _ in range(2))
    with Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:  # the parent hears Ctrl-C
        for path, split, notes, reason in tqdm(pool.imap(read_one, paths, 25), "read", len(paths), disable=args.quiet):
            if reason:
                print(reason)
            else:
                splits[split].append(notes)
                files[split].append(path)
    if not any(splits.values()):
        fail(f"{args.path}: none of {len(paths)} .mid files can be read and passes the filter")
    table = []
    for name, pieces in splits.items():
        notes = np.concatenate([np.zeros((0, 3), np.int32), *pieces])
        np.save(args.out / f"{name}.npy", notes)
        np.save(args.out / f"{name}_bounds.npy", np.cumsum([0, *map(len, pieces)]))
        table.append((name, len(pieces), len(notes), sum(piece[-1, TIME] for piece in pieces) / 360_000))
    kept = sum(map(len, splits.values()))
    print_table((f"{kept} of {len(paths)} files kept", "pieces", "notes", "hours"), table)
    save_results(args.out, args, table=table, files=files)


def load_pieces(args, split, vocab):
    """What tokenize wrote → notes (all, 3) int32, not loaded; bounds of the pieces."""
    if vocab != Vocabulary():
        fail(f"--ckpt {args.ckpt} has a vocabulary of its own, and the files the paper's")
    if not (args.data / f"{split}.npy").exists():
        fail(f"--data {args.data} is no folder that tokenize wrote: python anticipation.py tokenize FOLDER")
    return np.load(args.data / f"{split}.npy", mmap_mode="r"), np.load(args.data / f"{split}_bounds.npy")


@torch.no_grad()
def held_out_table(model, vocab, args, split):
    """Section 4.1: bits a second; perplexities of a triplet and of its three ids. NaN: the split fills no row."""
    notes, bounds = load_pieces(args, split, vocab)
    stream = [START[:0]]
    for first, last in pairwise(bounds):
        events = as_events(notes[first:last])
        stream += [START, interleave(events, np.zeros(len(events), bool), vocab)]
    stream, size, nats = np.concatenate(stream), vocab.triplets, []
    for i in range(0, len(stream) - size + 1, size):
        if (row := row_of(stream[i : i + size], False, vocab)) is not None:
            ids, targets = collate([row])
            logits = model.eval()(ids)[0][0].float()
            nats.append(F.cross_entropy(logits, targets[0].to(logits.device), reduction="none").double().cpu())
    if not nats:
        return [("bits a second", math.nan)]
    bits = torch.stack(nats).numpy().reshape(-1, 3).mean(0) / math.log(2)  # of time, duration, note
    seconds = notes[bounds[1:] - 1, TIME].sum() / vocab.resolution  # the last onset of each piece
    return [("bits a second", bits.sum() * len(stream) / seconds), ("perplexity of a triplet", 2 ** bits.sum()),
            *[(f"perplexity of a {name}", 2**b) for name, b in zip(("time", "duration", "note"), bits)]]


def train(args):
    """Section 4: train on what tokenize wrote, or with --ckpt go on from a model (fine-tune). Also under torchrun."""
    device, rank, world = set_up(args)
    n_layer, n_head, width, lr = SIZES[args.size]
    if args.ckpt:
        model, vocab, _ = open_music(args.ckpt)
        lr = lr / 10  # the author's advice
    else:
        vocab = Vocabulary()
        dropout = 0.0 if args.size == "mini" else 0.1
        model = MusicGPT(MusicConfig(vocab.size, vocab.context, n_layer, n_head, width, dropout))
    on_gpu = device.type == "cuda"
    steps, batch = args.steps or (100_000 if on_gpu else 100), args.batch_size or (512 if on_gpu else 8)
    notes, bounds = load_pieces(args, "train", vocab)
    if not len(notes):
        fail(f"{args.data} has no piece in its train split")
    rows = Rows(notes, bounds, vocab, args.seed)
    opt, checkpoint, first = make_adamw(model.to(device)), args.out / "checkpoint.pt", 0
    settings = [str(x) for x in (steps, batch, args.lr, args.size, args.ckpt, args.data, args.seed)]
    if args.resume:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["settings"] != settings:
            fail(f"{checkpoint} is of another run: {', '.join(saved['settings'])}")
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
    stop, history, step = [], [], first
    signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, signal.SIG_DFL)))
    warmup = min(1000, steps // 10)
    for step, loss, stopped in music_updates(model, opt, rows, steps, batch, args.lr or lr, warmup, first, stop,
                                             args.quiet):
        history.append((step, loss))
        if rank == 0 and (stopped or step == steps or step % args.save_every == 0):
            save_music(checkpoint, model, vocab, True, optimizer=opt.state_dict(), step=step, settings=settings)
        if stopped and step < steps:
            print(f"stopped after step {step} of {steps}: the same command with --resume goes on", file=sys.stderr)
            raise KeyboardInterrupt
    if rank == 0:
        table = held_out_table(model, vocab, args, "valid")
        print_table(("validation", f"step {step}"), table)
        print(checkpoint)
        save_results(args.out, args, history=history, table=table)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def eval_(args):
    """Section 4.1: bits a second, perplexities of a triplet and of its three ids, on the test split."""
    device, _, _ = set_up(args)
    model, vocab, _ = open_music(args.ckpt, device)
    table = held_out_table(model, vocab, args, "test")
    print_table(("test", ""), table)
    save_results(args.out, args, table=table)


# ==================================================================================== music from a file


def parts_of(song):
    """→ {(track, channel, program): which notes are its, (n,) bool}."""
    return {tuple(part): (song.parts == part).all(1) for part in np.unique(song.parts, axis=0).tolist()}


def melody_of(song, asked):
    """→ (n,) bool. asked: a program, "track:1" or "channel:2"."""
    parts = parts_of(song)
    chosen = [its for (t, c, p), its in parts.items() if asked in (f"track:{t}", f"channel:{c}", f"{p}")]
    if not chosen:
        has = [f"track:{t} channel:{c} program {p}, {its.sum()} notes" for (t, c, p), its in parts.items()]
        fail(f"--melody {asked} is not there; the file has {'; '.join(has)}")
    return np.any(chosen, 0)


def open_both(args):
    """--ckpt and the file, checked → (what open_music gives, Song by the model's clock, its onsets in seconds)."""
    device, _, _ = set_up(args)
    opened = open_music(args.ckpt, device)
    song = read_song(args.path, opened[1])
    if not (1 <= args.n <= 100 and 0 < args.top_p <= 1 and args.temperature >= 0):
        fail("--n must be from 1 to 100, --top_p above 0 and at most 1, --temperature not below 0")
    return opened, song, song.events[:, TIME] / opened[1].resolution


def play_anew(args, opened, song, kept, start, end, until):
    """New music in [start, end), seconds, written into the song, whose notes in [start, until) go, but for the kept."""
    model, vocab, anticipatory = opened
    if not 0 <= start < end <= 3600:
        fail(f"from {start:g} to {end:g} s: a start from 0 on, before an end, within an hour")
    first, last = round(start * vocab.resolution), round(end * vocab.resolution)
    times, programs = song.events[:, TIME], song.events[:, NOTE] >> 7
    removed = (times >= first) & (times < until * vocab.resolution) & ~kept
    rest = ~kept & ~removed
    players = set(args.instruments or programs[~kept].tolist() or vocab.programs)
    if strange := players.union(programs.tolist()) - set(vocab.programs):
        fail(f"{args.ckpt} does not know programs {sorted(strange)}, only {vocab.programs}")
    if not anticipatory and (kept | rest & (times >= first)).any():
        fail(f"--ckpt {args.ckpt} was trained without controls: it can only continue")
    bar = tqdm(total=last - first, disable=args.quiet)
    for k in range(args.n):
        bar.reset()
        new = generate(model, vocab, song.events[rest], song.events[kept], first, last, players,
                       lambda time: bar.update(time - first - bar.n), window=args.window, top_p=args.top_p,
                       temperature=args.temperature, seed=args.seed + k)
        print(f"version {k}: {len(new)} notes from {start:g} to {end:g} s; {removed.sum()} taken out")
        write_midi(args.out / f"{k}.mid", new, vocab.resolution, song, removed)
        parts = dict(kept=song.events[kept], given=song.events[rest], new=new)
        show_parts(args, {f"{k}": parts}, f"{k}.png", vocab.resolution)
    save_results(args.out, args, notes=len(new), removed=removed.sum())


def continue_(args):
    """Section 4.2: what is before --start stays (5 s), what follows it is new, for 15 s or up to --end."""
    opened, song, seconds = open_both(args)
    start = seconds[0] + 5 if args.start is None else args.start
    if not (seconds < start).any():
        fail(f"--start {start:g}: the first note is at {seconds[0]:g} s, so there is nothing to continue")
    end = start + 15 if args.end is None else args.end
    play_anew(args, opened, song, seconds < 0, start, end, math.inf)


def accompany(args):
    """Section 4.3: the melody stays, and all before --start (its first 5 s); the others play anew, to its end."""
    opened, song, seconds = open_both(args)
    kept = melody_of(song, args.melody)
    start = seconds[kept][0] + 5 if args.start is None else args.start
    end = seconds[kept][-1] + 1 if args.end is None else args.end
    play_anew(args, opened, song, kept, start, end, end)


def infill(args):
    """Section 3.2: a span is taken out, of all or of --instruments, and played anew, given what is before and after."""
    opened, song, seconds = open_both(args)
    start, end = args.span
    if end > seconds[-1]:
        fail(f"--span {start:g}:{end:g} goes beyond the last note, at {seconds[-1]:g} s: for that there is continue")
    others = ~np.isin(song.events[:, NOTE] >> 7, args.instruments or range(129))
    play_anew(args, opened, song, others & (seconds >= start) & (seconds < end), start, end, end)


def plot(args):
    """A MIDI file as a piano roll, with --wav as sound."""
    song = read_song(args.path)
    parts = parts_of(song)
    print_table(("track", "channel", "program", "notes"), [(*part, its.sum()) for part, its in parts.items()])
    named = {f"track {t}, program {p}": song.events[its] for (t, _, p), its in parts.items()}
    show_parts(args, {args.path.stem: named}, f"{args.path.stem}.png")


def show_parts(args, pieces, name, resolution=100):
    """pieces: {name: {part: events}} → a piano roll of each, a colour a part, drums 60 lower; with --wav its sound."""

    def draw(fig):
        for ax, (title, parts) in zip(fig.subplots(len(pieces), squeeze=False, sharex=True).flat, pieces.items()):
            for k, (part, events) in enumerate(parts.items()):
                heights = (events[:, NOTE] & 127) - 60 * (events[:, NOTE] >> 7 == DRUMS)
                begins = events[:, TIME] / resolution
                ends = begins + np.maximum(events[:, DUR], 1) / resolution
                ax.hlines(heights, begins, ends, f"C{k % 10}", lw=3, label=part)
            ax.set(title=title, xlabel="seconds", ylabel="MIDI pitch (drums: − 60)")
            ax.legend(loc="center right", fontsize=8)

    if args.wav:
        for title, parts in pieces.items():
            write_wav(args.out / f"{title}.wav", np.concatenate(list(parts.values())), resolution)
    figure(args.out / name, args, draw, (11, 4) if len(pieces) == 1 else (9, 9))


def write_wav(path, events, resolution=100, rate=22_050):
    """Decaying sines, noise for drums; mono, 16 bits, −6 dB; ten minutes at most, from the first note on."""
    begins = (events[:, TIME] - events[:, TIME].min()) / resolution
    lasts, noise = np.maximum(events[:, DUR] / resolution, 0.1), np.random.default_rng(0)
    sound = np.zeros(int(rate * min(600, (begins + lasts).max())))
    for begin, last, note in zip(begins.tolist(), lasts.tolist(), events[:, NOTE].tolist()):
        here = sound[int(begin * rate) :][: int(last * rate)]
        t = np.arange(len(here)) / rate
        if note >> 7 == DRUMS:
            here += noise.standard_normal(len(t)) * np.exp(-20 * t)
        else:
            tone = np.sin(2 * np.pi * 440 * 2 ** ((note % 128 - 69) / 12) * t)
            here += tone * np.exp(-2 * t) * np.minimum(1, (last - t) / 0.05)  # no click at its end
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((sound * 16_383 / np.abs(sound).max()).astype("<i2").tobytes())
    print(path)


# ==================================================================================== command line


def time_span(text):
    start, end = map(float, text.split(":"))
    return start, end


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "demo")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Without TASK: demo.")
    parser.error = fail
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    flags = {
        "path": dict(type=Path, help="a MIDI file; tokenize: a folder of them"),
        "ckpt": dict(help="a checkpoint, or hub:NAME as hub:music-small-800k, the authors' (train: a new model; eval: "
                     "train's; else the demo's)"),
        "data": dict(type=Path, default=Path("out/anticipation/tokenize"), help="what tokenize wrote (%(default)s)"),
        "size": dict(choices=SIZES, default="small", help="of the model (%(default)s)"),
        "steps": dict(type=int, help="updates (demo 500; train 100,000 on a GPU, the paper's first, else 100)"),
        "batch_size": dict(type=int, help="rows an update, over all ranks (512 on a GPU, the paper's; else 8)"),
        "lr": dict(type=float, help="peak learning rate (the paper's for the size; with --ckpt a tenth)"),
        "save_every": dict(type=int, default=1000, help="updates between checkpoints (%(default)s); one at Ctrl-C too"),
        "resume": dict(action="store_true", help="go on from the checkpoint in --out"),
        "pieces": dict(type=int, default=48, help="held-out pieces (%(default)s)"),
        "start": dict(type=float, help="second from which on music is new (5 s after the first note or the melody's)"),
        "end": dict(type=float, help="second at which it ends (start + 15; accompany: with the melody)"),
        "span": dict(type=time_span, required=True, help="FROM:TO in seconds, as 8:12"),
        "melody": dict(required=True, help="what stays: track:N, channel:N (from 0) or a program 0 … 128; see plot"),
        "instruments": dict(type=int, nargs="+", help="programs that play, as 0 32 128 = drums (those of the file)"),
        "n": dict(type=int, default=1, help="versions (%(default)s)"),
        "top_p": dict(type=float, default=0.95, help="nucleus (%(default)s, the paper's; its repository has 0.98)"),
        "temperature": dict(type=float, default=1.0, help="of sampling; 0: always the likeliest (%(default)s)"),
        "window": dict(choices=("hop", "exact"), default="hop", help="full context: move seldom, or as the authors do"),
        "wav": dict(action="store_true", help="write sound too"),
        "seed": dict(type=int, default=0, help="of weights, data and draws (%(default)s)"),
        "device": dict(help="cuda or cpu (cuda where there is one)"),
        "out": dict(type=Path, help="folder for results (%(default)s)"),
        "no_plot": dict(action="store_true", help="write no figure"),
        "quiet": dict(action="store_true", help="no progress bars"),
    }

    def task(function, names, **defaults):
        about, name = function.__doc__.strip(), function.__name__.rstrip("_")
        sub = tasks.add_parser(name, help=about.split("\n")[0], description=about)
        sub.error = fail
        for flag in names.split():
            sub.add_argument(flag if flag == "path" else f"--{flag}", **flags[flag])
        sub.set_defaults(task=function, **dict(out=Path(f"out/anticipation/{name}")) | defaults)

    sampling = "instruments n top_p temperature window wav ckpt seed device out no_plot quiet"
    trained = "out/anticipation/demo/anticipatory.pt"
    task(demo, "steps pieces seed out no_plot quiet", steps=500, device="cpu", wav=True)
    task(tokenize, "path out quiet")
    task(train, "data size ckpt steps batch_size lr save_every resume seed device out quiet")
    task(eval_, "data ckpt seed device out", ckpt="out/anticipation/train/checkpoint.pt")
    task(continue_, f"path start end {sampling}", ckpt=trained)
    task(accompany, f"path melody start end {sampling}", ckpt=trained)
    task(infill, f"path span {sampling}", ckpt=trained)
    task(plot, "path wav out no_plot")
    return parser.parse_args(argv)


def main():
    run(parse_args())


if __name__ == "__main__":
    main()
