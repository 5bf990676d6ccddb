"""kernels/sophia_update.py against the plain version in sophia.py: under the interpreter on a CPU, compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernels import sophia_update as kernel  # noqa: E402
from sophia import Sophia, hessian_ema_, sophia_update_  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (127,), (33, 31), (4096,), (4097,), (0,), (2, 3, 5)]


def columns(p=torch.float32, g=torch.float32, seed=0):
    torch.manual_seed(seed)
    made = [[torch.randn(shape).to(DEVICE, d) for shape in SHAPES] for d in (p, g, torch.float32, torch.float32)]
    return made, [[t.clone() for t in column] for column in made]


@pytest.mark.parametrize("p, g", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2])
@pytest.mark.parametrize("gamma, weight_decay, clip", [(0.5, 0.1, 1.0), (1e-9, 0.0, 1.0), (3.0, 0.2, 0.25)])
def test_step_equals_plain(p, g, gamma, weight_decay, clip):
    plain, fused = columns(p, g)
    settings = (1e-2, 0.9, gamma, 1e-12, weight_decay, clip)
    wins = sophia_update_(*plain, *settings), kernel.sophia_update_(*fused, *settings)
    assert int(wins[0]) == int(wins[1]) and 0 <= int(wins[0]) <= sum(t.numel() for t in plain[0])
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[p]  # half types: at most one rounding step apart
    for i, tolerance in enumerate((ulp, 0.0, 1e-6, 0.0)):
        for a, b in zip(plain[i], fused[i]):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=1e-6 if tolerance else 0.0)


def test_win_count_by_brute_force():
    _, (p, g, m, h) = columns()
    wins = kernel.sophia_update_(p, g, m, h, 0.1, 0.9, 0.5, 1e-12, 0.0)
    ratio = torch.cat([(a.double() / (0.5 * b.double()).clamp(min=1e-12)).flatten() for a, b in zip(m, h)])
    assert int(wins) == int((ratio.abs() < 1).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_terms", [None, 7, torch.tensor(7)])
def test_average_equals_plain(dtype, n_terms):
    (_, g, _, plain), (_, _, _, fused) = columns(g=dtype)
    hessian_ema_(plain, g, 0.9, n_terms)
    kernel.hessian_ema_(fused, g, 0.9, n_terms)
    for a, b in zip(plain, fused):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_sizes_and_addresses_that_are_multiples_of_16():
    """The path with 16-byte loads, which one odd tensor in the list turns off."""
    torch.manual_seed(0)
    plain = [[torch.randn(shape, device=DEVICE) for shape in ((16,), (4096 + 64,), (48, 32))] for _ in range(4)]
    fused = [[t.clone() for t in column] for column in plain]
    if DEVICE == "cuda":  # on a CPU memory lies where malloc pleases
        assert all(aligned for *_, aligned in kernel.by_dtype(*fused))
    wins = [int(update(*c, 0.1, 0.9, 0.5, 1e-12, 0.1)) for update, c in ((sophia_update_, plain), (kernel.sophia_update_, fused))]
    assert wins[0] == wins[1]
    for a, b in zip(sum(plain, []), sum(fused, [])):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


def test_views_that_are_not_aligned():
    """Slices of one buffer start at any multiple of four bytes: no 16-byte loads there. Catches a wrong alignment promise (GPU)."""
    buffer = torch.randn(4, 10_001, device=DEVICE)
    plain = [[row[1:4001], row[4001:]] for row in buffer.clone()]
    fused = [[row[1:4001], row[4001:]] for row in buffer]
    sophia_update_(*plain, 0.1, 0.9, 0.5, 1e-12, 0.1)
    kernel.sophia_update_(*fused, 0.1, 0.9, 0.5, 1e-12, 0.1)
    for a, b in zip(plain, fused):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_nan_is_not_swallowed():
    """min and max drop a NaN by default: a poisoned gradient would become a silent full step."""
    (p, g, m, h), _ = columns()
    g[1][5] = torch.nan
    kernel.sophia_update_(p, g, m, h, 0.1, 0.9, 0.5, 1e-12, 0.0)
    assert p[1][5].isnan() and p[1].isnan().sum() == 1


def test_what_it_refuses():
    good = [torch.zeros(4, device=DEVICE)]
    for bad in (torch.zeros(5, device=DEVICE), torch.zeros(4, device=DEVICE, dtype=torch.float64), torch.zeros(8, device=DEVICE)[::2],
                torch.zeros(1, device=DEVICE).expand(4)):
        with pytest.raises(ValueError):
            kernel.sophia_update_(good, [bad], good, good, 0.1, 0.9, 0.5, 1e-12, 0.0)
    with pytest.raises(ValueError):
        kernel.sophia_update_(good, good, [good[0].bfloat16()], good, 0.1, 0.9, 0.5, 1e-12, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_optimizer_uses_the_kernel():
    torch.manual_seed(0)
    start = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    both = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    opts = [Sophia(params, lr=1e-2, fused=fused) for params, fused in zip(both, (None, False))]
    for _ in range(5):
        grads = [torch.randn_like(t) for t in start]
        for params, opt in zip(both, opts):
            opt.update_hessian(grads, n_terms=100)
            for p, g in zip(params, grads):
                p.grad = g.clone()
            opt.step()
    assert opts[0].win_rate == pytest.approx(opts[1].win_rate, abs=1e-3)
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
