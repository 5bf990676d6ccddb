"""kernels/perturb.py against the plain version in spsa_distributed.py: under the interpreter on a CPU, compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import spsa_distributed as spsa  # noqa: E402
from kernels import perturb as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0xFEDCBA9876543210
EXACT = ["rademacher", "binomial"]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("n_tiles, n_machines", [(1, 1), (5, 3)])
def test_equals_plain_bit_for_bit(kind, n_tiles, n_machines):
    flat, grid, records, coefs = kernel.sample(n_tiles, n_machines, DEVICE)
    plain = flat.clone()
    kernel.perturb_(flat, grid, KEY, kind, records, coefs)
    spsa.perturb_(plain, grid, KEY, kind, records, coefs)
    assert torch.equal(flat, plain)


def test_gaussian_within_a_grid_point():
    """log, sin and cos may differ in the last places: 4 ulp of z, so at most one step of the grid for each sum."""
    flat, grid, records, coefs = kernel.sample(3, 2, DEVICE)
    plain = flat.clone()
    kernel.perturb_(flat, grid, KEY, "gaussian", records, coefs)
    spsa.perturb_(plain, grid, KEY, "gaussian", records, coefs)
    steps = (flat - plain).view(3, -1).abs() / grid[:, None]
    assert steps.max() <= 3 and (steps > 0).float().mean() < 0.05


@pytest.mark.parametrize("kind", list(kernel.KINDS))
def test_one_pass_equals_many(kind):
    flat, grid, records, coefs = kernel.sample(2, 3, DEVICE)
    single = flat.clone()
    kernel.perturb_(flat, grid, KEY, kind, records, coefs)
    for part in (slice(0, 1), slice(1, 4), slice(4, None)):
        kernel.perturb_(single, grid, KEY, kind, records[part], coefs[part])
    assert torch.equal(flat, single)


def test_flip_is_symmetric_and_restores():
    flat, grid, _, _ = kernel.sample(2, 1, DEVICE)
    start, seen = flat.clone(), []
    for times in (1, -2, 1):
        kernel.perturb_(flat, grid, 7, "rademacher", torch.tensor([[3, 1, 0, times]]), torch.tensor([1e-3]))
        seen.append(flat - start)
    assert torch.equal(seen[0], -seen[1]) and torch.equal(flat, start)
    assert torch.allclose(seen[0].abs(), torch.tensor(1e-3), rtol=0, atol=float(grid.max()))


def test_high_group_bits_and_large_ids():
    """Counters beyond 16 and 31 bits: the largest machine, sample and step."""
    flat, grid, _, _ = kernel.sample(1, 1, DEVICE)
    plain, records = flat.clone(), torch.tensor([[2**31 - 1, 65535, 65535, 1]])
    kernel.perturb_(flat, grid, 2**64 - 1, "binomial", records, torch.tensor([0.01]))
    spsa.perturb_(plain, grid, 2**64 - 1, "binomial", records, torch.tensor([0.01]))
    assert torch.equal(flat, plain)


def test_what_it_refuses():
    flat, grid, records, coefs = kernel.sample(2, 1, DEVICE)
    good = [flat, grid, 5, "rademacher", records, coefs]
    for i, bad in ((0, flat[:1000]), (0, flat.double()), (0, flat.view(2, -1)), (1, grid[:1]), (1, grid.double()), (2, 2**64), (2, -1),
                   (3, "uniform"), (4, records[:, :3]), (4, records.float()), (5, coefs[:1])):
        arguments = list(good)
        arguments[i] = bad
        with pytest.raises(ValueError, match="perturb"):
            kernel.perturb_(*arguments)
    before = flat.clone()
    kernel.perturb_(flat, grid, 5, "rademacher", records[:0], coefs[:0])
    assert torch.equal(flat, before)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", EXACT)
def test_cpu_and_gpu_replicas_are_equal(kind):
    run = dict(key=3, steps=5, samples=1, eps=1e-3, lr=1e-2, reduce="sqrt", schedule="constant", noise=kind, codec="byte")
    sums = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        replica = spsa.Replica(spsa.GPT(spsa.GPTConfig(**spsa.TINY)).to(device), run)
        for step in range(5):
            replica.update([(m, bytes([60 + 7 * m + step])) for m in range(3)])
        sums.append(replica.sha256())
    assert sums[0] == sums[1]
