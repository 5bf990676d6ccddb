"""kernels/perturb.py against the plain version in spsa_distributed.py: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import spsa_distributed as spsa  # noqa: E402
from kernels import perturb as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0xFEDCBA9876543210


@pytest.mark.parametrize("n_tiles, n_machines", [(1, 1), (5, 3)])
def test_rademacher_equals_plain_bit_for_bit(n_tiles, n_machines):
    flat, grid, moves = kernel.sample(n_tiles, n_machines, DEVICE)
    plain = flat.clone()
    kernel.perturb_(flat, grid, KEY, "rademacher", moves)
    spsa.perturb_(plain, grid, KEY, "rademacher", moves)
    assert torch.equal(flat, plain)


def test_gaussian_within_a_grid_point():
    """log, sin and cos may differ in the last places: 4 ulp of z, so at most one step of the grid for each sum."""
    flat, grid, moves = kernel.sample(3, 2, DEVICE)
    plain = flat.clone()
    kernel.perturb_(flat, grid, KEY, "gaussian", moves)
    spsa.perturb_(plain, grid, KEY, "gaussian", moves)
    steps = (flat - plain).view(3, -1).abs() / grid[:, None]
    assert steps.max() <= 3 and (steps > 0).float().mean() < 0.05


@pytest.mark.parametrize("kind", kernel.KINDS)
def test_one_pass_equals_many(kind):
    flat, grid, moves = kernel.sample(2, 3, DEVICE)
    single = flat.clone()
    kernel.perturb_(flat, grid, KEY, kind, moves)
    for part in (moves[:1], moves[1:-1], moves[-1:]):
        kernel.perturb_(single, grid, KEY, kind, part)
    assert torch.equal(flat, single)


def test_flip_is_symmetric_and_restores():
    flat, grid, _ = kernel.sample(2, 1, DEVICE)
    start, seen = flat.clone(), []
    for then in (spsa.PROBE, spsa.FLIP, spsa.PROBE):
        kernel.perturb_(flat, grid, 7, "rademacher", [(3, 2**64 - 1, then, 1e-3)])
        seen.append(flat - start)
    assert torch.equal(seen[0], -seen[1]) and torch.equal(flat, start)
    assert torch.allclose(seen[0].abs(), torch.tensor(1e-3, device=DEVICE), rtol=0, atol=float(grid.max()))


@pytest.mark.parametrize("step, machine", [(2**32 - 1, 2**64 - 1), (0, 2**32), (5, 2**32 - 1)])
def test_counters_beyond_31_bits_and_the_bounds_of_the_grid(step, machine):
    flat, grid, _ = kernel.sample(1, 1, DEVICE)
    plain, moves = flat.clone(), [(step, machine, spsa.UPDATE, 99.0), (step, machine, spsa.PROBE, 99.0)]
    kernel.perturb_(flat, grid, 2**64 - 1, "rademacher", moves)
    spsa.perturb_(plain, grid, 2**64 - 1, "rademacher", moves)
    assert torch.equal(flat, plain) and not torch.equal(flat, kernel.sample(1, 1, DEVICE)[0])
    assert float((flat / grid).abs().max()) <= 2**23 + 2**22


def test_what_it_refuses():
    flat, grid, moves = kernel.sample(2, 1, DEVICE)
    good = [flat, grid, 5, "rademacher", moves]
    for i, bad in ((0, flat[:1000]), (0, flat.double()), (0, flat.view(2, -1)), (1, grid[:1]), (1, grid.double()),
                   (2, 2**64), (2, -1), (3, "uniform"), (4, [(2**32, 0, 1, 1.0)]), (4, [(0, -1, 1, 1.0)]),
                   (4, [(0, 0, 3, 1.0)])):
        arguments = list(good)
        arguments[i] = bad
        with pytest.raises(ValueError, match="perturb"):
            kernel.perturb_(*arguments)
    before = flat.clone()
    kernel.perturb_(flat, grid, 5, "rademacher", [])
    assert torch.equal(flat, before)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cpu_and_gpu_replicas_are_equal():
    hashes = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        replica = spsa.Replica(spsa.GPT2(*spsa.TINY).to(device), spsa.RUN | dict(every=5))
        for _ in range(5):
            replica.apply([(2**40 + m, 0.3 * m) for m in range(3)])
        hashes.append(replica.hash)
    assert hashes[0] == hashes[1]
