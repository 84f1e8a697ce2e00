"""Matching rules, timed and checked: python benchmarks/match.py wnids.txt /usr/share/wordnet [WORLD]

Sentences are WordNet's glosses, classes the synsets of a list of wnids (ImageNet's 1,000) with all their words. A
pyahocorasick loop with word boundaries (pip install pyahocorasick) runs in turns with ours, each from the captions to
the count of each class, or to the entries of each caption; medians of five such pairs and the median of their ratios
are printed, by seconds of CPU, in process. Then: counts against a regular expression per class (20,000 sentences) and
the paper's rule against class-by-class sets (50,000); curate with 500,000 entries; with a shapes WORLD, precision and
recall of label, laionet and curate. Two minutes; in a pair each side goes through 1,058,931 sentences, curate's through
117,659. Two runs on a core of a busy Xeon (2 MiB of L2; Python 3.11, numpy 2.4, pyahocorasick 2.3) gave for bag 1.45
and 1.54 M captions/s, 2.40 and 2.48 times pyahocorasick; for word 1.90 and 2.03 M/s, 3.13 and 3.26 times; for curate
163,000 and 173,000/s, 7.7 times, with 0.22 GiB for its entries; docs/speed.md has
those of a slower core.
"""

import contextlib
import io
import re
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ahocorasick
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_datasets as bd  # noqa: E402


def automaton_of(names):
    automaton = ahocorasick.Automaton()
    for name, label in names:
        automaton.add_word(name, (*automaton.get(name, (len(name),)), label))
    automaton.make_automaton()
    return automaton


def by_automaton(automaton, captions, is_lower):
    """Classes per caption, by pyahocorasick and a test of both boundaries."""
    for caption in captions:
        text, found = caption.lower() if is_lower else caption, set()
        for end, (length, *labels) in automaton.iter(text):
            start = end + 1 - length
            before, after = text[start - 1 : start] if start else "", text[end + 1 : end + 2]
            if not (before.isalnum() or before == "_" or after.isalnum() or after == "_"):
                found.update(labels)
        yield found


def compare(what, ours, theirs, n, repeats=5):
    """Rates of two functions that go through n captions, run in turns. Returns: what each gave last."""
    seconds = []
    for _ in range(repeats):
        pair, given = [], []
        for function in (ours, theirs):
            start = time.process_time()  # of this process, so that others on the machine matter less
            given.append(function())
            pair.append(time.process_time() - start)
        seconds.append(pair)
    rates = [n / statistics.median(column) for column in zip(*seconds)]
    ratio = statistics.median(b / a for a, b in seconds)
    print(f"{what}: {rates[0]:,.0f} captions/s, pyahocorasick {rates[1]:,.0f}/s, median ratio {ratio:.2f}", flush=True)
    return given


def entries_of(wordnet, captions, n=500_000):
    """n entries: first words of synsets, then words, pairs and triples of the captions, the frequent ones first."""
    entries = dict.fromkeys(w for part in ("noun", "verb", "adj", "adv") for w, *_ in
                            (words for words, _ in bd.read_synsets(wordnet, part).values()))  # fmt: skip
    for size in (1, 2, 3):
        counts = bd.Counter()
        for caption in captions:
            words = bd.with_spaced_marks(caption).split()
            counts.update(" ".join(gram) for gram in zip(*(words[i:] for i in range(size))))
        entries.update(dict.fromkeys(gram for gram, _ in counts.most_common()))
    return list(entries)[:n]


def truth_of(world, name):
    """The true concept of each row of a set of a shapes world of seed 0, whether the table tells it or not: [N]."""
    n_rows, s, rng = len(read(world, name)), bd.TRAIN_SETS[name], bd.rng_of(0, name, "order")
    order = rng.permutation(len(bd.CONCEPTS) if s["is_open"] else bd.N_CLASSES)
    return rng.permutation(np.repeat(np.arange(len(order)), bd.zipf_counts(n_rows, order, s["zipf"])))


def read(world, name):
    return list(bd.open_tables([f"{world}/{name}/train.tsv"])[1])


def print_scores(what, labels, truth):
    """labels: [N], -1 none. Precision: the share of labels that are true; recall: the share of rows of a class."""
    right = (labels >= 0) & (labels == truth)
    print(f"  {what:<34} precision {right.sum() / max((labels >= 0).sum(), 1):.3f}, recall "
          f"{right.sum() / (truth < bd.N_CLASSES).sum():.3f}, {(labels >= 0).sum():,} rows")  # fmt: skip


def shapes(world):
    """Precision and recall on the world's raw captions, of which the renderer's seed tells the truth."""
    classes = bd.class_rows(f"{world}/classes.tsv")
    names = [(name, label) for label, row in enumerate(classes) for name in bd.names_of(row)]
    rows, truth = read(world, "yfcc"), truth_of(world, "yfcc")
    print(f"label on yfcc, {len(rows):,} captions")
    for rule in bd.RULES:
        found = bd.Matcher(names, rule, lemmas="none").match([row["caption"] for row in rows])
        print_scores(f"{rule} --multi drop", np.array([c[0] if len(c) == 1 else -1 for c in found]), truth)

    rows, truth = read(world, "laionet"), truth_of(world, "laionet")
    assert (truth == [int(row["label"]) for row in rows]).all(), "the table tells another truth"
    print(f"laionet on laionet, {len(rows):,} captions")
    found = bd.Matcher(names, "laionet").match([row["caption"] for row in rows])
    labels = np.array([c[0] if len(c) == 1 else -1 for c in found])
    similarity = np.array([float(row["similarity"]) for row in rows])
    for threshold in (0, 0.3, 0.4, 0.5):
        print_scores(f"--threshold {threshold}", np.where(similarity >= threshold, labels, -1), truth)

    # Curation has no labels: a concept's rows are found if its name or a synonym, as an entry, is matched.
    rows, truth = read(world, "web"), truth_of(world, "web")
    found = bd.Matcher(names, "metaclip").match([row["caption"] for row in rows])
    n_matches = sum(map(len, found))
    right = sum(t in c for t, c in zip(truth.tolist(), found))
    print(f"curate on web, {len(rows):,} captions\n  metaclip, each entry {'':15} precision {right / n_matches:.3f}, "
          f"recall {right / (truth < bd.N_CLASSES).sum():.3f}, {n_matches:,} matches")  # fmt: skip
    curate_shapes(world, rows, names, truth)


def curate_shapes(world, rows, names, truth):
    """Imbalance of the true classes before and after curate with the names of the classes as metadata."""
    with tempfile.TemporaryDirectory() as folder:
        bd.write_tsv(
            f"{folder}/entries.tsv", ["entry"], (dict(entry=name) for name in dict.fromkeys(n for n, _ in names))
        )
        place = {row["image"].rpartition(":")[2]: t for row, t in zip(rows, truth.tolist())}
        before = np.bincount(truth[truth < bd.N_CLASSES], minlength=bd.N_CLASSES)
        print(f"  {'all rows':<34} Gini {bd.gini_of(before):.3f}, of a class {before.min()} to {before.max():,} rows")
        for cap in (20, 100):
            out = f"{folder}/{cap}.tsv"
            with contextlib.redirect_stdout(io.StringIO()):
                bd.main(bd.parse_args(["curate", f"{world}/web/train.tsv", "--metadata", f"{folder}/entries.tsv",
                                       "--cap", str(cap), "--out", out]))  # fmt: skip
            kept = np.array([place[row["image"].rpartition(":")[2]] for row in bd.open_tables([out])[1]])
            after = np.bincount(kept[kept < bd.N_CLASSES], minlength=bd.N_CLASSES)
            print(
                f"  {f'curate --cap {cap}':<34} Gini {bd.gini_of(after):.3f}, of a class {after.min()} to "
                f"{after.max():,} rows; of {len(kept):,} kept {np.mean(kept < bd.N_CLASSES):.3f} show a class"
            )


def main(wnids, wordnet, *world):
    glosses = [gloss for part in ("noun", "verb", "adj", "adv") for _, gloss in bd.read_synsets(wordnet, part).values()]
    synsets = bd.read_synsets(wordnet)
    names = [(word, i) for i, wnid in enumerate(Path(wnids).read_text().split()) for word in synsets[wnid[1:]][0]]
    chunks = list(bd.in_chunks(glosses, lambda gloss: [gloss]))
    repeats = 9  # 9 x 117,659 sentences, more than 1 M
    automaton = automaton_of([(name.lower(), label) for name, label in names])

    def ours(matcher):
        counts = np.zeros(matcher.n_classes, np.int64)
        for _ in range(repeats):
            for chunk in chunks:
                counts += np.bincount(matcher.pairs(chunk)[1], minlength=len(counts))
        return counts.tolist()

    def theirs():
        counts = [0] * bag.n_classes
        for _ in range(repeats):
            for found in by_automaton(automaton, glosses, True):
                for label in found:
                    counts[label] += 1
        return counts

    bag = bd.Matcher(names, "bag", wordnet=wordnet)
    word = bd.Matcher(names, "word")
    compare("frequency --match bag", lambda: ours(bag), theirs, repeats * len(glosses))
    given = compare("frequency --match word", lambda: ours(word), theirs, repeats * len(glosses))
    print("word's counts equal pyahocorasick's:", given[0] == given[1], flush=True)

    patterns = {}
    for name, label in names:
        patterns.setdefault(label, []).append(re.escape(name.lower()))
    patterns = {label: re.compile(rf"(?<!\w)(?:{'|'.join(p)})(?!\w)") for label, p in patterns.items()}
    few = glosses[:20_000]
    expected = [tuple(label for label, p in patterns.items() if p.search(g.lower())) for g in few]
    print("word equals a regular expression per class on 20,000 sentences:", word.match(few) == expected, flush=True)
    cached = {}

    def lemmas(text):
        words = [p for w in re.sub("[^a-z ]", " ", text.lower()).split() for p in bd.CONTRACTIONS.get(w, (w,))]
        for w in words:
            if w not in cached:
                cached[w] = bd.nltk_lemma(w, *nouns)
        return {cached[w] for w in words}

    nouns = bd.read_nouns(wordnet)
    sets = [(lemmas(name), label) for name, label in names]
    few = glosses[:50_000]
    expected = []
    for gloss in few:
        held = lemmas(gloss)
        expected.append(tuple(sorted({label for needle, label in sets if needle <= held})))
    print("bag equals sets class by class on 50,000 sentences:", bag.match(few) == expected, flush=True)

    entries = entries_of(wordnet, glosses)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metaclip = bd.Matcher([(entry, i) for i, entry in enumerate(entries)], "metaclip")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory with {len(entries):,} entries {after / 2**20:.2f} GiB, before {before / 2**20:.2f}")
    automaton = automaton_of([(entry, i) for i, entry in enumerate(entries)])
    compare("curate", lambda: [metaclip.match(chunk) for chunk in chunks],
            lambda: bd.deque(by_automaton(automaton, glosses, False), 0), len(glosses))  # fmt: skip
    if world:
        shapes(world[0])


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
