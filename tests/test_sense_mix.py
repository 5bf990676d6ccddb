"""kernels/sense_mix.py, under the interpreter on a CPU: output and gradients against the plain version in float64."""

import pytest
import torch

pytest.importorskip("triton")
from kernels import sense_mix as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", kernel.ROUNDING)
@pytest.mark.parametrize("case", kernel.CASES)
def test_kernel(case, dtype):
    """No farther from float64 than the plain version in the same dtype: tails of every size, e below 16 and no power of
    two, one sense, d beyond a piece, tokens that repeat within a tile and across."""
    for mine, plain in zip(*kernel.errors(*case, dtype, DEVICE)):
        assert mine <= max(plain, kernel.ROUNDING[dtype])


def test_deltas_of_all_senses_sum_to_what_the_output_tells():
    """Σ_l δ_li = ⟨G_i, o_i⟩, so scaling all senses by 1 + t changes the loss by t·Σ⟨G, o⟩; and a constant table has gradient 0 for α."""
    query, key, table, index, scale = kernel.draw(1, 40, 2, 8, 16, 5, torch.float32, DEVICE)
    out = kernel.sense_mix(query, key, table, index, scale)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (query, key, table))
    torch.testing.assert_close((grads[2] * table).sum(), (out * weight).sum(), rtol=1e-4, atol=1e-3)
    flat = torch.ones_like(table).requires_grad_()
    out = kernel.sense_mix(query, key, flat, index, scale)
    torch.testing.assert_close(
        out, torch.full_like(out, 2.0), rtol=1e-5, atol=1e-5
    )  # weights sum to 1 for each of two senses
    for g in torch.autograd.grad((out * weight).sum(), (query, key)):
        assert g.abs().max() < 1e-4


def test_large_scores_stay_finite():
    query, key, table, index, scale = kernel.draw(1, 35, 2, 8, 16, 5, torch.float32, DEVICE)
    with torch.no_grad():
        out = kernel.sense_mix(query * 300, key * 300, table, index, scale)
    assert out.isfinite().all() and out.abs().max() <= 2 * table.abs().max() * 1.0001


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 3, 4)), "want query and key"),
        (dict(key=torch.zeros(2, 4, 2, 4)), "want query and key"),
        (dict(table=torch.zeros(5, 3, 8)), "and table"),
        (dict(index=torch.zeros(2, 4, dtype=torch.int64)), "want index"),
        (dict(index=torch.zeros(2, 3)), "want index"),
        (dict(table=torch.zeros(5, 2, 8, dtype=torch.bfloat16)), "of one dtype"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(
        query=torch.zeros(2, 3, 2, 4),
        key=torch.zeros(2, 3, 2, 4),
        table=torch.zeros(5, 2, 8),
        index=torch.zeros(2, 3, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match=message):
        kernel.sense_mix(**{**arguments, **change}, scale=0.5)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        kernel.sense_mix(
            *(torch.zeros(2, 3, 2, 4, dtype=torch.float64),) * 2,
            torch.zeros(5, 2, 8, dtype=torch.float64),
            torch.zeros(2, 3, dtype=torch.int64),
            1.0,
        )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_check_on_gpu():
    kernel.check("cuda")
