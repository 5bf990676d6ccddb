"""onesided_mc.py: its mathematics by other routes, its claims in miniature, its tasks and readers in use."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import onesided_mc as mc
from onesided_mc import PairStats, fit, rowspace_error

HOUSE = Path(__file__).parent.parent
DATA = os.environ.get("NANOPAPERS_TEST_DATA")


def ragged(n=300, d=12, seed=0, share=0.4):
    """x (n, d), which entries are seen, and the same as columns with −1."""
    rng = np.random.default_rng(seed)
    x, seen = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.random((n, d)) < share
    return x, seen, np.where(seen, np.arange(d), -1)


def two_a_row(m, seed=0, noise_sd=0.0, d=50, rank=3, k=2, blocks=1):
    """Blocks of the paper's rows, and the true row space."""
    V = mc.right_factor(d, rank, seed)
    rows = [torch.cat(x) for x in zip(*mc.low_rank_rows(V, m, k, seed, noise_sd))]
    parts = [PairStats(d).update(rows[1][i::blocks], rows[2][i::blocks]) for i in range(blocks)]
    return parts, torch.linalg.qr(V.double())[0]


def error(model, truth, *center):
    return rowspace_error(model.components(*center)[1], truth)


# ==================================================================================== 1. the mathematics


def test_sums_are_matrix_products():
    x, seen, columns = ragged()
    means = np.random.default_rng(1).normal(size=12)
    centred = np.where(seen, x - means, 0)
    dense = np.stack([centred.T @ centred, seen.T.astype(float) @ seen, (centred**2).T @ seen])
    order = np.random.default_rng(2).permutation(300)
    shuffled = np.random.default_rng(3).permuted(np.arange(12)[None].repeat(300, 0), axis=1)  # within each row
    parts = [PairStats(12, means).update(np.take_along_axis(columns, shuffled, 1)[some],
                                         np.take_along_axis(np.where(seen, x, np.nan), shuffled, 1)[some])
             for some in np.array_split(order, 7)]
    total = sum(parts[1:], parts[0])
    torch.testing.assert_close(total.table, torch.from_numpy(dense), rtol=1e-12, atol=1e-10)
    assert torch.equal(total.table[1], torch.from_numpy(dense[1]))  # counts to the bit, for any split
    torch.testing.assert_close((total - parts[0]).table, sum(parts[2:], parts[1]).table, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns, last", [([0, 3], 4), ([2, 2], 4), ([-2, 1], 4), ([1, 2], np.inf)])
def test_update_names_the_row(columns, last):
    with pytest.raises(ValueError, match="row 1 "):
        PairStats(3).update([[0, 1], columns], [[1, 2], [3, last]])


def test_squared_loss_is_the_papers_row_by_row():
    """Up to a constant: each row's ordered pairs, and its squares, count 1 over how many there are in all."""
    x, seen, columns = ragged(60, 6)
    table, losses = PairStats(6).update(columns, x).table, []
    thetas = [torch.randn(6, 6, generator=torch.Generator().manual_seed(i)).double() for i in range(2)]
    for theta in (theta + theta.T for theta in thetas):
        off, on = [], []
        for row, shown in zip(x, seen):
            for a in np.flatnonzero(shown):
                for b in np.flatnonzero(shown):
                    (on if a == b else off).append((float(theta[a, b]) - row[a] * row[b]) ** 2)
        losses.append((np.mean(off) + np.mean(on), float(mc.squared_loss(theta, table)[0])))
    (by_hand, ours), (by_hand_2, ours_2) = losses
    assert ours - ours_2 == pytest.approx(by_hand - by_hand_2, rel=1e-10)


@pytest.mark.parametrize("loss", [mc.squared_loss, mc.pair_likelihood])
def test_gradients(loss):
    """Along random symmetric directions, against central differences."""
    x, _, columns = ragged(60, 6)
    table, generator = PairStats(6).update(columns, x).table, torch.Generator().manual_seed(0)
    L, D = torch.randn(2, 6, 6, generator=generator).double()
    theta, D = L @ L.T + torch.eye(6), D + D.T
    slope = (loss(theta + 1e-6 * D, table)[0] - loss(theta - 1e-6 * D, table)[0]) / 2e-6
    assert float((loss(theta, table)[1] * D).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_pair_likelihood_is_that_of_gaussian_pairs():
    x, seen, columns = ragged(40, 5)
    L, total, pairs = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double(), 0.0, 0
    theta = L @ L.T + torch.eye(5)
    for row, shown in zip(torch.from_numpy(x), seen):
        for two in torch.combinations(torch.from_numpy(np.flatnonzero(shown))):
            density = torch.distributions.MultivariateNormal(torch.zeros(2).double(), theta[two][:, two])
            total, pairs = total - 2 * float(density.log_prob(row[two])) - 2 * np.log(2 * np.pi), pairs + 1
    ours = mc.pair_likelihood(theta, PairStats(5).update(columns, x).table)[0]
    assert float(ours) == pytest.approx(total / pairs, rel=1e-10)


def test_inverse_propensity_is_unbiased():
    """Over random masks in which columns differ in popularity, within four standard errors."""
    x, _, _ = ragged(400, 5)
    rng, share, draws = np.random.default_rng(0), np.array([0.2, 0.4, 0.5, 0.7, 0.9]), []
    for _ in range(400):
        columns = np.where(rng.random(x.shape) < share, np.arange(5), -1)
        draws.append(mc.inverse_propensity(PairStats(5).update(columns, x)).numpy())
    off = np.abs(np.mean(draws, 0) - x.T @ x / 400) / (np.std(draws, 0) / 20)
    assert off.max() < 4, off


@pytest.mark.parametrize("estimator", ["paper", "likelihood"])
def test_everything_seen(estimator):
    """Rows of rank 2, all entries: the row space is that of X, whatever the loss; a scale changes nothing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 6))
    truth = torch.from_numpy(np.linalg.svd(x)[2][:2].T)
    for scale in 1.0, 1e-4:
        model = fit(PairStats(6).update(np.arange(6)[None].repeat(500, 0), scale * x), 2, estimator=estimator)
        assert model.converged and error(model, truth) < 5e-4
        values = torch.from_numpy(np.linalg.svd(scale * x)[1][:2] ** 2 / 500)
        torch.testing.assert_close(model.components()[0], values, rtol=2e-2, atol=0.0)


def test_unseen_pairs_are_filled_in():
    """Exact second moments at 60 % of the pairs: the paper's estimator finds the others."""
    V, stats = mc.right_factor(15, 2, 0).double(), PairStats(15)
    seen = torch.rand(15, 15, generator=torch.Generator().manual_seed(0)) < 0.35
    seen = (seen | seen.T).fill_diagonal_(True).double()
    stats.table[:] = torch.stack([V @ V.T * seen, seen, seen])
    found = fit(stats, 2, estimator="paper").V
    assert float((found @ found.T - V @ V.T).abs().max()) < 1e-4


def test_rowspace_error_is_procrustes():
    A, B = torch.linalg.qr(torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0)).double())[0]
    angles = torch.linspace(0, 2 * torch.pi, 20_001).double()
    turns = [torch.stack([torch.stack([angles.cos(), -sign * angles.sin()], 1),
                          torch.stack([angles.sin(), sign * angles.cos()], 1)], 1) for sign in (1, -1)]
    best = min(float(((A @ turn - B) ** 2).sum((1, 2)).min()) for turn in turns)
    assert rowspace_error(A, B) == pytest.approx(best, abs=1e-6) and rowspace_error(A, A.flip(1)) < 1e-12


def test_row_centring_and_transform():
    x, seen, columns = ragged(2000, 6)
    model = fit(PairStats(6, x.mean(0)).update(columns, x), 2)
    theta, center = model.V @ model.V.T, torch.eye(6).double() - 1 / 6
    values, Q = torch.linalg.eigh(center @ theta @ center)
    torch.testing.assert_close(model.components("rows")[0], values.flip(0)[:2])
    assert error(model, Q[:, -2:], "rows") < 1e-9
    loadings = model.components()[1] * model.components()[0].sqrt()
    whole = model.transform(columns[:50], x[:50])[1]
    S = (loadings @ loadings.T + model.residual_variance * torch.eye(6)).numpy()
    for row, shown, ours in zip(x[:50], seen[:50], whole):  # conditional mean by the joint covariance of the entries
        weights = (loadings @ loadings.T).numpy()[:, shown] @ np.linalg.inv(S[np.ix_(shown, shown)])
        np.testing.assert_allclose(ours, x.mean(0) + weights @ (row - x.mean(0))[shown], atol=1e-7)


@pytest.mark.parametrize("k", [2, 8])
def test_standard_error_of_held_out_differences(k):
    """Rows are independent, their pairs are not: the error must hold at k = 8 too."""
    V, draws = mc.right_factor(10, 2, 0), []
    one, two = (mc.Model(V.double()[:, :n], n, 0.0, 1.0, torch.zeros(10), True) for n in (1, 2))
    for seed in range(120):
        rows = [torch.cat(x) for x in zip(*mc.low_rank_rows(V, 500, k, seed, 1.0))]
        blocks = [PairStats(10).update(rows[1][i::5], rows[2][i::5]) for i in range(5)]
        gain = torch.stack([mc.pair_fit(two, block)[1] - mc.pair_fit(one, block)[0] for block in blocks])
        draws.append((float(gain.mean()), float(mc.block_error(gain)) ** 2))
    means, squares = np.array(draws).T
    assert np.mean(squares) ** 0.5 == pytest.approx(np.std(means), rel=0.25)


def test_completion_is_a_minimum():
    _, columns, values = next(mc.low_rank_rows(mc.right_factor(8, 2, 0), 200, 3, 0))
    V = mc.complete(columns, values, 8, 2, [0.2], steps=300)[0]
    x, ridge = values.double(), 0.2 * values.double().square().mean()

    def loss(V):
        L = V[columns]
        U = torch.linalg.solve(L.mT @ L + 3 * ridge * torch.eye(2), L.mT @ x[..., None])[..., 0]
        penalty = ridge * (U.square().sum() / 200 + V.square().sum() / 8)
        return ((L @ U[..., None])[..., 0] - x).square().mean() + penalty

    scale = torch.eye(2).double().requires_grad_()  # the basis is orthonormal: the best factor on it
    optimizer = torch.optim.LBFGS([scale], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    optimizer.step(lambda: (optimizer.zero_grad(), value := loss(V @ scale), value.backward())[1])
    factor = (V @ scale).detach().requires_grad_()
    loss(factor).backward()
    assert float(factor.grad.abs().max()) < 1e-5 < float(scale.detach().abs().max())


# ==================================================================================== 2. the claims in miniature


def test_case_file():
    """4,000 rows, two entries each: the likelihood is nearer than the paper, which beats the spectral baselines."""
    (stats,), truth = two_a_row(4000)
    ours, paper = error(fit(stats, 3), truth), error(fit(stats, 3, estimator="paper"), truth)
    spectral = {name: error(mc.spectral(stats, 3, matrix), truth) for name, matrix in mc.SPECTRAL.items()}
    assert 3 * ours < paper < min(spectral.values()) and spectral["direct SVD"] > 2, (ours, paper, spectral)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(fit(stats, 3), truth) == pytest.approx(ours, abs=1e-6)
    (stats,), _ = two_a_row(16_000)
    paper_large, ours_large = (error(fit(stats, 3, estimator=name), truth) for name in ("paper", "likelihood"))
    assert paper_large < paper / 2 and ours_large < ours / 2  # as one over rows


def test_noise():
    """σ² by the likelihood with V of r columns; the rest beyond r where V has more; both are positive without noise."""
    (stats,), truth = two_a_row(50_000, noise_sd=1.0)
    assert fit(stats, 3, 3).noise_variance == pytest.approx(1, abs=0.1)
    assert fit(stats, 3).residual_variance == pytest.approx(1, abs=0.1)
    assert error(fit(stats, 3), truth) < error(fit(stats, 3, estimator="paper"), truth) / 1.5
    assert 0 < fit(two_a_row(4000)[0][0], 3).noise_variance < 0.05


@pytest.mark.parametrize("size", [1, 10])
def test_means_come_off_first(size):
    """Column means of 1 and 10 times the spread: the row space is as near as without them."""
    V, means = mc.right_factor(30, 3, 0), size * np.random.default_rng(0).normal(size=30)
    _, columns, values = (torch.cat(x) for x in zip(*mc.low_rank_rows(V, 30_000, 4, 0)))
    at, truth, shifted = columns.numpy(), torch.linalg.qr(V.double())[0], values.numpy() + means[columns.numpy()]
    seen = np.bincount(at.ravel(), shifted.ravel()) / np.bincount(at.ravel())
    assert error(fit(PairStats(30, seen).update(columns, shifted), 3), truth) < 0.005


@pytest.mark.parametrize("rank, k, noise_sd", [(3, 2, 0.0), (12, 6, 0.5)])
def test_rank_by_held_out_rows(rank, k, noise_sd):
    blocks, _ = two_a_row(30_000, 0, noise_sd, 30, rank, k, blocks=5)
    found, at_bound = mc.choose_rank(blocks, fit_rank=4)  # the columns of V must double to see rank 12
    assert rank - 1 <= found <= rank and not at_bound
    full, _ = two_a_row(30_000, 0, 0.0, 4, 4, 3, blocks=5)
    assert mc.choose_rank(full) == (4, True)  # as many components as columns: said


def k_means(points, k, restarts=20):
    rng, best = np.random.default_rng(0), (np.inf, None)
    for _ in range(restarts):
        centres = points[rng.choice(len(points), k, replace=False)]
        for _ in range(50):
            distance = ((points[:, None] - centres) ** 2).sum(2)
            label = distance.argmin(1)
            centres = np.stack([points[label == j].mean(0) if (label == j).any() else centres[j] for j in range(k)])
        best = min(best, (distance.min(1).sum(), label), key=lambda pair: pair[0])
    return best[1]


def adjusted_rand(a, b):
    table = np.zeros((max(a) + 1, max(b) + 1))
    np.add.at(table, (a, b), 1)
    together, first, second, pairs = ((x * (x - 1) / 2).sum() for x in (table, table.sum(1), table.sum(0), table.sum()))
    return (together - first * second / pairs) / ((first + second) / 2 - first * second / pairs)


def people_found(chunks, population, k):
    """Adjusted Rand index of three clusters: by the settings that held-out sites choose, by all genotypes; errors."""
    blocks, gram = [PairStats(60) for _ in range(5)], 0
    for number, x in chunks:
        columns, values, coded = mc.few_genotypes(x, k, 0.05, np.random.default_rng((0, number)))
        blocks[number % 5].update(columns, values)
        gram = gram + coded.T @ coded
    (estimator, R), _ = mc.choose_fit(blocks, 3, "rows", 2)
    stats, center = sum(blocks[1:], blocks[0]), np.eye(60) - 1 / 60
    full = mc.top_eigenvectors(torch.from_numpy(center @ gram @ center), 2)[1]
    models = [fit(stats, 3, R, estimator), mc.spectral(stats, 3, mc.SPECTRAL["direct SVD"])]
    bases = [model.components("rows", 2)[1] for model in models]
    index = [adjusted_rand(k_means(Q.numpy(), 3), population) for Q in (bases[0], full)]
    return *index, *(rowspace_error(Q, full) for Q in bases)


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
@pytest.mark.parametrize("k, worst", [(12, 0.15), (20, 0.06)])
def test_linked_genotypes(k, worst):
    """Simulated people, coalescent: the settings chosen by runs of held-out sites find what all genotypes find."""
    with np.load(Path(DATA) / "onesided_mc" / "ooa_genotypes_60.npz") as file:
        x, population = file["genotypes"], np.unique(file["population"], return_inverse=True)[1]
    chosen, full, ours, direct = people_found(enumerate(np.array_split(x, 15)), population, k)
    assert chosen >= full > 0.85 and ours < min(worst, direct), (chosen, full, ours, direct)


def test_unlinked_genotypes():
    """Five genotypes a site; coded 0, 1, 2 direct SVD is off by more than 0.5 (of 4) on as many sites."""
    population = np.arange(60) // 20
    chosen, full, ours, direct = people_found(mc.balding_nichols(40_000, population, 0.1, 0), population, 5)
    assert chosen >= 0.95 and full == 1 and ours < direct < 0.2, (chosen, full, ours, direct)


@pytest.mark.parametrize("name, rank, m, factor", [("breast_cancer", 3, 100_000, 3), ("digits", 4, 200_000, 1.5)])
def test_tables_of_no_rank(name, rank, m, factor):
    """Two entries a row of real tables, which have no rank: V of many columns."""
    x = getattr(pytest.importorskip("sklearn.datasets"), f"load_{name}")().data
    x = x[:, x.std(0) > 0] - x[:, x.std(0) > 0].mean(0)
    x = x / x.std(0) if name == "breast_cancer" else x
    rng, d = np.random.default_rng(0), x.shape[1]
    columns, rows = rng.random((m, d), np.float32).argpartition(1, 1)[:, :2], rng.integers(len(x), size=(m, 1))
    stats, truth = PairStats(d).update(columns, x[rows, columns]), torch.from_numpy(np.linalg.svd(x)[2][:rank].T)
    models = {"likelihood": fit(stats, rank), "paper": fit(stats, rank, estimator="paper")}
    models |= {matrix: mc.spectral(stats, rank, mc.SPECTRAL[matrix]) for matrix in ("direct SVD", "pairwise mean")}
    found = {estimator: error(model, truth) for estimator, model in models.items()}
    print(name, {estimator: round(value, 3) for estimator, value in found.items()})
    assert factor * found["likelihood"] < found["paper"]


def ratings(users=800, films=120, seed=0):
    """As people rate: biases, three tastes, noise, halves of a star; popular films more often; sorted by user."""
    rng = np.random.default_rng(seed)
    often, lengths = rng.lognormal(0, 1, films), rng.geometric(1 / 30, users).clip(8, films // 2)
    user = np.repeat(np.arange(users), lengths)
    film = np.concatenate([rng.choice(films, n, replace=False, p=often / often.sum()) for n in lengths])
    taste = (rng.normal(size=(users, 3))[user] * rng.normal(0, 0.4, (films, 3))[film]).sum(1)
    bias = rng.normal(0, 0.4, users)[user] + rng.normal(0, 0.45, films)[film]
    return user, film, (2 * (3.5 + bias + taste + rng.normal(0, 0.7, len(user)))).round().clip(1, 10) / 2


def bias_model(user, film, value, users=800, films=120, shrink=5):
    """Biases of films and users in turns, each shrunk as by five ratings without bias."""
    of_film, of_user, rest = np.zeros(films), np.zeros(users), value - value.mean()
    for _ in range(20):
        of_film = np.bincount(film, rest - of_user[user], films) / (np.bincount(film, minlength=films) + shrink)
        of_user = np.bincount(user, rest - of_film[film], users) / (np.bincount(user, minlength=users) + shrink)
    return value.mean(), of_film, of_user


def test_ratings(tmp_path, monkeypatch, capsys):
    """`fit --center columns --scores`: hidden ratings are predicted better than by biases of film and user."""
    everything = np.array(ratings())
    hidden = np.random.default_rng(1).random(everything.shape[1]) < 0.2
    (user, film, value), (test_user, test_film, test_value) = everything[:, ~hidden], everything[:, hidden]
    user, film, test_user, test_film = (x.astype(int) for x in (user, film, test_user, test_film))
    write(tmp_path / "r.csv", ["user,film,rating"] + [f"u{u},{f},{v}" for u, f, v in zip(user, film, value)])
    run_here(monkeypatch, tmp_path, "fit", "r.csv", "--center", "columns", "--scores", "s.csv", "--rank", 4, "--quiet")
    with np.load("out/onesided_mc/fit/model.npz") as model, open("s.csv") as file:
        scores = {line[0]: np.array(line[1:], float) for line in list(csv.reader(file))[1:]}
        at = np.array([list(model["columns"]).index(str(f)) for f in test_film])
        means, Q = model["means"][at], model["components"][at]
    mean, of_film, of_user = bias_model(user, film, value)
    guesses = dict(film=means, biases=mean + of_film[test_film] + of_user[test_user],
                   ours=means + (np.array([scores[f"u{u}"] for u in test_user]) * Q).sum(1))
    rmse = {name: round(float(np.mean((guess - test_value) ** 2) ** 0.5), 4) for name, guess in guesses.items()}
    print(rmse)
    assert rmse["ours"] < 0.9 * rmse["biases"] < 0.9 * rmse["film"], rmse


def test_the_left_side_cannot_be_had(tmp_path, monkeypatch, capsys):
    run_here(monkeypatch, tmp_path, "impossible", "--rows", "5000,20000", "--columns", 200, "--quiet")
    rows = json.loads(Path("out/onesided_mc/impossible/results.json").read_text())["rows"]
    assert float(rows[1][1]) < float(rows[0][1]) and rows[0][3] == pytest.approx(0.6, abs=0.03) and rows[1][2] > 0.57


# ==================================================================================== 3. the tool


def run_here(monkeypatch, folder, *args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["onesided_mc.py", *map(str, args)])
    mc.main()


def write(path, lines, mark="\n"):
    path.write_bytes((mark.join(lines) + mark).encode())
    return path


LONG = ["row,column,value", "a,x,1.5", "a,y,2", "b,x,3", "b,z,4"]
SAME = {("a", "x"): 1.5, ("a", "y"): 2.0, ("b", "x"): 3.0, ("b", "z"): 4.0}
BIG = str(2**53 + 1)
READ = {  # name: (bytes, entries)
    "plain": ("\n".join(LONG), SAME),
    "mark": ("\ufeff" + "\n".join(LONG[1:]), SAME),
    "crlf": ("\r\n".join(LONG), SAME),
    "unsorted": ("\n".join(LONG[::2] + LONG[1::2]), SAME),
    "tabs": ("\n".join(LONG).replace(",", "\t"), SAME),
    "semicolons": ("\n".join(LONG).replace(",", ";"), SAME),
    "colons": ("\n".join(line.replace(",", "::") for line in LONG[1:]), SAME),
    "quotes": ("\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in LONG), SAME),
    "first is missing": ("1,5,N/A\n1,6,2\n2,5,3", {("1", "6"): 2.0, ("2", "5"): 3.0}),
    "fourth field": ("\n".join(line + ",964982703" for line in LONG), SAME),
    "comma in a title": ('u,film,stars\n1,"Good, the",3\n1,M,4\n2,M,5',
                         {("1", "Good, the"): 3.0, ("1", "M"): 4.0, ("2", "M"): 5.0}),
    "ids": (f"r,c,v\n{BIG},x,1\n{2**53},x,2\n{BIG},y,3",
            {(BIG, "x"): 1.0, (str(2**53), "x"): 2.0, (BIG, "y"): 3.0}),
    "wide": ("id,x,y,z\na,1.5,2,\nb,3,NA,4", SAME),
    "wide, semicolons": ("name;x;y;z\na;1.5;2;.\nb;3;;4\n", SAME),
    "wide, no labels": ("x,y,z\n1,2,\n3,,4", {("1", "x"): 1.0, ("1", "y"): 2.0, ("2", "x"): 3.0, ("2", "z"): 4.0}),
    "wide, numbered": ("userId,x,y,z\n7,1,2,\n9,3,,4",
                       {("7", "x"): 1.0, ("7", "y"): 2.0, ("9", "x"): 3.0, ("9", "z"): 4.0}),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_people_have(name, zipped, tmp_path, capsys):
    text, want = READ[name]
    (tmp_path / "f").write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    row, column, value, rows, columns = mc.read_entries(tmp_path / "f")
    assert {(rows[r], columns[c]): v for r, c, v in zip(row, column, value)} == want and (np.diff(row) >= 0).all()
    said = capsys.readouterr().out
    missing = 2 if name.startswith("wide") else int("missing" in name)
    assert f"{len(want)} entries, {missing} missing" in said and ("wide:" in said) == name.startswith("wide")


REFUSED = {  # name: (bytes, words)
    "npz": (b"PK\x03\x04", "zip archive"), "page": (b"\n<!DOCTYPE html>", "web page"),
    "utf16": ("a,b".encode("utf-16"), "UTF-16"), "latin": ("é,b,c".encode("latin-1"), "not UTF-8"),
    "two fields": (b"a,b\nc,d", "2 fields"), "empty": (b"", "0 fields"),
    "decimal comma": (b"r;c;v\na;x;1,5\na;y;2", "row 'a', column 'x': '1,5' is no number"),
    "word": (b"a,x,1\na,y,two", "column 'y': 'two' is no number"),
    "thousands": (b"a,x,1\na,y,1_000", "'1_000' is no number"),
    "infinite": (b"a,x,1\na,y,inf", "'inf' is no number"),
    "twice": (b"a,x,1\na,y,1\na,x,2", "column 'x': '2' is there twice"),
    "ragged": (b"a,x,1\na,B, the,2", "line 2 has 4 fields"),
    "no names": (b"1,2,3,4,5\n1,2,3,4,5", "no names of columns"),
    "cut": (gzip.compress(b"a,x,1\n" * 99)[:-9], "cut off")}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name, tmp_path):
    raw, words = REFUSED[name]
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(ValueError) as error:
        mc.read_entries(tmp_path / "f")
    assert words in str(error.value), str(error.value)


HEAD = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\ts1\ts2\ts3\n"


def site(*cells, ref="A", alt="G", form="GT"):
    return "\t".join(["1", "9", ".", ref, alt, ".", ".", ".", form, *cells]) + "\n"


def test_vcf(tmp_path, capsys):
    text = HEAD + site("0|0", "0|1", "1|1") + site("./.", "1/0", "0|.") + site("0/1:9", "1:3", ".", form="GT:DP")
    text += site("0|0", "0|1", "1|2", alt="G,T") + site("0|0", "0|1", "1|1", ref="AT")
    (tmp_path / "v.gz").write_bytes(gzip.compress(text.encode()))
    samples, (number, x) = mc.read_vcf(tmp_path / "v.gz")
    assert samples == ["s1", "s2", "s3"] and number == 0
    assert x.tolist() == [[0, 1, 2], [-1, 1, -1], [1, 2, -1]]
    assert "3 SNPs of two alleles, 2 other sites left out" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    ("a,b,c\n", "line 1: want the header"), (HEAD, "no SNP"),
    (HEAD + site("0|0", "0|1"), "line 3: 2 genotypes, 3 samples"),
    (HEAD + site("0|0", "0|1", "0|3"), "line 3: b'0|3'"), (HEAD + site("0|0", "0|1", "0 1"), "line 3: b'0 1'"),
    (HEAD + site("9", "8", "7", form="DP"), "line 3: no genotypes"), (HEAD + "1\t9\t.\tA", "line 3: no genotypes")])
def test_broken_vcf(text, words, tmp_path):
    (tmp_path / "v").write_text(text)
    with pytest.raises(ValueError) as error:
        list(mc.read_vcf(tmp_path / "v"))
    assert words in str(error.value), str(error.value)


def vcf_of(path, sites=2600, people=12):
    chunks = mc.balding_nichols(sites + 512, np.arange(people) // 4, 0.3, 0)
    rows = np.concatenate([x for _, x in chunks])[:sites]
    head = HEAD.replace("s1\ts2\ts3", "\t".join(f"s{i}" for i in range(people)))
    path.write_text(head + "".join(site(*(("0|0", "0|1", "1|1")[g] for g in row)) for row in rows))
    return path


def test_genome_of_a_file(tmp_path, monkeypatch, capsys):
    vcf_of(tmp_path / "v.vcf")
    people = [f"s{i}\tx\t{'ABC'[i // 4]}\tmale" for i in range(12)]
    write(tmp_path / "p.panel", ["sample\tpop\tsuper_pop\tgender\t\t", *people])
    for panel in [], ["--panel", "p.panel"]:
        run_here(monkeypatch, tmp_path, "genome", "--data", "v.vcf", "--k", 6, "--quiet", *panel)
        with open("out/onesided_mc/genome/people.csv") as file:
            header, *lines = csv.reader(file)
        assert header == ["sample", "population", "PC1", "PC2"]
        assert [line[0] for line in lines] == [f"s{i}" for i in range(12)]
        assert [line[1] for line in lines] == (list("AAAABBBBCCCC") if panel else ["?"] * 12)


def two_ranks(folder, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*command, str(HOUSE / "onesided_mc.py"), *map(str, args), "--out", "two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "two" / "results.json").read_text()), done.stdout


@pytest.mark.parametrize("args", [["--rows", "1000,250000", "--seeds", 1, "--columns", 20],
                                  ["genome", "--data", "v.vcf", "--k", 6]])
def test_two_ranks_are_one(args, tmp_path, monkeypatch, capsys):
    """Two chunks of rows, six of sites; the default run's paths come last."""
    vcf_of(tmp_path / "v.vcf")
    run_here(monkeypatch, tmp_path, *args, "--quiet", "--out", "one")
    said, one = capsys.readouterr().out.split(), json.loads(Path("one/results.json").read_text())
    assert all(Path(path).is_file() for path in said[-1:])
    two, said = two_ranks(tmp_path, *args, "--quiet")
    number = lambda cell: float(str(cell).split(" ")[0] or "nan")
    for row, other in zip(one["rows"], two["rows"]):
        assert number(other[1]) == pytest.approx(number(row[1]), rel=0.02, abs=2e-4), row
        assert number(other[2]) == pytest.approx(number(row[2]), rel=0.02, abs=2e-4, nan_ok=True), row
    assert said.count("2,600 SNPs") == said.count("2,600 sites,") == ("genome" in args)


def test_fit_of_a_table(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 6)) + 100
    lines = [",".join("" if rng.random() < 0.4 else f"{v:.6f}" for v in row) for row in x]
    write(tmp_path / "t.csv", ["a,b,c,d,e,f,rare"] + [line + (",1" if i < 5 else ",") for i, line in enumerate(lines)])
    run_here(monkeypatch, tmp_path, "fit", "t.csv", "--center", "columns", "--quiet")
    said = capsys.readouterr().out
    assert "1 columns with fewer than 10 entries" in said and "rank 2 by held-out rows" in said
    with np.load("out/onesided_mc/fit/model.npz") as model:
        truth = torch.from_numpy(np.linalg.svd(x - x.mean(0))[2][:2].T)
        assert rowspace_error(torch.from_numpy(model["components"]), truth) < 0.01
        assert model["columns"].tolist() == list("abcdef")
    command = [sys.executable, HOUSE / "onesided_mc.py", "fit", "no.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.csv" in done.stderr


@pytest.mark.parametrize("args, words", [
    (["--seeds", "0"], "--seeds 0"), (["robust", "--seeds", "-1"], "--seeds -1"),
    (["--k", "1"], "k in 2"), (["--rank", "60"], "--rank 60"), (["--rows", "10"], "100 rows"),
    (["--rows", "a"], "row_counts"), (["--center", "rows"], "--center"), (["--device", "tpu"], "tpu"),
    (["robust", "--rows", "500,600"], "one number of rows"), (["genome", "--fst", "1"], "--fst"),
    (["genome", "--populations", "20", "--people", "10"], "two people"), (["genome", "--k", "70"], "--k 70"),
    (["genome", "--data", "none.vcf"], "none.vcf"), (["fit"], "file"),
    (["fit", "parts.csv", "--least", "1"], "no row links column 'z'"), (["fit", "parts.csv"], "0 columns have 10"),
    (["fit", "zero.csv", "--least", "1", "--rank", "1"], "every value is zero"),
    (["fit", "parts.csv", "--center", "rows", "--scores", "s"], "--scores goes with"),
    (["fit", "wide.csv", "--least", "1"], "raise --least")])
def test_mistakes_end_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    write(tmp_path / "parts.csv", ["a,x,1", "a,y,2", "b,z,3", "b,w,4"])
    write(tmp_path / "zero.csv", ["a,x,0", "a,y,0", "a,z,0", "b,x,0"])
    write(tmp_path / "wide.csv", [f"{i % 9},{i},1" for i in range(10_001)])
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, tmp_path, *args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said, said
