"""build_datasets.py: the examples of --help run as they stand, on the shapes and on tests/samples.

tests/samples is what other tools write, in small, with pictures of the shapes world: img2dataset's folder of files
(shards), ImageNet's class folders and ImageNet-Captions' JSON; and a few entries for curate.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest

import build_datasets as bd


def helps():
    """{command: its --help}."""
    found = {}

    def parse_known_args(parser, *_):
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        found.update({name: sub.format_help() for name, sub in commands.choices.items()})
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_known_args)
        with pytest.raises(SystemExit):
            bd.parse_args([])
    return found


HELPS = helps()
EXAMPLES = {name: re.search(rf"example: (python build_datasets.py {name} .*)$", text, re.M)[1] for name, text in HELPS.items()}


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    """A folder like the repository's root after `python build_datasets.py shapes`."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "build_datasets.py").symlink_to(programs.ROOT / "build_datasets.py")
    (folder / "tests").mkdir()
    (folder / "tests" / "samples").symlink_to(programs.ROOT / "tests" / "samples")
    (folder / "data").mkdir()
    (folder / "data" / "shapes").symlink_to(world)
    return folder


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_run(root, command):
    if command == "status":
        pytest.importorskip("pyarrow")
    python, *argv = shlex.split(EXAMPLES[command])
    assert python == "python" and "In:" in HELPS[command] and "Out:" in HELPS[command]
    done = subprocess.run([sys.executable, *argv], cwd=root, env=programs.ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    out = root / argv[argv.index("--out") + 1]
    if command == "shapes":
        assert (out / "world.json").is_file()
        return
    for table in root.glob(f"{out.name.replace('{set}', '*')}") if command == "prune" else [out]:
        header, *rows = table.read_text("utf-8").splitlines()
        assert "\t" in header and (rows or command in ("check", "prune"))
        if not table.name.endswith("leaks.tsv"):
            report = json.loads(Path(f"{table}.json").read_text("utf-8"))
            assert {Path(entry["path"]).name for entry in report["outputs"]} == {table.name}
            assert shlex.split(report["command"]) == [python, *argv]  # what is pasted makes it again


def test_a_class_list_may_have_the_header_of_a_table(tmp_path, capsys):
    source, out = tmp_path / "list.tsv", tmp_path / "o.tsv"
    source.write_text("name\tsynonyms\tdefinition\nlion\tking\ta cat\nname\n")
    programs.run_here(bd, "classes", source, "--out", out)
    assert [row["name"] for row in bd.class_rows(str(out))] == ["lion", "name"]
    for header in ("wnid", "Synset\tname", "name"):
        source.write_text(f"{header}\nn01440764 tench, Tinca tinca\nn02129165 lion, king of beasts\n")
        programs.run_here(bd, "classes", source, "--out", out)
        assert [(row["wnid"], row["name"], row["synonyms"]) for row in bd.class_rows(str(out))] == [
            ("n01440764", "tench", "Tinca tinca"), ("n02129165", "lion", "king of beasts")]  # fmt: skip
        assert "warning" not in capsys.readouterr().err
    source.write_text("id\nn01440764 tench\nn02129165 lion\n")
    programs.run_here(bd, "classes", source, "--out", out)
    assert "list.tsv:1: a name, not a wnid as 2 other lines are" in capsys.readouterr().err
    source.write_text("name\tsynonyms\twnid\nlion\tking\tn00000001\n")
    with pytest.raises(SystemExit, match="list.tsv:1: got columns name, synonyms, wnid; .*--extra"):
        programs.run_here(bd, "classes", source, "--out", out)
