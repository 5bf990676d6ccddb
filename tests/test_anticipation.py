"""anticipation.py: encodings, MIDI files, controls, the model and its sampler; the claim in miniature; the command line."""

import json
import math
import os
import subprocess
import sys
import wave
from collections import deque
from itertools import permutations
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

import anticipation as A
from anticipation import CTRL, DRUMS, DUR, MINI, NOTE, REST, SEP, TIME, MusicConfig, MusicGPT, Vocabulary

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")
PAPER = Vocabulary()
TINY = Vocabulary(resolution=4, max_time=24, max_duration=4, programs=(0, 32, DRUMS), context=34, delta=6, density=3)

TWINKLE = [(0, 48, 60), (50, 48, 60), (100, 48, 67), (150, 48, 67), (200, 48, 69), (250, 48, 69), (300, 95, 67), (400, 48, 65),
           (450, 48, 65), (500, 48, 64), (550, 48, 64), (600, 48, 62), (650, 48, 62), (700, 95, 60)]
TWINKLE_ARRIVAL = [55026, 55025, 55025, 55025, 0, 10048, 11060, 50, 10048, 11060, 100, 10048, 11067, 150, 10048, 11067, 200, 10048, 11069,
                   250, 10048, 11069, 300, 10095, 11067, 400, 10048, 11065, 450, 10048, 11065, 500, 10048, 11064, 550, 10048, 11064,
                   600, 10048, 11062, 650, 10048, 11062, 700, 10095, 11060]
TWINKLE_INTERARRIVAL = [1060, 48, 17572, 2, 1060, 48, 17572, 2, 1067, 48, 17579, 2, 1067, 48, 17579, 2, 1069, 48, 17581, 2, 1069, 48,
                        17581, 2, 1067, 95, 17579, 5, 1065, 48, 17577, 2, 1065, 48, 17577, 2, 1064, 48, 17576, 2, 1064, 48, 17576, 2,
                        1062, 48, 17574, 2, 1062, 48, 17574, 2, 1060, 95, 17572]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def triplets(rows, control=0):
    return np.array([(*row, control) for row in rows], np.int64).reshape(-1, 4)


def random_piece(rng, n, longest=200, programs=(0, 32, 73, DRUMS), control=0):
    times = np.sort(rng.integers(longest, size=n))
    notes = 128 * rng.choice(programs, n) + rng.integers(40, 50, n)
    return np.stack([times, rng.integers(1, 4, n), notes, np.full(n, control)], 1)


# ------------------------------------------------------------------------------------------------ 1. the mathematics: encodings


def test_id_tables():
    """The blocks of appendix C, and the small layout, from one object."""
    assert PAPER.slots == ((0, 10_000), (10_000, 11_000), (11_000, 27_513))
    assert (PAPER.rest, PAPER.control, PAPER.sep, PAPER.size, PAPER.context) == (27_512, 27_513, 55_025, 55_028, 1 + 3 * 341)
    assert PAPER.control + PAPER.first_note == 38_513 and (MINI.size, MINI.context % 3) == (1158, 1)
    last = triplets([(9999, 999, 128 * 128 + 127)], 1)
    assert A.triplet_ids(last, PAPER).tolist() == [37_512, 38_512, 55_024]
    assert A.triplet_ids(triplets([(7, 0, REST), (0, 0, SEP)]), PAPER).tolist() == [7, 10_000, 27_512, 55_025, 55_025, 55_025]


def test_twinkle(tmp_path):
    """The paper's printed rows, through a file."""
    path = A.write_midi(tmp_path / "twinkle.mid", triplets(TWINKLE))
    events = A.read_midi(path)
    assert A.piece_row(events, np.zeros(14, bool), PAPER).tolist() == TWINKLE_ARRIVAL
    seconds, notes, _, on = A.read_messages(path)
    for compat in (False, True):
        assert A.interarrival_ids(seconds, notes, on, compat).tolist() == TWINKLE_INTERARRIVAL
    assert A.interarrival_of(events, PAPER).tolist() == TWINKLE_INTERARRIVAL


def test_interarrival_drift():
    """Steps of 4 ms: rounded one by one nothing ever moves; as differences of rounded times the clock keeps its place."""
    seconds, notes, on = np.arange(1, 101) * 0.004, np.full(100, 60), np.ones(100, bool)
    assert not (A.interarrival_ids(seconds, notes, on, compat=True) < 1000).any()
    exact = A.interarrival_ids(seconds, notes, on)
    assert exact[exact < 1000].sum() == 40
    assert A.interarrival_ids([30.0], [60], [True])[0] == 999 and A.interarrival_ids([0.0], [60], [False]).tolist() == [17_572]


@pytest.mark.parametrize("vocab", [PAPER, MINI])
def test_ids_and_back(vocab):
    rng = np.random.default_rng(0)
    n = 400
    sequence = np.stack([rng.integers(vocab.max_time, size=n), rng.integers(vocab.max_duration, size=n),
                         128 * rng.choice(vocab.programs, n) + rng.integers(128, size=n), rng.integers(2, size=n)], 1)
    sequence[5], sequence[9] = (3, 0, REST, 0), (0, 0, SEP, 0)
    ids = A.triplet_ids(sequence, vocab)
    assert np.array_equal(A.triplets_of(ids, vocab), sequence)
    low = [ids[k::3][sequence[:, CTRL] == 1].min() for k in range(3)]
    assert low[0] >= vocab.control and low[1] >= vocab.control + vocab.max_time and low[2] >= vocab.control + vocab.first_note
    for bad in ((vocab.max_time, 0, 60, 0), (-1, 0, 60, 0), (0, vocab.max_duration, 60, 0)):  # trap: times that run into the next block
        with pytest.raises(ValueError, match="does not fit"):
            A.triplet_ids(np.array([bad]), vocab)
    for wrong in ([vocab.rest, vocab.max_time, vocab.first_note], [0, vocab.rest, vocab.first_note], [0, vocab.max_time, 0],
                  [0, vocab.max_time, vocab.control + vocab.first_note], [vocab.sep, vocab.sep, vocab.first_note],
                  [vocab.control, vocab.control + vocab.max_time, vocab.sep]):
        with pytest.raises(ValueError, match="triplet 1"):
            A.triplets_of([0, vocab.max_time, vocab.first_note, *wrong], vocab)


def naive_pad(times, end, density):
    out, previous = [], 0
    for time in [*times, None]:
        while (end if time is None else time) > previous + density:
            previous += density
            out.append(("R", previous))
        if time is not None:
            out.append(("e", time))
            previous = time
    return out


def test_padding():
    rng = np.random.default_rng(1)
    for n in (0, 1, 2, 30):
        for _ in range(20):
            events = random_piece(rng, n, 300)
            end, density = int(rng.integers(400)), int(rng.integers(1, 30))
            padded = A.pad_with_rests(events, end, density)
            expected = naive_pad(events[:, TIME].tolist(), end, density)
            assert [("R" if e[NOTE] == REST else "e", e[TIME]) for e in padded.tolist()] == expected
    gap = A.pad_with_rests(triplets([(0, 1, 60), (100, 1, 60), (201, 1, 60)]), 301, 100)
    assert gap[:, TIME].tolist() == [0, 100, 200, 201]  # a gap of exactly a second gets no REST, 101 bins do


def naive_anticipate(events, controls, delta):
    """Algorithm 1, word by word."""
    out, last, waiting = [], 0, deque(controls)
    for event in events:
        while waiting and last >= waiting[0][TIME] - delta:
            out.append(waiting.popleft())
        out.append(event)
        last = event[TIME]
    return out, list(waiting)


def test_interleaving_word_by_word():
    rng = np.random.default_rng(2)
    for n, k in ((0, 3), (1, 1), (30, 0), (30, 12), (12, 30)):
        for delta in (0, 7, 25, 10_000):
            events, controls = random_piece(rng, n), random_piece(rng, k, control=1)
            told, waiting = A.anticipate(events, controls, delta)
            expected, left = naive_anticipate(events, controls, delta)
            assert told.tolist() == [e.tolist() for e in expected] and waiting.tolist() == [e.tolist() for e in left]
            assert len(told) + len(waiting) == n + k
            both = np.concatenate([told, waiting])
            assert np.array_equal(both[both[:, CTRL] == 0], events) and np.array_equal(both[both[:, CTRL] == 1], controls)
    assert np.array_equal(A.anticipate(events, controls[:0], 5)[0], events)
    assert np.array_equal(A.anticipate(events, controls, 10_000)[0][: len(controls)], controls)  # δ = ∞: all controls first


def test_the_papers_cases():
    def order(times, s, delta, pad=None):
        events = triplets([(10 * t, 1, 60) for t in times])
        if pad:
            events = A.pad_with_rests(events, 10 * times[-1], 10 * pad)
        told, waiting = A.anticipate(events, triplets([(round(10 * s), 1, 60)], 1), 10 * delta)
        return "".join("u" if t[CTRL] else "R" if t[NOTE] == REST else "e" for t in told), len(waiting)

    assert order((1, 3, 5), 7, 5) == ("eeue", 0)
    assert order((1, 2, 5), 4.5, 2) == ("eee", 1)  # after the last event there is no place: left over
    assert order((1, 2, 5), 4.5, 2, pad=1) == ("eeRuRe", 0)
    assert order((1, 3), 5, 5) == ("uee", 0)  # time 0 at the start: a control within δ comes before the first event


def test_places_are_stopping_times():
    """What stands up to a control is the same whatever comes after it."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        events, controls = random_piece(rng, 20), random_piece(rng, 8, control=1)
        told, _ = A.anticipate(events, controls, 30)
        for place in np.flatnonzero(told[:, CTRL]):
            n_before = int((told[:place, CTRL] == 0).sum())
            changed = events.copy()
            changed[n_before:, TIME] += rng.integers(1, 100)
            changed[n_before:, NOTE] = 1
            again, _ = A.anticipate(changed, controls, 30)
            assert np.array_equal(again[: place + 1], told[: place + 1])


def test_dense_sequences_tell_in_time():
    """Δ*-dense events: no control is left over, each is told at least δ − Δ* ahead, and nothing is lost on the way back."""
    rng = np.random.default_rng(4)
    for _ in range(30):
        piece = random_piece(rng, 60, 3000)
        mask = rng.random(60) < 0.5
        sequence = A.sequence_of(piece, mask, PAPER)
        assert sequence[0].tolist() == [0, 0, SEP, 0] and not sequence[-1, CTRL]
        gaps = np.diff(sequence[sequence[:, CTRL] == 0, TIME])
        assert gaps.max() <= 100
        for place in np.flatnonzero(sequence[:, CTRL]):
            reached = sequence[:place][sequence[:place, CTRL] == 0, TIME].max()
            assert sequence[place, TIME] <= PAPER.delta or sequence[place, TIME] - reached >= PAPER.delta - PAPER.density
        back = A.separate(sequence)
        assert sorted(map(tuple, back.tolist())) == sorted(map(tuple, piece.tolist()))
        assert (np.diff(back[:, TIME]) >= 0).all()


# ------------------------------------------------------------------------------------------------ 1. the mathematics: MIDI files


def vlq(n):
    out = [n & 127]
    while n := n >> 7:
        out.insert(0, n & 127 | 128)
    return bytes(out)


def midi_bytes(*tracks, division=480, kind=1):
    """tracks: lists of (delta, message bytes)."""
    chunks = b""
    for track in tracks:
        body = b"".join(vlq(delta) + bytes(message) for delta, message in track)
        chunks += b"MTrk" + len(body).to_bytes(4, "big") + body
    return b"MThd" + (6).to_bytes(4, "big") + b"".join(n.to_bytes(2, "big") for n in (kind, len(tracks), division)) + chunks


END = (0, [0xFF, 0x2F, 0])


def events_of(tmp_path, *tracks, **options):
    (tmp_path / "x.mid").write_bytes(midi_bytes(*tracks, **options))
    return A.read_midi(tmp_path / "x.mid")[:, :3].tolist()


@pytest.mark.parametrize("track, expected", [
    ([(0, [0x90, 60, 64]), (24, [0x80, 60, 0])], [[0, 2, 60]]),  # 24 ticks at 120 beats a minute are 2.5 bins: half to even
    ([(24, [0x90, 60, 64]), (24, [0x80, 60, 0])], [[2, 2, 60]]),  # the duration from unrounded times: 2.5 again, not 5 − 2
    ([(0, [0x90, 60, 64]), (34, [0x80, 60, 0])], [[0, 4, 60]]),  # 3.54
    ([(0, [0x90, 60, 64]), (96, [60, 0])], [[0, 10, 60]]),  # running status; velocity 0 is off
    ([(0, [0x90, 60, 64]), (0, [0xFF, 1, 2, 65, 66]), (96, [60, 0])], [[0, 10, 60]]),  # which a meta message leaves alone
    ([(0, [0x99, 36, 64]), (96, [0x89, 36, 0])], [[0, 10, 128 * 128 + 36]]),  # channel 10 as people count: drums
    ([(0, [0xC3, 40]), (0, [0x93, 60, 64]), (96, [0x83, 60, 0])], [[0, 10, 128 * 40 + 60]]),
    ([(0, [0x90, 60, 64]), (96, [0xC0, 5]), (96, [0x80, 60, 0])], [[0, 25, 60]]),  # a program change leaves the note open: 250 ms
    ([(0, [0x90, 60, 64])], [[0, 25, 60]]),
    ([(96, [0x80, 60, 0]), (0, [0x90, 60, 64]), (96, [0x80, 60, 0])], [[10, 10, 60]]),  # a note-off of nothing
    ([(0, [0x90, 60, 64]), (480 * 24, [0x80, 60, 0])], [[0, 999, 60]]),  # 12 s
    ([(0, [0x90, 60, 64]), (96, [0x90, 60, 64]), (96, [0x80, 60, 0]), (96, [0x80, 60, 0])],
     [[0, 20, 60], [10, 20, 60]]),  # first in, first out
    ([(0, [0x90, 60, 64]), (480, [0xFF, 0x51, 3, 15, 66, 64]), (480, [0x80, 60, 0])], [[0, 150, 60]]),  # then 1,000,000 µs a beat
    ([(0, [0xF0, 3, 1, 2, 0xF7]), (0, [0xB0, 7, 100]), (0, [0xD0, 9]), (0, [0xE0, 0, 64]), (128, [0x90, 60, 1])], [[13, 25, 60]]),
])
def test_rules_of_reading(tmp_path, track, expected):
    assert events_of(tmp_path, [*track, END]) == expected


def test_tracks_are_merged(tmp_path):
    """Ties keep the order of the tracks; a tempo of one track holds for all; the end of a track cuts no time in two."""
    tempo = [(480, [0xFF, 0x51, 3, 3, 208, 144]), END]  # 250,000 µs from tick 480 on
    late = [(480, [0x90, 64, 9]), (480, [0x80, 64, 0]), END]
    early = [(480, [0x90, 62, 9]), (960, [0x80, 62, 0]), END]
    assert events_of(tmp_path, tempo, late, early) == [[50, 25, 64], [50, 50, 62]]
    assert events_of(tmp_path, early, late, tempo) == [[50, 50, 62], [50, 25, 64]]
    rest_of_file = b"JUNK" + (4).to_bytes(4, "big") + b"abcd"
    data = midi_bytes(early)
    (tmp_path / "x.mid").write_bytes(data[:14] + rest_of_file + data[14:])  # a chunk of another kind is skipped
    assert len(A.read_midi(tmp_path / "x.mid")) == 1


def random_file(path, seed):
    """Several tracks, tempi, programs and controllers, odd divisions, written by mido."""
    rng = np.random.default_rng(seed)
    file = mido.MidiFile(type=1, ticks_per_beat=int(rng.choice([96, 120, 192, 480, 1000])))
    for _ in range(4):
        track = mido.MidiTrack()
        for _ in range(150):
            wait, channel, pitch = int(rng.exponential(40)), int(rng.choice([0, 1, 9])), int(rng.integers(60, 64))
            track.append([
                mido.Message("note_on", channel=channel, note=pitch, velocity=9, time=wait),
                mido.Message("note_on", channel=channel, note=pitch, velocity=int(rng.integers(2)) * 9, time=wait),
                mido.Message("note_off", channel=channel, note=pitch, time=wait),
                mido.Message("program_change", channel=channel, program=int(rng.integers(3)), time=wait),
                mido.Message("control_change", channel=channel, control=7, value=1, time=wait),
                mido.MetaMessage("set_tempo", tempo=int(rng.integers(200_000, 900_000)), time=wait),
                mido.MetaMessage("text", text="la", time=wait)][rng.integers(7)])
        track.append(mido.MetaMessage("end_of_track", time=int(rng.integers(300))))
        file.tracks.append(track)
    file.save(path)
    return path


def test_bits_equal_midos_on_random_files(tmp_path):
    for seed in range(12):
        path = random_file(tmp_path / "x.mid", seed)
        ours, theirs = A.read_midi(path), A.mido_events(path)
        assert len(ours) > 60 and np.array_equal(ours, theirs), seed
        now, seconds = 0.0, []
        for message in mido.MidiFile(path):
            now += message.time
            seconds += [now] if message.type in ("note_on", "note_off") else []
        assert A.read_messages(path)[0].tolist() == seconds  # to the last bit


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_bits_equal_midos_on_real_files():
    paths = sorted(Path(DATA, "anticipation/midi").glob("*.mid"))
    paths = [path for path in paths if path.stat().st_size < 15_000]  # the rest: python anticipation.py bench --data
    assert len(paths) > 10
    for path in paths:
        assert np.array_equal(A.read_midi(path), A.mido_events(path)), path


GOOD = midi_bytes([(0, [0x90, 60, 64]), (96, [0x80, 60, 0]), END])


@pytest.mark.parametrize("data, words", [
    (b"RIFF....", "does not begin with MThd"), (b"", "does not begin with MThd"), (GOOD[:-6], "truncated: track 0"),
    (GOOD[:16], "truncated: track 0"), (midi_bytes([END], kind=2), "type 2"), (midi_bytes([END], division=0xE728), "SMPTE"),
    (midi_bytes([END], division=0), "division of 0"), (midi_bytes([(0, [0x90, 60, 200]), END]), "data byte over 127"),
    (midi_bytes([(0, [0xC0, 200]), END]), "data byte over 127"), (midi_bytes([(0, [0xB0, 7, 200]), END]), "data byte over 127"),
    (midi_bytes([(0, [60, 64]), END]), "running status without"), (midi_bytes([(0, [0xF4]), END]), "undefined status 0xf4"),
    (midi_bytes([(0, [0xF0, 1, 0xF7]), (0, [60, 64]), END]), "running status without"),
    (midi_bytes([(0, [0xFF, 0x51, 1, 9]), END]), "tempo of 1 bytes"), (midi_bytes([(0, [0x90, 60])]), "ends within a message"),
    (midi_bytes([(0, [0xFF, 1, 90, 65])], [END]), "past the end"),
])
def test_broken_files_say_why(tmp_path, data, words):
    (tmp_path / "x.mid").write_bytes(data)
    with pytest.raises(A.MidiError, match=words):
        A.read_midi(tmp_path / "x.mid")


def test_filter_in_its_order():
    def piece(n, seconds, programs):
        return triplets([(round(100 * seconds * k / max(1, n - 1)), 1, 128 * (k % programs) + 60) for k in range(n)])

    assert A.why_not(piece(99, 5, 20)) == "99 notes, fewer than 100" and A.why_not(piece(100, 5, 20)) == "5.0 s, shorter than 10"
    assert A.why_not(piece(100, 3601, 20)) == "3601 s, longer than 3600" and A.why_not(piece(100, 60, 17)) == "17 instruments, more than 16"
    assert A.why_not(piece(100, 10, 16)) == A.why_not(piece(100, 3600, 1)) == "" and A.why_not(triplets([])).startswith("0 notes")


def test_files_of_any_length_come_back(tmp_path):
    """Trap: absolute times past 275.13 s look like control ids, those at 550.25 s like SEP."""
    rng = np.random.default_rng(5)
    for seconds in (300, 600, 4000):
        times = np.sort(rng.choice(100 * seconds // 50, 80, replace=False)) * 50
        times[-1], times[-2] = 55_025, 27_513
        events = triplets([(t, int(rng.integers(1, 50)), 128 * int(rng.choice((0, 40, DRUMS))) + 60) for t in np.sort(times)])
        assert np.array_equal(A.read_midi(A.write_midi(tmp_path / "x.mid", events)), events)
    mini = triplets([(0, 8, 60), (3, 1, 128 * 32 + 40)])
    assert A.read_midi(A.write_midi(tmp_path / "x.mid", mini, MINI.resolution))[:, :2].tolist() == [[0, 200], [75, 25]]


@pytest.mark.parametrize("programs", [[DRUMS, *range(15)], [*range(16), DRUMS], list(range(20))])
def test_channels(tmp_path, programs):
    """Trap: drums take no melodic channel; more than 15 programs share channels, and every note still has its own program."""
    events = triplets([(20 * k, 90, 128 * p + 60 + j) for j in range(3) for k, p in enumerate(programs, j * len(programs))])
    path = A.write_midi(tmp_path / "x.mid", events)
    assert np.array_equal(A.read_midi(path), events)
    channels = {(m.channel == 9, m.channel) for m in mido.MidiFile(path) if m.type == "note_on"}
    assert len({c for drums, c in channels if not drums}) == min(15, len(set(programs) - {DRUMS}))
    assert any(drums for drums, _ in channels) == (DRUMS in programs)


def test_offs_before_ons(tmp_path):
    """Trap: a note repeated at the tick where it ends would be cut if its note-on were written first."""
    path = A.write_midi(tmp_path / "x.mid", triplets([(0, 10, 60), (10, 10, 60), (20, 0, 60)]))
    messages = [(m.type, m.time) for m in mido.MidiFile(path).tracks[0] if not m.is_meta and m.type.startswith("note")]
    assert messages == [("note_on", 0), ("note_off", 10), ("note_on", 0), ("note_off", 10), ("note_on", 0), ("note_off", 1)]
    nested = triplets([(0, 100, 60), (20, 10, 60)])
    assert A.read_midi(A.write_midi(path, nested))[:, DUR].tolist() == [20, 10]  # cut where the key is struck again
    assert A.read_midi(A.write_midi(path, nested, clip=False))[:, DUR].tolist() == [30, 80]  # what MIDI makes of it otherwise


def test_sound_file(tmp_path):
    events = triplets([(0, 50, 60), (50, 20, 128 * 32 + 30), (50, 10, 128 * DRUMS + 36), (70, 10, 128 * DRUMS + 42)])
    with wave.open(str(A.write_wav(tmp_path / "x.wav", events))) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 22_050)
    assert abs(int(np.abs(sound).max()) - 16_383) <= 1 and abs(len(sound) - 1.8 * 22_050) <= 1  # −6 dB
    spectrum = np.abs(np.fft.rfft(sound[:10_000]))
    assert abs(spectrum.argmax() * 22_050 / 10_000 - 261.6) < 3  # middle C


# ------------------------------------------------------------------------------------------------ 1. the mathematics: training data


class Waits:
    """A generator whose exponential waits are given."""

    def __init__(self, waits):
        self.waits = list(waits)

    def exponential(self, mean):
        assert mean == 20 * PAPER.resolution
        return self.waits.pop(0) if self.waits else 1e9


def test_spans_word_by_word():
    rng = np.random.default_rng(6)
    for _ in range(20):
        piece = random_piece(rng, 80, 9000)
        piece[:, TIME] = piece[:, TIME] // 100 * 100  # so that events stand at the very end of a span
        waits = rng.exponential(600, 30) * (rng.random(30) < 0.8)
        expected, queue, open_until, opens = [], list(waits), piece[0, TIME], None
        for time in piece[:, TIME]:  # a span lasts δ; the event at or past its end draws the next wait, and may open the next span
            if opens is None and time >= open_until:
                opens = time + int(queue.pop(0))
            if opens is not None and time >= opens:
                opens, open_until = None, time + PAPER.delta
            expected.append(opens is None)
        assert A.choose_controls(piece, "spans", Waits(waits), PAPER).tolist() == expected


def test_prior_statistics():
    """Ten, ten, forty and forty per cent; tolerances are four standard errors."""
    assert [A.PRIOR.count(kind) for kind in ("none", "spans", "random", "instruments")] == [1, 1, 4, 4]
    rng = np.random.default_rng(7)
    piece = random_piece(rng, 300, 60_000)
    shares = [A.choose_controls(piece, "random", rng, PAPER).mean() for _ in range(600)]
    assert abs(np.mean(shares) - 0.5) < 4 * np.std(shares) / 600**0.5 and min(shares) < 0.15 and max(shares) > 0.85
    span = [A.choose_controls(piece, "spans", rng, PAPER).mean() for _ in range(600)]
    gap = 600 / 300  # seconds between events; a cycle is a wait, the gap to the event that opens, the span, the gap to the one after
    assert abs(np.mean(span) - (gap + 5) / (20 + gap + 5 + gap)) < 4 * np.std(span) / 600**0.5 + 0.02
    counts = {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}
    for _ in range(600):
        mask = A.choose_controls(piece, "instruments", rng, PAPER)
        chosen = set((piece[mask, NOTE] >> 7).tolist())
        assert not set((piece[~mask, NOTE] >> 7).tolist()) & chosen
        counts[len(chosen)] += 1
    assert counts[0] == counts[4] == 0 and all(abs(counts[j] - 200) < 4 * (600 * 2 / 9) ** 0.5 for j in (1, 2, 3))
    alone = random_piece(rng, 30, programs=(5,))
    assert not A.choose_controls(alone, "instruments", rng, PAPER).any()  # and so the flag says autoregress, unlike the authors'
    assert A.flag_of(A.sequence_of(alone, np.zeros(30, bool), PAPER), PAPER) == 55_026
    assert not A.choose_controls(piece, "none", rng, PAPER).any()
    assert set((piece[A.choose_controls(piece, "melody", rng, PAPER), NOTE] >> 7).tolist()) == {A.melody_of(piece)}


def test_packing():
    """Rows of 1,024; the pieces come back from them; each carries the flag of the piece that owns its first triplet; a row that exceeds
    the clock is dropped, and the next row's flag is its own (trap: the authors keep the dropped one's)."""
    rng = np.random.default_rng(8)
    sequences = []
    for n in (200, 350, 20, 600, 90):
        piece = random_piece(rng, n, 4000)
        sequences.append(A.sequence_of(piece, (rng.random(n) < 0.4) & (n != 350), PAPER))
    stream, owner = np.concatenate(sequences), np.repeat(range(5), [len(s) for s in sequences])
    rows = A.pack_rows(sequences, PAPER)
    assert rows.dtype == np.uint16 and rows.shape == (len(stream) // 341, 1024)
    for i, row in enumerate(rows.astype(np.int64)):
        cut, read = stream[341 * i : 341 * (i + 1)], A.triplets_of(row[1:], PAPER)
        assert row[0] == 55_026 + sequences[owner[341 * i]][:, CTRL].any()
        first = next((k for k, t in enumerate(cut) if t[NOTE] == SEP), 341)
        assert np.array_equal(read[:, DUR:], cut[:, DUR:]) and np.array_equal(read[first:, TIME], cut[first:, TIME])
        shifts = cut[:first, TIME] - read[:first, TIME]
        assert not first or (len(set(shifts)) == 1 and read[:first, TIME].min() == 0)
    small = Vocabulary(max_time=500, context=31, delta=200)
    long = triplets([(0, 1, 60), (100, 1, 60), (200, 1, 60), (300, 1, 60), (400, 1, 60), (600, 1, 60)])
    other = A.sequence_of(triplets([(t, 1, 60) for t in range(0, 400, 20)]), np.zeros(20, bool), small)
    sequences = [A.sequence_of(long, np.array([0, 0, 1, 0, 0, 0], bool), small), other]
    assert A.flag_of(sequences[0], small) == small.sep + 2 and sum(map(len, sequences)) == 30
    assert A.pack_rows(sequences, small)[:, 0].tolist() == [small.sep + 1] * 2


def test_rows_by_number():
    pieces = [random_piece(np.random.default_rng(k), n, 20_000) for k, n in enumerate((900, 150))]
    rows, flags, later = A.Rows(pieces, PAPER, 3), [], 0
    for i in range(60):
        row = rows[i]
        assert np.array_equal(row, A.Rows(pieces, PAPER, 3)[i]) and len(row) == 1024
        read = A.triplets_of(row[1:], PAPER)  # every id in its slot
        seps = np.flatnonzero(read[:, NOTE] == SEP)
        if len(seps) == 0 or seps[0] > 0:
            assert read[: seps[0] if len(seps) else 341, TIME].min() == 0
        flags.append(int(row[0]))
        later += row[0] == 55_026 and read[:, CTRL].any()  # controls of the piece that follows are not the flag's business
    assert not np.array_equal(rows[0], A.Rows(pieces, PAPER, 4)[0]) and set(flags) == {55_026, 55_027} and later > 0
    inter = A.Rows(pieces, PAPER, 3, interarrival=True)[0]
    assert len(inter) == 1024 and inter.max() <= A.INTERARRIVAL_SEP


def test_targets_of_rows_side_by_side():
    """Trap: in a padded batch the longest row's last target must not become padding; shorter rows end in −1."""
    ids, targets = A.collate_rows([np.arange(5), np.arange(10, 13)])
    assert ids.tolist() == [[0, 1, 2, 3], [10, 11, 0, 0]] and targets.tolist() == [[1, 2, 3, 4], [11, 12, -1, -1]]
    row = A.piece_row(triplets([(0, 1, 60), (2, 1, 128 * 73 + 70), (4, 1, 61)]), np.array([False, True, False]), MINI)
    _, targets = A.collate_rows([row], MINI)
    assert (targets[0] == -1).sum() == 3 and targets[0, :3].tolist() == [MINI.sep] * 3 and targets[0, -1] == row[-1]
    assert (A.collate_rows([row])[1] == -1).sum() == 0


# ------------------------------------------------------------------------------------------------ 1. the mathematics: the model


def tiny_model(vocab=TINY, **changes):
    torch.manual_seed(0)
    model = MusicGPT(MusicConfig(vocab.size, vocab.context, **(dict(n_layer=3, n_head=2, n_embd=16, dropout=0.0) | changes)))
    model.start_from_noise(0.3)
    return model.eval()


@pytest.mark.parametrize("size, n", [("small", 128_103_936), ("medium", 359.71e6), ("large", 780.14e6)])
def test_parameter_counts(size, n):
    with torch.device("meta"):
        model = MusicGPT(MusicConfig(**A.SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(n, rel=1e-4 if size != "small" else 0)


def dense_gpt2(weights, ids, n_head, by_layer):
    """GPT-2 in numpy, from a state dict in its own layout (matrices (in, out)), float64."""
    w = {name: t.double().numpy() for name, t in weights.items()}

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    x = w["wte.weight"][ids] + w["wpe.weight"][: len(ids)]
    for i in range(sum(name.endswith("ln_1.bias") for name in w)):
        h = f"h.{i}."
        qkv = norm(x, h + "ln_1") @ w[h + "attn.c_attn.weight"] + w[h + "attn.c_attn.bias"]
        heads = []
        for q, k, v in zip(*(np.split(part, n_head, -1) for part in np.split(qkv, 3, -1))):
            a = q @ k.T / math.sqrt(q.shape[1]) / (i + 1 if by_layer else 1)
            a = np.where(np.tri(len(ids), dtype=bool), np.exp(a - a.max()), 0)
            heads.append(a / a.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, -1) @ w[h + "attn.c_proj.weight"] + w[h + "attn.c_proj.bias"]
        u = norm(x, h + "ln_2") @ w[h + "mlp.c_fc.weight"] + w[h + "mlp.c_fc.bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ w[h + "mlp.c_proj.weight"] + w[h + "mlp.c_proj.bias"]
    return norm(x, "ln_f") @ w["wte.weight"].T


def gpt2_layout(model, prefix=""):
    matrices = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {prefix + name: (p.t() if name.endswith(matrices) else p).detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("by_layer", [True, False])
def test_logits_of_an_independent_gpt2(by_layer):
    """Trap: without the division by the layer's number the released weights load and produce noise."""
    model = tiny_model(scale_by_layer=by_layer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ids = np.random.default_rng(0).integers(TINY.size, size=TINY.context)
    ours = model(torch.from_numpy(ids)[None])[0].detach().numpy()
    weights = gpt2_layout(model)
    assert np.abs(ours - dense_gpt2(weights, ids, 2, by_layer)).max() < 1e-4
    assert np.abs(ours - dense_gpt2(weights, ids, 2, not by_layer)).max() > 1e-2


def test_loading_the_authors_layout():
    source, other = tiny_model(), tiny_model()
    other.start_from_noise(1.0)
    extra = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(0.0), "lm_head.weight": torch.ones(1)}
    for prefix in ("transformer.", ""):
        other.load_gpt2(gpt2_layout(source, prefix) | {prefix + name: t for name, t in extra.items()})
        assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values()))
    broken = gpt2_layout(source)
    del broken["wpe.weight"]
    with pytest.raises(ValueError, match="wpe.weight is missing, expected \\(34, 16\\)"):
        other.load_gpt2(broken)


def test_cache_equals_full_pass():
    """In pieces of any size, also after forgetting some tokens."""
    model, rng = tiny_model(), np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(TINY.size, size=(3, 30)))
    full = model.trunk(ids).detach()
    cache, at = A.KVCache(model.config, 3, full), 0
    with torch.no_grad():
        for n in (4, 1, 2, 3, 1, 1, 3, 3, 12):
            wrong = model.trunk(torch.zeros(3, 2, dtype=torch.int64), cache) if n == 3 else None
            if wrong is not None:
                cache.length = at
            assert torch.allclose(model.trunk(ids[:, at : at + n], cache), full[:, at : at + n], atol=1e-4)
            at += n
    with pytest.raises(ValueError, match="exceed the context of 34"):
        model.trunk(ids[:, :5], cache)


def test_start_of_the_mini_model():
    model = MusicGPT(MusicConfig(MINI.size, MINI.context, **A.SIZES["mini"]))
    A.start_mini(model, MINI)
    table = model.wte.weight.detach()
    shift = table[MINI.control : MINI.sep] - table[: MINI.rest]
    assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-6) and shift.std() > 0.03
    assert table[5, 0] == pytest.approx(0.07 * math.sin(5)) and table[5, 3] == pytest.approx(0.07 * math.cos(5 / 1000 ** (2 / 96)))


def test_learning_rate_and_decay():
    model = tiny_model()
    opt, rates = A.make_adamw(model, 1.0, (0.9, 0.99)), []
    rows = [np.arange(6)]
    for _ in A.music_updates(model, opt, lambda step: [A.collate_rows(rows)] * 2, 10, 0.01, 4):
        rates.append(opt.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.0025, 0.005, 0.0075]) and rates[5] == pytest.approx(0.005) and rates[9] < 0.0003
    sizes = {False: 12, True: 14}
    for every, n in sizes.items():
        groups = A.make_adamw(model, 1.0, (0.9, 0.99), every).param_groups
        assert len(groups[0]["params"]) == n and groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0


def test_bits_of_a_model_that_knows_nothing():
    """All logits equal: every id costs log2 of the vocabulary, and conditional bits count the accompaniment's ids only."""
    model = tiny_model(MINI)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    held = [A.band(np.random.default_rng(k)) for k in range(3)]
    pieces, masks = [e for e, _ in held], [e[:, NOTE] >> 7 == A.MELODY for e, _ in held]
    rows = [np.arange(5), np.arange(9)]
    assert [b.tolist() for b in A.row_bits(model, rows)] == [pytest.approx([math.log2(MINI.size)] * n) for n in (4, 8)]
    seconds = sum(e[:, TIME].max() + 1 for e in pieces) / 4
    n_ids = 3 * sum((~m).sum() for m in masks)  # the band has no gap over a second: no RESTs
    for anticipatory in (True, False):
        found = A.conditional_bits(model, pieces, masks, MINI, anticipatory)
        assert found == pytest.approx(n_ids * math.log2(MINI.size) / seconds, rel=1e-5)


# ------------------------------------------------------------------------------------------------ 1. the mathematics: sampling


def toy(vocab, seed=0, sharp=3.0):
    """A causal model without a cache: logits are a fixed function of all ids so far."""
    rng = np.random.default_rng(seed)
    table, out = (torch.from_numpy(rng.standard_normal((vocab.size, 12))) for _ in range(2))

    def model(ids):
        weights = 0.8 ** torch.arange(ids.shape[1] - 1, -1, -1.0, dtype=torch.float64)
        state = torch.tanh((table[ids] * weights[None, :, None]).sum(1) + torch.arange(12) * 0.1)
        return (sharp * state @ out.T)[:, None]

    return model


def test_nucleus():
    """Against a loop: the set kept is the shortest list of likeliest ids whose mass passes p; the draw inverts its cumulative sum."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, p, temperature, u = 12, rng.choice([0.3, 0.8, 0.95, 1.0]), rng.choice([0.5, 1.0, 2.0]), rng.random()
        logits, allowed = rng.standard_normal(n), rng.random(n) < 0.7
        allowed[rng.integers(n)] = True
        weights = {i: math.exp(logits[i] / temperature) for i in range(n) if allowed[i]}
        total, kept, mass = sum(weights.values()), [], 0.0
        for i in sorted(weights, key=lambda i: -weights[i]):
            if mass < p:
                kept.append(i)
            mass += weights[i] / total
        goal, k = u * sum(weights[i] for i in kept), 0
        while (goal := goal - weights[kept[k]]) >= 0:
            k += 1
        found = A.nucleus_draw(torch.from_numpy(logits)[None], torch.from_numpy(allowed)[None], torch.tensor([u]).double(), temperature, p)
        assert int(found) == kept[k]
    assert int(A.nucleus_draw(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, True]]), torch.tensor([0.9]), 0)) == 2


def naive_sample(model, vocab, prompt, controls, start, end, delta, top_p, seed):
    """The authors' loop by another route: for each triplet three full passes over a window of the most recent triplets, re-relativised."""
    most, rng = (vocab.context - 3) // 3, np.random.default_rng((seed, 0))
    tokens, waiting = naive_anticipate(prompt, controls, delta)
    tokens, waiting = [t.tolist() for t in tokens], [t.tolist() for t in waiting]
    now, flag, new = (int(prompt[-1, TIME]) if len(prompt) else 0), vocab.sep + 1 + bool(len(controls)), []
    while True:
        while waiting and now >= waiting[0][TIME] - delta:
            tokens.append(waiting.pop(0))
        window = [list(t) for t in tokens[-most:]]
        offset = min((t[TIME] for t in window), default=0)
        while window and max(t[TIME] for t in window) - offset + vocab.density >= vocab.max_time:
            window.pop(0)
            offset = min(t[TIME] for t in window)
        for t in window:
            t[TIME] -= offset
        ids = [flag, *A.triplet_ids(np.array(window, np.int64).reshape(-1, 4), vocab).tolist()]
        for slot, (low, high) in enumerate(vocab.slots):
            logits = model(torch.tensor([ids]))[0, -1].clone()
            banned = torch.ones(vocab.size, dtype=torch.bool)
            banned[max(low, max(start, now) - offset) if slot == 0 else low : high] = False
            p = torch.where(banned, -torch.inf, logits).double().softmax(-1).numpy()
            order, mass, u = np.argsort(-p, kind="stable"), 0.0, rng.random()
            keep = []
            for i in order:
                if mass < top_p:
                    keep.append(i)
                mass += p[i]
            ids.append(int(keep[int(np.searchsorted(np.cumsum(p[keep]), u * p[keep].sum(), side="right"))]))
        t, d, note = (int(x) for x in np.array(ids[-3:]) - np.array([low for low, _ in vocab.slots]))
        t += offset
        if t >= end:
            return new
        rest = note == vocab.rest - vocab.first_note
        drawn = [t, 0 if rest else d, REST if rest else 128 * vocab.programs[note // 128] + note % 128, 0]
        tokens.append(drawn)
        new += [] if rest else [drawn]
        now = t


@pytest.mark.parametrize("seed", range(4))
def test_exact_window_is_the_authors_sampler(seed):
    """Prompt, controls, a window of ten triplets that slides, a clock that runs out: equal to full passes, draw by draw."""
    rng = np.random.default_rng(seed)
    prompt = A.pad_with_rests(random_piece(rng, 5, 10, TINY.programs), 10, TINY.density)
    controls = random_piece(rng, 12, 60, TINY.programs, control=1)
    model = toy(TINY, seed)
    expected = naive_sample(model, TINY, prompt, controls, 10, 60, TINY.delta, 0.95, 7)
    parts = [A.anticipating_part(prompt, controls, 10, 60, TINY.delta)]
    played = A.perform(model, TINY, parts, [TINY.sep + 2], window="exact", seed=7, sep=False)[0]
    new = played[(played[:, 4] == 1) & (played[:, NOTE] >= 0), :4]
    assert len(expected) > 5 and new.tolist() == expected
    assert played[played[:, CTRL] == 1][:, :4].tolist() == controls[: int(played[:, CTRL].sum())].tolist()


@pytest.mark.parametrize("window", ["exact", "hop"])
@pytest.mark.parametrize("sep", [True, False])
def test_cached_sampling_equals_full_passes(window, sep):
    """Of a GPT, in a batch whose parts have different prompts and controls: token by token, for draws and greedily."""
    model, rng = tiny_model(), np.random.default_rng(1)
    cases = [(A.pad_with_rests(random_piece(rng, n, 10, TINY.programs), 10, TINY.density),
              random_piece(rng, k, 50, TINY.programs, control=1)) for n, k in ((4, 9), (0, 0), (14, 3))]

    def play(player, some, options):
        parts = [A.anticipating_part(*case, 10, 40, TINY.delta) for case in some]
        return A.perform(player, TINY, parts, [TINY.sep + 2] * len(some), window=window, sep=sep, seed=3, **options)

    for options in (dict(top_p=0.9), dict(temperature=0)):
        cached, full = play(model, cases, options), play(lambda ids: model(ids), cases, options)
        assert all(np.array_equal(a, b) for a, b in zip(cached, full)) and max(map(len, cached)) > 15
        assert np.array_equal(play(model, cases[:1], options)[0], cached[0])  # the batch changes nothing


def test_ten_thousand_hostile_draws():
    """Logits that prefer RESTs, controls, SEP and the past: every draw is an event in its slot, never before its predecessor, RESTs have
    no duration (trap: the authors' mask lets REST into the time and duration slots), and parts end in time."""
    generator = torch.Generator().manual_seed(0)

    def model(ids):
        logits = 4 * torch.randn(len(ids), 1, TINY.size, generator=generator)
        logits[..., TINY.rest:] += 8
        logits[..., :3] += 4
        return logits

    prompts = [A.pad_with_rests(triplets([]), 0, 3)] * 100
    played = A.perform(model, TINY, [A.anticipating_part(p, p, 0, 100, 6) for p in prompts], [TINY.sep + 1] * 100, top_p=1.0, dense=True)
    drawn = [p[p[:, 4] == 1] for p in played]
    assert sum(map(len, drawn)) > 3000  # triplets, three draws each
    for d in drawn:
        assert (np.diff(d[:, TIME]) >= 0).all() and d[:, TIME].max() < 100 and (np.diff(d[:, TIME]) <= TINY.density).all()
        assert (d[d[:, NOTE] == REST, DUR] == 0).all() and (d[:, DUR] < TINY.max_duration).all() and (d[:, CTRL] == 0).all()
        assert np.isin(d[d[:, NOTE] >= 0, NOTE] >> 7, TINY.programs).all()
    assert any((d[:, NOTE] == REST).any() for d in drawn) and any((d[:, NOTE] >= 0).any() for d in drawn)


def test_instrument_limit():
    """Trap: RESTs and drums are no instruments of the fifteen, and drums are never forbidden."""
    many = Vocabulary(resolution=4, max_time=24, max_duration=4, programs=(*range(20), DRUMS), context=34, delta=6, density=3)
    closed = A.silenced(many, {*range(14), DRUMS})
    assert not closed.any()
    closed = A.silenced(many, {*range(15), DRUMS}).reshape(-1)[:-1].reshape(21, 128)
    assert closed[15:20].all() and not closed[:15].any() and not closed[20].any() and not A.silenced(many, set(range(15)))[-1]
    assert A.silenced(many, set(), (3,))[3 * 128 : 4 * 128].all()
    played = A.perform(toy(many, sharp=0.0), many, [A.anticipating_part(triplets([]), triplets([]), 0, 60, 6)], [many.sep + 1], dense=True,
                       top_p=1.0)[0]
    melodic = set((played[played[:, NOTE] >= 0, NOTE] >> 7).tolist()) - {DRUMS}
    assert len(melodic) == 15


def test_generation_keeps_what_is_given():
    model, rng = toy(TINY), np.random.default_rng(2)
    piece, melody = random_piece(rng, 30, 60, TINY.programs), random_piece(rng, 12, 60, (0,))
    new, again = A.generate_events(model, TINY, piece, melody, 20, 40, n=2, seed=5)
    assert not np.array_equal(new, again)  # two versions
    assert np.array_equal(A.generate_events(model, TINY, piece, melody, 20, 40, seed=5)[0], new)
    changed = piece.copy()
    changed[(piece[:, TIME] >= 20) & (piece[:, TIME] < 40), NOTE] = 1
    assert np.array_equal(A.generate_events(model, TINY, changed, melody, 20, 40, seed=5)[0], new)  # the gap's own notes are not seen
    changed = piece.copy()
    changed[piece[:, TIME] >= 40, NOTE] = 1
    assert not np.array_equal(A.generate_events(model, TINY, changed, melody, 20, 40, seed=5)[0], new)  # what comes after it is
    assert (new[:, TIME] >= 20).all() and (new[:, TIME] < 40).all() and (new[:, CTRL] == 0).all()
    none = piece[:0]
    assert len(A.generate_events(model, TINY, piece, none, 30, 30)[0]) == 0  # start = end
    assert len(A.generate_events(model, TINY, none, none, 0, 40, dense=True)[0]) > 0  # nothing given, from 0 on
    only = A.generate_events(model, TINY, piece, melody, 20, 40, programs=[32], dense=True)[0]
    assert set((only[:, NOTE] >> 7).tolist()) == {32}
    with pytest.raises(ValueError, match="none of the programs"):
        A.generate_events(model, TINY, piece, melody, 20, 40, programs=[99])


def test_flags_of_generation():
    seen = []

    def model(ids):
        seen.append(ids[:, 0].tolist())
        return toy(TINY)(ids)

    piece = triplets([(0, 1, 60), (30, 1, 60)])
    A.generate_events(model, TINY, piece[:1], piece[:0], 5, 8)
    A.generate_events(model, TINY, piece, piece[:0], 5, 8)
    assert seen[0] == [TINY.sep + 1] and seen[-1] == [TINY.sep + 2]


def test_anticipating_part_by_hand():
    prompt, controls = triplets([(0, 1, 60)]), triplets([(3, 1, 70), (9, 1, 71), (30, 1, 72)], 1)
    part = A.anticipating_part(prompt, controls, 2, 20, 5)
    assert [part.send(None)[NOTE] for _ in range(2)] == [70, 60]  # 3 ≤ δ: before the first event
    assert part.send(None) == A.Ask(2)
    drawn = np.array((4, 1, 50, 0))
    assert part.send(drawn) is drawn and part.send(None)[NOTE] == 71  # 4 ≥ 9 − 5
    assert part.send(None) == A.Ask(4)
    with pytest.raises(StopIteration):
        part.send(np.array((20, 1, 50, 0)))


def test_following_part_by_hand():
    """Algorithm 2: melody notes up to the drawn time go in first; drawn notes of the melody's program are dropped, then silenced."""
    melody = triplets([(4, 1, 128 * 73 + 70), (6, 1, 128 * 73 + 71)])
    part = A.following_part(triplets([(0, 1, 60)]), melody, 2, 20)
    assert part.send(None)[NOTE] == 60 and part.send(None) == A.Ask(2)
    drawn = np.array((5, 1, 50, 0))
    assert part.send(drawn)[TIME] == 4 and part.send(None) is drawn and part.send(None) == A.Ask(5)
    copy = np.array((5, 1, 128 * 73 + 70, 0))
    for _ in range(3):
        assert part.send(copy) == A.Ask(5)
    assert part.send(copy) == A.Ask(5, (73,))
    drawn = np.array((6, 1, 50, 0))
    assert part.send(drawn)[NOTE] == 128 * 73 + 71 and part.send(None) is drawn and part.send(None) == A.Ask(6)  # and heard again


# ------------------------------------------------------------------------------------------------ 1. the mathematics: the band


@pytest.mark.parametrize("hard", [True, False])
def test_band_plays_by_its_rules(hard):
    roots_first = []
    for k in range(20):
        events, chords = A.band(np.random.default_rng(k), hard)
        assert (np.diff(events[:, TIME]) >= 0).all() and len(chords) == 6
        for bar, chord in enumerate(chords):
            tones = {[0, 2, 4, 5, 7, 9, 11][(chord + step) % 7] for step in (0, 2, 4)}
            here = events[(events[:, TIME] >= 8 * bar) & (events[:, TIME] < 8 * bar + 8)]
            by = {p: here[here[:, NOTE] >> 7 == p] for p in MINI.programs}
            assert {n % 128 % 12 for n in by[0][:, NOTE].tolist()} == tones and (by[0][:, TIME] == 8 * bar).all() and len(by[0]) == 3
            assert [n % 12 for n in (by[32][:, NOTE] % 128).tolist()] == [[0, 2, 4, 5, 7, 9][chord], ([0, 2, 4, 5, 7, 9][chord] + 7) % 12]
            assert min(by[0][:, NOTE]) % 12 == [0, 2, 4, 5, 7, 9][chord]  # root position
            melody = (by[73][:, NOTE] % 128).tolist()
            assert {p % 12 for p in melody[:3]} == tones and all(72 <= p < 84 for p in melody)
            roots_first.append(melody[0] % 12 == [0, 2, 4, 5, 7, 9][chord])
        ties = events[events[:, TIME] == 0]
        assert ties[0, NOTE] >> 7 == 73
        right = events[(events[:, NOTE] >> 7 != 73) & (events[:, TIME] >= 16) & (events[:, TIME] < 40)]
        full = A.score_accompaniment(right, events, chords, 2, 5)
        assert full == dict(root=1.0, chord=1.0, f1=1.0, off_key=0.0)
        assert A.score_accompaniment(events[:0], events, chords, 2, 5) == dict(root=0.0, chord=0.0, f1=0.0, off_key=0.0)
    assert all(roots_first) if not hard else 0.15 < np.mean(roots_first) < 0.5
    moved = right.copy()
    moved[:, NOTE] += np.where(moved[:, NOTE] >> 7 == 32, 1, 0)  # the bass a half-tone up
    scores = A.score_accompaniment(moved, events, chords, 2, 5)
    assert scores["root"] == 0 and scores["chord"] == 1 and 0.5 < scores["f1"] < 1


def test_ceilings_by_simulation():
    """The best guess of a player who counted 60,000 bars, within 0.01."""
    rng = np.random.default_rng(0)
    chords, seen = [0], [{} for _ in range(4)]
    draws = rng.random(60_000)
    cumulative = A.CHAIN.cumsum(1)
    orders = {chord: list(permutations([0, 2, 4, 5, 7, 9, 11][(chord + s) % 7] for s in (0, 2, 4))) for chord in range(6)}
    for u, pick in zip(draws, rng.integers(6, size=60_000)):
        chord = int(np.searchsorted(cumulative[chords[-1]], u))
        for k in range(4):
            counts = seen[k].setdefault((chords[-1], orders[chord][pick][:k]), [0] * 6)
            counts[chord] += 1
        chords.append(chord)
    assert np.allclose(A.CHAIN.sum(1), 1)
    values, vectors = np.linalg.eig(A.CHAIN.T)
    stationary = vectors[:, np.argmax(values.real)].real
    assert A.root_ceilings()[0] == pytest.approx(float(stationary / stationary.sum() @ A.CHAIN.max(1)))
    for limit, counts in zip(A.root_ceilings(), seen):
        assert sum(max(c) for c in counts.values()) / 60_000 == pytest.approx(limit, abs=0.01)
    assert A.root_ceilings(hard=False)[1] == pytest.approx(1) and A.root_ceilings(hard=False)[0] == pytest.approx(A.root_ceilings()[0])


def test_small_vocabularies_hear_what_they_can():
    table = A.nearest_programs(MINI, melody=40)
    assert (table[0], table[3], table[35], table[DRUMS], table[40], table[41], table[79]) == (0, 0, 32, DRUMS, 73, 0, 73)
    events = triplets([(0, 3, 60), (2, 3, 128 * 3 + 60), (13, 30, 61), (100, 999, 62)])
    assert A.fit_to_vocabulary(events, MINI).tolist() == [[0, 1, 60, 0], [1, 1, 61, 0], [4, 8, 62, 0]]
    assert A.fit_to_vocabulary(events, PAPER) is events


# --------------------------------------------------------------------------------------------------------- 2. the claim


CALL = Vocabulary(resolution=4, max_time=40, max_duration=4, programs=(0, 73), context=103, delta=6, density=4)


def test_telling_ahead_is_what_helps():
    """Eight times a bass note, and half a second later the melody note that settles which it was to be, one of four. No model that reads
    in order of time can do better than log2 4 = 2 bits a bass note. Told 1.5 s ahead the same small model gets below 1; with δ = 0 it
    stays at 2. A control in the wrong place, or one that the model cannot tell from an event, fails this."""
    def piece(*seed):
        tones = np.random.default_rng(seed).integers(4, size=8)
        return np.array([(4 * k + 2 * j, 1, 128 * 73 * j + 60 + c, 0) for k, c in enumerate(tones) for j in (0, 1)])

    bits = {}
    for delta, steps in ((6, 200), (0, 40)):
        torch.manual_seed(0)
        model = MusicGPT(MusicConfig(CALL.size, CALL.context, n_layer=2, n_head=2, n_embd=32, dropout=0.0, scale_by_layer=False))
        A.start_mini(model, CALL)

        def batches(step, delta=delta):
            pieces = [piece(0, step, k) for k in range(16)]
            yield A.collate_rows([A.piece_row(e, e[:, NOTE] >= 128 * 73, CALL, delta) for e in pieces], CALL)

        for _ in A.music_updates(model, A.make_adamw(model, 1e-2, (0.9, 0.99), True), batches, steps, 1e-2, 10):
            pass
        held_out = [piece(1, k) for k in range(20)]
        masks = [e[:, NOTE] >= 128 * 73 for e in held_out]
        bits[delta] = A.conditional_bits(model, held_out, masks, CALL, True, delta=delta) * (31 / 4) / 8
    assert bits[6] < 1 and bits[0] > 1.9, bits


# ----------------------------------------------------------------------------------------------------------- 3. the tool


def tool(monkeypatch, capsys, *args, code=None):
    """main() in this process → what it printed."""
    monkeypatch.setattr(sys, "argv", ["anticipation.py", *map(str, args)])
    if code is None:
        A.main()
    else:
        with pytest.raises(SystemExit) as stop:
            A.main()
        assert stop.value.code == code
    return capsys.readouterr()


def song(path, programs=(0, 33, 40, DRUMS), n=160, seconds=20, seed=0):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(100 * seconds, size=n))
    events = triplets([(int(t), 30, 128 * programs[k % len(programs)] + 50 + 10 * (k % len(programs)) + int(rng.integers(8)))
                       for k, t in enumerate(times)])
    return A.write_midi(path, events)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The default run, two updates long."""
    folder, here, argv = tmp_path_factory.mktemp("demo"), os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = "anticipation.py --steps 2 --pieces 2 --workers 1 --quiet".split()
    try:
        A.main()
    finally:
        os.chdir(here)
        sys.argv = argv
    return folder


def test_default_run_in_small(demo_run):
    out = demo_run / "out/anticipation/demo"
    results = json.loads((out / "results.json").read_text())
    names = [row[0] for row in results["table"]]
    assert names == ["anticipatory, seed 0", "autoregressive, seed 0", "retrieval", "chain's best guess", "the right answer"]
    assert len(results["ceilings"]) == 4 and {"seed", "command", "revision"} <= set(results)
    assert (out / "demo.png").stat().st_size > 20_000
    for kind in ("anticipatory", "autoregressive"):
        events = A.read_midi(out / f"{kind}.mid")
        melody = events[events[:, NOTE] >> 7 == A.MELODY]
        right = A.band(np.random.default_rng((0, 1, 0)))[0]
        right = right[(right[:, NOTE] >> 7 == A.MELODY) & (right[:, TIME] < 40)]
        assert np.array_equal(melody[:, [TIME, NOTE]], right[:, [TIME, NOTE]] * np.array([25, 1]))  # untouched
        assert wave.open(str(out / f"{kind}.wav")).getnframes() > 100_000


@pytest.mark.parametrize("task, flags, end", [
    ("continue", ("--start", 5, "--end", 9), 9), ("accompany", ("--melody", 40, "--start", 5, "--end", 9, "--n", 2), 9),
    ("infill", ("--span", "6:9", "--instruments", "33"), None), ("infill", ("--span", "6:9"), None)])
def test_music_from_a_file(demo_run, tmp_path, monkeypatch, capsys, task, flags, end):
    """Files come back whole: what was given is untouched to the hundredth of a second, what is new lies where it was asked for."""
    monkeypatch.chdir(demo_run)
    path = song(tmp_path / "song.mid")
    before = A.read_midi(path)
    out, _ = tool(monkeypatch, capsys, task, path, *flags, "--quiet", "--out", tmp_path)
    results, picture = out.split()[-2:]
    about, programs = json.loads(Path(results).read_text()), before[:, NOTE] >> 7
    assert Path(picture).stat().st_size > 10_000 and wave.open(str(tmp_path / f"{task}-0.wav")).getnframes() > 0
    times = before[:, TIME]
    given = {"continue": times < 500, "accompany": (times < 500) | (programs == 40) & (times < 900),
             "infill": ~((times >= 600) & (times < 900) & ((programs == 33) if "--instruments" in flags else True))}[task]
    for k in range(len(about["generated"])):
        after = A.read_midi(tmp_path / f"{task}-{k}.mid")
        old, new = ({tuple(e) for e in events[:, [TIME, NOTE]].tolist()} for events in (before[given], after))
        assert old <= new and 0 < len(after) - given.sum() == about["generated"][k]
        added = np.array(sorted(new - old) or [(700, 0)])
        start, last = (600, 900) if task == "infill" else (500, 900)
        assert (added[:, 0] >= start).all() and (added[:, 0] < last).all()
        if "--instruments" in flags:
            assert set((added[:, 1] >> 7).tolist()) <= {33}
    if task == "accompany":
        assert len(about["generated"]) == 2 and "40 (strings) as 73 (pipe)" in out


def test_autoregressive_checkpoint_follows(demo_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(demo_run)
    flags = ("--ckpt", "out/anticipation/demo/autoregressive.pt", "--quiet", "--no_plot", "--out", tmp_path)
    path = song(tmp_path / "song.mid")
    tool(monkeypatch, capsys, "accompany", path, "--melody", 40, "--start", 5, "--end", 8, *flags)
    assert len(A.read_midi(tmp_path / "accompany-0.mid"))
    _, err = tool(monkeypatch, capsys, "infill", path, "--span", "6:8", *flags, code=2)
    assert "trained without controls" in err and err.count("\n") == 1


def test_tokenize_then_train_then_eval(tmp_path, monkeypatch, capsys):
    """A broken file is named with its reason, and the rest goes on; order and rows do not depend on the processes."""
    monkeypatch.chdir(tmp_path)
    for k in range(6):
        song(tmp_path / f"midi/{k}.mid", seed=k)
    song(tmp_path / "midi/short.mid", n=40)
    Path("midi/broken.mid").write_bytes(b"MThd")
    out, _ = tool(monkeypatch, capsys, "tokenize", "midi", "--copies", 10, "--quiet")
    assert "broken: broken.mid: not a MIDI file" in out and "filtered: short.mid: 40 notes, fewer than 100" in out
    assert "8 files: 6 kept, 1 broken, 1 filtered" in out
    index = json.loads(Path("out/anticipation/tokenize/index.json").read_text())["pieces"]
    events = np.load("out/anticipation/tokenize/events.npy")
    assert [p["name"] for p in index] == [f"{k}.mid" for k in range(6)]
    for piece in index:
        whole = A.read_midi(f"midi/{piece['name']}")[:, :3]
        assert np.array_equal(events[piece["first"] : piece["first"] + piece["notes"]], whole)
    rows = A.read_row_file("out/anticipation/tokenize/rows.bin", 1024, PAPER.size)
    n_control = sum((A.triplets_of(row[1:], PAPER)[:, CTRL] == 1).any() for row in rows)
    assert len(rows) > 5 and n_control > len(rows) / 2
    out, _ = tool(monkeypatch, capsys, "inspect", "out/anticipation/tokenize/rows.bin", "--row", 1, "--quiet", "--no_plot")
    assert f"z = {rows[1, 0]}" in out
    train_split = {p["split"] for p in index}
    tool(monkeypatch, capsys, "train", "--data", "out/anticipation/tokenize", "--steps", 2, "--batch_size", 2, "--quiet", "--no_plot")
    split = sorted(train_split)[0]
    tool(monkeypatch, capsys, "eval", "--ckpt", "out/anticipation/train/checkpoint.pt", "--data", "midi", "--split", split, "--quiet",
         "--no_plot")
    table = dict(json.loads(Path("out/anticipation/eval/results.json").read_text())["table"])
    slots = [table[f"perplexity of {name}"] for name in ("times", "durations", "notes")]
    assert table["perplexity of a triplet"] == pytest.approx(math.prod(slots)) and slots[0] > 1
    assert table["bits a second"] == pytest.approx(table["bits a token"] * table["tokens a second"])
    assert 3 * table["bits a token"] == pytest.approx(math.log2(table["perplexity of a triplet"]))


def test_bits_a_second_of_table_1():
    """The formula of `eval`, bits a token × tokens a second, on the paper's rows: bps from ppl(e) and 61.921 tokens/s."""
    for ppl, bps in ((14.9, 80.4), (12.7, 75.7), (12.1, 74.4), (10.4, 69.7)):
        assert math.log2(ppl) / 3 * 61.921 == pytest.approx(bps, abs=0.6)


def test_resumed_run_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("train", "--steps", 4, "--save_every", 2, "--batch_size", 2, "--quiet", "--no_plot", "--out")
    tool(monkeypatch, capsys, *flags, "a")
    keep = A.save_checkpoint

    def interrupted(path, state):
        keep(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(A, "save_checkpoint", interrupted)
    out, _ = tool(monkeypatch, capsys, *flags, "b", code=130)
    assert "stopped after 2 updates" in out and "--resume" in out
    monkeypatch.setattr(A, "save_checkpoint", keep)
    tool(monkeypatch, capsys, *flags, "b", "--resume")
    a, b = (torch.load(f"{name}/checkpoint.pt", weights_only=True) for name in "ab")
    assert a["step"] == b["step"] == 4 and all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    _, err = tool(monkeypatch, capsys, *flags, "b", "--resume", "--lr", 0.5, code=2)
    assert "lr = 0.006, this run has 0.5" in err
    tool(monkeypatch, capsys, "finetune", "--ckpt", "a/checkpoint.pt", "--steps", 1, "--batch_size", 2, "--quiet", "--no_plot")
    settings = torch.load("out/anticipation/finetune/checkpoint.pt", weights_only=True)["settings"]
    assert settings["lr"] == pytest.approx(0.0006)


def test_two_ranks_train_as_one(tmp_path, monkeypatch, capsys):
    """torchrun: the same rows, so the same losses as one process."""
    flags = ("train", "--steps", "3", "--batch_size", "4", "--micro_batch_size", "2", "--log_every", "1", "--quiet", "--no_plot", "--out")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HOUSE / "anticipation.py"))
    done = subprocess.run([*launcher, *flags, "two"], cwd=tmp_path, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    tool(monkeypatch, capsys, *flags, "one")
    one, two = ([r["loss"] for r in json.loads((tmp_path / name / "results.json").read_text())["records"]] for name in ("one", "two"))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)


def test_hub_weights(tmp_path, monkeypatch, capsys):
    """config.json and pytorch_model.bin as on the hub, in a cache filled by hand."""
    small = tiny_model(PAPER, n_layer=1, n_embd=4, n_head=2)
    folder = tmp_path / "huggingface.co/stanford-crfm/music-small-800k/resolve/main"
    folder.mkdir(parents=True)
    about = dict(vocab_size=55_028, n_positions=1024, n_layer=1, n_head=2, n_embd=4, scale_attn_by_inverse_layer_idx=True)
    (folder / "config.json").write_text(json.dumps(about))
    torch.save(gpt2_layout(small, "transformer."), folder / "pytorch_model.bin")
    monkeypatch.setattr(A, "CACHE", tmp_path)
    model, vocab, settings = A.load_music(A.parse_args(["continue", "x.mid", "--ckpt", "hub:music-small-800k"]), "cpu")
    ids = torch.arange(12)[None]
    assert vocab == PAPER and settings["anticipatory"] and not settings["sep"] and torch.equal(model(ids), small(ids))
    (folder / "config.json").write_text(json.dumps(about | {"n_embd": 8}))
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit):
        A.load_music(A.parse_args(["continue", "x.mid", "--ckpt", "hub:music-small-800k"]), "cpu")
    err = capsys.readouterr().err
    assert "wte.weight is (55028, 4), expected (55028, 8)" in err and err.count("\n") == 1


def test_play_plot_inspect_sweep_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = song(tmp_path / "song.mid")
    out, _ = tool(monkeypatch, capsys, "play", path, "--quiet")
    assert wave.open("out/anticipation/play/song.wav").getnframes() > 22_050 * 19 and Path(out.split()[-1]).stat().st_size > 10_000
    out, _ = tool(monkeypatch, capsys, "inspect", path, "--melody", 40, "--no_plot")
    assert "z = 55027" in out and "40 controls" in out and "128 (drums)" in out
    out, _ = tool(monkeypatch, capsys, "delta_sweep", "--steps", 1, "--pieces", 1, "--workers", 1, "--quiet", "--no_plot")
    runs = json.loads(Path("out/anticipation/delta_sweep/results.json").read_text())["runs"]
    assert [run["delta_s"] for run in runs] == [0, 0.5, 1, 1.5, 2]
    out, _ = tool(monkeypatch, capsys, "bench", "--preset", "mini", "--quiet")
    results = json.loads(Path("out/anticipation/bench/results.json").read_text())
    assert results["equal"] == results["compared"] == 10 and results["greedy_equal"]
    assert results["bytes_notes_per_s"] > 5 * results["mido_notes_per_s"]  # about 20 on a quiet machine


@pytest.mark.parametrize("args, words", [
    (["nonsense"], "infill"), (["continue"], "continue needs a MIDI file"), (["continue", "nowhere.mid"], "nowhere.mid is no file"),
    (["continue", "text.mid"], "does not begin with MThd"), (["continue", "empty.mid"], "has no notes"),
    (["continue", "song.mid", "--start", "9", "--end", "8"], "--start 9 is not before --end 8"),
    (["continue", "song.mid", "--start", "-1"], "--start"), (["continue", "song.mid", "--start", "0"], "nothing to continue"),
    (["continue", "song.mid", "--top_p", "0"], "--top_p"), (["continue", "song.mid", "--top_p", "1.5"], "--top_p"),
    (["continue", "song.mid", "--temperature", "0"], "--temperature"), (["continue", "song.mid", "--temperature", "nan"], "--temperature"),
    (["continue", "song.mid", "--ckpt", "nowhere.pt"], "no checkpoint nowhere.pt"),
    (["continue", "song.mid", "--ckpt", "text.mid"], "text.mid is not a checkpoint"),
    (["continue", "song.mid", "--ckpt", "odd.pt"], "should hold model, config, vocab"),
    (["continue", "song.mid", "--ckpt", "wide.pt"], "does not fit its configuration"),
    (["continue", "song.mid", "--ckpt", "ids.pt"], "has 99 ids, its arrival vocabulary 1,158"),
    (["continue", "song.mid", "--ckpt", "inter.pt"], "interarrival encoding: a token's time"),
    (["accompany", "song.mid", "--melody", "53"], "no notes of program 53; it has 0 (piano) 40 notes; 33 (bass) 40 notes"),
    (["accompany", "song.mid", "--melody", "x"], "--melody"), (["accompany", "song.mid", "--start", "90", "--end", "95"], "no"),
    (["infill", "song.mid"], "--span FROM:TO"), (["infill", "song.mid", "--span", "8"], "--span"),
    (["infill", "song.mid", "--span", "-2:3"], "--span"), (["infill", "song.mid", "--span", "9:8"], "--span 9:8"),
    (["infill", "song.mid", "--span", "8:80"], "--span 8:80"),
    (["infill", "song.mid", "--span", "6:8", "--instruments", "7"], "--instruments"),
    (["tokenize"], "tokenize needs a folder"), (["tokenize", "song.mid"], "song.mid is no folder"),
    (["tokenize", "none"], "no .mid files in none"), (["tokenize", "bad"], "none of the 1 files"),
    (["train", "--data", "nowhere"], "--data nowhere"), (["train", "--data", "none"], "no .mid files in none"),
    (["train", "--data", "bad"], "no piece to train on"), (["train", "--preset", "small"], "--data DIR"),
    (["train", "--batch_size", "6", "--micro_batch_size", "4"], "--batch_size 6"), (["train", "--resume"], "--resume"),
    (["train", "--data", "odd.bin"], "no whole number of rows"), (["train", "--data", "high.bin"], "id 60000"),
    (["train", "x.mid"], "--data x.mid"), (["finetune"], "run python anticipation.py first"),
    (["eval", "--ckpt", "mini.pt", "--data", "bad"], "no piece"), (["train", "--lr", "fast"], "--lr"),
    (["inspect", "odd.bin"], "no whole number of rows"), (["inspect", "slots.bin"], "row 0: triplet 0"),
    (["inspect", "slots.bin", "--row", "5"], "--row 5"), (["inspect", "song.mid", "--melody", "9"], "no notes of program 9"),
    (["bench", "--data", "none"], "no .mid files"), (["demo", "--device", "abacus"], "--device abacus"),
    (["demo", "--steps", "0"], "--steps"),
    (["continue", "song.mid", "--ckpt", "hub:music-small-800k"], "music-small-800k/resolve/main/config.json"),
])
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(A, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(A.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    song(Path("song.mid"))
    Path("text.mid").write_text("not music")
    Path("empty.mid").write_bytes(midi_bytes([END]))
    for folder in ("none", "bad"):
        Path(folder).mkdir()
    Path("bad/x.mid").write_text("not music")
    np.full(1000, 1, np.uint16).tofile("odd.bin")
    for name, row in (("high.bin", 60_000), ("slots.bin", 5)):
        np.full(PAPER.context if name == "slots.bin" else MINI.context, row, np.uint16).tofile(name)
    if any(name.endswith(".pt") for name in args):
        model = tiny_model(MINI, n_embd=4)
        good = A.music_checkpoint(model, MINI, encoding="arrival", anticipatory=True, sep=True, preset="mini")
        torch.save(dict(a=1), "odd.pt")
        torch.save(good, "mini.pt")
        torch.save(good | dict(config=good["config"] | dict(n_embd=8)), "wide.pt")
        torch.save(good | dict(config=good["config"] | dict(vocab_size=99)), "ids.pt")
        inter = dict(settings=dict(encoding="interarrival"), config=good["config"] | dict(vocab_size=A.INTERARRIVAL_SIZE))
        torch.save(good | inter, "inter.pt")
    elif args[0] in ("continue", "accompany", "infill") and "nowhere" not in str(args):
        model = tiny_model(MINI, n_embd=4)
        A.save_checkpoint(Path("out/anticipation/demo/anticipatory.pt"),
                          A.music_checkpoint(model, MINI, encoding="arrival", anticipatory=True, sep=True, preset="mini"))
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    _, err = tool(monkeypatch, capsys, *args, "--quiet", code=2)
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before, "nothing may be written"


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        A.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in "device dtype seed out data ckpt preset steps batch_size lr resume no_plot quiet top_p temperature span melody n".split():
        assert f"--{flag}" in text
