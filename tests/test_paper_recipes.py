"""The study's experiments as command lines: recipes/paper and recipes/shapes.sh run against stubs in the place of python,
torchrun and img2dataset, which note their arguments and leave empty files; then every command line is parsed by its script."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pyarrow.csv
import pytest
from sync_copies import ROOT, SCRIPTS
from test_rules import parse_args_of

spec = importlib.util.spec_from_file_location("shapes_results", ROOT / "recipes" / "shapes_results.py")
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)

RECIPES = sorted((ROOT / "recipes" / "paper").glob("*.sh"))
# The order in which they need each other; figures that are not named here come last.
ORDER = ["fig2", "fig1a", "fig1b", "fig3_captions", "fig3_vocabulary", "fig12"]
GIVEN = {  # what a user has to put into a folder
    "ROOT": {"wnids.txt": "n01440764\ttench\nn01443537\tgoldfish\n", "templates.txt": "a photo of a {}.\nart of {}.\n",
             "bpe.txt": "", "imagenet100.txt": "0\n"},
    "RAW": {"laion400m/0.parquet": "", "laion2b/0.parquet": "", "imagenetv2/0/0.jpg": "", "imagenetv2/1/0.jpg": ""},
    "WEIGHTS": {}, "TRANSFER": {},
    "SETS": {f"{name}/names.txt": "a\n" for name in "cub food101 pets flowers102 places365 eurosat dtd".split()},
    "JUDGED": {"dtd.relevant.tsv": ""}, "OUT": {},
}
# One file a call: the arguments, each ended by a NUL. Then the files that the real program would write. Builtins where
# they do: a thousand calls are made.
STUB = r"""#!/usr/bin/env bash
call=$CALLS/$RECIPE.$EPOCHREALTIME.$$
printf '%s\0' "${0##*/}" "$@" >"$call"
folder() { [ -d "$1" ] || mkdir -p "$1"; }
files=()
if [ "${1-}" = - ]; then # a program on stdin; arguments TABLE OUT ROOT
  cat >"$call.py"
  files=("$3.npy" "$3.classes.npy")
fi
out='' sets=(val v2) is_set=''
while [ $# -gt 0 ]; do
  case $1 in
    --*) is_set='' ;;&
    --out) out=$2 ;;
    --eval-sets) is_set=1 sets=() ;;
    --json | --plot | --export | --markdown) files+=("$2") ;;
    *) [ -z "$is_set" ] || { set=${1##*/} && sets+=("${set%.tsv}"); } ;;
  esac
  shift
done
case $out in
  '') ;;
  *.html) files+=("$out") ;;
  *.tsv)
    folder "${out%/*}"
    [[ $out != *"{set}"* ]] && sets=(whole) || sets=(combined sketch rendition objectnet v2)
    for set in "${sets[@]}"; do
      printf 'image\tlabel\tname\tcaption\ttitle\ttags\tdescription\tcount\n1\t0\ta\tb\tc\td\te\t7\n' >"${out/\{set\}/$set}"
    done
    ;;
  *) for file in metrics.json checkpoint.pt "${sets[@]/%/.npz}"; do files+=("$out/$file"); done ;;
esac
for file in "${files[@]}"; do folder "${file%/*}" && : >"$file"; done
"""


def run_recipe(recipe, folder, tmp_path, *flags, **env):
    """Run a recipe of a copy of the tree with stubs. Returns: the finished process, its calls as lists of words, the
    programs that it gave to python on stdin."""
    stubs, calls = tmp_path / "bin", tmp_path / "calls"
    if not stubs.exists():
        stubs.mkdir(), calls.mkdir()
        for name in ("python", "torchrun", "img2dataset", "g++"):
            (stubs / name).write_text(STUB)
            (stubs / name).chmod(0o755)
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(calls), "RECIPE": recipe.stem, **env}
    result = subprocess.run(["bash", folder / recipe.relative_to(ROOT), *flags], env=env, capture_output=True, text=True,
                            timeout=120)
    files = sorted(path for path in calls.glob(f"{recipe.stem}.*") if path.suffix != ".py")
    found = [tuple(path.read_text("utf-8").split("\0")[:-1]) for path in files]
    programs = [path.read_text("utf-8") for path in calls.glob(f"{recipe.stem}.*.py")]
    return result, found, programs


@functools.cache
def parsed(call):
    """(script, its arguments as parsed) of a call, (None, None) of one that runs none of ours. Fails for a wrong flag."""
    program, *words = call
    if program == "img2dataset" or words[0] in ("-", "-c"):
        return None, None
    while program == "torchrun" and words[0].startswith("--"):
        assert words[0] == "--nproc-per-node" and words[1].isdigit(), call
        words = words[2:]
    if words[0].startswith("recipes/"):
        assert (ROOT / words[0]).is_file(), call
        return None, None
    assert words[0] in SCRIPTS, f"{words[0]} is no script of ours: {' '.join(call)}"
    try:
        return words[0], parse_args_of(words[0])(words[1:])
    except SystemExit:
        pytest.fail(f"{words[0]} does not take this: {' '.join(call)}")


def unseen(recipe, calls):
    """Scripts and flags that a recipe's text has and no call had: branches that did not run hide lines from the parser."""
    code = re.sub(r"<<'PY'\n.*?\nPY\n", "\n", re.sub(r"(^|\s)#.*", "", recipe.read_text("utf-8")), flags=re.S)
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*|\b\w+\.py\b", code)) - {word for call in calls for word in call}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """All recipes of the paper, run in one tree: {name: (process, calls, programs)}; the folders they were given."""
    tmp_path = tmp_path_factory.mktemp("paper")
    shutil.copytree(ROOT / "recipes", tmp_path / "tree" / "recipes")
    folders = {name: tmp_path / name for name in GIVEN}
    for name, files in GIVEN.items():
        folders[name].mkdir()
        for file, text in files.items():
            (folders[name] / file).parent.mkdir(parents=True, exist_ok=True)
            (folders[name] / file).write_text(text)
    env = {name: str(folder) for name, folder in folders.items()}
    order = sorted(RECIPES, key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path))
    return {path.stem: run_recipe(path, tmp_path / "tree", tmp_path, **env) for path in order}, folders


def test_recipes_of_all_figures_are_there():
    assert {path.stem.split("_")[0] for path in RECIPES} == {f"fig{n}" for n in "1a 1b 2 3 4 5 6 7 8 9 10 12 13 14".split()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_command_parses(recipe, study):
    assert subprocess.run(["bash", "-n", recipe]).returncode == 0
    result, calls, programs = study[0][recipe.stem]
    assert result.returncode == 0 and not result.stderr, result.stderr[-2000:]
    scripts = [parsed(call)[0] for call in calls]
    assert any(scripts), "no command at all"
    for program in programs:
        compile(program, recipe.name, "exec")
    assert not unseen(recipe, calls)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_head_says_what_the_paper_found(recipe):
    head, _, code = recipe.read_text("utf-8").partition("set -euo pipefail\n")
    number = re.match(r"fig(\d+[ab]?)", recipe.stem)[1]
    assert head.startswith(f"#!/usr/bin/env bash\n# Figure {number}") and code
    assert all(line.startswith("#") for line in head.splitlines())
    paragraphs = dict(re.findall(r"^# (Paper|Deviations|Faults avoided|In)\b(.*?)(?=^#$|^# (?:Faults|In)\b|\Z)", head, re.S | re.M))
    assert paragraphs.keys() == {"Paper", "Deviations", "Faults avoided", "In"}
    assert len(re.findall(r"\d*\.\d+", paragraphs["Paper"])) >= 4, "the paper's numbers"


def test_same_block_has_same_text():
    """A function or list of two recipes is the same to the letter."""
    seen = {}
    for recipe in RECIPES:
        for name, text in re.findall(r"^(\w+(?:\(\) \{|=\()) (.*?)^[)}]$", recipe.read_text("utf-8"), re.S | re.M):
            home = seen.setdefault(name, (recipe.name, text))
            assert home[1] == text or name == "frequency() {", f"{name} differs between {home[0]} and {recipe.name}"
    assert {"clip() {", "sl() {", "checkpoints=("} <= seen.keys()


def test_one_folder_has_one_run(study):
    """Figures share runs: the same --out is the same command, so the second one finds the first one's checkpoint."""
    runs = defaultdict(set)
    for _, calls, _ in study[0].values():
        for call in calls:
            script, args = parsed(call)
            if script in SCRIPTS[:3] and not args.eval_only:
                runs[args.out].add(call)
    assert len(runs) > 150
    for out, commands in runs.items():
        assert len(commands) == 1, f"{out}: {commands}"


def test_what_is_read_is_written(study):
    """Each file that a command names below ROOT, SETS, TRANSFER and OUT was given or written by one of the recipes."""
    folders = tuple(f"{study[1][name]}/" for name in ("ROOT", "SETS", "TRANSFER", "OUT"))
    read = [word.removeprefix("@") for _, calls, _ in study[0].values() for call in calls for word in call]
    read = {word for word in read if word.startswith(folders) and Path(word).suffix in (".npz", ".npy", ".tsv", ".pt", ".txt")}
    missing = [word for word in sorted(read) if not os.path.exists(word)]
    assert len(read) > 300 and not missing, missing


def test_img2dataset_gets_the_rows_of_laionet(tmp_path):
    """Its reader (pyarrow.csv) takes a quote at the start of a field for one around it: fig2.sh writes quotes for it."""
    rows = [["http://a/1", '"Unbalanced goldfish', "2"], ["http://a/2", 'plain "inside"', "3"], ["http://a/3", "", "4"]]
    (tmp_path / "laionet_urls.tsv").write_text("".join("\t".join(row) + "\n" for row in [["URL", "caption", "label"], *rows]))
    code = re.search(r"^awk .*\n.*quoted\.tsv\"", (ROOT / "recipes/paper/fig2.sh").read_text("utf-8"), re.M)[0]
    subprocess.run(["bash", "-c", code], env=os.environ | {"ROOT": str(tmp_path)}, check=True)
    table = pyarrow.csv.read_csv(tmp_path / "laionet_urls.quoted.tsv", parse_options=pyarrow.csv.ParseOptions(delimiter="\t"))
    assert [list(map(str, row.values())) for row in table.to_pylist()] == rows


def test_a_misspelt_flag_is_found():
    call = ("torchrun", "--nproc-per-node", "4", "clip.py", "--root", "data", "--epochs", "32")
    assert parsed(call)[1].epochs == 32
    for wrong in ("--epoch=3", "--text-head=fixed", "--batch-size=many", "--word-dropout=2"):
        with pytest.raises(pytest.fail.Exception, match="does not take"):
            parsed((*call, wrong))


def test_the_study_in_miniature_parses(tmp_path):
    """recipes/shapes.sh with seed 0, and the parts that come only when they are named."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "data/study0").mkdir(parents=True)
    (tmp_path / "data/study0/classes.tsv").write_text("name\tsynonyms\nsolid circle\tdisc\n")  # its names are cut out
    recipe = ROOT / "recipes" / "shapes.sh"
    result, calls, _ = run_recipe(recipe, tmp_path, tmp_path, "0", PYTHON="python", JOBS="2",
                              ONLY=f"{' '.join(map(str, range(1, 13)))} 2b 4b 5b 6b 7b 8b 9b 10b 12b")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-1000:]
    scripts = [parsed(call)[0] for call in calls]
    assert all(scripts.count(script) > 1 for script in SCRIPTS), scripts
    assert not {word for word in unseen(recipe, calls) if word.startswith("--")}


def test_a_failed_run_stops_no_other(tmp_path):
    """Those of the second half are made too; it is tried once, and the script ends with 1 before the page."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "data/study0").mkdir(parents=True)
    failing = tmp_path / "failing"
    failing.write_text('#!/bin/bash\ncase "$*" in *" --out runs/shapes0/sl "*) exit 2 ;; esac\nexec python "$@"\n')
    failing.chmod(0o755)
    result, calls, _ = run_recipe(ROOT / "recipes" / "shapes.sh", tmp_path, tmp_path, "0", PYTHON=str(failing), JOBS="1", ONLY="1 2")
    assert result.returncode == 1 and result.stdout.count("FAILED sl:") == 1, result.stdout + result.stderr
    outs = {word for call in calls for word in call if word.startswith("runs/shapes0/")}
    assert {"runs/shapes0/clip", "runs/shapes0/frozen_quarter"} <= outs and not any("page" in call for call in calls)


@pytest.mark.parametrize("number", range(1, 13))
def test_the_page_s_command_makes_what_an_experiment_compares(number, tmp_path):
    """Every row and difference has its runs, and every score the runs that it is made of, on a machine without any."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "data/study0").mkdir(parents=True)
    (tmp_path / "data/study0/classes.tsv").write_text("name\tsynonyms\nsolid circle\tdisc\n")
    (experiment,) = [e for e in page.EXPERIMENTS if e["number"] == number]
    recipe = ROOT / "recipes" / "shapes.sh"
    result, _, _ = run_recipe(recipe, tmp_path, tmp_path, "0", PYTHON="python", JOBS="2", ONLY=page.PARTS[number])
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-1000:]
    todo = tmp_path / "runs/shapes0/todo"
    runs = {line.split("\t")[0] for line in (todo / "runs").read_text().splitlines()}
    scores = dict(line.split("\t")[:2] for line in (todo / "scores").read_text().splitlines())
    seed, asked = page.Seed(tmp_path / "none"), set()
    seed.files = type("Asked", (dict,), {"get": lambda self, name, default=None: asked.add(name) or default})()
    for cells in [cells for _, cells, _ in experiment["rows"]] + [[difference] for _, difference in experiment["contrasts"]]:
        for cell in cells:
            cell(seed)
    assert asked and asked <= runs | set(scores), asked - runs - set(scores)
    needed = {run for needs in scores.values() for run in needs.split() if run != "none"}
    assert needed <= runs, needed - runs
