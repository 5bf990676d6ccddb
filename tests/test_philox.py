"""kernels/philox.py against Random123's known answers and a scalar Philox: interpreted on a CPU, compiled on a GPU."""

import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels import philox as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = os.environ.get("NANOPAPERS_TEST_DATA")


def scalar_philox(counter, key, rounds):
    """The generator in Python's unbounded integers."""
    c, k = list(counter), [key % 2**32, key >> 32]
    for i in range(rounds):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        k0, k1 = (k[0] + i * 0x9E3779B9) % 2**32, (k[1] + i * 0xBB67AE85) % 2**32
        c = [q // 2**32 ^ c[1] ^ k0, q % 2**32, p // 2**32 ^ c[3] ^ k1, p % 2**32]
    return c


def words(rows, rounds=10):
    return kernel.random_words(torch.tensor(rows, device=DEVICE), rounds)


@pytest.mark.parametrize("case", kernel.KNOWN)
def test_known_answers(case):
    counter, key, rounds = case
    assert tuple(words([[*counter, key % 2**32, key >> 32]], rounds)[0].tolist()[0]) == kernel.KNOWN[case]
    assert tuple(scalar_philox(*case)) == kernel.KNOWN[case]


@pytest.mark.skipif(DATA is None, reason="NANOPAPERS_TEST_DATA names no folder")
def test_every_known_answer_of_the_published_file():
    lines = [line.split() for line in (Path(DATA) / "spsa_distributed/philox_kat.txt").read_text().splitlines()]
    lines = [(int(line[1]), [int(word, 16) for word in line[2:]]) for line in lines if line and line[0] == "philox4x32"]
    assert len(lines) >= 6
    for rounds, numbers in lines:
        assert words([numbers[:6]], rounds)[0].tolist() == [numbers[6:]]


def test_against_the_scalar_version():
    rows = torch.randint(2**32, (300, 6), generator=torch.Generator().manual_seed(1)).tolist()  # above a program's 256
    assert words(rows)[0].tolist() == [scalar_philox(row[:4], row[4] + row[5] * 2**32, 10) for row in rows]


def test_distributions_by_hand():
    rows = [[i, 1, 2, 3, 4, 5] for i in range(300)]
    integers, z = words(rows)
    for (x0, x1, _, x3), (first, last, cosine, sine) in zip(integers.tolist(), z.tolist()):
        assert first == (-1 if x0 & 1 else 1) and last == (-1 if x3 >> 31 else 1)
        radius, turn = math.sqrt(-2 * math.log(((x0 >> 9) + 0.5) / 2**23)), 2 * math.pi * (x1 >> 8) / 2**24
        assert cosine == pytest.approx(radius * math.cos(turn), abs=3e-6)
        assert sine == pytest.approx(radius * math.sin(turn), abs=3e-6)


def test_what_it_refuses():
    for bad in (torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64),
                torch.zeros(6, 4, dtype=torch.int64).T):
        with pytest.raises(ValueError, match="philox"):
            kernel.random_words(bad)
    assert len(kernel.random_words(torch.zeros(0, 6, dtype=torch.int64))[0]) == 0
