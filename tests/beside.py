"""Beside what you would use otherwise: one ratio for each file, both sides measured in one run.

    python -m pip install pandas scipy statsmodels pytorch_optimizer    (only for this; what is not there is left out)
    python tests/beside.py [FILE …]

One thread, CPU seconds, the least of several tries. Where the other side wins, the ratio says so.
"""

import contextlib
import csv
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def seconds(call, tries=5):
    """CPU seconds of the fastest of several calls."""
    taken = []
    for _ in range(tries):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def say(what, ours, other, unit="s"):
    print(f"{what}: ours {ours:.3g} {unit}, theirs {other:.3g} {unit}: {ours / other:.3g} times theirs", flush=True)


def sophia():
    """An optimizer's step over the tensors of GPT-2 (124M)."""
    import sophia as file

    params = list(file.GPT(*file.SIZES["gpt2"][:4], 50257).parameters())
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    ours = seconds(file.Sophia(params).step)
    say("Sophia's step, torch's fused AdamW's", ours, seconds(torch.optim.AdamW(params, fused=True).step))
    from pytorch_optimizer import SophiaH

    h, other = [torch.rand_like(p) for p in params], SophiaH(params, lr=6e-4)
    other.step(hessian=h)  # the next nine steps have no refresh
    say("Sophia's step, pytorch_optimizer's SophiaH's", ours, seconds(other.step))


def spsa_distributed():
    """The passes over 10M weights of a step (two probes and the update), the loss aside."""
    import spsa_distributed as file

    class Nothing:
        run, seed, model = file.RUN, 0, torch.nn.Linear(10_000, 1000, bias=False)
        loss_of = staticmethod(lambda machine, step: 0.5)

    mezo, ours = file.mezo(Nothing), file.spsa(Nothing)
    theirs = seconds(lambda: next(mezo))
    say("a step's noise, one machine and MeZO's idiom", seconds(lambda: next(ours)), theirs)
    gaussian = type("Gaussian", (Nothing,), dict(run=file.RUN | dict(noise="gaussian")))
    say("the same with Gaussian noise", seconds(lambda: next(file.spsa(gaussian)), 2), theirs)


def onesided_mc():
    """Row-space error (0 to 6) at 12,000 rows of rank 3 that show 2 of 50 columns; seeds 0 to 2."""
    import pandas as pd

    import onesided_mc as file

    errors = []
    for seed in range(3):
        V = file.right_factor(50, 3, seed)
        _, columns, values = (torch.cat(x) for x in zip(*file.low_rank_rows(V, 12_000, 2, seed)))
        truth = torch.linalg.qr(V.double())[0]
        table = torch.full((12_000, 50), math.nan, dtype=torch.float64).scatter_(1, columns, values.double())
        error = lambda matrix, truth=truth: file.rowspace_error(torch.linalg.eigh(matrix)[1][:, -3:], truth)
        covariance = torch.tensor(pd.DataFrame(table.numpy()).cov().fillna(0).values)
        X, seen = table.nan_to_num(), table.isfinite()
        softened = []
        for threshold in (0.5, 1, 2, 4, 8, 16):  # soft-impute (Mazumder et al. 2010), the best of six with the truth
            Z = torch.zeros_like(X)
            for _ in range(100):
                U, s, Vt = torch.linalg.svd(torch.where(seen, X, Z), full_matrices=False)
                Z = (U * (s - threshold).clamp(min=0)) @ Vt
            softened.append(error(Z.T @ Z))
        model = file.fit(file.PairStats(50).update(columns, values), 3)
        errors.append([file.rowspace_error(model.components()[1], truth), error(covariance), min(softened)])
    ours, pandas, softened = np.mean(errors, 0)
    say("row-space error, the likelihood of pairs and pandas' cov()", ours, pandas, "of 6")
    say("the same and soft-impute", ours, softened, "of 6")


def ecosystem():
    """Reading 100,000 people and 20 models, who answer in words, and the headline: read, count, expect, test."""
    import pandas as pd
    from scipy.stats import binom

    import ecosystem as file

    rng, words = np.random.default_rng(0), np.array("cat dog horse bird fish".split())
    label = rng.integers(5, size=(100_000, 1))
    wrong = rng.random((100_000, 21)) < np.r_[0, np.full(20, 0.3)]
    answers = words[np.where(wrong, rng.integers(5, size=(100_000, 21)), label)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        with open(path, "w", newline="") as out:
            csv.writer(out).writerows([["label", *(f"m{i}" for i in range(20))], *answers])

        def theirs():
            table = pd.read_csv(path)
            failed = table.drop(columns="label").ne(table.label, axis=0).to_numpy()
            expected, observed = failed.mean(0).prod(), failed.all(1).sum()
            return observed, expected, binom.sf(observed - 1, len(failed), expected)

        def ours():
            with contextlib.redirect_stdout(None):
                table = file.read_outcomes(path, file.load_columns(path))
            profiles, counts = file.outcome_profiles(table.failed[-1])
            return [file.homogeneity(profiles, counts, kind) for kind in file.KINDS]

        say("a table of words; pandas with scipy, one rate without interval", seconds(ours, 2), seconds(theirs, 2))


def review_consistency():
    """Variances of papers, reviewers and opinions from 720 reviews, by maximum likelihood."""
    import pandas as pd
    from statsmodels.regression.mixed_linear_model import MixedLM

    import review_consistency as file

    rng = np.random.default_rng(0)
    paper, reviewer = np.repeat(np.arange(240), 3), rng.permutation(np.repeat(np.arange(120), 6))
    y = 5 + rng.normal(0, 1.1, 240)[paper] + rng.normal(0, 0.5, 120)[reviewer] + rng.normal(0, 1.1, 720)
    index = [torch.as_tensor(x) for x in (paper, reviewer)]
    fit = lambda: file.calibrate(index, torch.as_tensor(y), generator=torch.Generator().manual_seed(0))
    table = pd.DataFrame(dict(y=y, paper=paper, reviewer=reviewer, all=1))
    parts = dict(paper="0 + C(paper)", reviewer="0 + C(reviewer)")
    other = lambda: MixedLM.from_formula("y ~ 1", table, groups="all", vc_formula=parts, re_formula="0").fit(reml=False)
    print("variances of paper, reviewer, opinion: ours", [round(x, 4) for x in fit()[0].tolist()], "statsmodels",
          [round(float(x), 4) for x in (*other().vcomp, other().scale)])
    say("calibration of 720 reviews, ours and statsmodels' MixedLM", seconds(fit, 3), seconds(other, 2))


def lost_in_middle():
    """Seven positions, 100 questions, no effect: how often does a test see one at 5 %?"""
    from scipy.stats import binomtest

    import lost_in_middle as file

    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        right = rng.random((100, 7)) < rng.beta(2, 2, (100, 1))  # (question, position)
        means = right.mean(0)
        best, worst = right[:, means.argmax()], right[:, means.argmin()]
        apart = int((best & ~worst).sum()), int((best != worst).sum())
        found.append((file.flat_p(right) < 0.05, apart[1] and binomtest(*apart).pvalue < 0.05))
    say("false alarms of flat_p, and of McNemar's test of best against worst", *np.mean(found, 0), "of 1")


def neqa():
    """Six models of one accuracy, 100 questions each: how often does the curve get a name?"""
    import neqa as file

    rng = np.random.default_rng(0)
    tables = rng.binomial(100, 0.5, (400, 6)) / 100
    ours = np.mean([file.shape(y, 100) != "flat" for y in tables])
    naive = np.mean([np.ptp(y) > 1.96 * 0.05 * 2**0.5 for y in tables])  # 0.05: the standard error of each
    say("false names by shape, and by a z-test of highest against lowest", ours, naive, "of 1")


def anticipation():
    """Reading MIDI files: of the folder midi/ of NANOPAPERS_TEST_DATA's anticipation/, else made ones."""
    from test_anticipation import obvious, random_file

    import anticipation as file

    with tempfile.TemporaryDirectory() as folder:
        data = os.environ.get("NANOPAPERS_TEST_DATA", "")
        paths = sorted(Path(data, "anticipation/midi").glob("*.mid"))[:20] if data else []
        for seed in range(0 if paths else 10):
            paths.append(Path(folder) / f"{seed}.mid")
            random_file(paths[-1], seed, 40)
        ours, theirs = seconds(lambda: [*map(file.read_midi, paths)], 2), seconds(lambda: [*map(obvious, paths)], 2)
        assert all(np.array_equal(file.read_midi(path), obvious(path)) for path in paths)
        say(f"reading {len(paths)} MIDI files, ours and the obvious loop over mido", ours, theirs)


def backpack():
    """100 tokens from a Backpack of the paper's micro size, with the cache, and with all recomputed for each token."""
    import backpack as file

    torch.manual_seed(0)
    model = file.Backpack(file.Config(6, 6, 384), 16).requires_grad_(False)
    start, model.known = torch.tensor([[464]]), {}

    def recompute():
        ids, model.known = start, None
        for _ in range(100):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
        model.known = {}
        return ids

    assert torch.equal(file.continue_texts(model, start, 100, temperature=0), recompute())
    ours = seconds(lambda: file.continue_texts(model, start, 100, temperature=0), 2)
    say("100 tokens of a Backpack, and by full recompute", ours, seconds(recompute, 1))


def lexinvariant():
    """LookUp of random values by models that were trained alike, on all symbols: an ordinary table of embeddings."""
    import lexinvariant as file

    right = [file.symbol_task(file.lookup_batch, mode, 230, 0, True)[1].mean() for mode in ("gaussian", "standard")]
    say("LookUp answered wrongly, Gaussian rows and a table", *(1 - share for share in right), "of 1")


CASES = [sophia, backpack, anticipation, lexinvariant, spsa_distributed, onesided_mc, ecosystem, neqa, lost_in_middle,
         review_consistency]

if __name__ == "__main__":
    for case in CASES:
        if not sys.argv[1:] or case.__name__ in sys.argv[1:]:
            try:
                case()
            except ImportError as error:
                print(f"{case.__name__}: {error}")
