"""kernels/popcount_histogram.py, under the interpreter on a CPU: against counting, not against the plain version."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kernels import popcount_histogram as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n, k, n_groups", [(1, 1, 1), (255, 3, 1), (257, 31, 2), (300, 32, 1), (513, 33, 3), (40, 100, 2)])
def test_kernel_counts(n, k, n_groups):
    failed, words, group = kernel.sample(n, k, n_groups, DEVICE)
    hist, columns = kernel.popcount_histogram(words, k, group.int() if k == 33 else group, n_groups)
    failed, group = failed.numpy(), group.cpu().numpy()
    for g in range(n_groups):
        assert np.array_equal(hist[g].cpu(), np.bincount(failed[group == g].sum(1), minlength=k + 1))
        assert np.array_equal(columns[g].cpu(), failed[group == g].sum(0))


def test_several_tiles_a_program(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 2)
    n = 2 * 1024 * 3 + 1  # four tiles of two people a program
    words = torch.full((n, 1), -1, dtype=torch.int32, device=DEVICE)  # every bit set, the sign's too
    hist, columns = kernel.popcount_histogram(words[: n if DEVICE == "cuda" else 41], 32)
    people = n if DEVICE == "cuda" else 41
    assert hist[0, 32] == people == hist.sum() and (columns == people).all()


def test_no_people():
    hist, columns = kernel.popcount_histogram(torch.empty(0, 2, dtype=torch.int32, device=DEVICE), 40)
    assert hist.shape == (1, 41) and columns.shape == (1, 40) and not hist.any() and not columns.any()


@pytest.mark.parametrize("words, k, group, n_groups, message", [
    (torch.zeros(4, 1, dtype=torch.int64), 3, None, 1, "int32 words"), (torch.zeros(4, 1, dtype=torch.int32), 33, None, 1, r"\(n, 2\)"),
    (torch.zeros(4, 4, dtype=torch.int32)[:, ::2], 40, None, 1, "contiguous"),
    (torch.zeros(4, 1, dtype=torch.int32), 3, None, 2, "need an int32 or int64 group"),
    (torch.zeros(4, 1, dtype=torch.int32), 3, torch.zeros(3, dtype=torch.int64), 2, "each of the 4 rows"),
])
def test_bad_arguments(words, k, group, n_groups, message):
    with pytest.raises(ValueError, match=message):
        kernel.popcount_histogram(words, k, group, n_groups)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_check_on_gpu():
    kernel.check("cuda")
