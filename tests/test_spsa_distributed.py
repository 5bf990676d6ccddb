"""spsa_distributed.py: noise, code, grid, estimator and log by other routes; the claims in miniature; the tool with real processes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spsa_distributed as spsa

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")
CPU = torch.device("cpu")
KINDS = ("rademacher", "binomial", "gaussian")
torch.set_num_threads(1)
RUN = dict(key=11, steps=40, samples=1, eps=1e-3, lr=1e-2, reduce="sqrt", schedule="constant", noise="rademacher", codec="byte",
           protocol=1, hash_every=4, weights="w")


class Toy(nn.Module):
    """Two tensors of odd sizes, one of ones, one of zeros, and a tied one."""

    def __init__(self, seed=0):
        super().__init__()
        self.a = nn.Parameter(torch.randn(37, 41, generator=torch.Generator().manual_seed(seed)) * 0.02)
        self.norm, self.bias = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(5))
        self.tied = self.a


def toy(**changes):
    return spsa.Replica(Toy(), dict(RUN, **changes))


def everything(replica):
    replica.flush()
    return torch.cat([p.flatten() for p in replica.model.parameters()]).clone()


def message(*gs):
    return spsa.pack(gs, "byte")


# ------------------------------------------------------------------------------------------------ 1. the mathematics: noise


@pytest.mark.parametrize("counter, key, rounds, answer", [  # Random123
    ((0, 0, 0, 0), 0, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 10, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ((0, 0, 0, 0), 0, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
])
def test_philox_known_answers(counter, key, rounds, answer):
    assert tuple(int(x) for x in spsa.philox(*map(torch.tensor, counter), key, rounds)) == answer
    assert spsa.philox(*counter, key, rounds) == answer  # Python's unbounded integers


def one_normal(kind, key, step, machine, sample, e):
    """The protocol for one weight, in scalars."""
    group = e // 128 if kind == "rademacher" else 256 * (e // 1024) + e % 256
    words = spsa.philox(group % 2**32, sample * 65536 + group // 2**32, step, machine, key)
    if kind == "rademacher":
        return 1.0 if words[e // 32 % 4] >> e % 32 & 1 == 0 else -1.0
    j = e // 256 % 4
    if kind == "binomial":
        return (bin(words[j]).count("1") - 16) / math.sqrt(8)
    u, turn = ((words[j - j % 2] >> 9) + 0.5) / 2**23, 2 * math.pi * (words[j - j % 2 + 1] >> 8) / 2**24
    return math.sqrt(-2 * math.log(u)) * (math.sin if j % 2 else math.cos)(turn)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_against_scalars(kind):
    records = torch.tensor([[7, 2, 1, 0], [2**31 - 1, 65535, 65535, 0]], dtype=torch.int32)
    z = spsa.noise(kind, 2**63 + 1234, records, 3, 2).flatten(1)
    for row, (step, machine, sample, _) in enumerate(records.tolist()):
        for e in [*range(0, 2048, 61), 31, 32, 127, 128, 255, 256, 1023, 1024]:
            expected = one_normal(kind, 2**63 + 1234, step, machine, sample, 3 * 1024 + e)
            assert float(z[row, e]) == pytest.approx(expected, abs=3e-6 if kind == "gaussian" else 2e-7), e


@pytest.mark.parametrize("kind, first", [  # written down once: another version or device must still give these
    ("rademacher", [1, -1, -1, -1, -1, 1, 1, -1]),
    ("binomial", [0.0, 1.0606601, 0.0, 1.767767, 0.70710677, -1.767767, -2.4748738, 1.4142135]),
    ("gaussian", [0.007035071, 0.29407409, 0.039675701, -0.46852866, -0.36570412, 1.5244634, 0.98822665, -0.3492969]),
])
def test_noise_fixture(kind, first):
    z = spsa.noise(kind, 1234, torch.tensor([[7, 2, 1]]), 0, 1)[0, 0, :8]
    torch.testing.assert_close(z, torch.tensor(first, dtype=torch.float32), rtol=0, atol=0 if kind == "rademacher" else 1e-6)


def test_groups_beyond_32_bits_have_their_own_counters():
    records = torch.tensor([[0, 0, 0]])
    far = spsa.noise("binomial", 5, records, 2**24, 1)  # group 2³²: its high bits are in the second word
    assert not torch.equal(far, spsa.noise("binomial", 5, records, 0, 1))
    assert float(far[0, 0, 0]) == pytest.approx(one_normal("binomial", 5, 0, 0, 0, 2**34), abs=1e-6)


@pytest.mark.parametrize("kind, fourth", [("rademacher", 1), ("binomial", 2.9375), ("gaussian", 3)])
def test_noise_moments_and_streams(kind, fourth):
    """Every figure within four standard errors of theory; streams of other steps, machines, samples and lags are uncorrelated."""
    records = torch.tensor([[t, m, k] for t in range(4) for m in range(4) for k in range(2)])
    z = spsa.noise(kind, 99, records, 0, 8).flatten(1).double()  # (32, 8192)
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * ((fourth - 1) / n) ** 0.5 + 1e-6
    assert abs((z**4).mean() - fourth) < 4 * ((z**4).var() / n) ** 0.5 + 1e-5
    assert abs((z**3).mean()) < 4 * ((z**6).mean() / n) ** 0.5
    between = (z @ z.T / z.size(1))[~torch.eye(32, dtype=torch.bool)]
    assert between.abs().max() < 5 / z.size(1) ** 0.5  # 992 of them
    for lag in (1, 32, 128, 256, 1024):
        assert abs((z[:, lag:] * z[:, :-lag]).mean()) < 4 / (n * (1 - lag / 8192)) ** 0.5


# ------------------------------------------------------------------------------------------------ the byte


def test_every_code_comes_back():
    for c in range(-127, 128):
        g = spsa.unpack(bytes([c & 255]), "byte")[0]
        assert spsa.encode(g) == c and (g > 0) == (c > 0)
        if c:
            assert g == pytest.approx(math.copysign(math.exp((abs(c) - 64) / 8), c), rel=1e-7)
    assert math.isnan(spsa.unpack(b"\x80", "byte")[0])
    values = [spsa.unpack(bytes([c & 255]), "byte")[0] for c in range(-127, 128)]
    assert values == sorted(values) and values == [-v for v in reversed(values)]


@pytest.mark.parametrize("g, code", [(0.0, 0), (-0.0, 0), (math.inf, -128), (-math.inf, -128), (math.nan, -128), (1e-9, 0), (-1e-9, 0),
                                     (1e9, 127), (-1e9, -127), (1.0, 64), (-1.0, -64), (3.57e-4, 0), (3.7e-4, 1), (2600, 127)])
def test_special_gradients(g, code):
    assert spsa.encode(g) == code


def test_code_error():
    g = np.exp(np.random.default_rng(0).uniform(math.log(4e-4), math.log(2500), 20_000))
    error = np.array(spsa.unpack(spsa.pack(g, "byte"), "byte")) / g - 1
    assert abs(error).max() < 0.0646  # e^(1/16) − 1
    assert error.mean() == pytest.approx(math.sinh(1 / 16) * 16 - 1, abs=4 * error.std() / 20_000**0.5)
    assert spsa.unpack(spsa.pack([1.5, math.nan], "float32"), "float32")[0] == 1.5 and len(spsa.pack([1, 2], "float32")) == 8


def test_another_exp_is_refused(monkeypatch):
    exp = math.exp
    monkeypatch.setattr(spsa.math, "exp", lambda x: exp(x) * (1 + 1e-6))
    with pytest.raises(ImportError):
        spsa.code_table()


# ------------------------------------------------------------------------------------------------ weights on a grid


def test_flat_buffer_and_grid():
    replica = toy()
    assert replica.first == {"a": 0, "norm": 2048, "bias": 3072} and replica.flat.shape == (4096,)  # tied once, starts at tiles
    assert replica.model.tied is replica.model.a and replica.model.a.data_ptr() == replica.flat.data_ptr()
    top = float(Toy().a.detach().abs().max())
    assert replica.grid.tolist() == [2.0**-24] * 2 + [2.0**-22, 2.0**-24] and top < 0.25  # e = 0, 0, ⌈log₂ 1⌉ + 2, 0
    assert (replica.model.a - Toy().a).abs().max() <= 2.0**-25 and torch.equal(replica.model.norm, torch.ones(7))
    big = Toy()
    big.a.data[0, 0] = 3.0
    assert float(spsa.flatten_(big)[1][0]) == 2.0 ** (4 - 24)  # ⌈log₂ 3⌉ + 2 = 4


def test_snap_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, 1e6 + 0.5])
    for q in (2.0**-24, 1.0, 4.0):
        assert torch.equal(spsa.snap(x * q, torch.tensor(q)), x.round() * q)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_probes_leave_no_trace(kind):
    replica = toy(noise=kind, eps=1.3e-3)
    start, digest = everything(replica), replica.sha256()
    for step in range(1000):
        replica.step = step
        replica.probe(step % 3, step % 2, lambda: torch.tensor(0.0))
    assert torch.equal(everything(replica), start) and replica.sha256() == digest


@pytest.mark.parametrize("kind", KINDS)
def test_probe_is_symmetric_and_scaled(kind):
    replica = toy(noise=kind)
    start, seen = everything(replica), []
    g = replica.probe(2, 0, lambda: (seen.append(torch.cat([p.flatten() for p in replica.model.parameters()]).clone()), len(seen) ** 2)[1])
    assert g == pytest.approx((1 - 4) / 2e-3) and torch.equal(seen[0] - start, start - seen[1])
    z = torch.tensor([one_normal(kind, 11, 0, 2, 0, e) for e in range(37 * 41)])
    torch.testing.assert_close((seen[0] - start)[: 37 * 41], 1e-3 * z, rtol=0, atol=2.0**-24)
    z = torch.tensor([one_normal(kind, 11, 0, 2, 0, 2048 + e) for e in range(7)])  # the norm's own place in the flat buffer
    torch.testing.assert_close((seen[0] - start)[37 * 41 : 37 * 41 + 7], 1e-3 * z, rtol=0, atol=2.0**-22)


def test_fused_equals_unfused():
    """The queue joins restoring, update and the next perturbation; doing each by itself gives the same bits."""
    fused, single = toy(lr=1e-5), toy(lr=1e-5)
    for _ in range(20):
        for replica in (fused, single):
            payloads = []
            for m in (4, 9):
                payloads.append((m, replica.payload(m, lambda m, t, k, r=replica: (r.flat[:1500] * (m + 1)).sum() ** 2)))
                if replica is single:
                    replica.flush()
            replica.update(payloads)
            if replica is single:
                replica.flush()
    assert fused.sha256() == single.sha256() != toy().sha256()


@pytest.mark.parametrize("reduce, divisor", [("sqrt", 3**0.5), ("mean", 3), ("sum", 1)])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_update_by_hand(reduce, divisor, schedule):
    """θ ← θ − snap(η/s·Σ g·z) in float64, over the valid codes only: one machine's second sample did not contribute."""
    replica = toy(reduce=reduce, schedule=schedule, samples=2, steps=10)
    replica.step = 5
    start = everything(replica).double()
    replica.update([(6, message(0.5, math.nan)), (1, message(-2.0, 3.0))])
    terms = [(1, 0, -2.0), (1, 1, 3.0), (6, 0, 0.5)]
    lr = 1e-2 * (0.5 if schedule == "linear" else 1)
    decoded = [math.copysign(math.exp((round(8 * math.log(abs(g))) + 64 - 64) / 8), g) for *_, g in terms]
    for e, at in [(0, 0), (700, 700), (2048 + 3, 37 * 41 + 3)]:
        change = -lr / divisor * sum(g * one_normal("rademacher", 11, 5, m, k, e) for (m, k, _), g in zip(terms, decoded))
        assert float(everything(replica)[at] - start[at]) == pytest.approx(change, abs=2.0**-22)
    assert replica.step == 6


def test_machine_ids_matter_and_their_order_does_not():
    """With 200 terms float32's sum depends on their order, unless they are sorted by machine."""
    sums, gs = [], np.random.default_rng(0).normal(size=200)
    step = [(m, message(g)) for m, g in enumerate(gs)]
    for members in (step, step[::-1], [(m, payload) for (m, _), (_, payload) in zip(step, step[::-1])]):
        replica = toy()
        replica.update(members)
        sums.append(replica.sha256())
    assert sums[0] == sums[1] != sums[2]


def test_replay_in_one_pass_and_never_cut_inside_a_sum():
    """600 machines in a step are more rows than the queue holds: a flush between them would lose part of the sum."""
    rng = np.random.default_rng(0)
    steps = [[(m, message(rng.normal())) for m in range(n)] for n in (3, 600, 2, 1)]
    at_once, single = toy(lr=1e-3), toy(lr=1e-3)
    for members in steps:
        at_once.update(members)
        single.update(members)
        single.flush()
    assert at_once.sha256() == single.sha256()
    torch.manual_seed(0)
    short = toy(lr=1e-3)
    short.step = 1
    short.update(steps[1])
    coefs = [-1e-3 / 600**0.5 * spsa.unpack(payload, "byte")[0] for _, payload in steps[1]]
    change = sum(c * one_normal("rademacher", 11, 1, m, 0, 5) for m, c in enumerate(coefs))
    assert float(everything(short)[5] - everything(toy())[5]) == pytest.approx(change, abs=1e-6)


def test_steps_without_a_byte():
    replica = toy()
    start = replica.sha256()
    for _ in range(9):
        replica.update([(0, message(math.nan))])
    replica.update([])
    assert replica.sha256() == start and replica.step == 10
    with pytest.raises(spsa.Diverged, match="not finite"):
        for _ in range(10):
            replica.update([(0, message(math.nan))])


def test_leaving_the_grid_and_vanishing_updates(capsys):
    """The bound stops a run before a weight is lost, after as many steps on a replica that was probing as on one that replays."""
    seen = []
    for probing in (False, True):
        replica = toy(lr=0.02)
        with pytest.raises(spsa.Diverged, match="a holds a weight of 0.9"):
            for _ in range(200):
                if probing:
                    replica.probe(7, 0, lambda: torch.tensor(0.0))
                replica.update([(0, message(1.0))])
        seen.append((replica.step, replica.sha256()))
        assert float(replica.model.a.abs().max()) < 1
    assert seen[0] == seen[1] and 30 < seen[0][0] < 200
    small = toy(lr=1e-9)
    small.update([(0, message(1.0))])
    assert "raise --lr" in capsys.readouterr().err and small.sha256() == toy().sha256()


def test_twice_the_same_loss_is_noticed(capsys):
    replica = toy()
    for step in range(60):
        replica.step = step
        replica.probe(0, 0, lambda: torch.tensor(1.0))
    assert capsys.readouterr().err.count("raise --eps") == 1


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    top = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:  # neither in place nor a view
                self.top = max(self.top, t.numel())
        return result


def test_no_temporary_of_the_size_of_the_weights():
    model = nn.Linear(3000, 2000, bias=False)  # 6M weights; a piece is 64 tiles of 8 records
    replica = spsa.Replica(model, RUN)
    start = model.weight.flatten()[5_000_000:5_000_020].tolist()
    with Largest() as watch:
        replica.probe(0, 0, lambda: torch.tensor(0.0))
        replica.update([(m, message(1.0)) for m in range(20)])
        replica.sha256()
    for i, e in enumerate(range(5_000_000, 5_000_020)):  # far beyond the first piece
        change = -1e-2 / 20**0.5 * sum(one_normal("rademacher", 11, 0, m, 0, e) for m in range(20))
        assert float(model.weight.flatten()[e] - start[i]) == pytest.approx(change, abs=2.0**-23)
    assert 64 * 1024 <= watch.top <= 8 * 64 * 1024 < model.weight.numel() / 10


# ------------------------------------------------------------------------------------------------ the estimator


@pytest.mark.parametrize("kind, fourth", [("rademacher", 1), ("binomial", 2.9375), ("gaussian", 3)])
def test_estimator_mean_and_second_moment(kind, fourth):
    """On a quadratic the two-sided difference is ⟨∇f, z⟩ exactly: E g·z = ∇f and E‖g·z‖² = (d + E z⁴ − 1)·‖∇f‖². 40,000 draws, d = 64."""
    generator = torch.Generator().manual_seed(0)
    a, x = torch.randn(64, 64, generator=generator).double(), torch.randn(64, generator=generator).double()
    a = a @ a.T
    z = spsa.noise(kind, 3, torch.stack([torch.arange(2500), torch.zeros(2500).long(), torch.zeros(2500).long()], 1), 0, 1)
    z = z.reshape(-1, 64).double()  # (40000, 64)

    def f(y):
        return (y @ a * y).sum(-1) / 2

    gz = ((f(x + 1e-3 * z) - f(x - 1e-3 * z)) / 2e-3)[:, None] * z
    gradient = a @ x
    assert F.cosine_similarity(gz.mean(0), gradient, 0) > 0.998
    assert float(gz.mean(0) @ gradient / gradient.square().sum()) == pytest.approx(1, abs=0.03)
    assert float(gz.square().sum(1).mean() / gradient.square().sum()) == pytest.approx(64 + fourth - 1, rel=0.025)


def test_projected_gradient_against_autograd():
    torch.manual_seed(1)
    model = spsa.GPT(spsa.GPTConfig(**spsa.TINY)).double()
    problem = spsa.Problem(model, CPU)
    for p in model.parameters():
        p.data.mul_(3)
    batch = problem.batch(0, 0, 0, 8)
    gradients = torch.autograd.grad(F.cross_entropy(exact_logits(problem, batch), batch[2]), list(model.parameters()))
    replica = spsa.Replica(model, dict(RUN, eps=1e-4))
    for machine in range(3):
        seen = []

        def loss(seen=seen):
            seen.append([p.detach().clone() for p in model.parameters()])
            return F.cross_entropy(exact_logits(problem, batch), batch[2])

        g = replica.probe(machine, 0, loss)
        along = sum(float((grad * (a - b)).sum()) for grad, a, b in zip(gradients, *seen)) / 2e-4
        assert g == pytest.approx(along, rel=1e-3, abs=1e-5)


def exact_logits(problem, batch):
    """Float64 logits of the label words out of the full head."""
    logits = problem.model(batch[0])[torch.arange(len(batch[0])), batch[1]]
    return logits[:, problem.label_ids]


# ------------------------------------------------------------------------------------------------ the log


def write(path, steps, **changes):
    log = spsa.Log(path, dict(RUN, **changes))
    for members in steps:
        log.append(members)
    log.file.close()
    return path.read_bytes()


STEPS = [[(0, b"\x01"), (1, b"\x02")], [(0, b"\x03"), (1, b"\x80")], [], [(1, b"\x05")], [(1, b"\x06"), (300, b"\x07")]]


def test_log_layout_and_round_trip(tmp_path):
    data = write(tmp_path / "a.log", STEPS)
    records = data[data.index(b"\n") + 1 :]
    assert spsa.Log(tmp_path / "a.log").steps == STEPS and json.loads(data.split(b"\n")[0]) == RUN
    assert records[:7] == b"\x02\x00\x00\x01\x00\x01\x02" and records[9:12] == b"\xff\x03\x80"  # the second: same members
    assert len(records) == (1 + 4 + 2 + 2) + (1 + 2 + 2) + (1 + 2) + (1 + 2 + 1 + 2) + (1 + 4 + 2 + 2)
    halves = write(tmp_path / "b.log", STEPS[:2])
    assert data.startswith(halves) and write(tmp_path / "b.log", STEPS[2:]) == data  # going on changes nothing


def test_log_cut_anywhere_is_recovered(tmp_path, capsys):
    data, path = write(tmp_path / "a.log", STEPS), tmp_path / "cut.log"
    start = data.index(b"\n") + 1
    for end in range(start, len(data)):
        path.write_bytes(data[:end])
        steps = spsa.Log(path).steps
        assert steps == STEPS[: len(steps)] and len(steps) < 5
        assert ("incomplete" in capsys.readouterr().err) == (end not in ends(data))
        assert write(path, STEPS[len(steps) :]) == data
        capsys.readouterr()


def ends(data):
    """Where whole records end."""
    at = data.index(b"\n") + 1
    return {at, at + 9, at + 14, at + 17, at + 23, at + 32}


def test_log_damaged_anywhere_is_refused(tmp_path, capsys):
    data, path, kept = write(tmp_path / "a.log", STEPS), tmp_path / "bad.log", 0
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x11]) + data[i + 1 :])
        try:
            steps = spsa.Log(path).steps
            kept += 1
            assert "incomplete" in capsys.readouterr().err and steps == STEPS[: len(steps)]  # a count that reaches past the end
        except SystemExit:
            err = capsys.readouterr().err
            assert err.startswith("error: ") and any(word in err for word in ("damaged at step", "not a log", "protocol")), err
    assert kept <= 5  # records


@pytest.mark.parametrize("content, words", [
    (b"", "not a log"), (b"{}\n", "not a log"), (b"[1]\n", "not a log"), (b"\x00\xff\n", "not a log"),
    (b'{"protocol": 2, "codec": "byte", "samples": 1}\n', "protocol 2"),
    (b'{"protocol": 1, "codec": "byte", "samples": 1}\n\xff\x01\x00\x00', "damaged at step 0"),
])
def test_what_is_no_log(tmp_path, capsys, content, words):
    (tmp_path / "x.log").write_bytes(content)
    with pytest.raises(SystemExit):
        spsa.Log(tmp_path / "x.log")
    assert words in capsys.readouterr().err


def test_log_of_another_run_is_refused(tmp_path, capsys):
    write(tmp_path / "a.log", STEPS)
    for change, words in ((dict(eps=2e-3), "eps = 0.001, here it is 0.002"), (dict(weights="v"), "weights = w, here it is v: copy")):
        with pytest.raises(SystemExit):
            spsa.Log(tmp_path / "a.log", dict(RUN, **change))
        assert words in capsys.readouterr().err


def test_seal():
    for size in (1, 4):
        members = [(0, b"abcd"[:size]), (65535, b"efgh"[:size])]
        assert spsa.unseal(spsa.seal(members), size) == members


# ------------------------------------------------------------------------------------------------ the task


def test_loss_is_the_masked_full_softmax():
    """Restricting the softmax to the label words = every other logit at −∞, as the authors do; padding changes nothing."""
    torch.manual_seed(0)
    problem = spsa.Problem(spsa.GPT(spsa.GPTConfig(**spsa.TINY)), CPU)
    ids, last, classes = problem.encode([(1, "the film was good .", "1"), (2, "the plot is bad but the cast was warm .", "0")])
    assert last.tolist() == [6, 11] and ids.shape == (2, 12)
    full = problem.model(ids)[torch.arange(2), last]
    mask = torch.full_like(full, -math.inf)
    mask[:, problem.label_ids] = 0
    names = [*spsa.TINY_IDS]
    assert [names[i] for i in problem.label_ids] == ["terrible", "great"]
    expected = F.cross_entropy(full + mask, problem.label_ids[classes])
    assert float(problem.loss(ids, last, classes).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    alone = problem.model(ids[:1, :7])[0, 6, problem.label_ids]
    torch.testing.assert_close(problem.logits(ids, last)[0], alone, rtol=1e-4, atol=1e-6)
    ids, last, _ = problem.encode([(1, "bad " * 12 + "good " * 18, "1")])
    assert problem.cut == 1 and ids.tolist() == [[spsa.TINY_IDS["good"]] * 18 + [spsa.TINY_IDS["it"], spsa.TINY_IDS["was"]]]


def test_generated_reviews():
    texts, labels, good = spsa.tiny_reviews(4000, 1, 2)
    for text, label in list(zip(texts, labels))[:200]:
        words = text.split()
        assert len(words) == 12 and set(words) <= set(spsa.TINY_IDS)
        assert label == str(int(sum(word in spsa.GOOD for word in words) >= 2)) and sum(word in spsa.GOOD + spsa.BAD for word in words) == 3
    agree = np.mean(good[:, 0] == good[:, 1])
    assert agree == pytest.approx(0.75**2 + 0.25**2, abs=4 * 0.5 / 4000**0.5)
    assert spsa.tiny_reviews(5, 1, 2)[0] != spsa.tiny_reviews(5, 1, 3)[0]


def test_batches_are_private_and_depend_on_the_counter_alone():
    problem, again = (spsa.Problem(spsa.GPT(spsa.GPTConfig(**spsa.TINY)), CPU) for _ in range(2))
    again.batch(1, 5, 0, 16)
    for a, b in zip(problem.batch(0, 3, 1, 16), again.batch(0, 3, 1, 16)):
        assert torch.equal(a, b)
    different = [problem.batch(*counter, 16)[0] for counter in ((0, 3, 1), (0, 4, 1), (0, 3, 0), (1, 3, 1))]
    assert len({t.numpy().tobytes() for t in different}) == 4 and len(problem.private) == 2


def table(path, text):
    Path(path).write_text(text)
    return str(path)


ROWS = "".join(f"the {noun} was {word} .\t{label}\n" for noun in ("film", "cast", "song", "plot") for word, label in
               (("good", "yes"), ("bad", "no"), ("warm", "yes"), ("dull", "no")))


@pytest.mark.parametrize("text, columns", [("sentence\tlabel\n" + ROWS, {}), ("y,x\n" + "".join(
    f'{row.split(chr(9))[1]},"{row.split(chr(9))[0]}"\n' for row in ROWS.splitlines()), dict(text_column="x", label_column="y"))])
def test_tables(tmp_path, text, columns):
    model = spsa.GPT(spsa.GPTConfig(**spsa.TINY))
    problem = spsa.Problem(model, CPU, table(tmp_path / "t", text), **columns)
    assert problem.classes == {"no": "terrible", "yes": "great"} and len(problem.train[0]) == 13 and len(problem.test[0]) == 3
    names, found = [*spsa.TINY_IDS], {}
    for ids, label in zip(torch.cat([problem.train[0], problem.test[0]]).tolist(), torch.cat([problem.train[2], problem.test[2]]).tolist()):
        found[" ".join(names[i] for i in ids)] = label  # all alike in length: no padding
    rows = [row.split("\t") for row in ROWS.splitlines()]
    assert found == {f"{text} it was": int(label == "yes") for text, label in rows}
    assert sorted(map(len, (problem.batch(0, 0, 0, 5)[0], problem.private[0][0]))) == [5, 13]
    turned = spsa.Problem(model, CPU, tmp_path / "t", labels="yes=terrible,no=great", **columns)
    assert turned.classes == {"yes": "terrible", "no": "great"}
    flipped = torch.equal(turned.label_ids, problem.label_ids) and torch.equal(turned.test[2], 1 - problem.test[2])
    assert flipped


@pytest.mark.skipif(DATA is None, reason="NANOPAPERS_TEST_DATA names no folder")
def test_gpt2_prompts_on_published_sentences(tmp_path, monkeypatch):
    """Movie-review snippets through GPT-2's tokenizer: label words of one token, sentences cut on the left, prompts kept whole."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(DATA) / "tiktoken"))
    rows = (Path(DATA) / "spsa_distributed/movieReviewSnippets_GroundTruth.txt").read_text(errors="replace").splitlines()[:60]
    rows = [row.split("\t") for row in rows]
    text = "sentence\tlabel\n" + "".join(f"{row[2]}\t{int(float(row[1]) > 0)}\n" for row in rows)
    model = spsa.GPT(spsa.GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=50257, block_size=24))
    problem = spsa.Problem(model, CPU, table(tmp_path / "t.tsv", text))
    _, encode, decode = spsa.get_tokenizer("gpt2")
    assert [decode([i]) for i in problem.label_ids.tolist()] == [" terrible", " great"] and problem.cut > 0
    ids, last, _ = problem.test
    for row, end in zip(ids.tolist(), last.tolist()):
        said = decode(row[: end + 1])
        assert said.endswith(" It was") and any(said[: -len(" It was")] in snippet[2] for snippet in rows) and end < 24
    other = spsa.Problem(model, CPU, tmp_path / "t.tsv", prompt="justonebyte")
    assert decode(other.test[0][0].tolist()[: int(other.test[1][0]) + 1]).endswith("\nsentiment:\n")


def test_bytes_on_the_wire():
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in spsa.GPT(spsa.GPTConfig(vocab_size=50257, bias=True)).parameters()]
    row = spsa.wire_bytes(shapes, samples=3)
    assert row["DDP, float32 gradients"] == 497_759_232 and row["1-bit Adam, compressed phase"] == 15_554_976  # 124,439,808 parameters
    assert row["one byte a probe"] == 3 and round(row["DiLoCo, 500 local steps"]) == 995_518
    assert spsa.wire_bytes([(5, 7), (11,)], rank=2)["PowerSGD, rank 2"] == 4 * (2 * (5 + 7) + 11)
    assert [spsa.in_words(x) for x in (1, 999, 1234, 5e6, 4.98e8, 6.23e9)] == ["1 B", "999 B", "1.23 kB", "5 MB", "498 MB", "6.23 GB"]


# ------------------------------------------------------------------------------------------------ the notary and its machines


def run_notary(log, result, port, **options):
    store = spsa.open_store("127.0.0.1", port, True, 10)
    result["port"] = store.port
    result["odd"] = spsa.notarise(store, log, options.pop("machines", 1), options.pop("deadline", 20), **options)


def machine(port, result, i, replica, delay=lambda step: None, **options):
    worker = spsa.Worker(("127.0.0.1", port), 20)
    try:
        worker.connect()

        def loss_of(m, step, k):
            delay(step)
            return (replica.flat[:1500] * torch.linspace(0, 1 + i, 1500)).sum() ** 2

        worker.work(replica, loss_of, **options)
        result[i] = replica.sha256(), worker.sent, worker.machine
    except SystemExit:
        result[i] = "stopped"


def threads(*jobs):
    started = [threading.Thread(target=job, args=args, kwargs=kwargs, daemon=True) for job, args, kwargs in jobs]
    for thread in started:
        thread.start()
    return started


def wait_for(result, key):
    until = time.monotonic() + 30
    while key not in result and time.monotonic() < until:
        time.sleep(0.01)
    return result[key]


def test_late_and_odd_machines(tmp_path, capsys):
    """Machine `slow` misses the deadline of step 3 and comes back; a replica with one other weight is named, and out. Nobody waits for
    those that are out: 3 s at each of 24 steps would be too long."""
    log, result = spsa.Log(tmp_path / "run.log", dict(RUN, steps=24, lr=1e-5)), {}
    replicas = [toy(steps=24, lr=1e-5) for _ in range(4)]
    replicas[2].model.a.data[3, 3] += 2.0**-24
    slept = []

    def slow(step):
        if step == 3 and not slept:
            slept.append(step)
            time.sleep(4)
        time.sleep(0.1)

    everyone = threads((run_notary, (log, result, 0), dict(machines=4, deadline=3)))
    port = wait_for(result, "port")
    everyone += threads(*((machine, (port, result, i, replica, slow if i == 1 else lambda step: time.sleep(0.1)), {})
                          for i, replica in enumerate(replicas)))
    for thread in everyone:
        thread.join(60)
    assert not any(thread.is_alive() for thread in everyone)
    assert result[0][0] == result[1][0] == result[3][0] and result[2] == "stopped"
    assert len(result["odd"]) == 1 and result["odd"][0][1] == 0 and "differs from the majority at step 0" in capsys.readouterr().err
    again = toy(steps=24, lr=1e-5)
    for members in spsa.Log(tmp_path / "run.log").steps:
        again.update(members)
    assert again.sha256() == result[0][0]
    counts = [{m for m, _ in members} for members in log.steps]
    late, steady = result[1][2], result[0][2]
    assert late in counts[2] and late not in counts[3] and late in counts[-1], "late at step 3, back later"
    assert all(steady in ids for ids in counts) and result["odd"][0][0] not in set().union(*counts)
    assert result[0][1] == 24 and result[1][1] <= 24  # one byte a probe, counted where it is handed over


def test_a_machine_with_a_longer_log_than_the_notary(tmp_path, capsys):
    log, result, replica = spsa.Log(tmp_path / "run.log", dict(RUN, steps=9, lr=1e-5)), {}, toy(steps=9)
    for _ in range(3):
        replica.update([(0, message(1.0))])
    notary = threads((run_notary, (log, result, 0), {}))
    port = wait_for(result, "port")
    machine(port, result, 0, replica)
    assert result[0] == "stopped" and "ends at step 0, this machine has seen 3" in capsys.readouterr().err
    machine(port, result, 1, toy(steps=9, lr=1e-5))
    notary[0].join(60)
    assert result[1][1] == 9 and not notary[0].is_alive()


# ----------------------------------------------------------------------------------------------------------- 2. the claims


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the pretrained tiny model."""
    folder, here = tmp_path_factory.mktemp("base"), Path.cwd()
    os.chdir(folder)
    spsa.pretrain_tiny(True)
    os.chdir(here)
    return folder


@pytest.fixture
def folder(base, tmp_path, monkeypatch):
    (tmp_path / spsa.TINY_FILE.parent).mkdir(parents=True)
    shutil.copy(base / spsa.TINY_FILE, tmp_path / spsa.TINY_FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_byte_and_float_and_more_machines(folder):
    """Catches a wrong sign, scale, seed or restoration: none of these learns. Measured: .25 to .31 at the end, from .387."""
    job = dict(optimizer="spsa", lr=2e-3, seed=0, steps=25, target=0.3, stop=False)
    four, exact, one = (spsa.one_run(dict(job, **changes)) for changes in (
        dict(machines=4), dict(machines=4, codec="float32"), dict(machines=1)))
    start, end = four["curve"][0][1], four["curve"][-1][1]
    assert end < start - 0.08 and four["reached"] and end < one["curve"][-1][1]
    assert abs(end - exact["curve"][-1][1]) < 0.02 and (four["bytes_a_step"], exact["bytes_a_step"]) == (1, 4)
    adam = spsa.one_run(dict(job, optimizer="adam", machines=1, lr=1e-3, steps=10))
    assert adam["curve"][-1][1] < end - 0.05, "and first-order training is far ahead"


def test_grid_does_not_drift_and_bfloat16_does(folder):
    assert spsa.idle_drift(torch.float32, True) == (0.0, 0.0)
    naive, still = spsa.idle_drift(torch.float32, False)
    assert 0 < naive < 0.01 and still == 0
    naive, still = spsa.idle_drift(torch.bfloat16, False)
    assert naive > 0.1 and still > 0.001  # LayerNorm's ones do not move by 0.001: bfloat16's neighbours of 1 are 0.996 and 1.008


def test_a_lost_run_is_given_up(folder):
    result = spsa.one_run(dict(optimizer="spsa", machines=1, lr=0.5, seed=0, steps=60, target=0.1, stop=True))
    assert result["reached"] is None and all(math.isfinite(ce) for _, ce, _ in result["curve"]) and result["probes"] < 60


# ----------------------------------------------------------------------------------------------------------- 3. the tool


def command(*args, cwd, launcher=(), **popen):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOPAPERS_CACHE": str(cwd / "cache")}
    return subprocess.Popen([sys.executable, *launcher, str(HOUSE / "spsa_distributed.py"), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finished(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def results(folder, out):
    return json.loads((folder / next(word for word in reversed(out.split()) if word.endswith("results.json"))).read_text())


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SMALL = ("train", "--steps", 12, "--batch_size", 8, "--eval_every", 12, "--hash_every", 4, "--quiet", "--no_plot")


def test_default_run_in_small(folder):
    """The whole demo, drills with kill -9 included, its runs shared out among two ranks (`compare` below: among the cores)."""
    out, _ = finished(command("--steps", 5, "--seeds", 1, "--quiet", cwd=folder, launcher=TORCHRUN))
    found, picture = (folder / path for path in out.split()[-2:])
    found = json.loads(found.read_text())
    assert picture.stat().st_size > 10_000 and "all equal" in out and "no speed-up is claimed" in out and "SPSA, float32" in out
    drill = found["drill"]
    assert len(drill["hashes"]) == 3 and len(set(drill["hashes"].values())) == 1 and drill["equal"]
    steps, dies, joins, notary_dies = spsa.DRILL
    newcomer = drill["machines"][1]
    in_step = [set(ids) for ids in drill["members"]]
    assert len(in_step) == steps and drill["killed"] not in set().union(*in_step[dies:]) and drill["killed"] in in_step[dies - 1]
    assert newcomer not in set().union(*in_step[:joins]) and newcomer in in_step[-1]
    assert drill["steps_replayed"][1] >= joins and min(drill["reconnected"]) >= 1
    for probes, sent in zip(drill["probes"], drill["bytes_sent"]):
        assert probes <= sent <= probes + 1  # a byte a probe; once more where the notary died after it was handed over
    assert [row["machines"] for row in found["table"]] == [1, 2, 4, 4, 1]
    assert [len(row["steps_of_all_seeds"]) for row in found["tuning"]] == [4] * 4, "equal budgets"


def test_two_ranks_equal_one_process_and_replay(folder):
    out, _ = finished(command(*SMALL, cwd=folder, launcher=TORCHRUN))
    found = results(folder, out)
    assert found["machines"] == 2 and found["bytes_sent_a_machine"] == 12
    replica = spsa.Replica(spsa.load_model("tiny"), found["run"])
    problem = spsa.Problem(replica.model, CPU)
    torch.set_flush_denormal(True)
    loss = spsa.probe_loss(problem, 8, torch.float32)
    sealed = list(spsa.spsa(replica, [0, 1], loss, lambda own: list(own.items())))
    assert sealed == spsa.Log(folder / "out/spsa_distributed/train/run.log").steps
    assert replica.sha256() == found["sha256"]
    replayed, _ = finished(command("replay", "--log", "out/spsa_distributed/train/run.log", "--quiet", cwd=folder))
    assert results(folder, replayed)["sha256"] == found["sha256"]
    again = spsa.load_model(str(folder / "out/spsa_distributed/replay/weights.pt"))
    assert torch.equal(again.lm_head.weight, replica.model.lm_head.weight)


def test_resume_after_kill_is_exact(folder):
    whole = command(*SMALL, "--out", "a", "--samples", 2, cwd=folder)
    killed = command(*SMALL, "--out", "b", "--samples", 2, cwd=folder)
    log, until = folder / "b/run.log", time.monotonic() + 120
    while time.monotonic() < until and killed.poll() is None and not (log.exists() and len(log.read_bytes().split(b"\n", 1)[1]) > 10):
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    expected = results(folder, finished(whole)[0])
    log.write_bytes(log.read_bytes() + b"\xff")  # and a record cut short
    out, err = finished(command(*SMALL, "--out", "b", "--samples", 2, "--resume", cwd=folder))
    assert results(folder, out)["sha256"] == expected["sha256"] and (folder / "a/run.log").read_bytes() == log.read_bytes()
    assert "incomplete" in err
    found = results(folder, out)
    assert found["codes_none"] == 0 and found["log_bytes"] == log.stat().st_size


def test_interrupt_then_resume(folder):
    process = command("train", "--steps", 100_000, "--batch_size", 8, "--quiet", "--no_plot", cwd=folder)
    log = folder / "out/spsa_distributed/train/run.log"
    while not (log.exists() and log.stat().st_size > 2000) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = finished(process, 130)
    assert "--resume" in out and "Traceback" not in err


def test_own_table_served_and_joined(folder):
    """serve and join as two terminals would, on a table of one's own; then the finished log is refused."""
    table(folder / "t.tsv", "sentence\tlabel\n" + ROWS)
    notary = command("serve", "--port", 0, "--steps", 6, "--data", "t.tsv", "--labels", "no=bad,yes=good", "--quiet", "--no_plot",
                     cwd=folder)
    port = re.search(r"at port (\d+)", notary.stdout.readline())[1]
    out, _ = finished(command("join", "--connect", f"127.0.0.1:{port}", "--data", "t.tsv", "--log", "mine.log", "--quiet", cwd=folder))
    assert results(folder, out)["bytes_sent"] == 6 and results(folder, out)["run"]["labels"] == "no=bad,yes=good"
    finished(notary)
    theirs = folder / "out/spsa_distributed/serve/run.log"
    assert theirs.read_bytes() == (folder / "mine.log").read_bytes()
    _, err = finished(command("serve", "--port", 0, "--data", "t.tsv", cwd=folder), 2)
    assert "finished run of 6 steps" in err and err.count("\n") == 1


def test_comm_and_bench(folder, monkeypatch, capsys):
    for task, words in (("comm", "498 MB"), ("bench", "probes a second")):
        monkeypatch.setattr(sys, "argv", ["spsa_distributed.py", task, "--quiet"])
        spsa.main()
        out = capsys.readouterr().out
        assert words in out and "nan" not in out and Path(next(w for w in out.split() if w.endswith("results.json"))).is_file()


def test_compare_in_small(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["spsa_distributed.py", "compare", "--steps", "5", "--seeds", "1", "--quiet"])
    spsa.main()
    out = capsys.readouterr().out
    assert "naive bfloat16" in out and out.split()[-1].endswith("compare.png") and "nan" not in out
    assert re.search(r"SPSA, one byte +.* 0 +0\n", out), "the grid does not drift"


@pytest.mark.parametrize("args, words", [
    (["nonsense"], "demo"),
    (["train", "--device", "abacus"], "--device abacus"),
    (["train", "--eps", "0"], "--eps"),
    (["train", "--lr", "nan"], "--lr"),
    (["train", "--lr", "inf"], "--lr"),
    (["train", "--samples", "70000"], "--samples"),
    (["train", "--noise", "uniform"], "--noise"),
    (["train", "--model", "gpt5"], "no such file"),
    (["train", "--model", "junk.pt"], "junk.pt"),
    (["train", "--model", "other.pt"], "no model of this program"),
    (["train", "--data", "nowhere.tsv"], "nowhere.tsv"),
    (["train", "--data", "short.tsv"], "too few"),
    (["train", "--data", "t.tsv", "--label_column", "mood"], "no column 'mood'"),
    (["train", "--data", "t.tsv", "--text_column", "words"], "--text_column"),
    (["train", "--data", "t.tsv", "--labels", "good"], "2 classes (no, yes), --labels 1"),
    (["train", "--data", "t.tsv", "--labels", "yes=great,no=terrible,so=fine"], "no row of class 'so'"),
    (["train", "--data", "t.tsv", "--labels", "yes=great"], "two classes"),
    (["train", "--data", "t.tsv", "--labels", "no=great,yes=great"], "another word for each"),
    (["train", "--data", "t.tsv", "--labels", "no=bad,yes=very good"], "does not know the word 'very'"),
    (["train", "--data", "t.tsv", "--labels", "no=bad,yes=good fine"], "not one token"),
    (["train", "--data", "three.tsv", "--labels", "no=bad,yes=good"], "three.tsv line 18: label 'so' is none of no, yes"),
    (["train", "--data", "ragged.tsv"], "ragged.tsv line 18 has 1 columns, the header 2"),
    (["train", "--data", "strange.tsv"], "strange.tsv line 18: the tiny model does not know the word 'zebra'"),
    (["train", "--prompt", "justonebyte"], "--prompt"),
    (["train", "--resume", "--out", "old"], "damaged at step 0"),
    (["replay"], "--log"),
    (["replay", "--log", "nowhere.log"], "nowhere.log"),
    (["replay", "--log", "other.log"], "weights = 00"),
    (["replay", "--log", "other.log", "--eps", "0.5"], "--eps 0.5: this run has 0.001"),
    (["serve", "--log", "t.tsv"], "not a log"),
    (["serve", "--port", "BUSY"], "--port"),
    (["join", "--connect", "here"], "HOST:PORT"),
    (["join", "--connect", "here:99999"], "from 1 to 65535"),
    (["serve", "--log", "old"], "old: Is a directory"),
    (["join", "--connect", "127.0.0.1:1", "--patience", "0.2"], "no notary at 127.0.0.1:1"),
    (["join", "--resume"], "--resume"),
    (["bench", "--model", "gpt5"], "--model gpt5"),
])
def test_mistakes_end_in_one_line(args, words, folder, monkeypatch, capsys):
    for name, row in (("t", ""), ("three", "the film was flat .\tso\n"), ("ragged", "the film\n"),
                      ("strange", "the zebra was dull .\tno\n")):
        table(f"{name}.tsv", "sentence\tlabel\n" + ROWS + row)
    table("short.tsv", "sentence\tlabel\nthe film .\tno\n")
    table("junk.pt", "junk")
    torch.save(dict(a=1), "other.pt")
    model = spsa.load_model("tiny")
    header = dict({key: value[0] for key, value in spsa.SETTINGS.items()}, protocol=1, key=0, model="tiny", labels="0=terrible,1=great",
                  weights="00", order="00")
    table("other.log", json.dumps(header) + "\n")
    Path("old").mkdir()
    Path("old/run.log").write_bytes(json.dumps(header).encode() + b"\n\x01\x00\x00\x05\x00\x00")
    busy = spsa.open_store("127.0.0.1", 0, True, 5)
    monkeypatch.setattr(sys, "argv", ["spsa_distributed.py", *(str(busy.port) if a == "BUSY" else a for a in args), "--quiet"])
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
    with pytest.raises(SystemExit) as stop:
        spsa.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    after = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
    assert after == before and spsa.load_model("tiny").lm_head.weight.equal(model.lm_head.weight), "nothing may be written"


def test_exit_code_without_traceback(tmp_path):
    out, err = finished(command("train", "--lr", "-1", cwd=tmp_path), 2)
    assert out == "" and err.count("\n") == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        spsa.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in "device dtype seed out data model steps batch_size lr resume no_plot quiet eps noise codec reduce log connect port".split():
        assert f"--{flag}" in text
