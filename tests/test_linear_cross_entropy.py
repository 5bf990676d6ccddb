"""kernels/linear_cross_entropy.py against the plain version in sophia.py: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.linear_cross_entropy import linear_cross_entropy as fused  # noqa: E402
from sophia import linear_cross_entropy as plain  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens=37, d=24, rows=104, n_vocab=99, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, d, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(rows, d, device=DEVICE).mul_(0.5).to(dtype).requires_grad_()
    targets = torch.randint(n_vocab, (tokens,), device=DEVICE)
    targets[tokens // 3] = -1
    return hidden, weight, targets


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens, rows, n_vocab, chunk", [
    (37, 104, 99, 16), (1, 5, 5, 1024), (33, 130, 130, 8), (20, 4100, 4097, 7)])
def test_equals_plain(dtype, tolerance, tokens, rows, n_vocab, chunk):
    hidden, weight, targets = inputs(max(tokens, 2), 24, rows, n_vocab, dtype)
    with torch.no_grad():
        weight[n_vocab - 1] *= 4  # often the largest: the running maximum moves in the second of two blocks
    losses = fused(hidden, weight, targets, n_vocab, chunk=chunk)[0], plain(hidden, weight, targets, n_vocab)[0]
    torch.testing.assert_close(*losses, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (hidden, weight)) for loss in losses)):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden *= 1000
    losses = fused(hidden, weight, targets, 99)[0], plain(hidden, weight, targets, 99)[0]
    assert losses[0].isfinite()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_all_ignored():
    hidden, weight, targets = inputs()
    loss, drawn = fused(hidden, weight, torch.full_like(targets, -1), 99, seed=1)
    assert loss == 0 and (drawn == -1).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_draws_depend_on_seed_and_place_alone():
    hidden, weight, targets = inputs(12)
    draws = [fused(hidden, weight, targets, 99, seed, chunk)[1] for seed, chunk in ((1, 1024), (1, 5), (2, 5))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0] == -1, targets == -1)  # an ignored target stays ignored
    given = inputs(12)[2].clone()
    fused(hidden, weight, given, 99, seed=1)
    assert torch.equal(given, targets), "the caller's targets are not overwritten"
    loss, drawn = fused(hidden, weight, targets, 99, seed=1)
    torch.testing.assert_close(loss, plain(hidden, weight, drawn, 99)[0])  # the loss is that of the drawn targets


def test_draws_follow_the_softmax():
    """Chi-square with 7 degrees of freedom; 40 is p = 1e-6."""
    n = 250 if DEVICE == "cpu" else 200_000  # the interpreter is slow
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.0, 1.5], device=DEVICE)
    weight = torch.cat([logits, torch.full((3,), 9.0, device=DEVICE)])[:, None]  # three padded rows that would win
    ones, targets = torch.ones(n, 1, device=DEVICE), torch.zeros(n, dtype=torch.long, device=DEVICE)
    _, drawn = fused(ones, weight, targets, 8, seed=5, chunk=200)
    counts, expected = torch.bincount(drawn, minlength=11).cpu(), n * logits.softmax(0).cpu()
    assert counts[8:].sum() == 0, "a padded id was drawn"
    assert ((counts[:8] - expected) ** 2 / expected).sum() < 40


def test_no_gradient_no_work():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss, _ = fused(hidden, weight, targets, 99)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, targets, 99)[0].detach())


def test_under_autocast():
    hidden, weight, targets = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        losses = fused(hidden, weight, targets, 99)[0], plain(hidden, weight, targets, 99)[0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_what_it_refuses():
    hidden, weight, targets = inputs()
    for bad in ((hidden[0], weight, targets), (hidden, weight[:, :5], targets), (hidden, weight, targets[:5]),
                (hidden.double(), weight.double(), targets), (hidden, weight, targets.int())):
        with pytest.raises(ValueError):
            fused(*bad)
