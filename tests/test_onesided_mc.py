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


def shown(V, m, k=2, seed=0, noise_sd=0.0):
    """Columns and values of the paper's rows."""
    return [torch.cat(x) for x in list(zip(*mc.low_rank_rows(V, m, k, seed, noise_sd)))[1:]]


def blocks_of(rows, d, n=5):
    return [PairStats(d).update(*(x[i::n] for x in rows)) for i in range(n)]


def two_a_row(m, noise_sd=0.0):
    """PairStats of the paper's rows, and the true row space."""
    V = mc.right_factor(50, 3, 0)
    return PairStats(50).update(*shown(V, m, noise_sd=noise_sd)), torch.linalg.qr(V.double())[0]


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """tool("fit", …): the command in this process and an empty folder → what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["onesided_mc.py", *map(str, args)])
        mc.main()
        return capsys.readouterr().out

    return run


def write(name, lines):
    Path(name).write_text("\n".join(lines))


HEAD = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\ts0\ts1\ts2"


def site(*cells, ref="A", alt="G", form="GT"):
    return "\n" + "\t".join(["1", "9", ".", ref, alt, ".", ".", ".", form, *cells])


def write_vcf(genotypes, population):
    """v.vcf of the people s0, s1, …, and p.panel of their populations, as 1000 Genomes writes it."""
    head, people = HEAD.removesuffix("s0\ts1\ts2"), [f"s{i}" for i in range(len(population))]
    write("v.vcf", [head + "\t".join(people) + "".join(site(*np.array(["0|0", "0|1", "1|1"])[x]) for x in genotypes)])
    write("p.panel", ["sample\tpop\tsuper_pop\tgender\t\t", *map("{}\tx\t{}\tmale".format, people, population)])


def error(model, truth, *center):
    return rowspace_error(model.components(*center)[1], truth)


# ==================================================================================== 1. the mathematics


def test_sums_are_matrix_products():
    """Any split of the rows, any order of a row's entries."""
    x, seen, columns = ragged()
    means = np.random.default_rng(1).normal(size=12)
    centred = np.where(seen, x - means, 0)
    dense = torch.from_numpy(np.stack([centred.T @ centred, seen.T.astype(float) @ seen, (centred**2).T @ seen]))
    order = np.random.default_rng(2).permuted(np.arange(12)[None].repeat(300, 0), axis=1)
    columns, values = (np.take_along_axis(table, order, 1) for table in (columns, np.where(seen, x, np.nan)))
    parts = [PairStats(12, means).update(columns[i::7], values[i::7]) for i in range(7)]
    total = sum(parts[1:], parts[0])
    torch.testing.assert_close(total.table, dense, rtol=1e-12, atol=1e-10)
    assert torch.equal(total.table[1], dense[1])  # counts to the bit
    torch.testing.assert_close((total - parts[0]).table, sum(parts[2:], parts[1]).table, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns, last", [([0, 3], 4), ([2, 2], 4), ([-2, 1], 4), ([1, 2], np.inf)])
def test_update_names_the_row(columns, last):
    with pytest.raises(ValueError, match="row 1 "):
        PairStats(3).update([[0, 1], columns], [[1, 2], [3, last]])


def squares_by_hand(theta, x, seen):
    """Equation 2: the ordered pairs of all rows count 1 in all, and so do the squares."""
    both, same = seen[:, :, None] & seen[:, None], torch.eye(5, dtype=torch.bool)
    squares = (theta - x[:, :, None] * x[:, None]) ** 2
    return squares[both & ~same].mean() + squares[both & same].mean()


def likelihood_by_hand(theta, x, seen):
    """−2·log density of each two entries of a row, the mean."""
    terms = []
    for two in torch.combinations(torch.arange(5)):
        density = torch.distributions.MultivariateNormal(torch.zeros(2).double(), theta[two][:, two])
        terms.append(-2 * density.log_prob(x[seen[:, two].all(1)][:, two]))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("loss, by_hand", [(mc.squared_loss, squares_by_hand),
                                           (mc.pair_likelihood, likelihood_by_hand)])
def test_losses_row_by_row(loss, by_hand):
    """Up to a constant the loss is the one by hand, and its gradient autograd's."""
    x, seen, columns = ragged(40, 5)
    table, gaps = PairStats(5).update(columns, x).table, []
    for L in torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0)).double():
        theta = (L @ L.T + torch.eye(5)).requires_grad_()
        want = by_hand(theta, torch.from_numpy(x), torch.from_numpy(seen))
        want.backward()
        value, gradient = loss(theta.detach(), table)
        torch.testing.assert_close(gradient + gradient.T, theta.grad + theta.grad.T)
        gaps.append(float(value - want.detach()))
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-8)


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
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_everything_seen(estimator, scale):
    """Rows of rank 2, all entries: the row space is that of X, whatever the loss and the unit."""
    rng = np.random.default_rng(0)
    x = scale * rng.normal(size=(500, 2)) @ rng.normal(size=(2, 6))
    model = fit(PairStats(6).update(np.arange(6)[None].repeat(500, 0), x), 2, estimator=estimator)
    _, s, Vt = torch.linalg.svd(torch.from_numpy(x))
    assert model.converged and error(model, Vt[:2].T) < 5e-4
    torch.testing.assert_close(model.components()[0], s[:2] ** 2 / 500, rtol=2e-2, atol=0.0)


def test_unseen_pairs_are_filled_in():
    """Exact second moments at 60 % of the pairs: the paper's estimator finds the others."""
    V, stats = mc.right_factor(15, 2, 0).double(), PairStats(15)
    seen = torch.rand(15, 15, generator=torch.Generator().manual_seed(0)) < 0.35
    seen = (seen | seen.T).fill_diagonal_(True).double()
    stats.table[:] = torch.stack([V @ V.T * seen, seen, seen])
    found = fit(stats, 2, estimator="paper").V
    assert float((found @ found.T - V @ V.T).abs().max()) < 1e-4


def test_rowspace_error_is_procrustes():
    """Two planes at angles of .3 and 1: (2·sin of half the angle)² each, in any basis of either."""
    angles, (turn, back) = torch.tensor([0.3, 1.0]).double(), torch.linalg.qr(torch.randn(2, 2, 2).double())[0]
    A, B = torch.eye(4, 2).double(), torch.cat([angles.cos().diag(), angles.sin().diag()])
    assert rowspace_error(A @ turn, B @ back) == pytest.approx(float((4 * (angles / 2).sin() ** 2).sum()))


def test_row_centring_and_transform():
    x, seen, columns = ragged(2000, 6)
    model, center = fit(PairStats(6, x.mean(0)).update(columns, x), 2), torch.eye(6).double() - 1 / 6
    values, Q = torch.linalg.eigh(center @ model.V @ model.V.T @ center)
    torch.testing.assert_close(model.components("rows")[0], values.flip(0)[:2])
    assert error(model, Q[:, -2:], "rows") < 1e-9
    values, Q = model.components()
    low_rank = (Q * values @ Q.T).numpy()
    covariance = low_rank + model.residual_variance * np.eye(6)
    for row, shown, ours in zip(x[:50], seen, model.transform(columns[:50], x[:50])[1]):  # the conditional mean
        weights = low_rank[:, shown] @ np.linalg.inv(covariance[np.ix_(shown, shown)])
        np.testing.assert_allclose(ours, x.mean(0) + weights @ (row - x.mean(0))[shown], atol=1e-7)


@pytest.mark.parametrize("k", [2, 8])
def test_standard_error_of_held_out_differences(k):
    """Rows are independent, their pairs are not: the error must hold at k = 8 too."""
    V, draws = mc.right_factor(10, 2, 0), []
    one, two = (mc.Model(PairStats(10), V.double()[:, :n], n) for n in (1, 2))
    for seed in range(120):
        blocks = blocks_of(shown(V, 500, k, seed, 1.0), 10)
        gain = torch.stack([mc.pair_fit(two, block)[1] - mc.pair_fit(one, block)[0] for block in blocks])
        draws.append((float(gain.mean()), float(mc.block_error(gain)) ** 2))
    means, squares = np.array(draws).T
    assert np.mean(squares) ** 0.5 == pytest.approx(np.std(means), rel=0.25)


def test_completion_is_a_minimum():
    """L-BFGS on V alone, from another start, ends in the same space."""
    columns, values = shown(mc.right_factor(8, 2, 0), 200, 3)
    x, ridge = values.double(), 0.2 * values.double().square().mean()
    V = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    optimizer = torch.optim.LBFGS([V], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        L = V[columns]
        U = torch.linalg.solve(L.mT @ L + 3 * ridge * torch.eye(2), L.mT @ x[..., None])  # the best U for this V
        value = (x - (L @ U)[..., 0]).square().mean() + ridge * (U.square().sum() / 200 + V.square().sum() / 8)
        optimizer.zero_grad()
        value.backward()
        return value

    optimizer.step(loss)
    ours = mc.complete(columns, values, 8, 2, [0.2], steps=300)[0]
    assert rowspace_error(ours, torch.linalg.qr(V.detach())[0]) < 1e-9


# ==================================================================================== 2. the claims in miniature


def test_case_file():
    """4,000 rows, two entries each: the likelihood is nearer than the paper, which beats the spectral baselines."""
    stats, truth = two_a_row(4000)
    ours, paper = error(fit(stats, 3), truth), error(fit(stats, 3, estimator="paper"), truth)
    spectral = {name: error(mc.spectral(stats, 3, matrix), truth) for name, matrix in mc.SPECTRAL.items()}
    assert 3 * ours < paper < min(spectral.values()) and spectral["direct SVD"] > 2, (ours, paper, spectral)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(fit(stats, 3), truth) == pytest.approx(ours, abs=1e-6)
    stats, _ = two_a_row(16_000)
    assert error(fit(stats, 3), truth) < ours / 2  # as one over rows
    assert error(fit(stats, 3, estimator="paper"), truth) < paper / 2


def test_noise():
    """σ² by the likelihood with V of r columns; the rest beyond r where V has more; positive without noise."""
    stats, truth = two_a_row(50_000, 1.0)
    wide, narrow = fit(stats, 3), fit(stats, 3, 3)
    assert narrow.noise_variance == pytest.approx(1, abs=0.1) and wide.residual_variance == pytest.approx(1, abs=0.1)
    assert error(wide, truth) < error(fit(stats, 3, estimator="paper"), truth) / 1.5
    assert 0 < fit(two_a_row(4000)[0], 3).noise_variance < 0.05


@pytest.mark.parametrize("size", [1, 10])
def test_means_come_off_first(size):
    """Column means of 1 and 10 times the spread: the row space is as near as without them."""
    V, means = mc.right_factor(30, 3, 0), size * torch.randn(30, generator=torch.Generator().manual_seed(0))
    columns, values = shown(V, 30_000, 4)
    values = values + means[columns]
    seen = np.bincount(columns.flatten(), values.flatten()) / np.bincount(columns.flatten())
    assert error(fit(PairStats(30, seen).update(columns, values), 3), torch.linalg.qr(V.double())[0]) < 0.005


@pytest.mark.parametrize("d, rank, k, noise_sd, want, bound", [
    (30, 3, 2, 0.0, (2, 3), False), (30, 12, 6, 0.5, (11, 12), False), (4, 4, 3, 0.0, (4,), True)])
def test_rank_by_held_out_rows(d, rank, k, noise_sd, want, bound):
    """Rank 12: V of 4 columns must double twice. At rank d there is no rank, and that is said."""
    blocks = blocks_of(shown(mc.right_factor(d, rank, 0), 30_000, k, noise_sd=noise_sd), d)
    found, at_bound = mc.choose_rank(blocks, fit_rank=4)
    assert found in want and at_bound == bound


def genome(tool, *args):
    """`genome` → the error of the settings that it chooses, that of direct SVD, and the adjusted Rand index of three
    clusters of people.csv: pairs of people that are together, 0 by chance (k-means, from three people far apart on)."""
    tool("genome", *args)
    rows = json.loads(Path("out/onesided_mc/genome/results.json").read_text())["rows"]
    with open("out/onesided_mc/genome/people.csv") as file:
        _, *people = csv.reader(file)
    points = np.array([line[2:] for line in people], float)
    population, centres = np.unique([line[1] for line in people], return_inverse=True)[1], points[:1]
    apart = lambda: ((points[:, None] - centres) ** 2).sum(2)  # (people, centres)
    for _ in range(2):
        centres = np.concatenate([centres, points[[apart().min(1).argmax()]]])
    for _ in range(50):
        label = apart().argmin(1)
        centres = np.stack([points[label == j].mean(0) for j in range(3)])
    a, b = ((x[:, None] == x)[np.triu_indices(60, 1)] for x in (label, population))
    rand = ((a & b).mean() - a.mean() * b.mean()) / ((a.mean() + b.mean()) / 2 - a.mean() * b.mean())
    return next(row[1] for row in rows if "chosen" in row[3]), dict(row[:2] for row in rows)["direct SVD"], rand


@pytest.mark.skipif(not DATA, reason="NANOPAPERS_TEST_DATA is not set")
@pytest.mark.parametrize("k, worst", [(12, 0.085), (20, 0.04)])
def test_linked_genotypes(k, worst, tool):
    """Simulated people, coalescent: the settings chosen by runs of held-out sites find what all genotypes find."""
    with np.load(Path(DATA) / "onesided_mc" / "ooa_genotypes_60.npz") as file:
        write_vcf(file["genotypes"], file["population"])
    ours, direct, rand = genome(tool, "--data", "v.vcf", "--panel", "p.panel", "--k", k)
    assert rand > 0.9 and ours < min(worst, direct), (ours, direct, rand)  # all genotypes: .902


def test_unlinked_genotypes(tool):
    """Five genotypes a site; coded 0, 1, 2 direct SVD is off by more than 0.5 (of 4) on as many sites."""
    ours, direct, rand = genome(tool, "--sites", 40_000)
    assert rand == 1 and ours < direct < 0.2, (ours, direct, rand)


@pytest.mark.parametrize("name, rank, m, factor", [("breast_cancer", 3, 100_000, 3), ("digits", 4, 200_000, 1.5)])
def test_tables_of_no_rank(name, rank, m, factor):
    """Two entries a row of real tables, which have no rank: V of many columns."""
    x = getattr(pytest.importorskip("sklearn.datasets"), f"load_{name}")().data
    x = x[:, x.std(0) > 0] - x[:, x.std(0) > 0].mean(0)
    x = x / x.std(0) if name == "breast_cancer" else x
    rng, d = np.random.default_rng(0), x.shape[1]
    columns, rows = rng.random((m, d), np.float32).argpartition(1, 1)[:, :2], rng.integers(len(x), size=(m, 1))
    stats, truth = PairStats(d).update(columns, x[rows, columns]), torch.from_numpy(np.linalg.svd(x)[2][:rank].T)
    ours, paper = (error(fit(stats, rank, estimator=estimator), truth) for estimator in ("likelihood", "paper"))
    mean = error(mc.spectral(stats, rank, mc.SPECTRAL["pairwise mean"]), truth)
    print(f"{name}: likelihood {ours:.3f}, paper {paper:.3f}, pairwise mean {mean:.3f}")
    assert factor * ours < paper


def ratings(users=800, films=120, seed=0):
    """As people rate: biases, three tastes, noise, halves of a star; popular films more often; sorted by user."""
    rng = np.random.default_rng(seed)
    often, lengths = rng.lognormal(0, 1, films), rng.geometric(1 / 30, users).clip(8, films // 2)
    user = np.repeat(np.arange(users), lengths)
    film = np.concatenate([rng.choice(films, n, replace=False, p=often / often.sum()) for n in lengths])
    taste = (rng.normal(size=(users, 3))[user] * rng.normal(0, 0.4, (films, 3))[film]).sum(1)
    bias = rng.normal(0, 0.4, users)[user] + rng.normal(0, 0.45, films)[film]
    return user, film, (2 * (3.5 + bias + taste + rng.normal(0, 0.7, len(user)))).round().clip(1, 10) / 2


def bias_model(user, film, value):
    """Biases of users and films by a ridge of five ratings, solved at once."""
    A = np.hstack([np.eye(800)[user], np.eye(120)[film]])
    biases = np.linalg.solve(A.T @ A + 5 * np.eye(920), A.T @ (value - value.mean()))
    return lambda user, film: value.mean() + biases[user] + biases[800 + film]


def test_ratings(tool):
    """`fit --center columns --scores`: hidden ratings are predicted better than by biases of film and user."""
    user, film, value = ratings()
    hidden = np.random.default_rng(1).random(len(user)) < 0.2
    seen, (user, film, value) = [x[~hidden] for x in (user, film, value)], [x[hidden] for x in (user, film, value)]
    write("r.csv", ["user,film,rating"] + [f"{u},{f},{v}" for u, f, v in zip(*seen)])
    tool("fit", "r.csv", "--center", "columns", "--scores", "s.csv", "--rank", 4)
    label, *scores = np.loadtxt("s.csv", delimiter=",", skiprows=1).T
    with np.load("out/onesided_mc/fit/model.npz") as model:
        at = model["columns"].astype(int).argsort()[film]
        guesses = dict(film=model["means"][at], biases=bias_model(*seen)(user, film))
        guesses["ours"] = guesses["film"] + (np.array(scores).T[label.argsort()[user]] * model["components"][at]).sum(1)
    rmse = {name: round(float(np.mean((guess - value) ** 2) ** 0.5), 4) for name, guess in guesses.items()}
    print(rmse)
    assert rmse["ours"] < 0.9 * rmse["biases"] < 0.9 * rmse["film"], rmse


def test_the_left_side_cannot_be_had(tool):
    tool("impossible", "--rows", "5000,20000", "--columns", 200)
    first, last = json.loads(Path("out/onesided_mc/impossible/results.json").read_text())["rows"]
    assert float(last[1]) < float(first[1]) and first[3] == pytest.approx(0.6, abs=0.03) and last[2] > 0.57


# ==================================================================================== 3. the tool


LONG = ["row,column,value", "a,x,1.5", "a,y,2", "b,x,3", "b,z,4"]
SAME, NUMBERED = "a x 1.5, a y 2, b x 3, b z 4", "1 x 1, 1 y 2, 2 x 3, 2 z 4"
BIG = 2**53
READ = {  # name: (text, entries)
    "plain": ("\n".join(LONG), SAME),
    "mark": ("\ufeff" + "\n".join(LONG[1:]), SAME),
    "crlf": ("\r\n".join(LONG), SAME),
    "unsorted": ("\n".join(LONG[::2] + LONG[1::2]), SAME),
    "tabs": ("\n".join(LONG).replace(",", "\t"), SAME),
    "semicolons": ("\n".join(LONG).replace(",", ";"), SAME),
    "colons": ("\n".join(LONG[1:]).replace(",", "::"), SAME),
    "quotes": ("\n".join(LONG).replace(",", '","').replace("\n", '"\n"').join('""'), SAME),
    "first is missing": ("1,5,N/A\n1,6,2\n2,5,3", "1 6 2, 2 5 3"),
    "fourth field": ("\n".join(line + ",964982703" for line in LONG), SAME),
    "comma in a title": ('u,film,stars\n1,"Good, the",3\n1,M,4\n2,M,5', "1 Good, the 3, 1 M 4, 2 M 5"),
    "ids": (f"r,c,v\n{BIG + 1},x,1\n{BIG},x,2\n{BIG + 1},y,3", f"{BIG} x 2, {BIG + 1} x 1, {BIG + 1} y 3"),
    "wide": ("id,x,y,z\na,1.5,2,\nb,3,NA,4", SAME),
    "wide, semicolons": ("name;x;y;z\na;1.5;2;.\nb;3;;4\n", SAME),
    "wide, no labels": ("x,y,z\n1,2,\n3,,4", NUMBERED),
    "wide, numbered": ("userId,x,y,z\n1,1,2,\n2,3,,4", NUMBERED),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_people_have(name, zipped, tmp_path, capsys):
    text, want = READ[name]
    (tmp_path / "f").write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    row, column, value, rows, columns = mc.read_entries(tmp_path / "f")
    got = [f"{rows[r]} {columns[c]} {v:g}" for r, c, v in zip(row, column, value)]
    assert ", ".join(sorted(got)) == want and (np.diff(row) >= 0).all()
    said = capsys.readouterr().out
    missing = 2 if name.startswith("wide") else int("missing" in name)
    assert f"{len(got)} entries, {missing} missing" in said and ("wide:" in said) == name.startswith("wide")


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


def test_vcf(tmp_path, capsys):
    text = HEAD + site("0|0", "0|1", "1|1") + site("./.", "1/0", "0|.") + site("0/1:9", "1:3", ".", form="GT:DP")
    text += site("0|0", "0|1", "1|2", alt="G,T") + site("0|0", "0|1", "1|1", ref="AT")
    (tmp_path / "v.gz").write_bytes(gzip.compress(text.encode()))
    samples, (number, x) = mc.read_vcf(tmp_path / "v.gz")
    assert samples == ["s0", "s1", "s2"] and number == 0
    assert x.tolist() == [[0, 1, 2], [-1, 1, -1], [1, 2, -1]]
    assert "3 SNPs of two alleles, 2 other sites left out" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    ("a,b,c\n", "line 1: want the header"), (HEAD, "no SNP"),
    (HEAD + site("0|0", "0|1"), "line 3: 2 genotypes, 3 samples"),
    (HEAD + site("0|0", "0|1", "0|3"), "line 3: b'0|3'"), (HEAD + site("0|0", "0|1", "0 1"), "line 3: b'0 1'"),
    (HEAD + site("9", "8", "7", form="DP"), "line 3: no genotypes"), (HEAD + "\n1\t9\t.\tA", "line 3: no genotypes")])
def test_broken_vcf(text, words, tmp_path):
    (tmp_path / "v").write_text(text)
    with pytest.raises(ValueError) as error:
        list(mc.read_vcf(tmp_path / "v"))
    assert words in str(error.value), str(error.value)


def twice(tool, *args):
    """The rows of results.json by this process, by two ranks, and what the two print."""
    tool(*args, "--out", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [HOUSE / "onesided_mc.py", *map(str, args), "--out", "two"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return *(json.loads(Path(name, "results.json").read_text())["rows"] for name in ("one", "two")), done.stdout


def test_the_default_and_two_ranks(tool):
    """Two chunks of rows; the sums, so the errors, are those of one rank."""
    one, two, said = twice(tool, "--rows", "1000,250000", "--seeds", 1, "--columns", 20)
    assert Path("one/one.png").is_file() and said.count("results.json") == 1
    for row, other in zip(one, two, strict=True):
        want = [float(cell or "nan") for cell in row[1:3]]
        assert [float(cell or "nan") for cell in other[1:3]] == pytest.approx(want, rel=0.02, abs=2e-4, nan_ok=True)


def test_genome_of_a_file(tool):
    """2,600 sites, twelve people; six chunks of sites for two ranks."""
    chunks = mc.balding_nichols(3112, np.arange(12) // 4, 0.3, 0)
    write_vcf(np.concatenate([x for _, x in chunks])[:2600], "AAAABBBBCCCC")
    said = tool("genome", "--data", "v.vcf", "--k", 6, "--out", "none")
    one, two, _ = twice(tool, "genome", "--data", "v.vcf", "--k", 6, "--panel", "p.panel")
    assert "2,600 SNPs" in said and "sites have a minor allele frequency of 0.05 or more" in said
    for folder, labels in ("none", "?" * 12), ("one", "AAAABBBBCCCC"), ("two", "AAAABBBBCCCC"):
        with open(Path(folder, "people.csv")) as file:
            people = list(csv.reader(file))
        assert people[0] == ["sample", "population", "PC1", "PC2"] and people[12][0] == "s11"
        assert "".join(line[1] for line in people[1:]) == labels
    for row, other in zip(one, two):
        assert other[1:3] == pytest.approx(row[1:3], rel=0.02, abs=2e-4)


def test_fit_of_a_table(tool):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)) @ rng.normal(size=(2, 6)) + 100
    lines = [",".join("" if rng.random() < 0.4 else f"{v:.6f}" for v in row) for row in x]
    write("t.csv", ["a,b,c,d,e,f,rare"] + [line + ",1" * (i < 5) + "," * (i >= 5) for i, line in enumerate(lines)])
    said = tool("fit", "t.csv", "--center", "columns")
    assert "1 columns with fewer than 10 entries" in said and "rank 2 by held-out rows" in said
    with np.load("out/onesided_mc/fit/model.npz") as model:
        truth = torch.from_numpy(np.linalg.svd(x - x.mean(0))[2][:2].T)
        assert rowspace_error(torch.from_numpy(model["components"]), truth) < 0.01
        assert model["columns"].tolist() == list("abcdef")


@pytest.mark.parametrize("args, words", [
    (["--seeds", "0"], "--seeds 0"), (["robust", "--seeds", "-1"], "--seeds -1"),
    (["--k", "1"], "k in 2"), (["--rank", "60"], "--rank 60"), (["--rows", "10"], "100 rows"),
    (["--rows", "a"], "row_counts"), (["--center", "rows"], "--center"), (["--device", "tpu"], "tpu"),
    (["robust", "--rows", "500,600"], "one number of rows"), (["genome", "--k", "70"], "--k 70"),
    (["genome", "--sites", "2000", "--quiet"], "2,560 sites"),
    (["genome", "--data", "v.vcf", "--panel", "empty"], "of 's0'"),
    (["genome", "--data", "none.vcf"], "none.vcf"), (["fit"], "file"), (["fit", "no.csv"], "no.csv"),
    (["fit", "parts.csv", "--least", "1"], "no row links column 'z'"), (["fit", "parts.csv"], "0 columns have 10"),
    (["fit", "zero.csv", "--least", "1", "--rank", "1"], "every value is zero"),
    (["fit", "few.csv"], "49 rows show a pair"), (["fit", "torn.csv", "--least", "1"], "without a fifth of the rows"),
    (["fit", "parts.csv", "--center", "rows", "--scores", "s"], "--scores goes with"),
    (["fit", "wide.csv", "--least", "1"], "raise --least")])
def test_mistakes_end_in_one_line(args, words, tool, capsys):
    write_vcf([[0, 1, 2]], "AAB")
    write("empty", [])
    write("parts.csv", ["a,x,1", "a,y,2", "b,z,3", "b,w,4"])
    write("zero.csv", ["a,x,0", "a,y,0", "a,z,0", "b,x,0"])
    few = [f"{i},{column},{i % 7}" for i in range(49) for column in "xyz"]
    write("few.csv", few)
    write("torn.csv", [*few, "49,x,1", "49,w,2"])  # one row alone links w
    write("wide.csv", [f"{i % 9},{i},1" for i in range(10_001)])
    with pytest.raises(SystemExit) as stop:
        tool(*args)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said, said
