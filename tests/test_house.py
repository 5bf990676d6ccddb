"""The rules of the house that a machine can check, for every root file that is there."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
PAPERS = ("sophia backpack anticipation lexinvariant spsa_distributed onesided_mc ecosystem neqa lost_in_middle "
          "review_consistency").split()
ROOT_FILES = [name for name in PAPERS if (HOUSE / f"{name}.py").exists()]
PACKAGES = {"torch", "numpy", "tiktoken", "mido", "tqdm", "einops", "triton", "matplotlib", "requests",
            "urllib3", "kernels"}
QUICK = {  # a task of each file that takes seconds: it must work from a folder that holds nothing else
    "sophia": "toy",
    "ecosystem": "--epochs 1",
    "review_consistency": "",
    "onesided_mc": "--rows 500,1000 --seeds 1 --columns 12",
    "spsa_distributed": "train --steps 5",
    "lexinvariant": "lookup --steps 1 --seeds 1",
    "anticipation": "--steps 2 --pieces 2 --quiet",
    "lost_in_middle": "lab --steps 2 --seeds 1",
    "neqa": "compose",
    "backpack": "ablate_k --steps 2 --seeds 1 --quiet",
}


def tree(name):
    return ast.parse((HOUSE / f"{name}.py").read_text("utf-8"))


def imported(module):
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def drifted(modules):
    """{file: tree} → names of top-level functions and classes that two files define differently, with both places."""
    seen, found = {}, []
    for file, module in modules.items():
        for node in module.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name in ("main", "parse_args"):
                continue
            task = isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] == ["args"]  # is its own
            if not task or node.name in ("run", "set_up"):
                other = seen.setdefault(node.name, (ast.dump(node), file, node.lineno))
                if other[0] != ast.dump(node):
                    found.append(f"{node.name}: {other[1]}.py:{other[2]} and {file}.py:{node.lineno}")
    return found


def run(*command, cwd=HOUSE, **env):
    command, env = [sys.executable, *map(str, command)], {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ROOT_FILES)
def test_imports(name):
    extra = set(imported(tree(name))) - PACKAGES - set(sys.stdlib_module_names)
    assert not extra, f"{name}.py imports {extra}: only the standard library, the card's packages and kernels"


def test_same_name_same_code():
    assert not drifted({name: tree(name) for name in ROOT_FILES})


@pytest.mark.parametrize("name", ROOT_FILES)
def test_narrow_and_soon_at_the_method(name):
    lines = (HOUSE / f"{name}.py").read_text("utf-8").split("\n")
    assert max(map(len, lines)) <= 120, [i for i, line in enumerate(lines, 1) if len(line) > 120]
    assert min(i for i, line in enumerate(lines) if line.startswith(("def ", "class "))) < 150


def test_drift_is_seen():
    same = ast.parse("def f(x):\n    return x")
    other = ast.parse("def f(x):\n    # a comment is no drift\n    return x")
    changed = ast.parse("\ndef f(x):\n    return x + 1\ndef main():\n    return 1\ndef task(args):\n    return 2")
    tasks = ast.parse("def main():\n    return 3\ndef task(args):\n    return 4")
    assert not drifted({"a": same, "b": other, "c": tasks})
    assert drifted({"a": same, "b": changed, "c": tasks}) == ["f: a.py:1 and b.py:2"]


ALONE = """
import os, sys, torch
sys.dont_write_bytecode = True
state, threads, here = torch.get_rng_state(), torch.get_num_threads(), set(os.listdir())
def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if importing and (event.startswith(("socket.connect", "socket.getaddrinfo", "urllib")) or writes):
        raise RuntimeError(f"importing does {event} {args}")
sys.addaudithook(hook)
sys.path.insert(0, "")
importing = True
import NAME
importing = False
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads(), "importing changes torch"
assert "matplotlib" not in sys.modules and "kernels" not in sys.modules and set(os.listdir()) == here
print("imported")
NAME.main()
"""


@pytest.mark.parametrize("name", ROOT_FILES)
def test_works_alone(name, tmp_path, capsys):
    """Copied into an empty folder, without kernels/: importing does nothing, and a small run prints its paths last."""
    shutil.copy(HOUSE / f"{name}.py", tmp_path)
    done = run("-c", ALONE.replace("NAME", name), *QUICK[name].split(), cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported\n")
    assert (tmp_path / done.stdout.split()[-1]).is_file()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).parse_args(["--help"])
    assert not stop.value.code and "usage" in capsys.readouterr().out


def test_readme():
    text = (HOUSE / "README.md").read_text("utf-8")
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert figures and all((HOUSE / figure).is_file() for figure in figures), figures
    kept = {p.relative_to(HOUSE) for p in (HOUSE / "assets").iterdir()}
    assert {Path(figure) for figure in figures} == kept, "a figure nobody shows"
    for name in ROOT_FILES:
        assert f"`{name}.py`" in text, f"README.md has no row for {name}.py"
        first, last = map(int, re.search(rf"`{name}.py` (\d+) to (\d+)", text).groups())  # where its method stands
        lines = (HOUSE / f"{name}.py").read_text("utf-8").splitlines()
        heads = [i for i, line in enumerate(lines, 1) if line.startswith("# ====")]
        assert first == heads[0] < 200 and last + 1 in heads, f"README.md: the method of {name}.py has moved"


def test_requirements_are_pinned_and_allowed():
    lines = (HOUSE / "requirements.txt").read_text().splitlines()
    pins = dict(line.split(";")[0].strip().split("==") for line in lines)
    assert set(pins) == (PACKAGES - {"kernels"}) | {"pytest", "pytest-xdist"}
