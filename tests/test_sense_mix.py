"""kernels/sense_mix.py, under the interpreter on a CPU: output and gradients against the plain version in float64."""

import pytest
import torch

pytest.importorskip("triton")
from kernels import sense_mix as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_kernel(capsys):
    """No farther from float64 than the plain version in the same dtype: tails of every size, e below 16 and no power
    of two, one sense, d beyond a piece, tokens that repeat within a tile and across."""
    kernel.check(DEVICE)


def test_sums_that_need_no_reference():
    """The senses are what o is linear in: ⟨∂table, table⟩ = ⟨G, o⟩. A constant table has no gradient for the weights,
    which sum to 1 for each of two senses."""
    query, key, table, index, scale = kernel.draw(1, 40, 2, 8, 16, 5, torch.float32, DEVICE)
    out = kernel.sense_mix(query, key, table, index, scale)
    weight = torch.randn_like(out)
    grad = torch.autograd.grad((out * weight).sum(), table)[0]
    torch.testing.assert_close((grad * table).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-3)
    out = kernel.sense_mix(query, key, torch.ones_like(table).requires_grad_(), index, scale)
    torch.testing.assert_close(out, torch.full_like(out, 2.0), rtol=1e-5, atol=1e-5)
    assert all(g.abs().max() < 1e-4 for g in torch.autograd.grad((out * weight).sum(), (query, key)))


def test_large_scores_stay_finite():
    query, key, table, index, scale = kernel.draw(1, 35, 2, 8, 16, 5, torch.float32, DEVICE)
    with torch.no_grad():
        out = kernel.sense_mix(query * 300, key * 300, table, index, scale)
    assert out.isfinite().all() and out.abs().max() <= 2 * table.abs().max() * 1.0001


@pytest.mark.parametrize("name, shape, dtype", [
    ("query", (2, 3, 4), torch.float32), ("key", (2, 4, 2, 4), torch.float32), ("table", (5, 3, 8), torch.float32),
    ("index", (2, 4), torch.int64), ("index", (2, 3), torch.int32), ("table", (5, 2, 8), torch.bfloat16)])
def test_bad_arguments(name, shape, dtype):
    arguments = dict(query=torch.zeros(2, 3, 2, 4), key=torch.zeros(2, 3, 2, 4), table=torch.zeros(5, 2, 8),
                     index=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="want query and key"):
        kernel.sense_mix(**{**arguments, name: torch.zeros(shape, dtype=dtype)}, scale=0.5)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernel.sense_mix(*(x.double() for x in list(arguments.values())[:3]), arguments["index"], 0.5)
