"""Memory and rate on an endless stream: python benchmarks/stream.py wnids.txt /usr/share/wordnet [MINUTES] [WHAT ...]

frequency: synthetic captions go through `frequency` as one input file, drawn by a seed from the words of WordNet's
glosses, so that hardly one comes twice, for so many minutes; printed are the rate and the resident memory every tenth
of the time. The seconds that drawing them takes are measured and left out of the rate. reader: the command itself on
files of 0.4 M and 4 M rows, as a subprocess; printed are its rate, with reading, and its peak of memory.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_datasets as bd  # noqa: E402


def resident():
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def captions_of(wordnet):
    """Endless captions of 4 to 16 words, each word as frequent as in the glosses."""
    draw, words = random.Random(0), " ".join(gloss for _, gloss in bd.read_synsets(wordnet).values()).split()
    while True:
        yield " ".join(draw.choices(words, k=draw.randint(4, 16)))


def stream(captions, minutes):
    """A table for the readers: (columns, rows), of as many captions as `minutes` of work beside the drawing allow."""

    def rows():
        n, drawing, start = 0, 0.0, time.perf_counter()
        report = seconds = minutes * 60 / 10
        last_n, last_work = 0, 0.0
        while time.perf_counter() - start < minutes * 60:
            before = time.perf_counter()
            chunk = [(n + i, [next(captions)]) for i in range(4096)]
            drawing += time.perf_counter() - before
            yield from chunk
            n += len(chunk)
            if time.perf_counter() - start > report:
                work = time.perf_counter() - start - drawing
                rate = (n - last_n) / (work - last_work)
                print(f"  {n / 1e6:6.1f} M captions, {rate:9,.0f}/s, {resident():7.1f} MiB", flush=True)
                last_n, last_work, report = n, work, report + seconds
        hours = 400e6 / (n / (time.perf_counter() - start - drawing)) / 64 / 3600
        print(f"  a projection, not a measurement: 400 M captions on 64 cores in {hours:.3f} h, without reading")

    return ["caption"], rows()


def classes_of(wnids, wordnet, path):
    synsets = bd.read_synsets(wordnet)
    rows = [dict(name=names[0], synonyms="|".join(names[1:]), wnid=wnid)
            for wnid in Path(wnids).read_text().split() for names, _ in [synsets[wnid[1:]]]]  # fmt: skip
    bd.write_tsv(path, ["name", "synonyms", "wnid"], rows)


def main(wnids, wordnet, minutes, what):
    with tempfile.TemporaryDirectory() as folder:
        classes_of(wnids, wordnet, f"{folder}/classes.tsv")
        classes = bd.class_rows(f"{folder}/classes.tsv")
        for rule in ("bag", "word") if "frequency" in what else ():
            settings = dict(bd.match_settings(classes, rule, False, "nltk", wordnet), columns=["caption"], out="",
                            skip_bad=False, n_sample=0, seed=0, n_classes=len(classes), weights="")  # fmt: skip
            table, read_table = stream(captions_of(wordnet), minutes), bd.read_table
            print(f"frequency --match {rule}, {minutes:g} minutes")
            bd.read_table = lambda *_, table=table, **__: table
            bd.frequency_file("stream", f"{folder}/part.npz", settings)
            bd.read_table = read_table
        for n in (400_000, 4_000_000) if "reader" in what else ():
            captions = captions_of(wordnet)
            bd.write_tsv(f"{folder}/{n}.tsv", ["caption"], (dict(caption=next(captions)) for _ in range(n)))
            command = [sys.executable, bd.__file__, "frequency", f"{folder}/{n}.tsv", "--classes",
                       f"{folder}/classes.tsv", "--wordnet", wordnet, "--out", f"{folder}/o.tsv"]  # fmt: skip
            start, kib = (
                time.perf_counter(),
                "import resource; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)",
            )
            code = f"import subprocess, json; subprocess.run(json.loads({json.dumps(json.dumps(command))}), check=True)"
            done = subprocess.run([sys.executable, "-c", f"{code}; {kib}"], capture_output=True, text=True, check=True)
            rate, peak = n / (time.perf_counter() - start), int(done.stdout.split()[-1]) / 1024
            print(f"reader: {n:,} rows, {rate:,.0f}/s with start and merge, peak memory {peak:.0f} MiB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:3], float((sys.argv[3:4] or [1])[0]), sys.argv[4:] or ["frequency", "reader"])
