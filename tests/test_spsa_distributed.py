"""spsa_distributed.py: its bits by another route, its claims in miniature, and a run by real processes."""

import asyncio
import json
import math
import multiprocessing
import os
import secrets
import signal
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spsa_distributed as spsa

DATA = os.environ.get("NANOPAPERS_TEST_DATA")
MACHINE = 0xFEDCBA9876543210
RUN = spsa.RUN | dict(steps=12, every=4, lr=3e-3)
MINUTES = 2
torch.set_num_threads(1)  # everything here is small, and two threads wait for each other on a busy machine


class Toy:
    """A small network learns from another one. Each machine has rows of its own. pause: seconds of a probe."""

    def __init__(self, run, pause=0.0, wild_at=None):
        generator = torch.Generator().manual_seed(0)
        pair = [nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)).requires_grad_(False) for _ in range(2)]
        for model in pair:
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1]))
        self.model, self.teacher, self.pause, self.wild_at = *pair, pause, wild_at

    def loss_of(self, machine, step):
        time.sleep(self.pause / 2)  # a probe asks twice
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed((machine + step) % 2**63))
        return F.mse_loss(self.model(x), self.teacher(x)) + (1e9 * torch.rand(()) if step == self.wild_at else 0)


def made(run=RUN, machines=(1, 2**40, MACHINE)):
    """A replica after its run, and the records."""
    toy, records = Toy(run), []
    replica = spsa.Replica(toy.model, run)
    while replica.step <= run["steps"]:
        records.append(replica.probe(machines, toy.loss_of))
        replica.update(records[-1])
    return replica, records


def written(path, records, run=RUN):
    path.write_bytes(json.dumps(run).encode() + b"\n" + b"".join(record.pack() for record in records))
    return path


# ---------------------------------------------------------------------------------------------- bits


def scalar_philox(counter, key, rounds=10):
    """The generator in Python's unbounded integers."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for i in range(rounds):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        k0, k1 = (k[0] + i * 0x9E3779B9) % 2**32, (k[1] + i * 0xBB67AE85) % 2**32
        c = [q // 2**32 ^ c[1] ^ k0, q % 2**32, p // 2**32 ^ c[3] ^ k1, p % 2**32]
    return c


@pytest.mark.parametrize("counter, key, answer", [  # Random123
    ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((2**32 - 1,) * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1])])
def test_philox_known_answers(counter, key, answer):
    assert spsa.philox(*(np.array([c], np.uint64) for c in counter), key)[0].tolist() == answer
    assert scalar_philox(counter, key) == answer


@pytest.mark.parametrize("kind", spsa.NOISE)
def test_noise_by_scalars(kind):
    """Any weight's z out of its counter (call, step, machine low, machine high)."""
    z, key, step = spsa.noise(kind, 5 << 40, 77, MACHINE, 3, 2), 5 << 40, 77
    counter = lambda call: (call, step, MACHINE % 2**32, MACHINE >> 32)
    for e in (0, 31, 32, 127, 128, 600, 1023):
        if kind == "rademacher":
            word = scalar_philox(counter(4 * 8 + e // 128), key)[e // 32 % 4]
            want = 1 - 2 * (word >> e % 32 & 1)
        else:
            words = scalar_philox(counter(4 * 256 + e % 256), key)[e // 512 * 2 :]
            radius = math.sqrt(-2 * math.log(((words[0] >> 9) + 0.5) / 2**23))
            turn = 2 * math.pi * (words[1] >> 8) / 2**24
            want = radius * (math.sin(turn) if e // 256 % 2 else math.cos(turn))
        assert z[1, e] == pytest.approx(want, abs=3e-6)


def test_every_code_comes_back():
    assert [spsa.encode(spsa.decode(code)) for code in range(-127, 128)] == list(range(-127, 128))
    sizes = np.exp(np.random.default_rng(0).uniform(math.log(3.6e-4), math.log(2700), 2000))
    errors = [spsa.decode(spsa.encode(g)) / g - 1 for g in (*sizes, *-sizes)]
    assert 0.06 < np.abs(errors).max() <= 0.0646
    specials = {0.0: 0, 1e-9: 0, 1e9: 127, -1e9: -127, math.nan: -128, math.inf: -128, -math.inf: -128}
    assert [spsa.encode(g) for g in specials] == list(specials.values()) and spsa.decode(-128) == 0


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("kind", spsa.NOISE)
def test_a_thousand_probes_leave_no_trace(kind):
    toy = Toy(RUN)
    replica = spsa.Replica(toy.model, RUN | dict(noise=kind))
    before = replica.flat.clone()
    for machine in range(1000):
        replica.gradient(machine << 50, toy.loss_of)
    assert not torch.equal(replica.flat, before)
    replica.flush()
    assert torch.equal(replica.flat, before)


def test_weights_lie_on_their_grid():
    model = Toy(RUN).model
    model[0].weight[3, 3] = 40.0
    flat, grid = spsa.flatten_(model)
    tiles = flat.view(-1, 1024)
    assert (tiles.abs().amax(1) <= 2**23 * grid).all() and (tiles % grid[:, None] == 0).all() and grid.max() == 2**-16


def test_the_update_by_hand():
    replica, records = made(RUN | dict(steps=1, every=1))
    start, (members, grid) = spsa.Replica(Toy(RUN).model, RUN).flat, (records[0].members, replica.grid[:, None])
    total = torch.zeros(len(grid), 1024)
    for machine, code in members:
        coef = -max(-RUN["clip"], min(RUN["clip"], RUN["lr"] * spsa.decode(code))) / math.sqrt(3)
        total += np.float32(coef) * spsa.noise("rademacher", RUN["key"], 0, machine, 0, len(grid))
    assert torch.equal(replica.flat, start + (grid * (total / grid).round()).flatten())

def test_wild_bytes_are_undone_exactly_and_move_no_weight_beyond_the_clip():
    """Bytes of 2,631 in every step, at a rate that would leave any grid: κ holds, and probes restore."""
    toy = Toy(RUN)
    replica = spsa.Replica(toy.model, RUN | dict(lr=1e3, clip=0.01))
    start = replica.flat.clone()
    for _ in range(10):
        replica.apply([(3, 2631.0)])
    replica.flush()
    assert 0.01 < (replica.flat - start).abs().max() <= 0.101
    replica.run["clip"] = 1e3
    for _ in range(10):
        replica.apply([(4, 2631.0), (5, -2631.0)])
    replica.flush()
    before = replica.flat.clone()
    replica.gradient(1, toy.loss_of)
    replica.flush()
    assert torch.equal(replica.flat, before) and replica.flat.isfinite().all()


def test_gradient_against_autograd():
    torch.manual_seed(0)
    problem = spsa.Problem(spsa.GPT2(*spsa.TINY), RUN, spsa.tiny_reviews(200, 0))
    replica = spsa.Replica(problem.model, RUN)
    for p in problem.model.parameters():
        p.requires_grad_(True)
    problem.loss_of(7, 0).backward()
    z = spsa.noise("rademacher", RUN["key"], 0, 7, 0, len(replica.grid)).flatten()
    parts = z.split([-(-p.numel() // 1024) * 1024 for p in problem.model.parameters()])
    pairs = zip(problem.model.parameters(), parts)
    slope = sum(float((p.grad.flatten() * part[: p.numel()]).sum()) for p, part in pairs)
    assert replica.gradient(7, problem.loss_of) == pytest.approx(slope, rel=0.02)


# ---------------------------------------------------------------------------------------------- records and the log


def test_replay_snapshots_and_prefixes(tmp_path, capsys):
    """Replicas, a replay, a replay from a snapshot and one process of three machines agree, step by step."""
    replica, records = made()
    assert replica.hash == records[-1].hash and len(records) == 13
    again = spsa.replica_of(Toy(RUN).model, RUN, records)
    assert torch.equal(again.flat, replica.flat)
    prefix = spsa.replica_of(Toy(RUN).model, RUN, records[:8], tmp_path)
    prefix.save(tmp_path)
    (tmp_path / f"{records[12].hash.hex()}.f32").write_bytes(b"damaged!")
    joined = spsa.replica_of(Toy(RUN).model, RUN, records, tmp_path)
    assert torch.equal(joined.flat, replica.flat) and "snapshot of step 8, then 5 records" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # a byte was changed: the next hash tells
        wrong = records[2]._replace(members=((1, 99), *records[2].members[1:]))
        spsa.replica_of(Toy(RUN).model, RUN, [*records[:2], wrong, *records[3:]])
    for _ in range(3):
        joined.hash = secrets.token_bytes(8)
        joined.save(tmp_path)
    assert len([*tmp_path.glob("*.f32")]) == 4  # its last two; and those of others


def test_records_that_are_refused():
    good = spsa.Record(3, b"12345678", ((1, 5), (2, -128))).pack()
    assert spsa.unpack(good).pack() == good
    twice, backwards = (spsa.Record(3, bytes(8), pair).pack() for pair in (((1, 5), (1, 6)), ((2, 5), (1, 5))))
    flipped = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    for bad in (good[:-1], good + b"0", bytes(len(good)), b"", b"x", twice, backwards, *flipped):
        with pytest.raises(ValueError):
            spsa.unpack(bad)


def test_a_torn_header_and_logs_of_others(tmp_path, capsys):
    path = tmp_path / "run.log"
    path.write_bytes(json.dumps(RUN).encode()[:30])
    log = spsa.Log(path, RUN)
    assert log.records == [] and spsa.read_log(path)[0] == RUN
    log.file.close()
    for text, words in ((path.read_bytes(), "another run"), (b"a,b\n1,2\n", "no log"), (b'{"key": 1}\n', "no run")):
        path.write_bytes(text)
        with pytest.raises(SystemExit):
            spsa.Log(path, RUN | dict(steps=99))
        assert words in capsys.readouterr().err and path.read_bytes() == text


# ---------------------------------------------------------------------------------------------- real processes

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "spsa_distributed"])


def child(path, function, args, env):
    """In a process of its own: what it says goes to path."""
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    function(*args)


def notary(path, port, run, machines):
    asyncio.run(spsa.notarise(spsa.Log(path, run), "127.0.0.1", port, machines, 0.5, 15.0))


def machine(port, number, folder, pause, wild_at=None):
    spsa.take_part("127.0.0.1", port, lambda run: Toy(run, pause, wild_at), folder, 60.0, number)


def command(*args):
    spsa.run(spsa.parse_args([*map(str, args)]))


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def processes(folder):
    """→ start(name, function, *args), said(name), when(condition). All that is left is killed at the end."""
    running, until = {}, time.monotonic() + 60 * MINUTES

    def start(name, function, *args, **env):
        running[name] = CONTEXT.Process(target=child, args=(folder / f"{name}.txt", function, args, env))
        running[name].start()
        return running[name]

    def said(name):
        path = folder / f"{name}.txt"
        return path.read_text() if path.exists() else ""

    def when(condition):
        while not (value := condition()):
            assert time.monotonic() < until, {name: said(name)[-300:] for name in running}
            time.sleep(0.01)
        return value

    try:
        yield start, said, when
    finally:
        for process in running.values():
            process.kill()
            process.join()


def ends(when, process, code=0):
    when(lambda: process.exitcode is not None)
    return process.exitcode == code


def test_a_run_by_real_processes(tmp_path):
    """A machine killed, one stopped past the deadline and at the end, one three times too slow, a wild byte, liars, a
    second notary, the notary killed with its log cut and damaged, a newcomer by a snapshot: all end with one hash."""
    run, log, port = RUN | dict(steps=300, every=20, lr=3e-3), tmp_path / "run.log", free_port()
    with processes(tmp_path) as (start, said, when):

        def records(n, last=lambda members: True):
            """The log, as soon as it has more than n records and this is true of the machines in the last."""
            def look():
                found = spsa.read_log(log)[1] if log.exists() else []
                return found if len(found) > n and last(dict(found[-1].members)) else None
            return when(look)

        first = start("notary", notary, log, port, run, 4)
        a, b, c = (start(name, machine, port, i, tmp_path, 0.01) for i, name in enumerate("abc", 1))
        wild = start("wild", machine, port, 4, tmp_path, 0.01, 100)  # g beyond 2,631 once
        slow = start("slow", machine, port, 5, tmp_path, 1.5)  # three times the deadline
        records(20)
        hello = lambda held: spsa.HELLO.pack(9, held)
        for data in (secrets.token_bytes(999), b"GET / HTTP/1.1\r\n\r\n" + bytes(99), hello(0) + bytes(99),
                     hello(0) + spsa.Record(10**6, bytes(8), ((9, 5),)).pack(),
                     hello(0) + spsa.Record(3, bytes(8), ((8, 5),)).pack(),
                     hello(0) + spsa.Record(3, bytes(8), ()).pack(),
                     hello(299) + spsa.Record(3, bytes(8), ()).pack()):
            with socket.create_connection(("127.0.0.1", port)) as liar:
                liar.sendall(data)
                try:
                    while liar.recv(2**16):  # until it is dropped
                        pass
                except ConnectionResetError:
                    pass
        assert said("notary").count("dropped") == 7
        assert ends(when, start("second notary", notary, log, port, run, 4), 2) and "in use" in said("second notary")
        b.kill()
        records(30, lambda members: 2 not in members)
        os.kill(c.pid, signal.SIGSTOP)  # past its deadline
        records(40, lambda members: 3 not in members)
        os.kill(c.pid, signal.SIGCONT)
        records(50, lambda members: 3 in members)
        records(110)
        first.kill()
        ends(when, first, -9)
        before = spsa.read_log(log)[1]
        lost = sum(len(record.pack()) for record in before[-3:])
        log.write_bytes(log.read_bytes()[:-lost] + before[-3].pack()[:20] + bytes(500))  # three lost, half a one, 0s
        late = start("late", machine, port, 6, tmp_path, 0.01)
        when(lambda: "no notary" in said("late"))
        again = start("notary again", notary, log, port, run, 4)
        records(len(before), lambda members: 6 in members)
        assert "snapshot of step" in said("late") and "cut off" in said("notary again")
        os.kill(c.pid, signal.SIGSTOP)
        records(300)  # the end, without it
        os.kill(c.pid, signal.SIGCONT)
        assert all(ends(when, process) for process in (a, c, wild, slow, late, again)), [said("slow"), said("c")]
    found, toy = spsa.read_log(log)[1], Toy(run)
    loss = float(toy.loss_of(0, 0))
    replica = spsa.replica_of(toy.model, run, found)
    # subtle: the last of them may have been on the disk alone when its notary was killed: then nobody has it
    assert found[: len(before) - 1] == before[:-1]  # what the log had lost came back from machines
    assert replica.hash == found[-1].hash and len(found) == 301
    assert float(toy.loss_of(0, 0)) < 0.8 * loss  # in spite of the wild byte
    shares = {i: sum(i in dict(record.members) for record in found[:300]) for i in range(1, 7)}
    assert shares[2] < 60 and shares[5] < 100 < min(shares[1], shares[4])
    assert 127 in map(abs, dict(found[100].members).values())


@pytest.mark.parametrize("answer", [
    b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(99), spsa.HELLO.pack(9, 0) + b"{" * 9, spsa.HELLO.pack(2, 0) + b"{}",
    spsa.HELLO.pack(len(json.dumps(RUN)), 2) + json.dumps(RUN).encode() + bytes(99),
    spsa.HELLO.pack(len(json.dumps(RUN)), 1) + json.dumps(RUN).encode() + spsa.Record(0, b"notthese", ()).pack()])
def test_a_notary_that_is_none(tmp_path, answer):
    """A one-byte record, another protocol, a run without settings, weights of others: one line, at once."""
    with socket.create_server(("127.0.0.1", 0)) as server, processes(tmp_path) as (start, said, when):
        joiner = start("joiner", machine, server.getsockname()[1], 1, tmp_path, 0.0)
        link, _ = server.accept()
        link.sendall(answer)
        assert ends(when, joiner, 2) and said("joiner").startswith("error: ") and said("joiner").count("\n") == 1
        link.close()


# ---------------------------------------------------------------------------------------------- the tool


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    spsa.save_model(spsa.TINY_FILE, spsa.GPT2(*spsa.TINY))
    capsys.readouterr()
    return tmp_path


def test_ranks_kill_resume_and_replay(folder):
    """One process, two gloo ranks at default flags, and a run killed and started again: one log, to the byte."""
    flags = ["train", "--steps", 20, "--every", 5, "--device", "cpu", "--out"]
    command(*flags, "one")
    want = (folder / "one/run.log").read_bytes()
    with processes(folder) as (start, said, when):
        port = str(free_port())
        ranks = [start(f"rank{i}", command, *flags, "two", RANK=str(i), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=port, LOCAL_RANK=str(i)) for i in range(2)]
        killed = start("killed", command, *flags, "three")
        log = folder / "three/run.log"
        when(lambda: log.exists() and log.stat().st_size > 500)
        killed.kill()
        ends(when, killed, -9)
        cut = log.read_bytes()
        assert len(cut) < len(want)
        command(*flags, "three")
        assert all(ends(when, rank) for rank in ranks), said("rank0") + said("rank1")
    assert log.read_bytes() == want and (folder / "two/run.log").read_bytes() == want
    command("replay", "--log", "one/run.log", "--out", "again")
    command("replay", "--log", "one/run.log", "--steps", 0, "--out", "none")
    one, again, none, first = (torch.load(path)["model"] for path in (
        "one/weights.pt", "again/weights.pt", "none/weights.pt", spsa.TINY_FILE))
    for name in one:
        assert torch.equal(one[name], again[name]) and (none[name] - first[name]).abs().max() < 1e-6


def test_default_run_in_small(folder, monkeypatch, capsys):
    """The demo, and its drill by the commands that a user types."""
    monkeypatch.setattr(spsa, "MAX_STEPS", 3)
    command("demo", "--seeds", 1)
    out = capsys.readouterr().out
    hashes = [line.split("weights ")[1] for line in out.splitlines() if "weights " in line]
    assert len(hashes) == 3 and len(set(hashes)) == 1, out
    assert "MeZO" in out and [Path(path).name for path in out.split()[-2:]] == ["results.json", "demo.png"]


def test_the_byte_does_as_well_as_a_float_and_machines_help():
    """Steps until the loss of the toy is halved."""
    def steps(machines, byte, lr):
        toy = Toy(RUN)
        toy.run = RUN | dict(lr=lr, every=10**6)
        goal = float(toy.loss_of(0, 0)) / 2
        return next(i for i, _ in enumerate(spsa.spsa(toy, machines, byte)) if float(toy.loss_of(0, 0)) < goal)

    byte, exact, four = steps(1, True, 4e-3), steps(1, False, 4e-3), steps(4, True, 8e-3)
    assert abs(byte - exact) < 0.2 * exact and four < 0.7 * byte


def test_bfloat16_autocast():
    torch.manual_seed(0)
    problem = spsa.Problem(spsa.GPT2(*spsa.TINY), RUN | dict(eps=1e-2), spsa.tiny_reviews(200, 0))
    with torch.autocast("cpu", torch.bfloat16):
        next(spsa.adam(problem))
        next(spsa.mezo(problem))
        replica = spsa.Replica(problem.model, problem.run)
        record = replica.probe([1, 2], problem.loss_of)
        replica.update(record)
    assert all(code not in (0, -128) for _, code in record.members)


def test_openai_names_and_a_causal_model():
    torch.manual_seed(0)
    model, other, theirs = spsa.GPT2(2, 2, 8, 6, 11), spsa.GPT2(2, 2, 8, 6, 11), {}
    names = dict(norm1="ln_1", norm2="ln_2", in_proj="attn.c_attn", out_proj="attn.c_proj", linear1="mlp.c_fc",
                 linear2="mlp.c_proj")
    for name, p in model.named_parameters():
        words = name.replace("_weight", ".weight").replace("_bias", ".bias").split(".")
        if "layers" in words:
            name = f"h.{words[2]}.{names[words[-2]]}.{words[-1]}"
            p = p.T if "norm" not in words[-2] and p.dim() == 2 else p
        theirs[name.replace("h.norm", "ln_f")] = p.detach()
    assert {"h.1.attn.c_attn.bias", "h.0.mlp.c_fc.weight", "ln_f.bias", "wpe.weight"} < set(theirs)
    ids = torch.randint(11, (3, 6))
    with torch.no_grad():
        assert torch.equal(other.load_openai(theirs)(ids), model(ids))
        assert torch.allclose(model(ids)[:, :4], model(ids[:, :4]), atol=1e-6)


WORDS = ["good dull warm", "bad fine flat", "fresh cold moving", "stale witty bright"] * 5
ROWS = [(text, str(i % 2)) for i, text in enumerate(WORDS)]


@pytest.mark.parametrize("data", [
    "\ufeffsentence,label\r\n" + "".join(f"{a},{b}\r\n" for a, b in ROWS),
    "label;sentence\n" + "".join(f"{b};\"{a}\"\n" for a, b in ROWS),
    "id\tsentence\tlabel\n" + "".join(f"7\t{a}\t{b}\n" for a, b in ROWS) + "8\t\t1\n",
    "sentence\tlabel\n" + "".join(f'"{a}"\t"{b}"\n' for a, b in ROWS),
    "sentence\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS[1:]) + '"good" dull warm\t0\n'])
def test_tables(tmp_path, data):
    path = tmp_path / "rows.csv"
    path.write_bytes(data.encode())
    assert sorted((text.replace('"', ""), label) for text, label in spsa.read_sentences(path)) == sorted(ROWS)


@pytest.mark.skipif(DATA is None, reason="NANOPAPERS_TEST_DATA names no folder")
def test_gpt2_tokens_and_label_words(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", f"{DATA}/tiktoken")
    text = Path(DATA, "spsa_distributed/movieReviewSnippets_GroundTruth.txt").read_text("utf-8", "replace")
    rows = [(row.split("\t")[2], str(i % 2)) for i, row in enumerate(text.split("\n")[:40])]
    model = spsa.GPT2(1, 1, 4, 64)
    problem = spsa.Problem(model, RUN, rows)
    assert problem.label_ids == [7818, 1049]  # " terrible", " great"
    assert problem.train[0][0][-2:] == [632, 373]  # " It was"
    logits, _ = problem.logits(problem.train[:5])
    for (ids, _), row in zip(problem.train, logits):
        alone = F.linear(model(torch.tensor([ids]))[0, -1], model.wte.weight)[[7818, 1049]]
        assert torch.allclose(row, alone, atol=1e-5)

@pytest.mark.parametrize("args, words", [
    (["train", "--lr", "0"], "lr = 0.0"), (["train", "--machines", "0"], "--machines 0"),
    (["serve", "--machines", "-1"], "--machines -1"), (["compare", "--seeds", "0"], "--seeds 0"),
    (["train", "--noise", "binomial"], "noise = binomial"),
    (["train", "--steps", "many"], "--steps"), (["train", "--resume_from", "x"], "unrecognized"),
    (["train", "--model", "gpt7"], "gpt7"), (["train", "--device", "abacus"], "abacus"),
    (["train", "--data", "none.csv"], "none.csv"), (["train", "--data", "lines.jsonl"], "columns sentence and label"),
    (["train", "--data", "wide.csv"], "UTF-8"), (["train", "--data", "torn.csv"], "row 2"),
    (["train", "--data", "few.csv"], "ten rows"), (["train", "--data", "pm.csv"], "'pos' is not in list (the tiny"),
    (["train", "--labels", "0=great,1=great"], "different words"), (["train", "--labels", "1=great"], "--labels"),
    (["join", "--connect", "here"], "HOST:PORT"), (["join", "--connect", "[::1]:port"], "HOST:PORT"),
    (["join", "--connect", "[::1]:1", "--patience", "0"], "no notary at ::1:1"),
    (["replay", "--log", "none.log"], "none.log"), (["replay", "--log", "few.csv"], "no log"),
    (["serve", "--data", "few.csv"], "unrecognized"), (["serve", "--log", "few.csv"], "no log"), (["bench"], "bench")])
def test_mistakes_end_in_one_line(args, words, folder, capsys):
    rows = "sentence,label\n" + "good dull warm,pos\n" * 12
    few = "sentence,label\ngood dull warm,1\n"
    files = {"lines.jsonl": '{"sentence": "good", "label": 1}\n' * 12, "few.csv": few, "pm.csv": rows,
             "torn.csv": few + "good dull\n", "wide.csv": rows}
    for name, text in files.items():
        (folder / name).write_text(text, "utf-16" if name == "wide.csv" else "utf-8")
    with pytest.raises(SystemExit) as stop:
        command(*args, *(["--device", "cpu"] if args[0] in ("train", "join") and "--device" not in args else []))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0], lines
    assert (folder / "few.csv").read_text() == few
