"""Anticipatory Music Transformer (Thickstun, Hall, Donahue, Liang; arXiv 2306.08620): accompaniment and infilling, in one decoder.

The problem. Music is a sequence of events e = (time, duration, note). Some may be fixed by the user (a melody, the bars around a gap),
the others are to be generated. Put all fixed ones in front, and they stand far from where they matter. Sort them in as if they happened
δ seconds early, and nobody can sample: the right place depends on an event that has not been drawn yet.

The idea. Put a control of time s right after the first event whose time reaches s − δ. That place is known from what came before it (a
stopping time), so a sampler draws events, pauses there, inserts the control and goes on.

    place of u_s = 1 + min{ i : t_i ≥ s − δ }, and the very front if s ≤ δ             definition 3.1, algorithm 1; δ = 5 s
    events no more than Δ* = 1 s apart (RESTs fill longer gaps)  ⇒  told at least δ − Δ* ahead                    section 3.3
    row = z, then triplets of ids (time, duration, note), controls in a second copy of the vocabulary             appendix C
    z = 1 if the piece has controls, else 0; times are absolute within the row, the first is 0

Everything else is a plain GPT-2 under cross-entropy: only the order of the data is new. Absolute times make it possible, since a triplet
means the same wherever it stands; in the usual encoding by time steps ("interarrival") no event can be moved.

How to run it.

    python anticipation.py                                 demo: learn to accompany, with and without anticipation; table, MIDI, sound
    python anticipation.py delta_sweep | bench             what looking δ ahead is worth; speed of reading, of sampling, of training
    python anticipation.py accompany X.mid                 new accompaniment for the melody of a file, by the demo's model; with --ckpt
                                                           hub:music-small-800k by the authors' (download); likewise continue X.mid and
    python anticipation.py infill X.mid --span 8:12        fill four seconds anew, given what is before and after them
    python anticipation.py tokenize DIR; … train --data out/anticipation/tokenize --preset small      or under torchrun on many GPUs
    python anticipation.py finetune | eval | inspect X.mid | play X.mid | plot X.mid

What the paper reports. Lakh MIDI, test split, bits a second: small models of 100k steps, interarrival 85.9, arrival 80.4, arrival with
anticipation 80.7; at 800k steps 75.7 without and 75.0 with (table 1). Accompaniments against the human original, wins, ties, losses in 60
judgements: anticipatory 18/31/11, autoregressive 5/10/45, retrieval 2/6/52 (table 3).

What we measured. The demo has no listeners but a right answer: a band (chords from a known chain; piano, bass and drums follow from them)
whose melody settles each bar's chord with its third note. 48 held-out pieces a seed, two bars of prompt, three to play; sampled, top-p
0.95 (`python anticipation.py --seeds 3`, torch 2.13.0 on a CPU, 70 s of one thread a model; seeds 0, 1, 2):

                               bass roots right         note F1                  bits/s of the accompaniment, melody known
    anticipatory, δ = 2 s      0.958  1.000  0.965      0.981  1.000  0.980      0.181  0.144  0.174
    autoregressive             0.368  0.417  0.465      0.678  0.704  0.726      0.773  0.764  0.720
    retrieval                  0.100                    0.489
    chain's best guess         0.396
    best possible knowing the last chord and 0, 1, 2, 3 melody notes of the bar: 0.370, 0.602, 0.829, 1; floor of the bits 0.132
    python anticipation.py delta_sweep, seed 0: δ = 0, 0.5, 1, 1.5, 2 s      roots right 0.188, 0.340, 0.479, 0.847, 0.958

The autoregressive baseline is algorithm 2 made fair: melody first among ties, so it has heard one note of the bar when it chooses; melody
notes that it draws itself are dropped (kept, they are the copies that the paper describes).

`python anticipation.py bench --data DIR` (39 files, 116,944 notes): this reader 557,049 notes/s, the obvious mido loop 27,438, 39 of 39
files bit-equal; the 128M model at full context on one CPU thread samples 47 times as fast with its cache as without, greedy output
equal. GPU: not measured. The authors' weights: loading is tested on files of their layout, nothing was downloaded.

What did not hold. Without controls the demo's anticipatory model costs 5.5 bits/s, the autoregressive one 3.2 to 4.5: a tenth of a short
run is plain. The demo's model has seen melodies as controls, not the paper's mix (10 % none, 10 % spans, 40 % random events, 40 %
instruments), one key, one tempo and four programs: continuing or filling a real file with it shows the tool, at a grid of 0.25 s, not the
method. `train --prior paper` has the mix.

What is ours in the demo, not the paper's: 4 bins a second, δ = 2 s, 0.47M parameters, sine tables and copied control rows to start from,
loss on events only, learning rate 0.006, attention not divided by the layer's number, melody-only copies, SEP at the head of each row.
Where this file differs elsewhere: training rows are cut at random places of copies made on the fly, by row number, not from a shuffled
104 GB file; a piece whose copy has no controls says z = 0 (the authors' single-instrument ones say 1); RESTs cannot be drawn as times
or durations and count as no instrument; a prompt ends before --start, so that a note at --start is new; the window moves seldom ("hop")
unless told --window exact; a history longer than the clock of a row is cut. In MIDI files note-offs stand before note-ons of the same tick,
drums take no melodic channel, and times are never mistaken for control ids, however long the piece.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import wave
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    from kernels.linear_cross_entropy import linear_cross_entropy as fused_linear_cross_entropy
except ImportError:  # copied alone, or no Triton here: the plain head computes the same
    fused_linear_cross_entropy = None

# ============================================================================================== the method: triplets and where controls go

TIME, DUR, NOTE, CTRL = range(4)  # columns of a triplet array, (n, 4) int64: onset and duration in bins, note, is it a control?
REST, SEP = -1, -2  # in the column NOTE; notes are 128·program + pitch, program 128 = drums
DRUMS = 128


@dataclass(frozen=True)
class Vocabulary:
    """What a model can say (appendix C). Ids: event times, durations, notes, REST; the same three again for controls; SEP, z = 0, z = 1.

    Every clock is in bins. The default is the paper's layout: 55,028 ids, context 1,024 = one flag z and 341 triplets.
    """

    resolution: int = 100  # bins a second
    max_time: int = 10_000  # bins in a context
    max_duration: int = 1_000  # durations are 0 … max_duration − 1 bins
    programs: tuple = tuple(range(129))  # General MIDI programs; 128 = drums
    context: int = 1024  # ids in a row
    delta: int = 500  # δ: how early a control is told
    density: int = 100  # Δ*: the longest gap between events, RESTs fill longer ones

    @property
    def first_note(self):
        return self.max_time + self.max_duration

    @property
    def rest(self):
        return self.first_note + 128 * len(self.programs)

    @property
    def control(self):  # added to an event's id
        return self.rest + 1

    @property
    def sep(self):
        return self.control + self.rest

    @property
    def size(self):  # after SEP come the flags z: sep + 1 = autoregress, sep + 2 = anticipate
        return self.sep + 3

    @property
    def slots(self):  # the event ids (first, past the last) that may stand in a triplet's first, second and third place
        return (0, self.max_time), (self.max_time, self.first_note), (self.first_note, self.rest + 1)

    @cached_property
    def index(self):  # program → place in programs, −1 = none
        return np.array([self.programs.index(p) if p in self.programs else -1 for p in range(129)])


def pad_with_rests(events, end, density):
    """RESTs wherever more than `density` bins (Δ*) pass without an event, and up to `end`. events: (n, 4), by time. Strict: a gap of
    exactly Δ* gets none. subtle: on events from which the controls were taken out, so that a melody never counts as filling a gap."""
    times = np.append(events[:, TIME], end)
    before = np.concatenate([[0], events[:, TIME]])
    n_rests = np.maximum(0, (times - before - 1) // density)  # RESTs before each event, and before the end
    k = np.arange(n_rests.sum()) - np.repeat(np.cumsum(n_rests) - n_rests, n_rests) + 1  # 1, 2, … within each gap
    rests = np.zeros((len(k), 4), np.int64)
    rests[:, TIME], rests[:, NOTE] = np.repeat(before, n_rests) + k * density, REST
    return np.insert(events, np.repeat(np.arange(len(times)), n_rests), rests, axis=0)


def anticipate(events, controls, delta):
    """Interleave (definition 3.1, algorithm 1) → (sequence, controls still waiting after the last event). Both by time, (n, 4).

    A control of time s stands before the first event whose predecessor has time ≥ s − δ; before the first event time is 0. That place
    is a stopping time: it depends on what came before it alone, so a sampler knows when to pause and insert.
    """
    last = np.concatenate([[0], events[:-1, TIME]])  # the time reached before each event
    place = np.searchsorted(last[: len(events)], controls[:, TIME] - delta)  # first index with last ≥ s − δ
    told = place < len(events)
    return np.insert(events, place[told], controls[told], axis=0), controls[~told]


def separate(sequence):
    """The inverse of pad and anticipate: no RESTs and SEPs, controls are events again, all by time (stable)."""
    events = sequence[sequence[:, NOTE] >= 0].copy()
    events[:, CTRL] = 0
    return events[np.argsort(events[:, TIME], kind="stable")]


def triplet_ids(sequence, vocab):
    """(n, 4) triplets, times relative to the row → (3·n,) int64 ids. ValueError for what the vocabulary cannot say: a time that is too
    large would silently read as a duration."""
    t, d, note, control = sequence.T
    real = note >= 0
    place = vocab.index[np.where(real, note >> 7, vocab.programs[0])]
    ids = np.stack([t, vocab.max_time + d, vocab.first_note + 128 * place + (note & 127)], 1) + (control * vocab.control)[:, None]
    ids[note == REST, 2] = vocab.rest
    ids[note == SEP] = vocab.sep
    bad = (t < 0) | (t >= vocab.max_time) | (d < 0) | (d >= vocab.max_duration) | (place < 0)
    if bad.any():
        raise ValueError(f"triplet {sequence[bad][0].tolist()} does not fit times below {vocab.max_time}, durations below "
                         f"{vocab.max_duration} and programs {vocab.programs}")
    return ids.ravel()


def triplets_of(ids, vocab):
    """The inverse of triplet_ids. ValueError names the first place where an id stands in a wrong slot."""
    ids = np.asarray(ids, np.int64).reshape(-1, 3)
    control = ((ids[:, 0] >= vocab.control) & (ids[:, 0] < vocab.sep)).astype(np.int64)
    plain = ids - (control * vocab.control)[:, None]
    sep, rest = (ids == vocab.sep).all(1), (control == 0) & (ids[:, 2] == vocab.rest)
    ok = [(plain[:, k] >= low) & (plain[:, k] < high) for k, (low, high) in enumerate(vocab.slots)]
    ok[2] &= (plain[:, 2] < vocab.rest) | rest
    wrong = ~sep & ~(ok[0] & ok[1] & ok[2])
    if wrong.any():
        raise ValueError(f"triplet {int(wrong.argmax())}, ids {ids[wrong][0].tolist()}: no time, duration and note of this vocabulary")
    place, pitch = np.divmod(np.where(sep | rest, 0, plain[:, 2] - vocab.first_note), 128)
    note = 128 * np.array(vocab.programs)[place] + pitch
    out = np.stack([plain[:, 0], plain[:, 1] - vocab.max_time, np.where(rest, REST, note), control], 1)
    out[sep] = 0, 0, SEP, 0
    return out


def interarrival_ids(seconds, notes, on, compat=False):
    """The baseline encoding (definition 2.3, vocabulary 34,025): time steps of 10 ms, note-ons, note-offs; no SEP yet.

    seconds: (n,) float; notes: (n,) 128·program + pitch; on: (n,) bool, messages in order. compat: as the authors' code, which rounds
    each step by itself and so loses what is below 5 ms; otherwise steps are differences of rounded times, without drift.
    """
    steps = np.diff(seconds, prepend=0.0) * 100 if compat else np.diff(np.rint(100 * np.asarray(seconds)), prepend=0.0)
    steps = np.minimum(np.rint(steps), 999).astype(np.int64)
    ids = np.stack([steps, np.where(on, 1000, 17_512) + notes], 1).ravel()
    return ids[ids > 0]  # a step of zero is not written


INTERARRIVAL_SEP, INTERARRIVAL_SIZE = 34_024, 34_025


# ---------------------------------------------------------------------------------------------- MIDI files, bit for bit the authors' rules

DATA_BYTES = {0xF1: 1, 0xF2: 2, 0xF3: 1, 0xF6: 0, **dict.fromkeys(range(0xF8, 0xFF), 0)}  # of system messages


class MidiError(ValueError):
    """What is wrong with a file, in words for its owner."""


def parse_track(data, i, end, ticks, voices, tempos):
    """One MTrk chunk, data[i:end]: append note and program messages, packed into ints, to voices, (tick, µs a beat) to tempos and the
    ticks of all other messages to ticks."""
    tick = status = 0
    while i < end:
        byte = data[i]
        i += 1
        if byte > 127:  # a variable-length delta, seven bits a byte
            delta = byte & 127
            while byte > 127:
                byte = data[i]
                i += 1
                delta = delta << 7 | byte & 127
            tick += delta
        else:
            tick += byte
        byte = data[i]
        if byte > 127:
            i += 1
            if byte != 0xFF:  # meta messages leave running status alone
                status = byte
        else:
            byte = status
        if byte < 0xA0 and byte > 127:  # note off, note on
            a, b = data[i], data[i + 1]
            if (a | b) > 127:
                raise MidiError(f"data byte over 127 at byte {i}")
            voices.append(tick << 24 | byte << 16 | a << 8 | b)
            i += 2
        elif byte < 0xF0 and byte > 127:
            n = 1 if 0xC0 <= byte < 0xE0 else 2
            if data[i] > 127 or data[i + n - 1] > 127:
                raise MidiError(f"data byte over 127 at byte {i}")
            if byte < 0xD0 and byte >= 0xC0:
                voices.append(tick << 24 | byte << 16 | data[i] << 8)
            else:
                ticks.append(tick)
            i += n
        elif byte == 0xFF or byte in (0xF0, 0xF7):
            kind, i = (data[i], i + 1) if byte == 0xFF else (None, i)
            size = 0
            while True:
                size = size << 7 | data[i] & 127
                i += 1
                if data[i - 1] < 128:
                    break
            if kind == 0x51:
                if size < 3:
                    raise MidiError(f"a tempo of {size} bytes at byte {i}")
                tempos.append((tick, int.from_bytes(data[i : i + 3], "big")))
            if kind != 0x2F:  # ends of tracks do not cut time into pieces
                ticks.append(tick)
            i += size
            status = status if kind is not None else 0
        elif byte in DATA_BYTES:
            ticks.append(tick)
            i += DATA_BYTES[byte]
        else:
            raise MidiError(f"running status without a status at byte {i}" if byte < 128 else f"undefined status {byte:#x} at byte {i}")
    if i > end:
        raise MidiError("a message runs past the end of its track")


def read_messages(path):
    """A MIDI file's note messages, tracks merged → seconds (n,) float64, notes (n,), channels (n,), on (n,) bool.

    subtle: seconds are sums of float64 steps, one for each tick at which any message stands (rounding to 10 ms meets ties at x.5, so
    the order of additions decides bits). Note-on with velocity 0 is off. The instrument is 128 on channel 9, else the channel's
    program at that moment. MidiError says why a file cannot be read.
    """
    data = Path(path).read_bytes()
    if data[:4] != b"MThd" or len(data) < 14:
        raise MidiError("not a MIDI file: it does not begin with MThd")
    kind, division = (int.from_bytes(data[k : k + 2], "big") for k in (8, 12))
    if kind > 1:
        raise MidiError(f"a MIDI file of type {kind}, whose tracks are pieces of their own" if kind == 2 else f"MIDI type {kind}")
    if division & 0x8000 or division == 0:
        raise MidiError("SMPTE time division, no beats" if division else "a time division of 0")
    i, ticks, voices, tempos = 8 + int.from_bytes(data[4:8], "big"), [], [], [(-1, 500_000)]
    for track in range(int.from_bytes(data[10:12], "big")):
        while True:  # chunks of other kinds are skipped
            name, size = data[i : i + 4], int.from_bytes(data[i + 4 : i + 8], "big")
            i += 8
            if i + size > len(data) or len(name) < 4:
                raise MidiError(f"truncated: track {track} should go on to byte {i + size:,}, the file has {len(data):,}")
            if name == b"MTrk":
                break
            i += size
        try:
            parse_track(data, i, i + size, ticks, voices, tempos)
        except IndexError:
            raise MidiError(f"truncated: track {track} ends within a message") from None
        i += size
    voices = np.array(voices, np.int64)
    voices = voices[np.argsort(voices >> 24, kind="stable")]  # ties: track order, then order inside the track
    tempos = np.array(sorted(tempos, key=lambda pair: pair[0]), np.int64)
    clock = np.unique(np.concatenate([voices >> 24, np.array(ticks, np.int64)]))
    before = np.append(0, clock[:-1])  # the tempo in force before a tick was set at or before the tick before it
    tempo = tempos[np.searchsorted(tempos[:, 0], before, side="right") - 1, 1] if len(clock) else np.zeros(0)
    seconds = np.cumsum(np.diff(clock, prepend=0) * (tempo * 1e-6 / division))[np.searchsorted(clock, voices >> 24)]
    status, pitch, velocity = voices >> 16 & 255, voices >> 8 & 255, voices & 255
    channel, is_program = status & 15, status >= 0xC0
    program = np.zeros(len(voices), np.int64)
    for c in np.unique(channel[is_program]):
        changes = np.flatnonzero(is_program & (channel == c))
        program = np.where(channel == c, np.append(0, pitch[changes])[np.searchsorted(changes, np.arange(len(voices)))], program)
    notes = 128 * np.where(channel == 9, DRUMS, program) + pitch
    keep = ~is_program
    return seconds[keep], notes[keep], channel[keep], ((status >= 0x90) & (velocity > 0))[keep]


def read_midi(path, vocab=None):
    """→ (n, 4) events in order of onset: times and durations rounded half to even to bins of `vocab` (10 ms), durations cut to its
    longest. A note-off ends the oldest open note of its instrument, pitch and channel; a note without one lasts 250 ms."""
    vocab = vocab or Vocabulary()
    seconds, notes, channels, on = read_messages(path)
    ends, waiting = np.full(len(seconds), np.nan), {}
    for i, (key, is_on) in enumerate(zip((notes << 4 | channels).tolist(), on.tolist())):
        if is_on:
            waiting.setdefault(key, deque()).append(i)
        elif waiting.get(key):
            ends[waiting[key].popleft()] = seconds[i]
    events = np.zeros((int(on.sum()), 4), np.int64)
    duration = np.rint(vocab.resolution * (ends[on] - seconds[on]))
    events[:, TIME] = np.rint(vocab.resolution * seconds[on])
    events[:, DUR] = np.minimum(np.where(np.isnan(duration), vocab.resolution // 4, duration), vocab.max_duration - 1)
    events[:, NOTE] = notes[on]
    return events


def write_midi(path, events, resolution=100, velocity=72, clip=True):
    """Events as a MIDI file of 100 ticks a second; velocities are not modelled. Note-offs stand before note-ons of the same tick, or a
    repeated note would be cut. clip: a note ends where the same key is struck again (MIDI cannot say two of them). Drums go to channel
    9; a program beyond the fifteenth shares a channel, with a program change before each of its messages."""
    from mido import Message, MetaMessage, MidiFile, MidiTrack

    events = events[np.argsort(events[:, TIME], kind="stable")]
    begins, lasts = (np.rint(events[:, k] * 100 / resolution).astype(np.int64) for k in (TIME, DUR))
    if clip:
        next_strike = {}
        for i in range(len(events) - 1, -1, -1):
            lasts[i] = min(lasts[i], next_strike.get(events[i, NOTE], 1 << 40) - begins[i])
            next_strike[events[i, NOTE]] = begins[i]
    melodic = [p for p in dict.fromkeys((events[:, NOTE] >> 7).tolist()) if p != DRUMS]
    channels = {p: (*range(9), *range(10, 16))[k % 15] for k, p in enumerate(melodic)} | {DRUMS: 9}
    messages = []
    for begin, last, note in zip(begins.tolist(), lasts.tolist(), events[:, NOTE].tolist()):
        messages += [(begin, 1, note), (begin + max(1, last), 0, note)]  # a note of no length lasts a tick
    track, now, programs = MidiTrack([MetaMessage("set_tempo", tempo=500_000)]), 0, {}
    for tick, on, note in sorted(messages, key=lambda message: message[:2]):
        program, pitch = divmod(note, 128)
        channel = channels[program]
        if program != DRUMS and programs.get(channel) != program:
            track.append(Message("program_change", channel=channel, program=program, time=tick - now))
            programs[channel], now = program, tick
        track.append(Message("note_on" if on else "note_off", channel=channel, note=pitch, velocity=velocity * on, time=tick - now))
        now = tick
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    MidiFile(type=1, ticks_per_beat=50, tracks=[track]).save(path)
    return Path(path)

# ---------------------------------------------------------------------------------------------- training data: filter, controls, rows


def why_not(events, resolution=100):
    """The paper's filter (appendix E), in its order: "" or the rule that a piece breaks, with the value."""
    n_programs = len(np.unique(events[:, NOTE] >> 7))
    length = events[:, TIME].max() / resolution if len(events) else 0
    rules = ((len(events) < 100, f"{len(events)} notes, fewer than 100"), (length < 10, f"{length:.1f} s, shorter than 10"),
             (length > 3600, f"{length:.0f} s, longer than 3600"), (n_programs > 16, f"{n_programs} instruments, more than 16"))
    return next((text for broken, text in rules if broken), "")


PRIOR = ("none", "spans", *("random",) * 4, *("instruments",) * 4)  # appendix D: kinds of ten copies of a piece


def choose_controls(events, kind, rng, vocab):
    """Which events are controls, (n,) bool. kind: "none"; "spans" of δ, the wait for each exponential with mean 20 s; "random" events,
    a share drawn from 0.1 … 0.9; "instruments", one to all but one of them; "melody", melody_of's (ours)."""
    times, programs = events[:, TIME], events[:, NOTE] >> 7
    mask = np.zeros(len(events), bool)
    if kind == "spans":
        i = 0
        while (i := int(np.searchsorted(times, times[i] + int(rng.exponential(20 * vocab.resolution))))) < len(events):
            j = int(np.searchsorted(times, times[i] + vocab.delta))
            mask[i:j] = True
            i = j
            if j == len(events):
                break
    elif kind == "random":
        mask = rng.random(len(events)) < rng.integers(1, 10) / 10
    elif kind == "instruments":
        present = np.unique(programs)
        if len(present) > 1:
            mask = np.isin(programs, rng.choice(present, rng.integers(1, len(present)), replace=False))
    elif kind == "melody":
        mask = programs == melody_of(events)
    return mask


def sequence_of(events, mask, vocab, delta=None):
    """A piece as its model reads it: SEP, then the events outside mask, padded to the end of the piece, with those in mask as controls."""
    delta = vocab.delta if delta is None else delta
    controls = events[mask].copy()
    controls[:, CTRL] = 1
    told, waiting = anticipate(pad_with_rests(events[~mask], events[:, TIME].max(), vocab.density), controls, delta)
    return np.concatenate([[[0, 0, SEP, 0]], told, waiting])


def relative_times(cut, vocab):
    """A cut of the stream as a row has it: the triplets before the first SEP moved so that their first time is 0; later ones keep the
    times of their own piece. None if some time does not fit."""
    seps = np.flatnonzero(cut[:, NOTE] == SEP)
    first = seps[0] if len(seps) else len(cut)
    cut = cut.copy()
    cut[:first, TIME] -= cut[:first, TIME].min() if first else 0
    return cut if cut[:, TIME].max() < vocab.max_time else None


def flag_of(sequence, vocab):
    return vocab.sep + 1 + int(sequence[:, CTRL].any())


def pack_rows(sequences, vocab):
    """Sequences end to end, cut into rows → (rows, context) uint16. Each row begins with the flag z of the piece that owns its first
    triplet; rows that do not fit the clock are dropped, and so is the tail."""
    stream, size = np.concatenate(sequences), (vocab.context - 1) // 3
    flags = np.concatenate([np.full(len(s), flag_of(s, vocab)) for s in sequences])
    rows = []
    for i in range(0, len(stream) - size + 1, size):
        if (cut := relative_times(stream[i : i + size], vocab)) is not None:
            rows.append(np.append(flags[i], triplet_ids(cut, vocab)))
    return np.array(rows, np.uint16).reshape(-1, vocab.context)


class Rows(torch.utils.data.Dataset):
    """Training rows by number, made when asked for: row i depends on (seed, i) alone, so a resumed run or one on another number of
    ranks sees the same data, and the thirty augmented copies of the paper need no disk.

    A row is a cut at a random place of a random copy of a random piece; where the piece ends, another begins. Ours: the authors write
    all copies to disk, end to end, shuffle and cut. pieces: list of (n, 4) events; prior: kinds to draw from.
    """

    def __init__(self, pieces, vocab, seed, prior=PRIOR, interarrival=False):
        self.pieces, self.vocab, self.seed, self.prior, self.interarrival = pieces, vocab, seed, prior, interarrival
        sizes = np.array([len(piece) for piece in pieces], float)
        self.share = np.cumsum(sizes) / sizes.sum()

    def draw(self, rng):
        events = self.pieces[min(int(np.searchsorted(self.share, rng.random())), len(self.pieces) - 1)]
        if self.interarrival:
            return np.append(INTERARRIVAL_SEP, interarrival_of(events, self.vocab))
        mask = choose_controls(events, self.prior[rng.integers(len(self.prior))], rng, self.vocab)
        return sequence_of(events, mask, self.vocab)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        size = self.vocab.context if self.interarrival else (self.vocab.context - 1) // 3
        while True:
            first = self.draw(rng)
            parts, start = [first], int(rng.integers(len(first)))
            while sum(map(len, parts)) < start + size:
                parts.append(self.draw(rng))
            cut = np.concatenate(parts)[start : start + size]
            if self.interarrival:
                return cut
            if (cut := relative_times(cut, self.vocab)) is not None:
                return np.append(flag_of(first, self.vocab), triplet_ids(cut, self.vocab))


def interarrival_of(events, vocab):
    """interarrival_ids of events; note-offs before note-ons of the same bin."""
    times = np.concatenate([events[:, TIME] + events[:, DUR], events[:, TIME]])
    on = np.arange(len(times)) >= len(events)
    order = np.lexsort((on, times))
    return interarrival_ids(times[order] / vocab.resolution, np.tile(events[:, NOTE], 2)[order], on[order])


# ---------------------------------------------------------------------------------------------- a band whose right accompaniment is known

MINI = Vocabulary(resolution=4, max_time=56, max_duration=9, programs=(0, 32, 73, DRUMS), context=289, delta=8, density=4)
MELODY, BAR, BARS = 73, 8, 6  # program; bins a bar (2 s: 120 beats a minute); bars a piece
PATTERNS = ((0, 36), (4, 38)), ((0, 36), (2, 42), (4, 38)), ((0, 36), (4, 36), (6, 38))  # drums: (bin, pitch), one a piece
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])
CHAIN = np.array([  # which chord follows which; triads on C D E F G A
    [0.06, 0.14, 0.10, 0.28, 0.32, 0.10], [0.08, 0.06, 0.10, 0.14, 0.48, 0.14], [0.08, 0.14, 0.06, 0.30, 0.08, 0.34],
    [0.26, 0.16, 0.06, 0.06, 0.36, 0.10], [0.40, 0.06, 0.10, 0.10, 0.06, 0.28], [0.10, 0.30, 0.10, 0.32, 0.12, 0.06]])


def triad(chord):
    """Pitch classes of the chord on degree 0 … 5, root first."""
    return SCALE[(chord + np.array([0, 2, 4])) % 7]


def band(rng, hard=True, bars=BARS):
    """A piece → (events (n, 4), by time with the melody first among ties; chords (bars,)). Given the melody all else is determined, but
    for which of three drum patterns the piece has. hard: the melody plays the chord's notes in any order, so that the third alone
    settles which chord it is; easy: the root first. The fourth is a neighbour of the third."""
    chords, pattern, notes = [int(rng.integers(6))], PATTERNS[rng.integers(3)], []
    while len(chords) < bars:
        chords.append(int(rng.choice(6, p=CHAIN[chords[-1]])))
    for bar, chord in enumerate(chords):
        now, tones = bar * BAR, triad(chord)
        order = rng.permutation(tones) if hard else np.append(tones[0], rng.permutation(tones[1:]))
        neighbour = SCALE[(int(np.searchsorted(SCALE, order[2])) + rng.choice((-1, 1))) % 7]
        notes += [(now + 2 * k, 2, 128 * MELODY + 72 + int(pitch)) for k, pitch in enumerate((*order, neighbour))]
        notes += [(now, BAR, 48 + int(tones[0] + (pitch - tones[0]) % 12)) for pitch in tones]  # piano: root position, program 0
        notes += [(now + 4 * k, 4, 128 * 32 + 36 + int(tones[0]) + 7 * k) for k in (0, 1)]  # bass: root, fifth
        notes += [(now + k, 1, 128 * DRUMS + pitch) for k, pitch in pattern]
    notes.sort(key=lambda note: (note[0], note[2] >> 7 != MELODY, note[2]))
    return np.insert(np.array(notes), 3, 0, axis=1), np.array(chords)


def root_ceilings(hard=True):
    """The best share of right roots for who knows the previous chord and the first 0, 1, 2, 3 melody notes of the bar."""
    from itertools import permutations

    share = np.full(6, 1 / 6)
    for _ in range(200):
        share = share @ CHAIN
    best = []
    for k in range(4):
        chance = {}  # (previous chord, notes heard) → weight of each chord
        for chord in range(6):
            tones = triad(chord)
            orders = list(permutations(tones)) if hard else [(tones[0], *rest) for rest in permutations(tones[1:])]
            for order in orders:
                for previous in range(6):
                    weights = chance.setdefault((previous, order[:k]), np.zeros(6))
                    weights[chord] += share[previous] * CHAIN[previous, chord] / len(orders)
        best.append(float(sum(weights.max() for weights in chance.values())))
    return best


def score_accompaniment(generated, piece, chords, first_bar, last_bar):
    """An accompaniment of bars first_bar … last_bar − 1 against the one right one → dict of root (the bass at bar starts), chord (the
    piano's pitch classes there), f1 (notes: same program, pitch and bin) and off_key (share of pitches outside the scale)."""
    span = first_bar * BAR, last_bar * BAR
    right = piece[(piece[:, TIME] >= span[0]) & (piece[:, TIME] < span[1]) & (piece[:, NOTE] >> 7 != MELODY)]
    roots, triads = [], []
    for bar in range(first_bar, last_bar):
        here = generated[generated[:, TIME] == bar * BAR, NOTE]
        bass, piano = ({int(n) % 128 % 12 for n in here if n >> 7 == program} for program in (32, 0))
        roots.append(bass == {int(triad(chords[bar])[0])})
        triads.append(piano == set(triad(chords[bar]).tolist()))
    played, wanted = ({(int(e[TIME]), int(e[NOTE])) for e in events} for events in (generated, right))
    pitched = generated[generated[:, NOTE] >> 7 != DRUMS, NOTE] % 128 % 12
    return dict(root=float(np.mean(roots)), chord=float(np.mean(triads)), f1=2 * len(played & wanted) / max(1, len(played) + len(wanted)),
                off_key=float(np.mean(~np.isin(pitched, SCALE))) if len(pitched) else 0.0)


# ============================================================================================== the model


@dataclass
class MusicConfig:
    vocab_size: int = 55_028
    context: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1  # on embeddings and residual branches
    scale_by_layer: bool = True  # divide the attention logits of layer i by i + 1: the released weights are noise without
    recompute: bool = False  # activations in the backward pass (gradient checkpointing)


SIZES = {  # the paper's, with the peak learning rate; mini: ours
    "mini": dict(n_layer=3, n_head=4, n_embd=96, dropout=0.0, scale_by_layer=False),
    "small": dict(n_layer=12, n_head=12, n_embd=768),
    "medium": dict(n_layer=24, n_head=16, n_embd=1024, recompute=True),
    "large": dict(n_layer=36, n_head=20, n_embd=1280, recompute=True),
}
LEARNING_RATES = {"mini": 6e-3, "small": 6e-4, "medium": 3e-4, "large": 2e-4}


class KVCache:
    """Keys and values of every layer, (layer, 2, batch, head, context, d_head); `length` tokens of them count. Setting length back
    forgets the tokens after it."""

    def __init__(self, config, batch, like):
        self.length = 0
        shape = (config.n_layer, 2, batch, config.n_head, config.context, config.n_embd // config.n_head)
        self.memory = torch.empty(shape, device=like.device, dtype=like.dtype)


class MusicBlock(nn.Module):
    """A GPT-2 block: pre-norm, biases, attention scale 1/(√d_head·(layer + 1)). Module names are GPT-2's."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(d, 3 * d), c_proj=nn.Linear(d, d)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(d, 4 * d), c_proj=nn.Linear(4 * d, d)))
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.scale = (d // config.n_head) ** -0.5 / (layer + 1 if config.scale_by_layer else 1)

    def forward(self, x, cache=None):
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.attn["c_attn"](self.ln_1(x)).chunk(3, -1))
        n, mask = x.size(1), None
        if cache is not None:
            start = cache.length
            for new, old in ((k, cache.memory[self.layer, 0]), (v, cache.memory[self.layer, 1])):
                old[:, :, start : start + n] = new
            k, v = (old[:, :, : start + n] for old in cache.memory[self.layer])
            if start and n > 1:  # query i sees keys up to its own place
                mask = torch.ones(n, start + n, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=n == k.size(2), scale=self.scale)
        x = x + F.dropout(self.attn["c_proj"](y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        h = self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(h, self.dropout, self.training)


class MusicGPT(nn.Module):
    """GPT-2 with learned positions and tied head. ids (batch, seq) int64 → logits (batch, seq, vocab_size)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, config.n_embd), nn.Embedding(config.context, config.n_embd)
        self.h = nn.ModuleList(MusicBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.start_from_noise(0.02)

    def start_from_noise(self, std):
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def trunk(self, ids, cache=None):
        """→ (batch, seq, n_embd), all but the head. With a KVCache, ids are the tokens after those it holds."""
        start = cache.length if cache else 0
        if start + ids.size(1) > self.config.context:
            raise ValueError(f"MusicGPT: {start + ids.size(1)} tokens exceed the context of {self.config.context}")
        x = F.dropout(self.wte(ids) + self.wpe.weight[start : start + ids.size(1)], self.config.dropout, self.training)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.config.recompute and self.training else block(x, cache)
        if cache:
            cache.length = start + ids.size(1)
        return self.ln_f(x)

    def forward(self, ids):
        return F.linear(self.trunk(ids), self.wte.weight)

    def load_gpt2(self, weights):
        """Copy GPT-2's tensors {name: tensor} into this model. ValueError lists what is missing or of another shape."""
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        wrong = []
        with torch.no_grad():
            for name, p in self.named_parameters():
                w = weights.get(name, torch.empty(0))
                if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    w = w.t()  # GPT-2 keeps (in, out)
                if w.shape == p.shape:
                    p.copy_(w)
                else:
                    wrong.append(f"{name} is {tuple(w.shape) if name in weights else 'missing'}, expected {tuple(p.shape)}")
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:3])}")
        return self


@torch.no_grad()
def start_mini(model, vocab):
    """Ours, for short runs on small models: noise of 0.05; times and positions begin as sines and cosines; control rows begin as copies
    of event rows plus one shared vector. Everything is trained."""
    model.start_from_noise(0.05)

    def waves(n):
        angle = torch.arange(n)[:, None] / 1000 ** (torch.arange(0, model.config.n_embd, 2) / model.config.n_embd)
        return 0.07 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    table = model.wte.weight
    table[: vocab.max_time], model.wpe.weight[:] = waves(vocab.max_time), waves(model.config.context)
    table[vocab.control : vocab.sep] = table[: vocab.rest] + 0.05 * torch.randn(model.config.n_embd)

# ============================================================================================== sampling


class Ask(NamedTuple):
    """A part's request for one drawn triplet: not before `earliest`, nothing by the programs in `silent`."""

    earliest: int
    silent: tuple = ()


def anticipating_part(prompt, controls, start, end, delta):
    """Algorithm 1 as a coroutine over triplets: yields what stands fixed, or an Ask, and is sent the triplet drawn. prompt: padded
    events; controls by time. A drawn triplet at or past `end` ends the part and does not count."""
    told, waiting = anticipate(prompt, controls, delta)
    yield from told
    now, waiting = (prompt[-1, TIME] if len(prompt) else 0), deque(waiting)
    while True:
        while waiting and now >= waiting[0][TIME] - delta:
            yield waiting.popleft()
        drawn = yield Ask(max(start, now))
        if drawn[TIME] >= end:
            return
        yield drawn
        now = drawn[TIME]


def following_part(prompt, melody, start, end):
    """Algorithm 2, the baseline without anticipation, made fair: melody notes up to a drawn triplet's time go in before it, as ordinary
    events; a drawn note of the melody's own program is dropped, and after four in a row that program is silenced until the melody has
    moved on. (Kept, such notes are the copies and dissonances that the paper describes.)"""
    yield from prompt
    now, waiting, dropped = (prompt[-1, TIME] if len(prompt) else 0), deque(melody), 0
    programs = tuple(np.unique(melody[:, NOTE] >> 7).tolist())
    while True:
        drawn = yield Ask(max(start, now), programs if dropped >= 4 else ())
        if drawn[TIME] >= end:
            return
        while waiting and waiting[0][TIME] <= drawn[TIME]:
            dropped = 0
            yield (note := waiting.popleft())
            now = max(now, note[TIME])
        if drawn[NOTE] >= 0 and drawn[NOTE] >> 7 in programs:
            dropped += 1
            continue
        yield drawn
        now = drawn[TIME]


class ModelReader:
    """What has been read, and logits for what comes next: with a key-value cache for a MusicGPT, else by calling model(ids) anew.
    Only the head's rows asked for are computed."""

    def __init__(self, model, batch, n_context):
        self.cached = isinstance(model, MusicGPT)
        self.model, self.batch, self.length = model, batch, 0
        like = next(model.parameters()) if self.cached else torch.empty(0)
        self.ids = torch.zeros(batch, n_context, dtype=torch.int64, device=like.device)
        self.cache = KVCache(model.config, batch, like) if self.cached else None

    def rewind(self, length):
        self.length = length
        if self.cached:
            self.cache.length = length

    def read(self, ids):
        """ids: (batch, n) array."""
        n = ids.shape[1]
        self.ids[:, self.length : self.length + n] = torch.as_tensor(ids)
        self.length += n
        if self.cached:
            self.hidden = self.model.trunk(self.ids[:, self.length - n : self.length], self.cache)[:, -1]

    def logits(self, low, high):
        """(batch, high − low) float32 on the CPU."""
        if self.cached:
            return F.linear(self.hidden, self.model.wte.weight[low:high]).float().cpu()
        return self.model(self.ids[:, : self.length])[:, -1, low:high].float().cpu()


def nucleus_draw(logits, allowed, uniform, temperature=1.0, top_p=1.0):
    """One index a row: softmax of the allowed logits at a temperature, cut to the likeliest whose mass first passes top_p, inverted at
    `uniform`. logits, allowed: (batch, n); uniform: (batch,) in [0, 1). temperature 0 takes the likeliest."""
    logits = logits.masked_fill(~allowed, -math.inf)
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass = p.cumsum(-1)
    p = p.masked_fill(mass - p >= top_p, 0.0)  # a token stays while the mass before it is below top_p
    mass = p.cumsum(-1)
    place = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    return order.gather(1, place.clamp(max=p.size(1) - 1)).squeeze(1)


@torch.no_grad()
def perform(model, vocab, parts, flags, *, window="hop", top_p=0.95, temperature=1.0, seed=0, programs=None, dense=False, sep=True,
            progress=None):
    """Play parts (coroutines like anticipating_part) in lockstep → a list of (n, 5) arrays, what each holds in the end: triplets, and
    in the last column whether it was drawn.

    model: a MusicGPT or any callable ids (batch, seq) → logits (batch, seq, vocab.size). flags: z of each part. sep: begin with SEP,
    as rows do that open a piece. programs: those that may be drawn. dense: no gaps over Δ*. progress: called with the time reached.
    window: once `vocab.context` is full, "exact" keeps the most recent triplets at every step (the authors' sampler; one pass over the
    window a triplet), "hop" three quarters of them, seldom. Times are relative to the oldest triplet of the window.

    Every draw of part i takes its three uniforms from default_rng((seed, i)): the batch a part is in changes nothing.
    """
    n, most = len(parts), (vocab.context - 3) // 3  # triplets of history: two ids of the next must fit as well
    keep = most if window == "exact" else most - most // 4
    span = vocab.max_time if window == "exact" else vocab.max_time * 3 // 4
    rngs = [np.random.default_rng((seed, i)) for i in range(n)]
    history, drawn = [[np.array((0, 0, SEP, 0))] * sep for _ in range(n)], [[0] * sep for _ in range(n)]
    times = [[0] * sep for _ in range(n)]  # history's, as plain ints
    begin, offset, used, reread = [0] * n, [0] * n, [set() for _ in range(n)], True
    reader = ModelReader(model, n, vocab.context)
    mask_notes = np.append(np.repeat([programs is None or p in programs for p in vocab.programs], 128), True)
    if not mask_notes[:-1].any():
        raise ValueError(f"none of the programs {tuple(programs)} is in the vocabulary {vocab.programs}")

    def add(i, triplet, is_drawn):
        """Append to history; move the window's begin and its offset where needed."""
        nonlocal reread
        history[i].append(np.asarray(triplet))
        drawn[i].append(is_drawn)
        times[i].append(int(triplet[TIME]))
        used[i] |= {int(triplet[NOTE]) >> 7} if triplet[NOTE] >= 0 else set()

        def low():
            return 0 if sep and begin[i] == 0 else min(times[i][begin[i] :])

        before = begin[i], offset[i]
        if len(history[i]) - begin[i] > most:
            begin[i] = len(history[i]) - keep
        offset[i] = low() if begin[i] != before[0] or not sep or triplet[TIME] < offset[i] else offset[i]
        high = max(times[i][begin[i] :]) + vocab.density
        if high - offset[i] >= vocab.max_time:  # the clock ran out: drop the oldest until it fits
            while high - (offset_i := low()) >= span and begin[i] < len(history[i]) - 1:
                begin[i] += 1
            offset[i] = offset_i
        reread |= before != (begin[i], offset[i])

    def advance(i, triplet=None):
        """Run part i up to its next Ask → that, or None at its end."""
        action, answer = None, triplet
        while True:
            try:
                action = parts[i].send(answer)
            except StopIteration:
                return None
            if isinstance(action, Ask):
                return action
            add(i, action, int(action is triplet))
            answer = None

    asks = [advance(i) for i in range(n)]
    n_read = 0  # triplets of each window that the reader holds
    while any(asks):
        if reread:
            reader.rewind(0)
            reader.read(np.array(flags)[:, None])
            n_read, reread = 0, False
        unread = [len(history[i]) - begin[i] - n_read for i in range(n)]
        if (new := min(u for u, ask in zip(unread, asks) if ask)) > 0:
            ids = np.zeros((n, 3 * new), np.int64)
            for i in (i for i in range(n) if asks[i]):
                triplets = np.array(history[i][begin[i] + n_read : begin[i] + n_read + new])
                triplets[:, TIME] -= np.where(triplets[:, NOTE] == SEP, 0, offset[i])
                ids[i] = triplet_ids(triplets, vocab)
            reader.read(ids)
            n_read += new
            continue
        asking = [i for i in range(n) if asks[i] and not unread[i]]
        uniforms = torch.from_numpy(np.stack([rngs[i].random(3) if i in asking else np.zeros(3) for i in range(n)]))
        here, draws = reader.length, []
        for slot, (low, high) in enumerate(vocab.slots):
            allowed = np.ones((n, high - low), bool)
            for i in asking:
                if slot == 0:
                    earliest = int(asks[i].earliest) - offset[i]
                    allowed[i, : max(0, earliest)] = False
                    if dense:
                        allowed[i, max(earliest, last_time(history[i]) - offset[i] + vocab.density) + 1 :] = False
                elif slot == 2:
                    allowed[i] = mask_notes & ~silenced(vocab, used[i], asks[i].silent)
            draws.append(nucleus_draw(reader.logits(low, high), torch.from_numpy(allowed), uniforms[:, slot], temperature, top_p))
            if slot < 2:
                reader.read((draws[-1] + low)[:, None])
        reader.rewind(here)  # the part decides what follows; whatever it is is read in one piece
        for i in asking:
            t, d, note = (int(draw[i]) for draw in draws)
            rest = note == vocab.rest - vocab.first_note
            program = 0 if rest else vocab.programs[note // 128]
            triplet = np.array((t + offset[i], 0 if rest else d, REST if rest else 128 * program + note % 128, 0))
            asks[i] = advance(i, triplet)
            if progress:
                progress(i, triplet[TIME])
    return [np.column_stack([np.array(h).reshape(-1, 4), np.array(d, np.int64)]) for h, d in zip(history, drawn)]


def last_time(history):
    return next((int(t[TIME]) for t in reversed(history) if not t[CTRL] and t[NOTE] != SEP), 0)


def silenced(vocab, used, silent=(), limit=15):
    """(notes + 1,) bool: what may not be drawn. subtle: a file has 15 melodic channels; RESTs and drums are no instruments of them."""
    used = used - {DRUMS}
    closed = [p in silent or (len(used) >= limit and p not in used and p != DRUMS) for p in vocab.programs]
    return np.append(np.repeat(closed, 128), False)


def generate_events(model, vocab, inputs, controls, start, end, n=1, delta=None, **options):
    """Continue, infill or accompany (section 3): n versions of what happens in [start, end) → list of (m, 4) generated events.

    inputs: (k, 4) events by time; those before `start` are the prompt, those from `end` on are told δ early as controls, with
    `controls` (a melody, …). Events of inputs in [start, end) are not looked at. Times in bins. options: perform's.
    """
    delta = vocab.delta if delta is None else delta
    prompt = pad_with_rests(inputs[inputs[:, TIME] < start], max(start, 0), vocab.density)
    future = np.concatenate([inputs[inputs[:, TIME] >= end], controls])
    future = future[np.argsort(future[:, TIME], kind="stable")]
    future[:, CTRL] = 1
    parts = [anticipating_part(prompt, future, start, end, delta) for _ in range(n)]
    played = perform(model, vocab, parts, [flag_of(future, vocab)] * n, **options)
    return [p[(p[:, 4] == 1) & (p[:, NOTE] >= 0), :4] for p in played]


def follow_events(model, vocab, inputs, melody, start, end, n=1, **options):
    """The same by algorithm 2: a model without controls that must follow a melody it cannot foresee."""
    earlier, later = inputs[inputs[:, TIME] < start], melody[melody[:, TIME] >= start]
    prompt = np.concatenate([melody[melody[:, TIME] < start], earlier])  # the melody first among ties
    prompt = pad_with_rests(prompt[np.argsort(prompt[:, TIME], kind="stable")], start, vocab.density)
    played = perform(model, vocab, [following_part(prompt, later, start, end) for _ in range(n)], [vocab.sep + 1] * n, **options)
    return [p[(p[:, 4] == 1) & (p[:, NOTE] >= 0), :4] for p in played]


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

# ============================================================================================== training

PRIORS = {"paper": PRIOR, "melody": ("none", *("melody",) * 9), "none": ("none",)}  # kinds of copies, drawn alike
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40": 181e12, "4090": 165e12}  # bfloat16, dense, data sheets
HUB = "https://huggingface.co/stanford-crfm/{}/resolve/main/{}"


class BandRows(torch.utils.data.Dataset):
    """Whole pieces of the band as rows: row i is a new piece, by (seed, i) alone."""

    def __init__(self, seed, prior, vocab=MINI, hard=True, delta=None):
        self.seed, self.prior, self.vocab, self.hard, self.delta = seed, prior, vocab, hard, delta

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        events, _ = band(rng, self.hard)
        mask = choose_controls(events, self.prior[rng.integers(len(self.prior))], rng, self.vocab)
        return piece_row(events, mask, self.vocab, self.delta)


def piece_row(events, mask, vocab, delta=None):
    sequence = sequence_of(events, mask, vocab, delta)
    return np.append(flag_of(sequence, vocab), triplet_ids(sequence, vocab))


def collate_rows(rows, vocab=None):
    """Rows of ids → (ids, targets), (batch, seq) int64; −1 = no target: padding, and, where a vocabulary is given, controls.
    subtle: the last target of a row is its last id, also when longer rows stand beside it."""
    longest = max(map(len, rows))
    ids, targets = torch.zeros(len(rows), longest - 1, dtype=torch.int64), torch.full((len(rows), longest - 1), -1)
    for i, row in enumerate(rows):
        row = torch.from_numpy(np.asarray(row, np.int64))
        ids[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
    if vocab:
        targets[(targets >= vocab.control) & (targets < vocab.sep)] = -1
    return ids, targets


class MusicLoss(nn.Module):
    """Mean cross-entropy over the targets ≥ 0, as one module for DDP to wrap."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets):
        hidden, table = self.model.trunk(ids).flatten(0, 1), self.model.wte.weight
        if fused_linear_cross_entropy and hidden.is_cuda:
            return fused_linear_cross_entropy(hidden, table, targets.flatten())[0]
        return F.cross_entropy(F.linear(hidden, table).float(), targets.flatten(), ignore_index=-1)


def make_adamw(model, lr, betas, every_table=False):
    """Weight decay 0.1 on matrices, on tables of embeddings as well where every_table."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and (every_table or not name.startswith(("wte", "wpe")))]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    return torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)], lr, betas, fused=True)


def music_updates(model, opt, batches, steps, lr, warmup, first=0, world=1, autocast=nullcontext):
    """Train: after each update from `first` to `steps` yield (updates done, loss). batches(step): that update's micro-batches (ids,
    targets). Learning rate: linear over warmup, then a cosine to 0. Gradients clipped to norm 1."""
    loss_of = MusicLoss(model)
    ddp = nn.parallel.DistributedDataParallel(loss_of) if world > 1 else loss_of
    model.train()
    for step in range(first, steps):
        for group in opt.param_groups:
            group["lr"] = lr * min((step + 1) / max(1, warmup), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        micro, total = list(batches(step)), 0.0
        for i, (ids, targets) in enumerate(micro):
            with ddp.no_sync() if world > 1 and i < len(micro) - 1 else nullcontext():
                with autocast():
                    loss = ddp(ids, targets) / len(micro)
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not math.isfinite(float(norm)):
            fail(f"step {step}: the gradient is not finite: start anew with a lower --lr")
        opt.step()
        opt.zero_grad()
        yield step + 1, float(total)
    model.eval()


@torch.no_grad()
def row_bits(model, rows, device="cpu"):
    """−log2 p of every id of every row but its first: a list of arrays."""
    model.eval()
    batch, out = max(1, 2**23 // (model.config.vocab_size * max(map(len, rows)))), []
    for i in range(0, len(rows), batch):
        ids, targets = (t.to(device) for t in collate_rows(rows[i : i + batch]))
        logits = model(ids).float().transpose(1, 2)
        bits = (F.cross_entropy(logits, targets, ignore_index=-1, reduction="none") / math.log(2)).cpu().numpy()
        out += [b[: len(row) - 1].astype(np.float64) for b, row in zip(bits, rows[i : i + batch])]
    return out


def conditional_bits(model, pieces, masks, vocab, anticipatory, device="cpu", delta=None):
    """Bits a second of the events outside the masks, those inside known, teacher forced: told δ early as controls, or, for a model
    without anticipation, merged in order of time. RESTs count, SEP does not. pieces end with their last onset."""
    size, rows, wanted, seconds = (vocab.context - 1) // 3, [], [], 0.0
    for events, mask in zip(pieces, masks):
        stream = sequence_of(events, mask if anticipatory else np.zeros_like(mask), vocab, delta)
        melody = np.unique(events[mask, NOTE] >> 7)
        for i in range(0, len(stream), size):
            if (cut := relative_times(stream[i : i + size], vocab)) is not None:
                rows.append(np.append(vocab.sep + 1 + int(anticipatory), triplet_ids(cut, vocab)))
                known = (cut[:, NOTE] == SEP) | ((cut[:, NOTE] >= 0) & np.isin(cut[:, NOTE] >> 7, melody))
                wanted.append(np.repeat(~known, 3))
        seconds += (events[:, TIME].max() + 1) / vocab.resolution
    return sum(float(bits[want].sum()) for bits, want in zip(row_bits(model, rows, device), wanted)) / float(seconds)


# ---------------------------------------------------------------------------------------------- pieces from files


def read_one(path):
    """→ (name, split, events or None, why it was dropped, of what kind). For a process of its own."""
    path = Path(path)
    digest = path.stem if len(path.stem) == 32 and set(path.stem) <= set("0123456789abcdef") else hashlib.md5(path.read_bytes()).hexdigest()
    split = {"e": "valid", "f": "test"}.get(digest[0], "train")  # the paper's rule for Lakh, whose files are named by their MD5
    try:
        events = read_midi(path)
    except MidiError as error:
        return path.name, split, None, str(error), "broken"
    reason = why_not(events)
    return path.name, split, None if reason else events, reason, "filtered" if reason else ""


def read_folder(folder, args):
    """All .mid and .midi files under folder, in order of name, read in parallel → list of read_one's results."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".mid", ".midi"))
    if not paths:
        fail(f"no .mid files in {folder}")
    n_workers = min(args.workers or os.cpu_count(), max(1, len(paths) // 50))  # a process takes seconds to start, a file a hundredth
    with ProcessPoolExecutor(n_workers, get_context("spawn"), quiet_worker) if n_workers > 1 else nullcontext() as pool:
        run = partial(pool.map, chunksize=25) if pool else map
        return list(tqdm(run(read_one, paths), "read", len(paths), unit="file", disable=args.quiet))


def nearest_programs(vocab, melody=None):
    """(129,) which program of vocab plays each program: itself, or one of its family of eight, or the first; the melody's: a flute's
    where there is one."""
    melodic = [p for p in vocab.programs if p != DRUMS]
    table = np.array([next((q for q in (p, *melodic) if q in vocab.programs and q // 8 == p // 8), melodic[0]) for p in range(129)])
    table[DRUMS] = DRUMS if DRUMS in vocab.programs else melodic[0]
    if melody is not None and MELODY in vocab.programs and melody not in vocab.programs:
        table[melody] = MELODY
    return table


def fit_to_vocabulary(events, vocab, melody=None):
    """Events at 10 ms → the same by the clock and the programs of vocab. Notes that fall together count once."""
    if vocab == Vocabulary():
        return events
    events = events.copy()
    events[:, TIME] = np.rint(events[:, TIME] * vocab.resolution / 100)
    events[:, DUR] = np.clip(np.rint(events[:, DUR] * vocab.resolution / 100), 1, vocab.max_duration - 1)
    events[:, NOTE] = 128 * nearest_programs(vocab, melody)[events[:, NOTE] >> 7] + (events[:, NOTE] & 127)
    _, first = np.unique(events[:, [TIME, NOTE]], axis=0, return_index=True)
    return events[np.sort(first)]


def load_pieces(data, vocab, args):
    """{split: pieces} of a folder of MIDI files or of what `tokenize` wrote, in vocab's terms."""
    folder = Path(data)
    if not folder.is_dir():
        fail(f"--data {data} is no folder (of .mid files, or written by tokenize), no .bin of rows and not band")
    if (folder / "index.json").exists():
        index, events = json.loads((folder / "index.json").read_text()), np.load(folder / "events.npy", mmap_mode="r")
        found = [(piece["split"], np.insert(events[piece["first"] : piece["first"] + piece["notes"]].astype(np.int64), 3, 0, axis=1))
                 for piece in index["pieces"]]
    else:
        found = [(split, events) for _, split, events, _, _ in read_folder(folder, args) if events is not None]
    splits = {name: [fit_to_vocabulary(events, vocab) for split, events in found if split == name] for name in ("train", "valid", "test")}
    if not splits["train"]:
        fail(f"{data} has no piece to train on that passes the filter: python anticipation.py tokenize {data} says why")
    return splits


def read_row_file(path, size, n_vocab):
    """A file of rows written by tokenize --copies → (rows, size) uint16, not loaded."""
    ids = np.memmap(path, np.uint16, "r") if Path(path).stat().st_size else np.zeros(0, np.uint16)
    if not len(ids) or len(ids) % size:
        fail(f"{path} has {len(ids):,} ids, which is no whole number of rows of {size}")
    if ids.max() >= n_vocab:
        fail(f"{path} has id {ids.max()}, and the vocabulary ends at {n_vocab - 1}")
    return ids.reshape(-1, size)


def programs_in(events):
    """[(program, notes)] by program."""
    return [(int(p), int(n)) for p, n in zip(*np.unique(events[:, NOTE] >> 7, return_counts=True))]


FAMILIES = ("piano", "chromatic percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe", "synth lead",
            "synth pad", "synth effects", "ethnic", "percussive", "sound effects", "drums")


def program_words(program):
    return "128 (drums)" if program == DRUMS else f"{program} ({FAMILIES[program // 8]})"


def melody_of(events):
    """The program that likely has the melody, by the authors' rule for clips: of the pitched ones with 20 notes the one of highest mean
    pitch, programs 0, 9 and from 112 on only when there is no other. None without pitched notes."""
    found = [(p, n) for p, n in programs_in(events) if p != DRUMS]
    likely = [(p, n) for p, n in found if p not in (0, 9) and p < 112]
    best = [p for p, n in likely if n >= 20] or [p for p, _ in likely or found]
    return max(best, key=lambda p: float((events[events[:, NOTE] >> 7 == p, NOTE] & 127).mean()), default=None)


# ---------------------------------------------------------------------------------------------- checkpoints


def music_checkpoint(model, vocab, **settings):
    return dict(model=model.state_dict(), config=asdict(model.config), vocab=asdict(vocab), settings=settings)


def load_music(args, device, sampling=True):
    """--ckpt: a file, or hub:NAME for the authors' weights → (model, vocabulary, settings)."""
    name = args.ckpt or "out/anticipation/demo/anticipatory.pt"
    if name.startswith("hub:"):
        name = name.removeprefix("hub:")
        about = json.loads(download(HUB.format(name, "config.json")).read_text())
        weights = torch.load(download(HUB.format(name, "pytorch_model.bin")), map_location="cpu", weights_only=True, mmap=True)
        config = MusicConfig(about["vocab_size"], about["n_positions"], about["n_layer"], about["n_head"], about["n_embd"],
                             about.get("resid_pdrop", 0.1), about.get("scale_attn_by_inverse_layer_idx", False))
        encoding = "interarrival" if config.vocab_size == INTERARRIVAL_SIZE else "arrival"
        saved = dict(vocab={}, settings=dict(encoding=encoding, anticipatory="-ar-" not in name, sep=False, preset=name))
        with torch.device("meta"):
            model = MusicGPT(config)
        model = model.to_empty(device="cpu")
    else:
        if not Path(name).exists():
            fail(f"no checkpoint {name}: " + ("name another" if args.ckpt else "run python anticipation.py first, or give --ckpt FILE or "
                                              "--ckpt hub:music-small-800k"))
        saved = load_checkpoint(name)
        if not isinstance(saved, dict) or {"model", "config", "vocab", "settings"} - set(saved):
            fail(f"{name} is not a checkpoint of this program: it should hold model, config, vocab and settings")
        weights, model = saved["model"], MusicGPT(MusicConfig(**saved["config"]))
        encoding = saved["settings"]["encoding"]
    vocab = Vocabulary(**{key: tuple(value) if key == "programs" else value for key, value in saved["vocab"].items()})
    rows = INTERARRIVAL_SIZE if encoding == "interarrival" else vocab.size
    if model.config.vocab_size != rows:
        fail(f"{name} has {model.config.vocab_size:,} ids, its {encoding} vocabulary {rows:,}")
    if sampling and encoding == "interarrival":
        fail(f"{name} speaks the interarrival encoding: a token's time there is the sum of all steps before it, so no event can be told "
             "ahead of its time; take an arrival checkpoint")
    try:
        model.load_gpt2(weights) if args.ckpt and args.ckpt.startswith("hub:") else model.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        fail(f"{name} does not fit its configuration: {' '.join(str(error).split())[:300]}")
    return model.to(device).eval(), vocab, saved["settings"]


# ============================================================================================== tasks: the band


def band_run(job):
    """Train one model on the band and score it → dict of figures and of the generated pieces. For a process of its own.

    job: prior ("melody" or "none"), seed, steps, hard, delta, lr, pieces (held-out ones to accompany), path (of the checkpoint), init
    (a checkpoint to go on from, or None), quiet, slot (of its progress bar), top_p, temperature.
    """
    torch.set_flush_denormal(True)
    torch.manual_seed(job["seed"])
    vocab, seed, start = MINI, job["seed"], time.perf_counter()
    model = MusicGPT(MusicConfig(vocab.size, vocab.context, **SIZES["mini"]))
    start_mini(model, vocab)
    if job["init"]:
        model.load_state_dict(load_checkpoint(job["init"])["model"])
    anticipatory = job["prior"] != "none"
    rows = BandRows(seed, PRIORS[job["prior"]], vocab, job["hard"], job["delta"])
    opt, losses = make_adamw(model, job["lr"], (0.9, 0.99), every_table=True), []
    held_out = [band(np.random.default_rng((seed, 1, k)), job["hard"]) for k in range(job["pieces"])]
    masks = [events[:, NOTE] >> 7 == MELODY for events, _ in held_out]

    def batches(step):
        yield collate_rows([rows[8 * step + k] for k in range(8)], vocab if anticipatory else None)

    name = f"{'anticipatory' if anticipatory else 'autoregressive'}, seed {seed}" + f", δ = {job['delta'] / 4:g} s" * bool(job["init"])
    for _, loss in tqdm(music_updates(model, opt, batches, job["steps"], job["lr"], 20), name, job["steps"], position=job["slot"],
                        disable=job["quiet"], mininterval=1):
        losses.append(loss)
    train_seconds = time.perf_counter() - start
    if job["path"]:
        save_checkpoint(Path(job["path"]), music_checkpoint(
            model, vocab, encoding="arrival", anticipatory=anticipatory, sep=True, preset="mini", seed=seed, steps=job["steps"]))
    first, last = 2, 5  # two bars of prompt, three to play, and one whose melody may be foreseen
    parts = []
    for (events, _), mask in zip(held_out, masks):
        known = mask | (events[:, TIME] < first * BAR)
        if anticipatory:
            controls = events[mask] + np.array([0, 0, 0, 1])
            prompt = pad_with_rests(events[~mask & known], first * BAR, vocab.density)
            parts.append(anticipating_part(prompt, controls, first * BAR, last * BAR, job["delta"]))
        else:
            prompt = pad_with_rests(events[events[:, TIME] < first * BAR], first * BAR, vocab.density)
            parts.append(following_part(prompt, events[mask & (events[:, TIME] >= first * BAR)], first * BAR, last * BAR))
    flags = [vocab.sep + 1 + int(anticipatory)] * len(parts)
    start = time.perf_counter()
    played = perform(model, vocab, parts, flags, seed=seed, top_p=job["top_p"], temperature=job["temperature"])
    played = [p[(p[:, 4] == 1) & (p[:, NOTE] >= 0), :4] for p in played]
    scores = [score_accompaniment(p, events, chords, first, last) for p, (events, chords) in zip(played, held_out)]
    pieces = [events for events, _ in held_out]
    plain = row_bits(model, [piece_row(events, np.zeros(len(events), bool), vocab) for events in pieces])
    return dict(
        kind="anticipatory" if anticipatory else "autoregressive", seed=seed, delta_s=job["delta"] / vocab.resolution, loss=losses[-1],
        **{key: float(np.mean([s[key] for s in scores])) for key in scores[0]},
        conditional=conditional_bits(model, pieces, masks, vocab, anticipatory, delta=job["delta"]),
        plain=float(sum(bits[3:].sum() for bits in plain) / (len(plain) * BARS * BAR / vocab.resolution)),
        train_seconds=train_seconds, sample_seconds=time.perf_counter() - start, played=[p.tolist() for p in played[:1]])


def run_bands(jobs, args):
    """band_run of every job, shared out among torchrun's ranks or among the cores → results in order, None on ranks above 0."""
    _, _, rank, world = set_up(args)
    if world > 1:
        shares = [None] * world
        torch.set_num_threads(1)
        dist.all_gather_object(shares, [band_run(job) for job in jobs[rank::world]])
        return [shares[i % world][i // world] for i in range(len(jobs))]
    n_workers = min(args.workers or os.cpu_count(), len(jobs))
    if n_workers == 1:
        return [band_run(job) for job in jobs]
    with ProcessPoolExecutor(n_workers, get_context("spawn"), quiet_worker) as pool:
        return list(pool.map(band_run, jobs))


def quiet_worker():
    """One thread a process; Ctrl-C ends it without a traceback of its own, and without leaving a semaphore of tqdm behind."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def band_job(args, prior, seed, **changes):
    return dict(prior=prior, seed=seed, steps=args.steps or 500, hard=args.level == "hard", delta=MINI.delta, lr=args.lr or 6e-3,
                pieces=args.pieces, path=None, init=None, quiet=args.quiet, slot=0, top_p=args.top_p,
                temperature=0 if args.greedy else args.temperature) | changes


def leave_ranks(world):
    if world > 1:
        dist.barrier()  # a rank that leaves while another goes on can abort at its exit
        dist.destroy_process_group()


def demo(args):
    """Section 3 where the right answer is known: an anticipatory and an autoregressive model, trained on equally many pieces of the band
    for equally many updates, accompany melodies that they have not seen."""
    _, _, rank, world = set_up(args)
    out, seeds = Path(args.out or "out/anticipation/demo"), range(args.seed, args.seed + args.seeds)
    jobs = [band_job(args, prior, seed, slot=k, path=str(out / f"{name}.pt") if seed == args.seed else None)
            for seed in seeds for k, (prior, name) in enumerate((("melody", "anticipatory"), ("none", "autoregressive")))]
    results = run_bands(jobs, args)
    if rank == 0:
        hard, first, last = args.level == "hard", 2, 5
        others = {"retrieval": [], "chain's best guess": []}
        for seed in seeds:
            rng = np.random.default_rng((seed, 2))
            for k in range(args.pieces):
                events, chords = band(np.random.default_rng((seed, 1, k)), hard)
                accompaniment = events[events[:, NOTE] >> 7 != MELODY]
                source = rng.choice([bar for bar in range(BARS - (last - first) + 1) if bar != first])
                moved = accompaniment + np.array([(first - source) * BAR, 0, 0, 0])
                inside = (moved[:, TIME] >= first * BAR) & (moved[:, TIME] < last * BAR)
                others["retrieval"].append(score_accompaniment(moved[inside], events, chords, first, last))
                right = np.mean([CHAIN[chords[bar - 1]].argmax() == chords[bar] for bar in range(first, last)])
                others["chain's best guess"].append(dict(root=float(right), chord=float(right)))
        rows = [(f"{r['kind']}, seed {r['seed']}", r["root"], r["chord"], r["f1"], r["off_key"], r["conditional"], r["plain"],
                 round(r["train_seconds"])) for r in sorted(results, key=lambda r: r["kind"])]
        rows += [(name, *(float(np.mean([s[key] for s in scores])) if key in scores[0] else math.nan
                          for key in ("root", "chord", "f1", "off_key")), math.nan, math.nan, "–") for name, scores in others.items()]
        limits = root_ceilings(hard)
        floor = math.log2(3) / (BARS * BAR / MINI.resolution)
        rows.append(("the right answer", 1.0, 1.0, 1.0, 0.0, floor, math.nan, "–"))
        print_table((f"{args.level} pieces", "root", "chord", "note F1", "off key", "bits/s, melody known", "bits/s, plain", "train, s"),
                    rows)
        print("best share of roots knowing the last chord and 0, 1, 2, 3 melody notes of the bar: "
              + ", ".join(f"{x:.3f}" for x in limits) + "; the autoregressive model has heard 1 when it chooses")
        events, chords = band(np.random.default_rng((args.seed, 1, 0)), hard)
        melody, prompt = (events[:, NOTE] >> 7 == MELODY) & (events[:, TIME] < last * BAR), (events[:, TIME] < first * BAR)
        known, labels = events[melody | prompt], np.where(melody, "melody", "prompt")[melody | prompt]
        panels = {r["kind"]: np.array(r["played"][0], np.int64).reshape(-1, 4) for r in reversed(results)}  # of the first seed
        pictures, files = [], []
        for name, played in sorted(panels.items()):
            whole = np.concatenate([known, played])
            n_right = 3 * score_accompaniment(played, events, chords, first, last)["root"]
            files += [write_midi(out / f"{name}.mid", whole, MINI.resolution), write_wav(out / f"{name}.wav", whole, MINI.resolution)]
            title = f"{name}: {n_right:.0f} of 3 roots right in this held-out piece"
            pictures.append((title, whole, np.append(labels, ["generated"] * len(played))))
        right = events[events[:, TIME] < last * BAR]
        pictures.append(("the right answer", right, np.where(right[:, NOTE] >> 7 == MELODY, "melody", "given")))
        print(*files, out / "anticipatory.pt", out / "autoregressive.pt", sep="\n")
        kept = [{key: value for key, value in r.items() if key != "played"} for r in results]
        means = {name: float(np.mean([r["root"] for r in results if r["kind"] == name])) for name in sorted(panels)}
        means |= {row[0]: row[1] for row in rows[len(results) : len(results) + 2]}
        print(save_results(out, args, dict(table=rows, runs=kept, ceilings=limits)), plot_demo_rolls(out, args, pictures, means, limits),
              sep="\n")
    leave_ranks(world)


def delta_sweep(args):
    """What looking ahead is worth: the share of right roots against δ. One model is trained in full at δ = 2 s, a bar; for each smaller δ
    training goes on from it for a fifth as long, at a quarter of the learning rate."""
    _, _, rank, world = set_up(args)
    out, steps = Path(args.out or "out/anticipation/delta_sweep"), args.steps or 500
    base = out / "anticipatory.pt"
    if rank == 0:
        full = band_run(band_job(args, "melody", args.seed, path=str(base)))
    if world > 1:
        dist.barrier()
    jobs = [band_job(args, "melody", args.seed, steps=max(1, steps // 5), lr=(args.lr or 6e-3) / 4, delta=delta, init=str(base), slot=k)
            for k, delta in enumerate((0, 2, 4, 6))]
    results = run_bands(jobs, args)
    if rank == 0:
        results.append(full)
        print_table(("δ in seconds", "root", "chord", "note F1", "bits/s given melody"),
                    [(f"{r['delta_s']:g}", r["root"], r["chord"], r["f1"], r["conditional"]) for r in results])
        limits = root_ceilings(args.level == "hard")
        kept = [{key: value for key, value in r.items() if key != "played"} for r in results]
        print(save_results(out, args, dict(runs=kept, ceilings=limits)), plot_sweep(out, args, results, limits), sep="\n")
    leave_ranks(world)


# ============================================================================================== tasks: files, training, evaluation


def tokenize(args):
    """A folder of MIDI files → events.npy and index.json, with the paper's filter; with --copies N also rows.bin, N augmented copies of
    each piece as rows of ids (the paper has 30; 0 leaves them to be made while training)."""
    out, start = Path(args.out or "out/anticipation/tokenize"), time.perf_counter()
    found = read_folder(given_path(args, "a folder of MIDI files", folder=True), args)
    seconds = time.perf_counter() - start
    kept, vocab = [(name, split, events) for name, split, events, _, _ in found if events is not None], Vocabulary()
    for name, _, events, reason, kind in found:
        if events is None:
            print(f"{kind}: {name}: {reason}")
    if not kept:
        fail(f"none of the {len(found)} files in {args.path} is whole and passes the filter")
    out.mkdir(parents=True, exist_ok=True)
    sizes = [len(events) for *_, events in kept]
    np.save(out / "events.npy", np.concatenate([events[:, :3] for *_, events in kept]).astype(np.int32))
    pieces = [dict(name=name, split=split, first=int(first), notes=len(events), seconds=float(events[:, TIME].max() / 100))
              for (name, split, events), first in zip(kept, np.cumsum([0, *sizes]))]
    (out / "index.json").write_text(json.dumps(dict(columns=("time, 10 ms", "duration, 10 ms", "128·program + pitch"), pieces=pieces)))
    n_rows, total = 0, sum(piece["seconds"] for piece in pieces)
    training = [events for _, split, events in kept if split == "train"]
    if args.copies:
        pairs = np.random.default_rng(args.seed).permutation(len(training) * args.copies)
        if args.encoding == "interarrival":
            stream = np.concatenate([np.append(INTERARRIVAL_SEP, interarrival_of(training[p % len(training)], vocab)) for p in pairs])
            rows = stream[: len(stream) // vocab.context * vocab.context].astype(np.uint16).reshape(-1, vocab.context)
        else:
            def copy(pair):  # copy k of piece p has controls of kind k mod 10, drawn by (seed, p, k)
                k, p = divmod(int(pair), len(training))
                rng = np.random.default_rng((args.seed, p, k))
                return sequence_of(training[p], choose_controls(training[p], PRIORS[args.prior or "paper"][k % len(
                    PRIORS[args.prior or "paper"])], rng, vocab), vocab)

            rows = pack_rows([copy(pair) for pair in pairs], vocab)
        rows.tofile(out / "rows.bin")
        n_rows = len(rows)
    lengths = {name: [3 * len(sequence_of(events, np.zeros(len(events), bool), vocab)) for _, split, events in kept if split == name]
               for name in ("train", "valid", "test")}
    table = [(name, len(lengths[name]), sum(p["notes"] for p in pieces if p["split"] == name), sum(lengths[name]),
              f"{sum(p['seconds'] for p in pieces if p['split'] == name) / 3600:.2f}") for name in lengths]
    print_table(("split", "pieces", "notes", "tokens, arrival", "hours"), table)
    n_all = sum(sizes)
    clipped = sum(int((events[:, DUR] == 999).sum()) for *_, events in kept)
    count = {kind: sum(k == kind for *_, k in found) for kind in ("broken", "filtered")}
    print(f"{len(found)} files: {len(kept)} kept, {count['broken']} broken, {count['filtered']} filtered; {n_all:,} notes in {seconds:.2f} "
          f"s ({n_all / seconds:,.0f} notes/s), {clipped} durations cut to 9.99 s" + f"; rows.bin: {n_rows:,} rows" * bool(args.copies))
    figures = dict(table=table, files=len(found), kept=len(kept), **count, notes=n_all, seconds=seconds, notes_per_s=n_all / seconds,
                   rows=n_rows, tokens_per_s=sum(map(sum, lengths.values())) / max(total, 1),
                   dropped={name: reason for name, _, events, reason, _ in found if events is None})
    print(save_results(out, args, figures), plot_lengths(out, args, [n for group in lengths.values() for n in group],
                                                         [p["seconds"] for p in pieces]), sep="\n")


def given_path(args, what, folder=False):
    if not args.path:
        fail(f"{args.task} needs {what}: python anticipation.py {args.task} PATH")
    if not (Path(args.path).is_dir() if folder else Path(args.path).is_file()):
        fail(f"{args.path} is no {'folder' if folder else 'file'}")
    return Path(args.path)


def train(args):
    """Section 4: train on the band, a folder of MIDI files or rows of ids. One loop for a laptop, a GPU, or the many of torchrun."""
    device, dtype, rank, world = set_up(args)
    tuned = args.task == "finetune"
    out, data = Path(args.out or f"out/anticipation/{args.task}"), args.data or "band"
    preset, encoding = args.preset or "mini", args.encoding
    prior = args.prior or ("melody" if data == "band" else "paper")
    if tuned:
        model, vocab, settings = load_music(args, device, sampling=False)
        preset, encoding = settings["preset"], settings["encoding"]
    else:
        vocab = MINI if preset == "mini" and encoding == "arrival" else Vocabulary()
        n_vocab = INTERARRIVAL_SIZE if encoding == "interarrival" else vocab.size
        model = MusicGPT(MusicConfig(n_vocab, vocab.context, **SIZES[preset]))
        if preset == "mini" and encoding == "arrival":
            start_mini(model, vocab)
        model.to(device)
    mini, inter = vocab == MINI, encoding == "interarrival"
    if data == "band" and (inter or not mini):
        fail("the band is for --preset mini with arrival times: give --data DIR, a folder of MIDI files")
    if args.resume and tuned:
        fail("--resume goes with train alone: a finetune is short")
    batch = args.batch_size or (8 if device.type == "cpu" else 512)  # rows an update over all ranks; 512: the paper's
    micro = args.micro_batch_size or math.gcd(max(1, batch // world), 8)
    if batch % (micro * world):
        fail(f"--batch_size {batch} is not a multiple of --micro_batch_size {micro} × {world} ranks")
    steps = args.steps or (500 if device.type == "cpu" else 2000 if tuned else 100_000)
    warmup = min(20 if mini else 1000, steps // 10) if args.warmup is None else args.warmup
    lr = args.lr or LEARNING_RATES.get(preset, 6e-4) / (10 if tuned else 1)
    splits = None
    if data == "band":
        rows = BandRows(args.seed, PRIORS[prior])
    elif data.endswith(".bin"):
        if not Path(data).is_file():
            fail(f"--data {data} is no file")
        rows = read_row_file(data, vocab.context, model.config.vocab_size)
    else:
        splits = load_pieces(data, vocab, args)
        rows = Rows(splits["train"], vocab, args.seed, PRIORS[prior], inter)
    settings = dict(encoding=encoding, anticipatory=prior != "none" and not inter, sep=data == "band", preset=preset, seed=args.seed,
                    data=data, prior=prior, steps=steps, batch_size=batch, lr=lr, warmup=warmup, events_only=args.events_only)
    opt, first = make_adamw(model, lr, (0.9, 0.99 if mini else 0.999), every_table=mini), 0
    if args.resume:
        if not (out / "checkpoint.pt").exists():
            fail(f"--resume: no {out / 'checkpoint.pt'}")
        saved = load_checkpoint(out / "checkpoint.pt", device)
        for key, value in settings.items():
            if saved["settings"].get(key) != value:
                fail(f"{out / 'checkpoint.pt'} was made with {key} = {saved['settings'].get(key)}, this run has {value}")
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if args.compile:
        model.trunk = torch.compile(model.trunk)
    n_params = sum(p.numel() for p in model.parameters())
    flops = 6 * n_params + 12 * model.config.n_layer * model.config.n_embd * vocab.context  # a token, forward and backward
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = next((rate for name, rate in PEAK_FLOPS.items() if name in card), None)
    if rank == 0:
        print(f"{n_params / 1e6:.1f}M parameters, {model.config.vocab_size:,} ids, {batch} rows of up to {vocab.context} ids an update, "
              f"{steps:,} updates on {world} × {card}", flush=True)

    def numbers():  # of this rank's rows, micro-batch by micro-batch: a row's number does not depend on the ranks
        for step in range(first, steps):
            for i in range(batch // (micro * world)):
                at = step * batch + (i * world + rank) * micro
                yield [n % len(rows) if isinstance(rows, np.ndarray) else n for n in range(at, at + micro)]

    loader = torch.utils.data.DataLoader(rows, batch_sampler=numbers(), num_workers=args.loaders, collate_fn=partial(
        collate_rows, vocab=vocab if args.events_only else None))
    stream = iter(loader)

    def batches(step):
        for _ in range(batch // (micro * world)):
            yield tuple(t.to(device, non_blocking=True) for t in next(stream))

    def keep(step):
        if rank == 0:
            save_checkpoint(out / "checkpoint.pt", music_checkpoint(model, vocab, **settings) | dict(optimizer=opt.state_dict(), step=step))

    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    records, start, done = [], time.perf_counter(), first
    bar = tqdm(total=steps, desc=args.task, initial=first, disable=args.quiet or rank > 0)
    try:
        for done, loss in music_updates(model, opt, batches, steps, lr, warmup, first, world, autocast):
            bar.update()
            if done % args.log_every == 0 or done == steps:
                total = torch.tensor(loss / world, device=device)
                if world > 1:
                    dist.all_reduce(total)
                speed = (done - first) * batch * (vocab.context - 1) / (time.perf_counter() - start)
                records.append(dict(step=done, loss=float(total), tokens_per_s=speed, mfu=speed * flops / (peak * world) if peak else None))
            if done % args.save_every == 0 or done == steps:
                keep(done)
    except KeyboardInterrupt:
        if rank == 0:
            kept = f"{out / 'checkpoint.pt'} is kept: the same command with --resume goes on" if (out / "checkpoint.pt").exists() else (
                f"nothing was saved yet (--save_every {args.save_every})")
            print(f"\nstopped after {done} updates; {kept}")
        raise SystemExit(130) from None
    bar.close()
    if rank == 0:
        last = records[-1] if records else dict(step=done)
        print_table((args.task, preset), [(key, f"{value:.4g}") for key, value in last.items() if value is not None])
        print(out / "checkpoint.pt")
        print(save_results(out, args, dict(settings=settings, records=records)), plot_losses(out, args, records), sep="\n")
    leave_ranks(world)


def finetune(args):
    """Go on from --ckpt on one's own files, at a tenth of the learning rate (the authors' advice: 1k to 10k updates)."""
    train(args)


def evaluate_music(args):
    """Section 4.1: held-out bits a second, perplexities of a triplet and of its slots; and the bits a second of an accompaniment given its
    melody, told ahead (or, for a model without anticipation, merged in time)."""
    device, _, rank, world = set_up(args)
    model, vocab, settings = load_music(args, device, sampling=False)
    out, data = Path(args.out or "out/anticipation/eval"), args.data or "band"
    if data == "band":
        if vocab != MINI:
            fail("the band is for checkpoints of --preset mini: give --data DIR, a folder of MIDI files")
        pieces = [band(np.random.default_rng((args.seed, 1, k)), args.level == "hard")[0] for k in range(args.pieces)]
    else:
        pieces = load_pieces(data, vocab, args)[args.split]
        if not pieces:
            fail(f"{data} has no piece in its {args.split} split: take another --split")
    seconds = sum(events[:, TIME].max() + 1 for events in pieces) / vocab.resolution
    none = [np.zeros(len(events), bool) for events in pieces]
    if settings["encoding"] == "interarrival":
        stream = np.concatenate([np.append(INTERARRIVAL_SEP, interarrival_of(events, vocab)) for events in pieces])
        n_tokens, rows = len(stream), stream[: len(stream) // vocab.context * vocab.context].reshape(-1, vocab.context)
    elif settings["sep"]:
        rows = [piece_row(events, mask, vocab) for events, mask in zip(pieces, none)]
        n_tokens = sum(map(len, rows)) - len(rows)
    else:
        sequences = [sequence_of(events, mask, vocab) for events, mask in zip(pieces, none)]
        rows, n_tokens = pack_rows(sequences, vocab), 3 * sum(map(len, sequences))
    if not len(rows):
        fail(f"{data}: {n_tokens} tokens in the {args.split} split do not fill a row of {vocab.context}")
    mine = rows[rank::world]
    bits = row_bits(model, mine, device) if len(mine) else []
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for b in bits:
        for slot in range(3):
            sums[:, slot] += torch.tensor([b[slot::3].sum(), len(b[slot::3])])
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    if rank == 0:
        mean = float(sums[0].sum() / sums[1].sum())
        slots = (sums[0] / sums[1]).tolist()
        bps = mean * n_tokens / seconds
        table = [("bits a second", bps), ("bits a token", mean), ("tokens a second", n_tokens / seconds)]
        if settings["encoding"] == "arrival":
            names = ("a triplet", "times", "durations", "notes")
            table += [(f"perplexity of {name}", 2.0**x) for name, x in zip(names, (sum(slots), *slots))]
            melodies = [(events, melody_of(events)) for events in pieces]
            melodies = [(events, m) for events, m in melodies if m is not None and (events[:, NOTE] >> 7 != m).any()]
            if melodies:
                known = [events[:, NOTE] >> 7 == m for events, m in melodies]
                table.append(("bits a second, accompaniment given the melody", conditional_bits(
                    model, [events for events, _ in melodies], known, vocab, settings["anticipatory"], device)))
        print_table((f"{len(pieces)} pieces, {seconds / 60:.1f} minutes, {len(rows)} rows", "value"), table)
        print(save_results(out, args, dict(settings=settings, table=table)), plot_bars(out, args, slots, settings["encoding"]), sep="\n")
    leave_ranks(world)


# ============================================================================================== tasks: music from a file


def given_piece(args):
    path = given_path(args, "a MIDI file")
    try:
        events = read_midi(path)
    except MidiError as error:
        fail(f"{path}: {error}")
    if not len(events):
        fail(f"{path} has no notes")
    return events[np.argsort(events[:, TIME], kind="stable")]


def clip_bounds(args, vocab, first=0):
    """→ (start, end) in bins of 10 ms: --start and --end, or a prompt of 5 s (mini 4) from bin `first` on and 15 s (mini 6) after it."""
    paper = vocab == Vocabulary()
    start = first + (500 if paper else 400) if args.start is None else 100 * args.start
    end = 100 * (args.end if args.end is not None else start / 100 + (15 if paper else 6))
    if start >= end:
        fail(f"--start {start / 100:g} is not before --end {end / 100:g}")
    return round(start), round(end)


def write_versions(args, model, vocab, settings, device, fixed, controls, start, end, origin=0, programs=None, melody=None):
    """Generate in [start, end), write what the file keeps together with it as MIDI, picture and sound. fixed, controls: events of the
    file at 10 ms, which stay to the hundredth; the model sees them from `origin` on, by its own clock and programs."""
    out, table = Path(args.out or f"out/anticipation/{args.task}"), nearest_programs(vocab, melody)
    heard = controls[controls[:, TIME] < end]  # of what the model is told ahead, the file has what lies before the end
    known = np.concatenate([fixed, heard])
    if vocab != Vocabulary():
        mapped = [f"{program_words(p)} as {program_words(int(table[p]))}" for p, _ in programs_in(known) if table[p] != p]
        print(f"this checkpoint knows {len(vocab.programs)} programs and {vocab.resolution} onsets a second; it hears "
              + "; ".join([*mapped, f"times to {1 / vocab.resolution:g} s"]) + ". The file's own notes are written as they were.")
    back = {}  # who plays the model's programs: the file's most frequent program that it hears so
    for p, _ in sorted(programs_in(known), key=lambda pair: pair[1]):
        back[int(table[p])] = p
    seen = [fit_to_vocabulary(part[part[:, TIME] >= origin] - np.array([origin, 0, 0, 0]), vocab, melody) for part in (fixed, controls)]
    lo, hi = (round((t - origin) * vocab.resolution / 100) for t in (start, end))
    options = dict(top_p=args.top_p, temperature=0 if args.greedy else args.temperature, seed=args.seed,
                   dense=settings["sep"] if args.enforce_density is None else args.enforce_density,
                   window=args.window, sep=settings["sep"], programs=None if programs is None else {int(table[p]) for p in programs})
    bar = tqdm(total=hi - lo, desc=args.task, disable=args.quiet, unit="bin")
    options["progress"] = lambda i, now: bar.update(max(0, min(int(now), hi) - lo - bar.n)) if i == 0 else None
    begin = time.perf_counter()
    if settings["anticipatory"]:
        versions = generate_events(model, vocab, *seen, lo, hi, args.n, **options)
    else:
        versions = follow_events(model, vocab, *seen, lo, hi, args.n, **options)
    seconds = time.perf_counter() - begin
    bar.close()
    files, pictures, given = [], [], "given" if args.task == "infill" else "prompt"
    for k, new in enumerate(versions):
        new = new.copy()
        new[:, [TIME, DUR]] = np.rint(new[:, [TIME, DUR]] * 100 / vocab.resolution)
        new[:, TIME] += origin
        new[:, NOTE] = 128 * np.array([back.get(p, p) for p in (new[:, NOTE] >> 7).tolist()], np.int64) + (new[:, NOTE] & 127)
        whole = np.concatenate([known, new])
        labels = [given] * len(fixed) + ["melody" if args.task == "accompany" else given] * len(heard) + ["generated"] * len(new)
        files += [write_midi(out / f"{args.task}-{k}.mid", whole), write_wav(out / f"{args.task}-{k}.wav", whole)]
        near = (whole[:, TIME] >= start - 1500) & (whole[:, TIME] < end + 1500)
        pictures.append((f"{args.task}, version {k}", whole[near], np.array(labels)[near]))
    n_new = [len(new) for new in versions]
    print(f"{', '.join(map(str, n_new))} notes from {start / 100:g} to {end / 100:g} s beside {len(known)} of the file, in {seconds:.1f} s")
    print(*files, sep="\n")
    print(save_results(out, args, dict(generated=n_new, kept=len(known), start=start / 100, end=end / 100, seconds=seconds)),
          plot_rolls(out, args, pictures[:3], 100), sep="\n")


def continue_piece(args):
    """Section 4.2: the file up to --start, and what may follow."""
    device, *_ = set_up(args)
    events, (model, vocab, settings) = given_piece(args), load_music(args, device)
    start, end = clip_bounds(args, vocab, events[0, TIME])
    fixed = events[events[:, TIME] < start]
    if not len(fixed):
        fail(f"{args.path} has no notes before --start {start / 100:g}, nothing to continue; its first is at {events[0, TIME] / 100:g} s")
    origin = 0 if vocab == Vocabulary() else max(0, start - 400)
    write_versions(args, model, vocab, settings, device, fixed, events[:0], start, end, origin, melody=melody_of(events))


def accompany(args):
    """Section 4.3: keep the melody, and all of the file up to --start; play the other instruments anew."""
    device, *_ = set_up(args)
    events, (model, vocab, settings) = given_piece(args), load_music(args, device)
    melody, programs = args.melody, events[:, NOTE] >> 7
    if melody == "auto":
        near = events[:, TIME] >= (args.start or 0) * 100
        melody = melody_of(events[near & (events[:, TIME] < (args.end or math.inf) * 100)])
    times = events[programs == melody, TIME]  # by default the clip begins where the next 20 s have most of the melody
    busiest = (np.searchsorted(times, times + 2000) - np.arange(len(times))).argmax() if len(times) else None
    start, end = clip_bounds(args, vocab, 0 if busiest is None else times[busiest])
    present = "; ".join(f"{program_words(p)} {n} notes" for p, n in programs_in(events))
    if melody not in dict(programs_in(events)):
        fail(f"{args.path} has no notes of program {melody}; it has {present}" if melody is not None else
             f"{args.path} has drums only: no melody to accompany")
    mine = programs == melody
    ahead = end + vocab.delta * 100 // vocab.resolution
    controls, fixed = events[mine & (events[:, TIME] < ahead)], events[~mine & (events[:, TIME] < start)]
    if not ((controls[:, TIME] >= start) & (controls[:, TIME] < end)).any():
        fail(f"program {program_words(melody)} has no notes from {start / 100:g} to {end / 100:g} s; {args.path} has {present}")
    print(f"melody: program {program_words(melody)}, {len(controls)} notes")
    players = args.instruments or sorted({p for p, _ in programs_in(events)} - {melody})
    origin = 0 if vocab == Vocabulary() else max(0, start - 400)
    write_versions(args, model, vocab, settings, device, fixed, controls, start, end, origin, players or None, melody)


def infill(args):
    """Section 3.2: take out a span, of all instruments or of --instruments, and fill it anew, given what is before and after."""
    device, *_ = set_up(args)
    events, (model, vocab, settings) = given_piece(args), load_music(args, device)
    if not args.span:
        fail("infill needs --span FROM:TO in seconds, as --span 8:12")
    start, end = (round(100 * t) for t in args.span)
    length = events[:, TIME].max()
    if start >= end or end > length:
        fail(f"--span {start / 100:g}:{end / 100:g} should be two times in order within the {length / 100:g} s of {args.path}")
    if not settings["anticipatory"]:
        fail(f"--ckpt {args.ckpt} was trained without controls and cannot know what comes after a gap: take an anticipatory one")
    present = {p for p, _ in programs_in(events)}
    if args.instruments and not set(args.instruments) <= present:
        fail(f"--instruments: {args.path} has {', '.join(program_words(p) for p in sorted(present))}")
    inside = (events[:, TIME] >= start) & (events[:, TIME] < end)
    taken = inside & np.isin(events[:, NOTE] >> 7, args.instruments or sorted(present))
    origin = 0 if vocab == Vocabulary() else max(0, start - 400)
    print(f"{int(taken.sum())} notes taken out")
    write_versions(args, model, vocab, settings, device, events[~inside], events[inside & ~taken], start, end, origin, args.instruments,
            melody_of(events))


def inspect_tokens(args):
    """Tokens as a table: of a MIDI file as its model reads it, with --melody as controls; or of a file of rows, with --row."""
    path, vocab, out = given_path(args, "a MIDI file or rows.bin"), Vocabulary(), Path(args.out or "out/anticipation/inspect")
    if path.suffix == ".bin":
        rows = read_row_file(path, vocab.context, vocab.size)
        if args.row >= len(rows):
            fail(f"--row {args.row}: {path} has {len(rows)} rows")
        ids = rows[args.row].astype(np.int64)
        try:
            sequence = triplets_of(ids[1:], vocab)
        except ValueError as error:
            fail(f"{path}, row {args.row}: {error}")
    else:
        events = given_piece(args)
        mask = np.zeros(len(events), bool)
        if args.melody != "auto":
            mask = events[:, NOTE] >> 7 == args.melody
            if not mask.any():
                fail(f"{path} has no notes of program {args.melody}; it has " + "; ".join(
                    f"{program_words(p)} {n} notes" for p, n in programs_in(events)))
        sequence = sequence_of(events, mask, vocab)
        kept = relative_times(sequence[: (vocab.context - 1) // 3], vocab)
        ids = np.append(flag_of(sequence, vocab), triplet_ids(kept, vocab)) if kept is not None else fail("its first row exceeds 100 s")
    names = "C C# D D# E F F# G G# A A# B".split()
    shown = sequence[: min(args.rows, len(ids) // 3)]
    table = [(str(i), *ids[1 + 3 * i : 4 + 3 * i].tolist(), "control" if t[CTRL] else "event",
              f"{t[TIME] / 100:.2f}", f"{t[DUR] / 100:.2f}",
              {REST: "REST", SEP: "SEP"}.get(int(t[NOTE])) or f"{names[t[NOTE] % 12]}{t[NOTE] % 128 // 12 - 1}",
              program_words(int(t[NOTE]) >> 7) if t[NOTE] >= 0 else "") for i, t in enumerate(shown)]
    print(f"z = {ids[0]} ({'anticipate' if ids[0] == vocab.sep + 2 else 'autoregress'}); {len(sequence)} triplets, "
          f"{int(sequence[:, CTRL].sum())} controls, {int((sequence[:, NOTE] == REST).sum())} RESTs")
    print_table(("", "time", "dur", "note", "kind", "at, s", "for, s", "pitch", "program"), table)
    labels = np.where(sequence[:, CTRL] == 1, "melody", "prompt")
    real = sequence[:, NOTE] >= 0
    picture = path.name, sequence[real], labels[real]
    print(save_results(out, args, dict(ids=ids.tolist())), plot_rolls(out, args, [picture], 100), sep="\n")


def plot_piece(args):
    """A MIDI file as a piano roll."""
    events, out = given_piece(args), Path(args.out or f"out/anticipation/{args.task}")
    rows = programs_in(events)
    print_table(("program", "notes"), [(program_words(p), n) for p, n in rows])
    if args.task == "play":
        print(write_wav(out / f"{Path(args.path).stem}.wav", events))
    labels = np.array([program_words(p) for p in (events[:, NOTE] >> 7).tolist()])
    print(save_results(out, args, dict(programs=rows, seconds=float(events[:, TIME].max() / 100))),
          plot_rolls(out, args, [(Path(args.path).name, events, labels)], 100), sep="\n")


def play(args):
    """A MIDI file as sound (WAV) and picture."""
    plot_piece(args)


def mido_events(path):
    """The obvious loop over mido's messages: what the reader above is checked against and timed beside."""
    from mido import MidiFile

    file, now, programs, waiting, events = MidiFile(path), 0.0, {}, {}, []
    for message in file:
        now += message.time
        if message.type == "program_change":
            programs[message.channel] = message.program
        elif message.type in ("note_on", "note_off"):
            instrument = DRUMS if message.channel == 9 else programs.get(message.channel, 0)
            key = instrument, message.note, message.channel
            if message.type == "note_on" and message.velocity:
                waiting.setdefault(key, deque()).append((len(events), now))
                events.append([round(100 * now), 25, 128 * instrument + message.note, 0])
            elif waiting.get(key):
                i, begun = waiting[key].popleft()
                events[i][DUR] = min(999, round(100 * (now - begun)))
    return np.array(events, np.int64).reshape(-1, 4)


def bench(args):
    """Speed: reading MIDI beside the obvious mido loop, bit for bit; sampling with the cache beside full passes, token for token; on a
    GPU also training."""
    device, dtype, *_ = set_up(args)
    out, rows = Path(args.out or "out/anticipation/bench"), []
    if args.data:
        paths = sorted(p for p in Path(args.data).rglob("*") if p.suffix.lower() in (".mid", ".midi"))
        if not paths:
            fail(f"no .mid files in {args.data}")
    else:
        paths = [write_midi(out / "band" / f"{k}.mid", band(np.random.default_rng((args.seed, k)), bars=200)[0], 4) for k in range(10)]
    times, results = {}, {}
    for name, reader in (("mido", mido_events), ("bytes", read_midi)):
        begin, results[name] = time.process_time(), {}
        for path in tqdm(paths, name, disable=args.quiet):
            try:
                results[name][path] = reader(path)
            except (OSError, ValueError, EOFError, IndexError, KeyError):
                pass  # a file that one of the two cannot read is not compared
        times[name] = time.process_time() - begin
    both = [path for path in paths if path in results["mido"] and path in results["bytes"]]
    n_notes = sum(len(results["bytes"][path]) for path in both)
    same = sum(np.array_equal(results["mido"][path], results["bytes"][path]) for path in both)
    rows += [(f"notes/s, {name}", f"{n_notes / times[name]:,.0f}") for name in times]
    rows += [("ratio", f"{times['mido'] / times['bytes']:.1f}"), ("files bit-equal", f"{same} of {len(both)}")]

    preset = args.preset or "small"
    vocab = MINI if preset == "mini" else Vocabulary()
    model = MusicGPT(MusicConfig(vocab.size, vocab.context, **SIZES[preset])).to(device).eval()
    most, rng = (vocab.context - 3) // 3, np.random.default_rng(args.seed)
    prompt = np.zeros((most - 9, 4), np.int64)
    prompt[:, TIME] = np.sort(rng.integers(vocab.max_time // 3, size=len(prompt)))
    prompt[:, NOTE], prompt[:, DUR] = 60 + rng.integers(12, size=len(prompt)), 2
    speeds, tokens = {}, {}
    for name, player, n_new in (("cached", model, 8), ("full passes", lambda ids: model(ids), 1)):
        stamps, tokens[name] = [], []
        part = first_few(anticipating_part(prompt, prompt[:0], 0, 1 << 30, 0), n_new + 1, stamps, tokens[name])
        perform(player, vocab, [part], [vocab.sep + 1], temperature=0)
        speeds[name] = 3 * n_new / (stamps[n_new] - stamps[0])
    agree = all(np.array_equal(a, b) for a, b in zip(*tokens.values()))
    rows += [(f"sampled tokens/s, {preset}, full context, {name}", f"{speed:.2f}") for name, speed in speeds.items()]
    rows += [("ratio", f"{speeds['cached'] / speeds['full passes']:.1f}"), ("greedy output equal", "yes" if agree else "no")]
    figures = dict(mido_notes_per_s=n_notes / times["mido"], bytes_notes_per_s=n_notes / times["bytes"], files=len(paths), equal=same,
                   compared=len(both), sampled_tokens_per_s=speeds, greedy_equal=agree)
    if device.type == "cuda":
        opt, batch = make_adamw(model, 1e-4, (0.9, 0.999)), args.micro_batch_size or 8
        data = torch.randint(vocab.size, (batch, vocab.context), device=device)
        autocast = partial(torch.autocast, "cuda", dtype)
        run = music_updates(model, opt, lambda _: [(data[:, :-1], data[:, 1:])], 12, 1e-4, 1, autocast=autocast)
        stamps = [(torch.cuda.synchronize(), time.perf_counter())[1] for _ in run]
        speed = batch * (vocab.context - 1) * 10 / (stamps[-1] - stamps[1])
        flops = 6 * sum(p.numel() for p in model.parameters()) + 12 * model.config.n_layer * model.config.n_embd * vocab.context
        peak = next((rate for name, rate in PEAK_FLOPS.items() if name in torch.cuda.get_device_name(device)), math.nan)
        rows += [(f"trained tokens/s, {preset}, {batch} rows", f"{speed:,.0f}"), ("MFU", speed * flops / peak)]
        figures |= dict(train_tokens_per_s=speed, mfu=speed * flops / peak)
    print_table((f"{len(paths)} files, {n_notes:,} notes", "value"), rows)
    print(save_results(out, args, figures), plot_bench(out, args, figures), sep="\n")


def first_few(part, n, stamps, kept):
    """A part cut short after n drawn triplets; keeps the time of each draw, and the triplets."""
    action = part.send(None)
    while not isinstance(action, Ask):
        yield action
        action = part.send(None)
    for _ in range(n):
        drawn = yield action
        stamps.append(time.perf_counter())
        kept.append(drawn)
        yield part.send(drawn)
        action = part.send(None)


# ============================================================================================== sound and pictures


def write_wav(path, events, resolution=100, rate=22_050):
    """A plain synthesiser: decaying harmonics for pitched notes, bursts of noise for drums; mono, 16 bits, peak at −6 dB."""
    path, rng = Path(path), np.random.default_rng(0)
    begins, lasts = events[:, TIME] / resolution, np.maximum(events[:, DUR] / resolution, 0.05)
    sound = np.zeros(int(rate * (float((begins + lasts).max(initial=0)) + 1)), np.float32)
    for begin, last, note in zip(begins.tolist(), lasts.tolist(), events[:, NOTE].tolist()):
        program, pitch = divmod(note, 128)
        t = np.arange(int(rate * (min(last, 0.25) if program == DRUMS else last + 0.1)), dtype=np.float32) / rate
        if program == DRUMS:
            wave_ = rng.standard_normal(len(t), np.float32) * np.exp(-t * (12 if pitch < 40 else 30))
            if pitch < 37:  # a bass drum has a pitch of its own
                wave_ = 0.3 * wave_ + 2 * np.sin(2 * np.pi * 55 * t) * np.exp(-t * 12)
        else:
            frequency = 440 * 2 ** ((pitch - 69) / 12)
            n_harmonics, decay = (3, 0.5) if 64 <= program < 80 else (6, 2.0) if program < 40 else (4, 0.8)
            wave_ = sum(np.sin(2 * np.pi * k * frequency * t) / k**1.5 for k in range(1, n_harmonics + 1) if k * frequency < rate / 2)
            wave_ = wave_ * np.exp(-decay * t) * np.clip((last + 0.1 - t) / 0.1, 0, 1)  # released over a tenth of a second
        place = int(begin * rate)
        sound[place : place + len(t)] += wave_ * np.minimum(1, t / 0.005)
    sound *= 0.5 / max(float(np.abs(sound).max(initial=0)), 1e-9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


COLOURS = {"melody": "#d1495b", "prompt": "#8d99ae", "given": "#8d99ae", "generated": "#00798c"}


def draw_roll(ax, title, events, labels, resolution):
    """Notes as bars, one colour a label; drums below the pitched notes."""
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    drums = events[:, NOTE] >> 7 == DRUMS
    pitches = events[:, NOTE] & 127
    floor = int(pitches[~drums].min(initial=60)) - 4
    kits = np.unique(pitches[drums])
    heights = np.where(drums, floor - len(kits) + np.searchsorted(kits, pitches) if len(kits) else 0, pitches)
    begin, end = events[:, TIME] / resolution, (events[:, TIME] + np.maximum(events[:, DUR], 0.2)) / resolution
    corners = np.stack([begin, heights - 0.4, begin, heights + 0.4, end, heights + 0.4, end, heights - 0.4], 1).reshape(-1, 4, 2)
    for k, name in enumerate(dict.fromkeys(labels.tolist())):
        ax.add_collection(PolyCollection(corners[labels == name], facecolor=COLOURS.get(name) or colormaps["tab20"](k), label=name,
                                         edgecolor="white", lw=0.4 if len(events) < 500 else 0))
    ax.autoscale()
    ax.set(title=title, ylabel="MIDI pitch" + " (drums below)" * bool(len(kits)), xlabel="seconds")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)


def plot_rolls(out, args, pictures, resolution):
    def draw(axes):
        for ax, (title, events, labels) in zip(axes[:, 0], pictures):
            draw_roll(ax, title, events, labels, resolution)

    return figure(out, f"{args.task}.png", args, draw, nrows=len(pictures), squeeze=False, figsize=(11, 3.4 * len(pictures)))


def plot_demo_rolls(out, args, pictures, means, limits):
    def draw(axes):
        for ax, (title, events, labels) in zip(axes.flat, pictures):
            draw_roll(ax, title, events, labels, MINI.resolution)
        ax = axes.flat[3]
        ax.barh(range(len(means)), means.values(), color=["#00798c", "#edae49", "#8d99ae", "#8d99ae"])
        for k, limit in enumerate(limits[:3]):
            ax.axvline(limit, color="black", ls=":", lw=1)
            ax.text(limit + 0.005, -0.5, f"{k}", va="bottom")
        ax.set_yticks(range(len(means)), means)
        ax.invert_yaxis()
        ax.set(xlim=(0, 1.02), xlabel="bars whose bass root is right")
        ax.set_title("all held-out pieces; dotted: best possible for who\nhas heard 0, 1, 2 melody notes of the bar", pad=16)

    return figure(out, "demo.png", args, draw, nrows=2, ncols=2, figsize=(14, 8))


def plot_sweep(out, args, results, limits):
    def draw(ax):
        ax.plot([r["delta_s"] for r in results], [r["root"] for r in results], "o-", label="anticipatory model, sampled")
        for k, limit in enumerate(limits[:3]):
            ax.axhline(limit, color="black", ls=":", lw=1, label="best knowing the last chord and 0, 1, 2 melody notes" * (k == 0) or None)
        ax.set(xlabel="δ: seconds by which the melody is told ahead", ylabel="bars whose bass root is right", ylim=(0, 1.05),
               title="What looking ahead is worth; a bar is 2 s")
        ax.legend()

    return figure(out, "delta_sweep.png", args, draw, figsize=(7, 4.5))


def plot_lengths(out, args, lengths, seconds):
    def draw(axes):
        axes[0].hist(lengths, 30)
        axes[0].set(xlabel="tokens a piece, arrival encoding", ylabel="pieces", title="figure 2 of the paper, these files")
        axes[1].hist(np.array(lengths) / np.maximum(seconds, 1), 30)
        axes[1].set(xlabel="tokens a second", ylabel="pieces", title="figure 3 of the paper, these files")

    return figure(out, "tokenize.png", args, draw, ncols=2, figsize=(10, 3.6))


def plot_losses(out, args, records):
    def draw(ax):
        ax.plot([r["step"] for r in records], [r["loss"] for r in records], "o-", ms=3)
        ax.set(xlabel="updates", ylabel="training loss, nats a token", title=f"{args.task}, {args.preset or 'mini'}")

    return figure(out, f"{args.task}.png", args, draw, figsize=(6, 4))


def plot_bars(out, args, slots, encoding):
    def draw(ax):
        names = ("times", "durations", "notes") if encoding == "arrival" else ("first", "second", "third")
        ax.bar(names, slots, color="#00798c")
        ax.set(ylabel="bits a token", title="held-out loss, slot by slot" if encoding == "arrival" else "held-out loss, every third token")

    return figure(out, "eval.png", args, draw, figsize=(5, 4))


def plot_bench(out, args, figures):
    def draw(axes):
        axes[0].bar(("obvious mido loop", "this file"), (figures["mido_notes_per_s"], figures["bytes_notes_per_s"]), color="#00798c")
        axes[0].set(ylabel="notes/s, one core", title="reading MIDI", yscale="log")
        axes[1].bar(list(figures["sampled_tokens_per_s"]), list(figures["sampled_tokens_per_s"].values()), color="#00798c")
        axes[1].set(ylabel="sampled tokens/s", title="sampling at full context", yscale="log")

    return figure(out, "bench.png", args, draw, ncols=2, figsize=(9, 4))


# ============================================================================================== command line

TASKS = {"demo": demo, "tokenize": tokenize, "train": train, "finetune": finetune, "eval": evaluate_music, "continue": continue_piece,
         "accompany": accompany, "infill": infill, "inspect": inspect_tokens, "delta_sweep": delta_sweep, "play": play, "plot": plot_piece,
         "bench": bench}


def time_span(text):
    """argparse type: FROM:TO in seconds."""
    first, last = (float(part) for part in text.split(":"))
    if not (0 <= first < math.inf and 0 <= last < math.inf):
        raise argparse.ArgumentTypeError(f"{text}: times are seconds from 0 on")
    return first, last


def program_number(text):
    return text if text == "auto" else number(int, 0, 128)(text)


def program_list(text):
    return [number(int, 0, 128)(part) for part in text.split(",")]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = fail  # one line, exit code 2
    flag, count = parser.add_argument, number(int, 1)
    flag("task", nargs="?", choices=TASKS, default="demo", help="demo (the default): accompany a melody, with and without anticipation, "
         "where the right answer is known; tokenize DIR; train; finetune; eval; continue, accompany, infill X.mid; inspect X.mid or "
         "rows.bin; delta_sweep: what looking ahead is worth; play, plot X.mid: sound, picture; bench: speed")
    flag("path", nargs="?", help="a MIDI file, or for tokenize a folder of them")
    flag("--ckpt", help="checkpoint: a file (out/anticipation/demo/anticipatory.pt) or hub:NAME, as hub:music-small-800k (download)")
    flag("--data", help="train, finetune, eval: band (default), a folder of MIDI files or written by tokenize, rows.bin; bench: a folder")
    flag("--preset", choices=SIZES, help="train, bench: size of the model (train: mini; bench: small)")
    flag("--encoding", choices=("arrival", "interarrival"), default="arrival", help="train, tokenize --copies: triplets, or the baseline")
    flag("--prior", choices=PRIORS, help="train: which copies have controls: paper (the default for files), melody (for the band), none")
    flag("--copies", type=number(int, 0), default=0, help="tokenize: augmented copies of each piece in rows.bin (the paper: 30)")
    flag("--events_only", action="store_true", help="train: no loss on controls (as the demo; the paper has it on all tokens)")
    flag("--steps", type=count, help="updates (demo: 500; train on a GPU: 100,000, the paper's first; finetune there: 2,000)")
    flag("--batch_size", type=count, help="train: rows an update, over all ranks (512 on a GPU, the paper's; 8 on a CPU)")
    flag("--micro_batch_size", type=count, help="train: rows a forward pass (8, if it divides)")
    flag("--lr", type=number(float, 0), help="peak learning rate (the paper's for the model; mini 0.006, ours; finetune: a tenth)")
    flag("--warmup", type=number(int, 0), help="train: updates of linear warm-up (1000, the paper's; mini 20)")
    flag("--save_every", type=count, default=1000, help="train: updates between checkpoints")
    flag("--log_every", type=count, default=10, help="train: updates between records")
    flag("--loaders", type=number(int, 0), default=0, help="train: processes that make rows (0 = none)")
    flag("--resume", action="store_true", help="train: go on from the checkpoint in --out")
    flag("--compile", action="store_true", help="train: torch.compile")
    flag("--split", choices=("train", "valid", "test"), default="test", help="eval: which pieces of --data")
    flag("--level", choices=("hard", "easy"), default="hard", help="demo, delta_sweep, eval: pieces of the band")
    flag("--pieces", type=count, default=48, help="demo, delta_sweep, eval: held-out pieces of the band")
    flag("--seeds", type=count, default=1, help="demo: number of seeds, from --seed on")
    flag("--start", type=number(float, 0), help="continue, accompany: seconds of the file that stay (5; mini 4)")
    flag("--end", type=number(float, 0), help="continue, accompany: second at which to stop (start + 15; mini start + 6)")
    flag("--melody", type=program_number, default="auto", help="accompany, inspect: its General MIDI program, 0 to 127; auto: the highest")
    flag("--span", type=time_span, help="infill: FROM:TO in seconds")
    flag("--instruments", type=program_list, help="accompany, infill: programs to play, as 0,32,128 (those of the file)")
    flag("--n", type=count, default=1, help="continue, accompany, infill: versions")
    flag("--top_p", type=number(float, 1e-9, 1), default=0.95, help="nucleus (0.95, the paper's; its repository has 0.98)")
    flag("--temperature", type=number(float, 1e-3), default=1.0, help="of sampling")
    flag("--greedy", action="store_true", help="always the likeliest token")
    flag("--window", choices=("hop", "exact"), default="hop", help="context full: move seldom, or at every triplet as the authors do")
    flag("--enforce_density", action=argparse.BooleanOptionalAction, help="no gap over a second, as in all training data (on for mini)")
    flag("--rows", type=count, default=20, help="inspect: triplets to show")
    flag("--row", type=number(int, 0), default=0, help="inspect rows.bin: which row")
    flag("--workers", type=count, help="tokenize, demo: processes (all cores)")
    flag("--device", default="auto", help="auto is cuda, else mps, else cpu")
    flag("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="train: of matmuls; auto: bfloat16 on cuda")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="of weights, data and draws")
    flag("--out", help="folder for results (out/anticipation/<task>)")
    flag("--no_plot", action="store_true", help="write no figure")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.path and args.task in ("demo", "train", "finetune", "eval", "delta_sweep", "bench"):
        fail(f"{args.task} takes no {args.path}; did you mean --data {args.path}?")
    return args


def main():
    args = parse_args()
    try:
        TASKS[args.task](args)
    except KeyboardInterrupt:
        fail("stopped")


if __name__ == "__main__":
    main()
