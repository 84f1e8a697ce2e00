"""Rules of the project that a machine can check: copies, imports, flags, README commands."""

import ast
import functools
import re
import shlex
import subprocess
import sys

import pytest
from sync_copies import ROOT, SCRIPTS, blocks, sync

TEXTS = {name: (ROOT / name).read_text("utf-8") for name in SCRIPTS if (ROOT / name).is_file()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
TRAINERS = [name for name in ("clip.py", "sl_vocab_subsample.py", "dino_laionet.py") if name in TEXTS]
OPTIONAL = {"pyarrow", "safetensors", "tensorboard", "wandb", "matplotlib", "faiss", "sklearn"}
ALLOWED = set(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "tqdm", "PIL", "scipy"}


def test_same_name_has_same_text():
    """A function or class that stands in two scripts is the same to the letter, and marked at all places but its home."""
    seen = {}
    for script in TEXTS:
        lines = TEXTS[script].split("\n")
        for name, (start, stop) in blocks(TEXTS[script]).items():
            if name in ("main", "parse_args"):
                continue
            text = "\n".join(lines[start:stop])
            if name in seen:
                home, home_text = seen[name]
                assert text == home_text, f"{name} differs between {home} and {script}: run python tests/sync_copies.py"
                assert lines[start - 1] == f"# Copied from {home}", (
                    f"{script}: {name} needs the line # Copied from {home}"
                )
            else:
                seen[name] = script, text
                assert not lines[start - 1].startswith("# Copied from"), f"{script}: {name} is marked but has no home"


def test_sync_copies_repairs_drift():
    home = "@decorated\ndef f(x):\n    return x + 1\n"
    copy = "import os\n\n\n# Copied from clip.py\ndef f(x):\n    return x\n\n\ndef g():\n    pass\n"
    fixed = sync({"clip.py": home, "evaluate.py": copy})
    assert fixed["evaluate.py"] == copy.replace("def f(x):\n    return x\n", home)
    with pytest.raises(SystemExit, match="has no f"):
        sync({"clip.py": "", "evaluate.py": copy})
    assert sync(TEXTS) == TEXTS


@pytest.mark.parametrize("script", TEXTS)
def test_imports(script):
    """At the top only the standard library and the run-time packages; optional ones inside the function that needs them."""
    top = {id(node) for node in TREES[script].body}
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for package in {name.split(".")[0] for name in names}:
                assert package in (ALLOWED if id(node) in top else ALLOWED | OPTIONAL), f"{script} imports {package}"


@pytest.mark.parametrize("script", TEXTS)
def test_no_broad_except_and_no_args_outside_main(script):
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), (
                f"{script}:{node.lineno} catches {caught}"
            )
    for node in TREES[script].body:
        is_guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Expr)
        assert is_guard or isinstance(node, (*plain, ast.AugAssign)), f"{script}:{node.lineno} runs at import"
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"{script}:{node.lineno} runs at import"


@pytest.mark.parametrize("script", TRAINERS)
def test_sections(script):
    banners = re.findall(r"^# -{78} (\w+)$", TEXTS[script], re.M)
    assert banners == ["flags", "method", "model", "data", "plumbing", "evaluate", "train"]


def flags_of(script):
    """{flag: help text} of every add_argument call of a script."""
    flags = {}
    for node in ast.walk(TREES[script]):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert "help" in keywords, f"{script}: {ast.unparse(node.args[0])} has no help"
            flags[node.args[0].value] = ast.unparse(keywords["help"])
    return flags


@pytest.mark.parametrize("script", TEXTS)
def test_every_flag_is_used(script):
    for flag in flags_of(script):
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            assert re.search(rf"\bargs\.{name}\b", TEXTS[script]), f"{script}: {flag} is never read"


def test_same_flag_same_help():
    seen = {}
    for script in TRAINERS:
        for flag, text in flags_of(script).items():
            assert seen.setdefault(flag, text) == text, f"{flag} is explained in two ways"


def test_supervised_learning_is_matched_with_clip():
    """The defaults of both are one protocol: what differs by default is the method alone."""
    theirs, ours = (vars(parse_args_of(script)([])) for script in ("clip.py", "sl_vocab_subsample.py"))
    same = theirs.keys() & ours.keys()
    assert {"arch", "batch_size", "bn", "crop_scale", "lr", "steps", "warmup_steps", "weight_decay"} <= same
    assert {name for name in same if theirs[name] != ours[name]} == {"out"}
    assert theirs["beta2"] == 0.98 and "(0.9, 0.98)" in TEXTS["sl_vocab_subsample.py"] and ours["optimizer"] == "adamw"
    (peak,) = {re.search(r"args.lr or (\(3e-3 if )\w+.arch( == .*)", TEXTS[s]).groups() for s in TRAINERS[:2]}
    assert peak == ("(3e-3 if ", ' == "tiny" else 1e-3)')


@pytest.mark.parametrize("script", TEXTS)
def test_help_is_instant_and_imports_nothing_heavy(script):
    code = f"import runpy, sys; sys.argv = ['{script}', '--help']\ntry:\n    runpy.run_path('{ROOT / script}', run_name='__main__')\n"
    code += "except SystemExit:\n    print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith("False"), result.stdout[-300:] + result.stderr[-300:]


def commands():
    """Every line of a shell block of a page or of a docstring that runs a script, and what a page has in `...`."""
    found, sources = [], {}
    blocks = r"```(?:sh|bash)\n(.*?)```"
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        text = page.read_text("utf-8")
        inline = re.findall(r"`((?:python|torchrun) [^`]*)`", re.sub(blocks, "", text, flags=re.S))
        sources[page.name] = re.findall(blocks, text, re.S) + [" ".join(command.split()) for command in inline]
    sources |= {name: [ast.get_docstring(tree) or ""] for name, tree in TREES.items()}
    for source, texts in sources.items():
        for line in "\n".join(texts).replace("\\\n", " ").split("\n"):
            for part in line.split("#")[0].split("&&"):
                match = re.search(r"(?:python3?|torchrun(?: --\S+ \d+)?|uv run) (\w+\.py)(.*)", part)
                if match and match[1] in TEXTS:
                    found.append(pytest.param(match[1], match[2], id=f"{source}: {part.strip()[:60]}"))
    return found


@functools.cache
def parse_args_of(script):
    """parse_args of a script, without the imports that are heavy: flags come before them."""
    scope = {"__name__": "not_main", "__doc__": ast.get_docstring(TREES[script])}
    exec(compile(TEXTS[script].split('if __name__ == "__main__":')[0], script, "exec"), scope)
    return scope["parse_args"]


@pytest.mark.parametrize("script, flags", commands())
def test_documented_commands_parse(script, flags):
    parse_args_of(script)(shlex.split(flags))


def float_flags():
    """(script, flag, values) of the trainers' flags that take numbers with a fraction."""
    for script in TRAINERS:
        for node in ast.walk(TREES[script]):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if keywords.get("type") == "float":
                    yield script, node.args[0].value, int(keywords.get("nargs", 1))


@pytest.mark.parametrize("script, flag, n_values", list(float_flags()))
def test_nan_is_refused(script, flag, n_values, capsys):
    """float("nan") is a number to argparse, and false in every comparison, so the usual checks let it pass."""
    with pytest.raises(SystemExit) as stopped:
        parse_args_of(script)([flag, *["nan"] * n_values])
    assert stopped.value.code == 2 and flag in capsys.readouterr().err
