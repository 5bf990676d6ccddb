"""kernels/pointer_cross_entropy.py, under the interpreter on a CPU: loss and gradients against float64."""

import pytest
import torch

pytest.importorskip("triton")
from kernels import pointer_cross_entropy as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batch, seq, d, n_vocab", [(1, 1, 4, 1), (2, 65, 48, 5), (1, 70, 100, 3), (1, 130, 64, 1000)])
def test_kernel(batch, seq, d, n_vocab, dtype, most):
    assert kernel.compare(batch, seq, d, n_vocab, dtype, DEVICE) < most


def test_constant_and_all_distinct_sequences():
    import lexinvariant

    for symbols in (torch.zeros(1, 71, dtype=torch.int64), torch.arange(71)[None]):
        first, target, n_seen = (x.to(DEVICE) for x in lexinvariant.pointers(symbols))
        torch.manual_seed(0)
        query, rows, new = (torch.randn(*shape, device=DEVICE) for shape in ((1, 70, 16), (1, 70, 16), (1, 70)))
        a, b = (module.pointer_cross_entropy(query, rows, first, target, new, n_seen, 71) for module in (kernel, lexinvariant))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert bool((target < 0).all()) == (int(symbols.max()) > 0)


def test_rows_without_gradient_get_none():
    query, rows, new, first, target, n_seen = kernel.sample(1, 20, 16, 4, torch.float32, DEVICE)
    kernel.pointer_cross_entropy(query, rows.detach(), first, target, new, n_seen, 4).sum().backward()
    assert rows.grad is None and query.grad is not None and new.grad is not None


@pytest.mark.parametrize("change, message", [
    (dict(query=torch.zeros(2, 3, 4, dtype=torch.float64)), "want query and rows"),
    (dict(rows=torch.zeros(2, 3, 5)), "want query and rows"),
    (dict(first=torch.zeros(2, 3)), "want first"), (dict(n_seen=torch.zeros(2, 4, dtype=torch.int64)), "want n_seen"),
])
def test_bad_arguments(change, message):
    index = torch.zeros(2, 3, dtype=torch.int64)
    arguments = dict(query=torch.zeros(2, 3, 4), rows=torch.zeros(2, 3, 4), first=index, target=index, new=torch.zeros(2, 3), n_seen=index)
    with pytest.raises(ValueError, match=message):
        kernel.pointer_cross_entropy(**{**arguments, **change}, n_vocab=5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_check_on_gpu():
    kernel.check("cuda")
