"""Rewrite the copies of shared functions and classes from their home: python tests/sync_copies.py

A copy has `# Copied from SCRIPT.py` directly above it (above its decorators). Only whole top-level functions and classes
are copied, without a change; tests/test_rules.py fails when a copy and its home differ.
"""

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["clip.py", "sl_vocab_subsample.py", "dino_laionet.py", "build_datasets.py", "evaluate.py"]


@functools.cache
def blocks(text: str) -> dict[str, tuple[int, int]]:
    """Top-level functions and classes of a script: name -> (first line, line after the last), from 0, with decorators."""
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {n.name: (min([n.lineno, *(d.lineno for d in n.decorator_list)]) - 1, n.end_lineno) for n in nodes}


def sync(texts: dict[str, str]) -> dict[str, str]:
    """Texts of scripts by name, with every marked copy replaced by the text of its home."""
    texts = dict(texts)
    for script, text in texts.items():
        lines = text.split("\n")
        for name, (start, stop) in sorted(blocks(text).items(), key=lambda item: -item[1][0]):
            marker = re.fullmatch(r"# Copied from (\w+\.py)", lines[start - 1]) if start else None
            if marker:
                home = texts[marker[1]]
                if name not in blocks(home):
                    raise SystemExit(f"{script}: {name} is marked as copied from {marker[1]}, which has no {name}")
                first, last = blocks(home)[name]
                lines[start:stop] = home.split("\n")[first:last]
        texts[script] = "\n".join(lines)
    return texts


if __name__ == "__main__":
    before = {name: (ROOT / name).read_text("utf-8") for name in SCRIPTS if (ROOT / name).is_file()}
    for name, text in sync(before).items():
        if text != before[name]:
            (ROOT / name).write_text(text, "utf-8")
            print(f"rewrote {name}", file=sys.stderr)
