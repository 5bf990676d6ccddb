"""kernels/sophia_update.py against the plain version in sophia.py: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
import sophia  # noqa: E402
from kernels.sophia_update import sophia_update_  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (127,), (33, 31), (4096,), (4097,), (0,), (2, 3, 5)]


def columns(shapes=SHAPES, p=torch.float32, g=torch.float32):
    torch.manual_seed(0)
    made = [[torch.randn(shape).to(DEVICE, d) for shape in shapes] for d in (p, g, torch.float32, torch.float32)]
    return made, [[t.clone() for t in column] for column in made]


def compare(plain, fused, settings=(1e-2, 0.9, 0.5, 1e-12, 0.1), tolerance=1e-6):
    for row in zip(*plain):
        sophia.sophia_update_(*row, *settings)
    sophia_update_(*fused, *settings)
    for a, b in zip(plain[0], fused[0]):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=1e-6)
    for a, b in zip(plain[2], fused[2]):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("p, g", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16)])
@pytest.mark.parametrize("gamma, weight_decay", [(0.5, 0.1), (1e-9, 0.0), (3.0, 0.2)])
def test_step_equals_plain(p, g, gamma, weight_decay):
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[p]
    compare(*columns(p=p, g=g), (1e-2, 0.9, gamma, 1e-12, weight_decay), ulp)


def test_sizes_and_addresses_that_are_multiples_of_16_and_that_are_not():
    """The path with 16-byte loads, which one odd tensor turns off; views start at any multiple of four bytes."""
    compare(*columns([(16,), (4096 + 64,), (48, 32)]))
    buffer = torch.randn(4, 10_001, device=DEVICE)
    plain, fused = ([[row[1:4001], row[4001:]] for row in rows] for rows in (buffer.clone(), buffer))
    compare(plain, fused)


def test_strided_parameters_and_gradients():
    """channels_last parameters, and gradients of another layout than their parameter."""
    plain, fused = columns([(4, 3, 5, 5), (6, 7)])
    for column in plain, fused:
        for i in (0, 2, 3):
            column[i][0] = column[i][0].to(memory_format=torch.channels_last)
        column[1][1] = column[1][1].t().contiguous().t()
    compare(plain, fused)


def test_nan_is_not_swallowed():
    """min and max drop a NaN by default: a poisoned gradient would become a silent full step."""
    (p, g, m, h), _ = columns()
    g[1][5] = torch.nan
    sophia_update_(p, g, m, h, 0.1, 0.9, 0.5, 1e-12, 0.0)
    assert p[1][5].isnan() and p[1].isnan().sum() == 1


def test_what_it_refuses():
    good = [torch.zeros(4, device=DEVICE)]
    gaps = [torch.zeros(8, device=DEVICE)[::2]]
    for row in ((good, [torch.zeros(5, device=DEVICE)], good, good), (good, [good[0].double()], good, good),
                (good, good, [good[0].bfloat16()], good), (gaps, good, good, good), (good, good, gaps, good)):
        with pytest.raises(ValueError):
            sophia_update_(*row, 0.1, 0.9, 0.5, 1e-12, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_optimizer_uses_the_kernel(monkeypatch):
    torch.manual_seed(0)
    start = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    both = [[t.clone().requires_grad_() for t in start] for _ in range(2)]
    for params, kernel in zip(both, (sophia.kernel, lambda name: None)):
        monkeypatch.setattr(sophia, "kernel", kernel)
        torch.manual_seed(1)
        opt = sophia.Sophia(params, lr=1e-2)
        for _ in range(5):
            grads = [torch.randn_like(t) for t in start]
            opt.update_hessian(grads, n_terms=100)
            for p, g in zip(params, grads):
                p.grad = g
            opt.step()
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
