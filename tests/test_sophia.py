"""sophia.py: the optimizer and its estimators, the GPT and the shared pieces, the paper's claims in miniature, the command line."""

import copy
import http.server
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sophia
from sophia import GPT, GPTConfig, Lion, Sophia

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")


def one(value, grad=None, **settings):
    """A Sophia over one float64 coordinate."""
    p = torch.tensor([float(value)], dtype=torch.float64, requires_grad=True)
    p.grad = None if grad is None else torch.tensor([float(grad)], dtype=torch.float64)
    return p, Sophia([p], **{"lr": 0.1, "betas": (0.0, 0.0), "gamma": 1.0, "weight_decay": 0.0, **settings})


# ------------------------------------------------------------------------------------------------ 1. the mathematics: update


@pytest.mark.parametrize("grad, hessian, expected", [
    (1.0, 0.0, 0.9),  # no curvature: a step of lr along the sign
    (-1e-30, 0.0, 1.0 + 0.1 * 1e-30 / 1e-12),  # below ε even that shrinks
    (1.0, 4.0, 1 - 0.1 / 4),  # Newton: lr·g/h
    (1.0, -4.0, 0.9),  # negative curvature: still downhill, along the sign (a ratio m/(γh) would climb)
    (8.0, 4.0, 0.9),  # a ratio of 2 is clipped to 1
    (0.0, 0.0, 1.0),  # nothing moves and nothing is 0/0
])
def test_step_by_hand(grad, hessian, expected):
    p, opt = one(1.0, grad)
    opt.update_hessian([torch.tensor([hessian], dtype=torch.float64)])
    opt.step()
    assert p.item() == pytest.approx(expected, abs=1e-15)


def test_weight_decay_is_decoupled():
    p, opt = one(2.0, 0.0, weight_decay=0.5)
    opt.step()
    assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_against_scalar_loops(bias_correction):
    """Ten steps on two groups against Algorithm 3 written with Python floats, one coordinate at a time."""
    rng = np.random.default_rng(0)
    start, k, beta1, beta2, gamma, eps = rng.normal(size=(2, 3)), 3, 0.9, 0.8, 0.3, 1e-12
    params = [torch.tensor(row, requires_grad=True) for row in start]
    opt = Sophia([dict(params=params[:1], weight_decay=0.1), dict(params=params[1:], lr=0.05)], lr=0.02, betas=(beta1, beta2),
                 gamma=gamma, weight_decay=0.0, k=k, bias_correction=bias_correction)
    grads, hats = rng.normal(size=(10, 2, 3)), rng.normal(size=(10, 2, 3))
    for t in range(10):
        assert opt.hessian_due == (t % k == 0)
        if opt.hessian_due:
            opt.update_hessian(torch.tensor(hats[t]))
        for p, g in zip(params, grads[t]):
            p.grad = torch.tensor(g)
        opt.step()
    for i, j in itertools.product(range(2), range(3)):
        theta, m, h, n = start[i, j], 0.0, 0.0, 0
        lr, decay = ((0.02, 0.1), (0.05, 0.0))[i]
        for t in range(10):
            m = beta1 * m + (1 - beta1) * grads[t, i, j]
            if t % k == 0:
                h, n = beta2 * h + (1 - beta2) * hats[t, i, j], n + 1
            m_hat, h_hat = (m / (1 - beta1 ** (t + 1)), h / (1 - beta2**n)) if bias_correction else (m, h)
            theta = theta * (1 - lr * decay) - lr * min(1.0, max(-1.0, m_hat / max(gamma * h_hat, eps)))
        assert params[i][j].item() == pytest.approx(theta, abs=1e-14)


def test_parametrisations():
    """The docstring's table: the paper's first version and the authors' code give the same trajectory in float64."""
    rng = np.random.default_rng(1)
    x = {name: np.full(4, 0.5) for name in ("v1", "repo")}
    m, h, h_repo, b1, b2, rho, lr, tokens = np.zeros(4), np.zeros(4), np.zeros(4), 0.9, 0.95, 0.04, 1e-2, 640
    p = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    opt = Sophia([p], lr=lr, betas=(b1, b2), gamma=rho, eps=1e-300, weight_decay=0.0, k=1)
    for _ in range(30):
        g, sampled = rng.normal(size=4), rng.normal(size=4) * 0.2
        m, h, h_repo = b1 * m + (1 - b1) * g, b2 * h + (1 - b2) * tokens * sampled**2, b2 * h_repo + (1 - b2) * sampled**2
        x["v1"] -= lr / rho * np.clip(m / h, -rho, rho)
        x["repo"] -= lr * np.sign(m) * np.minimum(np.abs(m) / (rho * tokens * h_repo), 1)
        opt.update_hessian([torch.tensor(sampled)], n_terms=tokens)
        p.grad = torch.tensor(g)
        opt.step()
    for name in x:
        np.testing.assert_allclose(p.detach().numpy(), x[name], rtol=0, atol=1e-12)


def test_small_gamma_is_signum():
    torch.manual_seed(0)
    params = [torch.randn(50).requires_grad_() for _ in range(2)]
    params[1].data.copy_(params[0].data)
    opts = Sophia(params[:1], lr=0.01, betas=(0.9, 0.9), gamma=1e-9, weight_decay=0.1), Lion(params[1:], 0.01, (0.9, 0.9), 0.1)
    for _ in range(5):
        g = torch.randn(50)
        opts[0].update_hessian([g], n_terms=10)
        for p, opt in zip(params, opts):
            p.grad = g.clone()
            opt.step()
    torch.testing.assert_close(*params)
    assert opts[0].win_rate == 0


def test_step_is_bounded_and_counts_wins():
    torch.manual_seed(0)
    p = torch.randn(300_001, requires_grad=True)  # more than two blocks, and a tail
    opt = Sophia([p], lr=0.1, betas=(0.9, 0.9), gamma=0.5, weight_decay=0.3)
    p.grad = torch.randn_like(p)
    opt.update_hessian([torch.randn_like(p)])
    before = p.detach().clone()
    opt.step()
    m, h = opt.averages(p)
    assert ((p - before).abs() <= 0.1 * (1 + 0.3 * before.abs()) + 1e-6).all()
    assert opt.win_rate == pytest.approx(((m / (0.5 * h).clamp(min=1e-12)).abs() < 1).double().mean().item(), abs=1e-9)


def test_blocks_change_nothing():
    torch.manual_seed(0)
    blocked, whole = ([torch.randn(2, 200_000) for _ in range(4)] for _ in range(2))
    for a, b in zip(blocked, whole):
        b.copy_(a)
    wins = sophia.sophia_update_(*([t] for t in blocked), 0.1, 0.9, 0.5, 1e-12, 0.1)
    assert int(wins) == int(sophia.sophia_rule_(*whole, 0.1, 0.9, 0.5, 1e-12, 0.1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(blocked, whole))
    transposed = [t.clone().t().contiguous().t() for t in whole]  # not contiguous: goes whole
    sophia.sophia_update_(*([t] for t in transposed), 0.1, 0.9, 0.5, 1e-12, 0.1)
    sophia.sophia_rule_(*whole, 0.1, 0.9, 0.5, 1e-12, 0.1, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(transposed, whole))


@pytest.mark.skipif(not any((Path(d) / "g++").exists() for d in os.environ["PATH"].split(os.pathsep)), reason="needs a C++ compiler")
def test_compiled_equals_plain():
    torch.manual_seed(0)
    columns = [[torch.randn(s) for s in ((1,), (127,), (33, 31))] for _ in range(4)]
    plain, compiled = copy.deepcopy(columns), copy.deepcopy(columns)
    for lr in (0.1, 0.05):  # a new learning rate must not be baked in
        wins = [update(*c, lr, 0.9, 0.5, 1e-12, 0.1, 1.0)
                for update, c in ((sophia.sophia_update_, plain), (sophia.compiled_sophia_update_, compiled))]
        assert int(wins[0]) == int(wins[1])
    for a, b in zip(itertools.chain(*plain), itertools.chain(*compiled)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_half_parameters_keep_float32_averages():
    """… also through state_dict, where torch would cast them to the parameter's dtype."""
    torch.manual_seed(0)
    p = torch.randn(100).bfloat16().requires_grad_()
    opt = Sophia([p], lr=0.1)
    opt.update_hessian([torch.randn(100).bfloat16()], n_terms=3)
    p.grad = torch.randn(100).bfloat16()
    opt.step()
    q = p.detach().clone().requires_grad_()
    other = Sophia([q])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for a, b in zip(opt.averages(p), other.averages(q)):
        assert a.dtype == torch.float32 and torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    for x, o in ((p, opt), (q, other)):
        x.grad = torch.ones(100).bfloat16()
        o.step()
    assert torch.equal(p, q) and other.param_groups[0]["steps"] == 2 and other.param_groups[0]["refreshes"] == 1


def test_state_dict_with_a_parameter_without_gradient():
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    opt = Sophia(params)
    params[1].grad = torch.ones(3)
    opt.step()
    other = Sophia(copy.deepcopy(params))
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.averages(other.params[1])[0], opt.averages(params[1])[0]) and not other.state[other.params[0]]


def test_closure_copies_and_the_warning():
    p, opt = one(1.0)
    assert opt.step(lambda: (p**2).sum().backward() or torch.tensor(7.0)) == 7.0 and p.item() == pytest.approx(0.9)
    copy.deepcopy(opt).step()
    p, opt = one(1.0, 1.0, k=2)
    with pytest.warns(UserWarning, match="update_hessian"):
        for _ in range(5):
            opt.step()


@pytest.mark.parametrize("settings", [dict(lr=-1), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)), dict(gamma=0), dict(eps=0),
                                      dict(weight_decay=-1), dict(k=0), dict(clip=0)])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="out of range"):
        one(1.0, **settings)


def test_what_the_optimizer_refuses():
    p, opt = one(1.0)
    p.grad = torch.ones(1, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    z = torch.ones(1, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(ValueError, match="complex"):
        Sophia([z]).step()
    for estimates, n_terms in (([], None), ([torch.ones(2)], None), ([torch.ones(1)], 0)):
        with pytest.raises(ValueError):
            opt.update_hessian(estimates, n_terms)
    adam = torch.optim.AdamW([p])
    p.grad = torch.ones(1, dtype=torch.float64)
    adam.step()
    with pytest.raises(ValueError, match="exp_avg"):
        opt.load_state_dict(adam.state_dict())


def test_lion_by_hand():
    p = torch.tensor([1.0, 1.0], requires_grad=True)
    opt = Lion([p], lr=0.1, betas=(0.5, 0.9), weight_decay=0.0)
    for grad in ([1.0, -1.0], [-0.05, 0.15]):  # then m = ±0.1, and 0.5·m + 0.5·g = 0.025 in both: against g, then with it
        p.grad = torch.tensor(grad)
        opt.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.8, 1.0]))


# -------------------------------------------------------------------------------------------- 1. the mathematics: estimators


def tiny_lm(vocab=4, seq=3, d=4):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=seq, vocab_size=vocab, n_layer=1, n_head=2, n_embd=d)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model, torch.randint(vocab, (1, seq))


def exact_gauss_newton(model, idx):
    """(1/B) Σ_n Σ_y p(y | n)·(∂ log p(y | n)/∂θ)², one label at a time: the diagonal of (1/B) Σ_n Jᵀ(diag p − ppᵀ)J."""
    params, logits = list(model.parameters()), model(idx).flatten(0, 1)
    logp, total = logits.log_softmax(-1), [torch.zeros_like(p) for p in model.parameters()]
    for n, y in itertools.product(range(logp.size(0)), range(logp.size(1))):
        for t, g in zip(total, torch.autograd.grad(logp[n, y], params, retain_graph=True)):
            t += logp[n, y].exp().detach() * g**2 / logp.size(0)
    return total


def test_bartlett_is_unbiased_exactly():
    """E[B·ĝ²] over all 4³ labellings, weighted by their probability, is the Gauss-Newton diagonal. Fails by a factor of 3 if B
    counts sequences, and without the square of the mean's cross terms cancelling (Bartlett's first identity)."""
    model, idx = tiny_lm()
    params, logits = list(model.parameters()), model(idx).flatten(0, 1)
    logp, expected = logits.log_softmax(-1), [torch.zeros_like(p) for p in model.parameters()]
    h = [torch.zeros_like(p) for p in model.parameters()]
    for labels in itertools.product(range(4), repeat=3):
        labels = torch.tensor(labels)
        weight = logp[range(3), labels].sum().exp().item()
        grads = torch.autograd.grad(F.cross_entropy(logits, labels), params, retain_graph=True)
        for t in h:
            t.zero_()
        sophia.hessian_ema_(h, grads, 0.0, n_terms=3)  # h = B·ĝ²
        for e, t in zip(expected, h):
            e += weight * t
    for e, gn in zip(expected, exact_gauss_newton(model, idx)):
        torch.testing.assert_close(e, gn, rtol=1e-10, atol=1e-14)


def test_curvature_counts_tokens():
    """The path that training takes, with drawn labels: 600 draws come within 6 % in L1; sequences for tokens would be off by 3."""
    model, idx = tiny_lm()
    loss_of, params = sophia.Loss(model, 4), list(model.parameters())
    assert loss_of(idx, idx)[1] == 3 and loss_of(idx, torch.tensor([[0, -1, 2]]))[1] == 2
    estimate = sophia.curvature("bartlett", loss_of, params, ((idx, idx, seed) for seed in range(600)))
    exact = exact_gauss_newton(model, idx)
    error = sum((a - b).abs().sum() for a, b in zip(estimate, exact)) / sum(b.sum() for b in exact)
    assert error < 0.06, error
    fisher = sophia.curvature("fisher", loss_of, params, [(idx, idx, 0)])  # true labels: another thing, and one draw of it
    assert sum((a - b).abs().sum() for a, b in zip(fisher, exact)) / sum(b.sum() for b in exact) > 0.5


def test_softmax_regression_closed_form():
    """For logits W·x the Gauss-Newton matrix is the Hessian, with diagonal mean over n of p(1 − p)·x². Ignored rows do not count."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.where(torch.arange(40) % 4 > 0, 1, -1)
    p = (x @ w.t()).softmax(-1).detach()[targets >= 0]
    exact = ((p * (1 - p)).t() @ x[targets >= 0] ** 2) / 30
    draws = []
    for seed in range(800):
        loss, used = sophia.linear_cross_entropy(x, w, targets, seed=seed)
        draws.append(torch.autograd.grad(loss, w)[0] ** 2 * (used >= 0).sum())
    draws = torch.stack(draws)
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 800**0.5).all()


def test_square_by_micro_batch():
    """Same mean, and a variance that M = 8 micro-batches divide by about 8 (a ratio of chi-squares; 4 to 16 is 6 sd)."""
    torch.manual_seed(0)
    x, w = torch.randn(64, 1, dtype=torch.float64), torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
    draws = {}
    for m in (1, 8):
        rows = []
        for trial in range(400):
            h = [torch.zeros_like(w)]
            for i, part in enumerate(x.chunk(m)):
                loss, _ = sophia.linear_cross_entropy(part, w, torch.zeros(len(part), dtype=torch.long), seed=1000 * m + 8 * trial + i)
                sophia.hessian_ema_(h, torch.autograd.grad(loss, [w]), i / (i + 1), n_terms=len(part))
            rows.append(h[0])
        draws[m] = torch.stack(rows)
    gap = (draws[1].mean(0) - draws[8].mean(0)).abs()
    assert (gap < 5 * (draws[1].var(0) / 400 + draws[8].var(0) / 400).sqrt()).all()
    assert 4 < (draws[1].var(0) / draws[8].var(0)).mean() < 16


def test_hutchinson_is_exact_on_a_diagonal():
    p = [torch.randn(5, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    a = [torch.randn(5), torch.randn(2, 3)]
    estimates = sophia.hutchinson(sum((c * q**2 / 2).sum() for c, q in zip(a, p)), p)
    for e, c in zip(estimates, a):
        torch.testing.assert_close(e, c)


def test_hutchinson_is_unbiased():
    """1,000 draws against the exact Hessian diagonal by double backward: within 5 standard errors. Signs that were always −1 would
    give the row sums of the Hessian."""
    model, idx = tiny_lm()
    loss_of, params = sophia.Loss(model, 4), [model.transformer.h[0].attn.c_attn.weight, model.lm_head.weight]
    with sophia.sdpa_kernel(sophia.SDPBackend.MATH):
        grads = torch.autograd.grad(loss_of(idx, idx, plain=True)[0], params, create_graph=True)
        exact = [torch.stack([torch.autograd.grad(g.flatten()[i], p, retain_graph=True)[0].flatten()[i] for i in range(g.numel())])
                 for p, g in zip(params, grads)]
        generator = torch.Generator().manual_seed(1)
        draws = [sophia.hutchinson(loss_of(idx, idx, plain=True)[0], params, generator) for _ in range(1000)]
    for e, column in zip(exact, zip(*draws)):
        column = torch.stack(column).flatten(1)
        assert ((column.mean(0) - e).abs() <= 5 * column.std(0) / 1000**0.5 + 1e-12).all()
        assert (exact[0] < 0).any(), "a Hessian with negative curvature, which Gauss-Newton has not"


def test_hutchinson_with_a_padded_vocabulary():
    model, idx = tiny_lm(vocab=6)
    for h in sophia.curvature("hutchinson", sophia.Loss(model, 4), list(model.parameters()), [(idx.clamp(max=3), idx.clamp(max=3), 0)]):
        assert h.isfinite().all()


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_hutchinson_on_published_data():
    """Levanter's test case: 4·mean((x·Wᵀ)²) at W = 1, with its loss and, for every row, the Hessian diagonal 2·mean(x², 0). They
    computed in float32, so their loss is good to two units in the last place, 2e-6."""
    x = torch.from_numpy(np.load(Path(DATA) / "sophia" / "hero_data.npy"))
    w = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
    assert float((4 * ((x @ w.t()) ** 2).mean()).detach()) == pytest.approx(15.74834156, abs=2e-6)
    draws = torch.stack([sophia.hutchinson(4 * ((x @ w.t()) ** 2).mean(), [w])[0] for _ in range(2000)])
    exact = torch.tensor([1.98294259, 2.02557336, 1.78671257, 1.88828830], dtype=torch.float64)
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 2000**0.5 + 1e-8).all()


def test_labels_follow_the_softmax():
    """Chi-square with 7 degrees of freedom over 200,000 draws; 40 is p = 1e-6."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.0, 1.5, -math.inf])
    drawn = sophia.sample_labels(logits.expand(400, 500, 9), torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 500)
    counts, expected = torch.bincount(drawn.flatten(), minlength=9), 200_000 * logits.softmax(0)
    assert counts[8] == 0 and ((counts - expected)[:8] ** 2 / expected[:8]).sum() < 40


def test_head_and_loss():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 9))
    targets = torch.tensor([0, 1, 6, -1, 3, -1, 2])
    loss, used = sophia.linear_cross_entropy(hidden, weight, targets, n_vocab=7)
    logits = (hidden @ weight[:7].t()).detach().numpy()
    rows = [-z[y] + np.log(np.exp(z).sum()) for z, y in zip(logits, targets.tolist()) if y >= 0]
    assert loss.item() == pytest.approx(np.mean(rows), abs=1e-12) and torch.equal(used, targets)
    assert torch.autograd.gradcheck(lambda h, w: sophia.linear_cross_entropy(h, w, targets, 7)[0], (hidden, weight))
    assert sophia.linear_cross_entropy(hidden, weight, torch.full((7,), -1), 7, seed=0)[0] == 0
    drawn = [sophia.linear_cross_entropy(hidden, weight, targets, 7, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2]) and drawn[0].max() < 7
    assert torch.equal(drawn[0] == -1, targets == -1)


# --------------------------------------------------------------------------------------------------- 1. the mathematics: GPT


def numpy_gpt(model, idx):
    """Logits of one sequence by loops over layers, heads and positions, from the weights alone."""
    w = {name: p.detach().numpy() for name, p in model.named_parameters()}
    c = model.config

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: len(idx)]
    for i in range(c.n_layer):
        q, k, v = np.split(linear(norm(x, f"transformer.h.{i}.ln_1"), f"transformer.h.{i}.attn.c_attn"), 3, -1)
        y, d = np.zeros_like(x), c.n_embd // c.n_head
        for head, t in itertools.product(range(c.n_head), range(len(idx))):
            part = slice(head * d, head * d + d)
            scores = k[: t + 1, part] @ q[t, part] / math.sqrt(d) / (i + 1 if c.scale_attn_by_layer else 1)
            y[t, part] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() @ v[: t + 1, part]
        x = x + linear(y, f"transformer.h.{i}.attn.c_proj")
        a = linear(norm(x, f"transformer.h.{i}.ln_2"), f"transformer.h.{i}.mlp.c_fc")
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        x = x + linear(a, f"transformer.h.{i}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def small_gpt(**settings):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=12, vocab_size=11, n_layer=3, n_head=2, n_embd=8), **settings})).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.mark.parametrize("settings", [{}, dict(bias=True), dict(scale_attn_by_layer=True)])
def test_gpt_against_numpy(settings):
    model, idx = small_gpt(**settings), [3, 1, 4, 1, 5, 9, 2, 6]
    np.testing.assert_allclose(model(torch.tensor([idx]))[0].detach().numpy(), numpy_gpt(model, idx), atol=1e-10)


def test_cache_equals_full_pass():
    """Token by token, and in uneven pieces after a cached prefix (where a plain causal mask would be wrong)."""
    model, idx = small_gpt(scale_attn_by_layer=True), torch.randint(11, (2, 12))
    full = model(idx)
    for pieces in ([1] * 12, [5, 4, 3], [12], [3, 1, 8]):
        cache = []
        got = torch.cat([model(part, cache) for part in idx.split(pieces, 1)], 1)
        torch.testing.assert_close(got, full, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="context"):
        model(idx[:, :1], cache)


def test_generate():
    model, prompt = small_gpt(), [1, 2, 3]
    greedy = sophia.generate(model, prompt, 9, temperature=0)
    ids = list(prompt)
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert greedy == ids
    long = sophia.generate(model, prompt, 40, top_k=3, seed=1, n_vocab=7)
    assert len(long) == 43 and max(long) < 7 and long == sophia.generate(model, prompt, 40, top_k=3, seed=1, n_vocab=7)


def test_parameter_counts():
    with torch.device("meta"):
        for name, count in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)):
            model = GPT(GPTConfig(**sophia.GPT_SIZES[name], vocab_size=50257, bias=True))
            assert sum(p.numel() for p in model.parameters()) == count
    with pytest.raises(ValueError, match="heads"):
        GPT(GPTConfig(n_embd=10, n_head=3))


def write_safetensors(path, tensors):
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(t.shape), data_offsets=[len(blob), len(blob) + len(raw)])
        blob += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_openai_weights(tmp_path, capsys, prefix):
    """Conv1D matrices are stored (in, out); masks and a tied head may stand in the file; names may carry a prefix."""
    model = small_gpt(bias=True).float()
    conv = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    stored = {prefix + name.removeprefix("transformer."): (p.detach().t() if name.endswith(conv) else p.detach())
              for name, p in model.named_parameters()}
    stored |= {prefix + "h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": model.lm_head.weight.detach()}
    write_safetensors(path := tmp_path / "model.safetensors", stored)
    other = GPT(model.config).load_openai(sophia.read_safetensors(path))
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    del stored[prefix + "h.1.mlp.c_fc.bias"]
    with pytest.raises(KeyError, match="h.1.mlp.c_fc.bias"):
        GPT(model.config).load_openai({name: t.clone() for name, t in stored.items()})
    for cut in (4, 100, path.stat().st_size - 8):
        (bad := tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(SystemExit):
            sophia.read_safetensors(bad)
        assert str(bad) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ 1. the shared pieces


def test_schedule():
    rates = [sophia.lr_at(step, 100, 2.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 and rates[-1] == pytest.approx(0.1)
    assert all(a <= b for a, b in zip(rates[:10], rates[1:10])) and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert sophia.lr_at(0, 1, 2.0, 0) == 2.0


def test_batches_depend_on_the_counter_alone():
    shards = [np.arange(100, dtype=np.uint16), np.arange(1000, 1300, dtype=np.uint16)]
    x, y = sophia.get_batch(shards, 64, 7, "cpu", 0, 5, 1)
    assert x.shape == (64, 7) and torch.equal(x + 1, y)  # a window never runs from one shard into the other
    assert torch.equal(x, sophia.get_batch(shards, 64, 7, "cpu", 0, 5, 1)[0])
    assert not torch.equal(x, sophia.get_batch(shards, 64, 7, "cpu", 0, 5, 2)[0])
    assert 5 < (x[:, 0] < 1000).sum() < 30  # shards by length: 16 of 64 expected


def test_evaluate_sees_each_window_once():
    model, shard = small_gpt().float(), np.arange(50, dtype=np.uint16) % 11
    loss_of = sophia.Loss(model, 11)
    ids = torch.from_numpy(shard.astype(np.int64))[None]
    expected = np.mean([loss_of(ids[:, i : i + 8], ids[:, i + 1 : i + 9])[0].item() for i in range(0, 42, 8)])
    assert sophia.evaluate(loss_of, [shard], 4, 8, "cpu", 0, 1) == pytest.approx(expected, rel=1e-5)
    halves = [sophia.evaluate(loss_of, [shard], 4, 8, "cpu", 0, 1, limit=16), sophia.evaluate(loss_of, [shard[:17]], 4, 8, "cpu", 0, 1)]
    assert halves[0] == halves[1]


def test_shards(tmp_path, capsys):
    tokens = np.arange(3000, dtype=np.uint16)
    raw, headed = tmp_path / "train.bin", tmp_path / "val_000001.bin"
    raw.write_bytes(tokens.tobytes())
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 3000
    headed.write_bytes(header.tobytes() + tokens.tobytes())
    for path in (raw, headed):
        assert np.array_equal(sophia.read_shard(path), tokens)
    train, val, tokenizer = sophia.load_tokens(str(tmp_path), "bytes", 64)
    assert tokenizer == "gpt2" and len(train) == len(val) == 1
    header[1] = 9
    for bad in (raw.read_bytes()[:-1], headed.read_bytes()[:-2], header.tobytes() + tokens.tobytes()):
        headed.write_bytes(bad)
        with pytest.raises(SystemExit):
            sophia.read_shard(headed)
        assert str(headed) in capsys.readouterr().err
    raw.write_bytes(np.full(3000, 60000, np.uint16).tobytes())
    headed.unlink()
    (tmp_path / "val.bin").write_bytes(tokens.tobytes())
    with pytest.raises(SystemExit):
        sophia.load_tokens(str(tmp_path), "bytes", 64)
    assert "60000" in capsys.readouterr().err


def test_text(tmp_path):
    prose, code = sophia.stdlib_text("prose"), sophia.stdlib_text("code")
    assert len(code) > 100 and any("class ArgumentParser" in text for text in code)
    assert sum(map(len, prose)) > 500_000 and not any("import sys\n" in text[:200] for text in prose[100:])
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    train, val, tokenizer = sophia.load_tokens(str(tmp_path / "a.txt"), "bytes", 16)
    assert tokenizer == "bytes" and len(train[0]) == 900 and len(val[0]) == 100
    _, encode, decode = sophia.get_tokenizer("bytes")
    assert decode(encode("naïve Ω")) == "naïve Ω"


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
def test_gpt2_tokenizer(monkeypatch, tmp_path):
    for file in (Path(DATA) / "tiktoken").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    name, encode, decode = sophia.get_tokenizer("gpt2")
    ids = encode("Hello world! The quick brown fox isn't lazy.")
    assert name == "gpt2" and ids.tolist() == [15496, 995, 0, 383, 2068, 7586, 21831, 2125, 470, 16931, 13]
    assert decode(ids) == "Hello world! The quick brown fox isn't lazy."


@pytest.fixture
def server():
    """A file server on the loopback that knows ranges and hangs up after `server.cut` bytes."""
    body = bytes(range(256)) * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.server.starts.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:][: self.server.cut])

        def log_message(self, *_):
            return

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.cut, httpd.starts, httpd.body = 10**9, [], body
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_download(server, tmp_path, monkeypatch, capsys):
    import hashlib

    monkeypatch.setattr(sophia, "CACHE", tmp_path)
    url, good = f"http://127.0.0.1:{server.server_port}/a/file.bin", hashlib.sha256(server.body).hexdigest()
    server.cut = 4000
    with pytest.raises(SystemExit):
        sophia.download(url, good)
    assert "broke off at 4,000 of 10,240" in capsys.readouterr().err and not list(tmp_path.rglob("file.bin"))
    server.cut = 10**9
    path = sophia.download(url, good[:16])
    assert path.read_bytes() == server.body and server.starts == [0, 4000]
    assert sophia.download(url) == path and len(server.starts) == 2  # from the cache
    path.unlink()
    with pytest.raises(SystemExit):
        sophia.download(url, "0" * 64)
    assert "sha256" in capsys.readouterr().err and not list(tmp_path.rglob("file.bin*"))
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit):
        sophia.download(url)
    assert url in capsys.readouterr().err


def test_checkpoints_are_atomic(tmp_path, monkeypatch):
    sophia.save_checkpoint(path := tmp_path / "a" / "c.pt", dict(x=torch.ones(2), step=3))
    monkeypatch.setattr(torch, "save", lambda state, file: Path(file).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sophia.save_checkpoint(path, dict(x=torch.zeros(2)))
    assert sophia.load_checkpoint(path)["step"] == 3


@pytest.mark.parametrize("a, b, c", [(2, 3, 0.5), (0, 10, 1.5), (1, -4, -0.1)])
def test_speedup(a, b, c):
    """Exact on power laws; what lies outside the baseline's three runs is not guessed."""
    at = [a + b * n**-c for n in (50, 100, 200)]
    for n in (50, 60, 100, 141.4, 200):
        assert sophia.speedup(a + b * n**-c, at) == pytest.approx(n / 100)
    assert sophia.speedup(at[2] - 1e-6, at) == math.inf and sophia.speedup(at[0] + 1e-6, at) == -math.inf


def test_speedup_of_noisy_baselines():
    assert sophia.speedup(2.5, [3.0, 2.5, 2.0]) == pytest.approx(1.0)  # a straight line
    assert sophia.speedup(2.0, [3.0, 2.0, 2.5]) == pytest.approx(1.0)  # worse after 2T than after T
    assert sophia.spread([1.0, 1.2]) == "1.10 ± 0.14" and sophia.spread([math.inf, 1.5]) == "1.50 to over 2"
    assert sophia.spread([-math.inf, -math.inf]) == "under 0.5"


# --------------------------------------------------------------------------------------------------------- 2. the claims


def test_insensitive_to_conditioning():
    """Section 4's point: on ½Σ cᵢxᵢ² with condition number 10⁴, 60 steps of Sophia-H bring the loss below 1e-4; sign steps of the same
    size, gradient descent at its stability limit and Sophia with its curvature forgotten (γ → 0) stay a hundred times above."""
    curvatures = torch.tensor([1e4, 1e2, 1.0])

    def final(make, hessian):
        x = torch.tensor([1.03, -0.95, 0.97], requires_grad=True)
        opt = make([x])
        for _ in range(60):
            if hessian:
                opt.update_hessian(sophia.hutchinson((curvatures * x**2).sum() / 2, [x]))
            opt.zero_grad()
            ((curvatures * x**2).sum() / 2).backward()
            opt.step()
        return float((curvatures * x.detach() ** 2).sum() / 2)

    settings = dict(lr=0.1, betas=(0.0, 0.0), weight_decay=0.0, k=1)
    ours = final(lambda p: Sophia(p, gamma=0.2, **settings), True)
    others = [final(lambda p: Sophia(p, gamma=1e-9, **settings), True), final(lambda p: Lion(p, 0.1, (0.0, 0.0), 0.0), False),
              final(lambda p: torch.optim.SGD(p, lr=1.9e-4), False)]
    assert ours < 1e-4 and min(others) > 1e-2, (ours, others)


def test_budgets_are_equal():
    for search in sophia.SEARCH.values():
        assert set(search) == set(sophia.NAMES)
        assert all(sum(len(values) for _, values in rows) == sophia.N_TRIALS for _, rows in search.values())


@pytest.mark.parametrize("optimizer", sophia.NAMES)
def test_every_optimizer_learns(optimizer):
    """60 small steps on the bigram model go well below the loss at the start (ln 256 = 5.545), at 3.2 or less; a wrong sign or a
    forgotten learning rate does not. (That curvature is used is for the tests above.)"""
    start, rows = sophia.SEARCH["bigram"][optimizer]
    job = dict(problem="bigram", data="stdlib", device="cpu", optimizer=optimizer, steps=60, seed=0, batch_size=8, **start)
    assert sophia.run_once(dict(job, lr=rows[0][1][2]))["loss"] < 3.2


def test_toy_golden_values(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sophia.py", "toy", "--no_plot"])
    sophia.main()
    rows = {row[0]: row[1:] for row in json.loads((tmp_path / "out/sophia/toy/results.json").read_text())["table"]}
    golden = {"GD": (1.0, 2.1212, 1.76487), "SignGD": (0.8, 4.2, 1.11824), "Adam": (1.009, 3.832, 0.016946), "Newton": (0, 4, 8),
              "Sophia": (1, 4, 0)}
    for name, expected in golden.items():
        assert rows[name][:3] == pytest.approx(expected, abs=6e-4), name
    assert rows["Sophia"][3] == 14 and all(rows[name][3] == "never" for name in golden if name != "Sophia")
    assert "no figure" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- 3. the tool


def command(*args, cwd, launcher=(), **popen):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOPAPERS_CACHE": str(cwd / "cache")}
    return subprocess.Popen([sys.executable, *launcher, str(HOUSE / "sophia.py"), *map(str, args)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def finished(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def losses(folder):
    return [(r["step"], r["loss"]) for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SMALL = ("train", "--steps", 12, "--warmup", 2, "--seq", 32, "--batch_size", 4, "--micro_batch_size", 1, "--k", 3, "--log_every", 1,
         "--eval_tokens", 2000, "--quiet", "--no_plot")


def test_default_run_in_small(tmp_path):
    out, err = finished(command("--steps", 2, "--seeds", 1, cwd=tmp_path))
    for word in ("AdamW", "Sophia-G", "Sophia-H", "Signum", "Lion", "speed-up", "bigram: Sophia-G", "gpt: Sophia-H"):
        assert word in out
    results, figure = (tmp_path / path for path in out.split()[-2:])
    table = json.loads(results.read_text())
    assert len(table["table"]) == 14 and {row["trials"] for row in table["table"]} == {8} and {"seed", "command", "revision"} <= set(table)
    assert figure.stat().st_size > 10_000 and "174/174" in err  # progress: 2 × (5 optimizers × 8 trials × 2 seeds + 7 final runs)


@pytest.mark.parametrize("optimizer", ["sophiag", "sophiah", "adamw"])
def test_resume_after_kill_is_exact(tmp_path, optimizer):
    flags = (*SMALL, "--save_every", 3, "--optimizer", optimizer)
    unbroken = command(*flags, "--out", "a", cwd=tmp_path)
    killed = command(*flags, "--out", "b", cwd=tmp_path)
    deadline = time.time() + 120
    while time.time() < deadline and not ((tmp_path / "b/log.jsonl").exists() and len(losses(tmp_path / "b")) >= 7):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    reached = len(losses(tmp_path / "b"))
    finished(unbroken)
    finished(command(*flags, "--out", "b", "--resume", cwd=tmp_path))
    assert 7 <= reached <= 12 and losses(tmp_path / "a") == losses(tmp_path / "b") and len(losses(tmp_path / "a")) == 12


def test_two_ranks_equal_one(tmp_path):
    for estimator in ("sophiag", "sophiah"):
        one, two = (command(*SMALL, "--hess_batch", 2, "--optimizer", estimator, "--out", name, cwd=tmp_path, launcher=launcher)
                    for name, launcher in ((f"{estimator}1", ()), (f"{estimator}2", TORCHRUN)))
        finished(one), finished(two)
        for (_, a), (_, b) in zip(losses(tmp_path / f"{estimator}1"), losses(tmp_path / f"{estimator}2"), strict=True):
            assert a == pytest.approx(b, rel=2e-6)


def test_sweeps_under_torchrun(tmp_path):
    jobs = [command("compare", "--problem", "bigram", "--steps", 2, "--seeds", 1, "--quiet", "--no_plot", cwd=tmp_path, launcher=launcher)
            for launcher in ((), TORCHRUN)]
    tables = [[line.split()[:4] for line in finished(job)[0].splitlines() if line.startswith("bigram ")] for job in jobs]
    assert tables[0] == tables[1] and len(tables[0]) == 7


def test_interrupt_then_sample(tmp_path):
    process = command(*SMALL[:2], 100_000, *SMALL[3:], "--save_every", 5, "--out", "out/sophia/run", cwd=tmp_path)
    while not (tmp_path / "out/sophia/run/checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = finished(process, 130)
    assert "--resume" in out
    out, _ = finished(command("sample", "--prompt", "def f", "--tokens", 5, cwd=tmp_path))
    assert out.startswith("def f")


@pytest.mark.parametrize("args, words", [
    (["--model", "gpt5"], "gpt2-medium"),
    (["nonsense"], "compare"),
    (["train", "--device", "cuda"], "--device cuda"),
    (["train", "--device", "abacus"], "--device abacus"),
    (["train", "--lr", "-1"], "--lr"),
    (["train", "--lr", "fast"], "--lr"),
    (["train", "--beta1", "1"], "--beta1"),
    (["train", "--gamma", "0"], "--gamma"),
    (["train", "--k", "0"], "--k"),
    (["train", "--batch_size", "6", "--micro_batch_size", "4"], "--batch_size 6"),
    (["train", "--steps", "5", "--warmup", "5"], "--warmup"),
    (["train", "--data", "nowhere.txt"], "nowhere.txt"),
    (["train", "--data", "short.txt"], "too few"),
    (["train", "--data", "broken"], "train.bin"),
    (["train", "--data", "empty"], "too few"),
    (["train", "--resume"], "checkpoint.pt"),
    (["train", "--resume", "--out", "old", "--seq", "16"], "block_size = 8, this run has 16"),
    (["train", "--resume", "--out", "old", "--seq", "8", "--optimizer", "adamw"], "optimizer = sophiag, this run has adamw"),
    (["compare", "--resume"], "--resume"),
    (["sample"], "no checkpoint"),
    (["sample", "--model", "tiny"], "gpt2"),
])
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("CUDA is there")
    Path("short.txt").write_text("too short")
    for folder in ("broken", "empty"):
        Path(folder).mkdir()
    Path("broken/train.bin").write_bytes(b"odd")
    model = GPTConfig(**{**sophia.GPT_SIZES["tiny"], "block_size": 8}, vocab_size=256)
    sophia.save_checkpoint(Path("old/checkpoint.pt"), dict(settings=dict(sophia.asdict(model), optimizer="sophiag")))
    before = sorted(p for p in tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["sophia.py", *args])
    with pytest.raises(SystemExit) as stop:
        sophia.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: ") and words in err, err
    assert sorted(p for p in tmp_path.rglob("*")) == before, "nothing may be written"


def test_exit_code_without_traceback(tmp_path):
    out, err = finished(command("train", "--lr", "-1", cwd=tmp_path), 2)
    assert out == "" and err.count("\n") == 1


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        sophia.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for flag in "device dtype seed out data model steps batch_size lr compile resume no_plot quiet gamma k pretrained".split():
        assert f"--{flag}" in text
