"""Matching rules, timed and checked: python benchmarks/match.py wnids.txt /usr/share/wordnet [WORLD]

Sentences are WordNet's glosses, classes the synsets of a list of wnids (ImageNet's 1,000) with all their words. A
pyahocorasick loop with word boundaries runs in turns with ours (pip install pyahocorasick); medians and the median of
the ratios are printed, per core, in process. Then: counts against a regular expression per class (20,000 sentences) and
the paper's rule against class-by-class sets (50,000); curate with 500,000 entries; with a shapes WORLD, precision and
recall of the labels by rule.
"""

import re
import resource
import statistics
import sys
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
    """Rates of two functions that go through n captions, run in turns."""
    seconds = []
    for _ in range(repeats):
        pair = []
        for function in (ours, theirs):
            start = time.perf_counter()
            function()
            pair.append(time.perf_counter() - start)
        seconds.append(pair)
    rates = [n / statistics.median(column) for column in zip(*seconds)]
    ratio = statistics.median(b / a for a, b in seconds)
    print(f"{what}: {rates[0]:,.0f} captions/s, pyahocorasick {rates[1]:,.0f}/s, median ratio {ratio:.2f}", flush=True)


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


def shapes(world):
    """Precision and recall of `label` on the yfcc set, of which the renderer's seed tells the truth."""
    s, rng = bd.TRAIN_SETS["yfcc"], bd.rng_of(0, "yfcc", "order")
    order = rng.permutation(len(bd.CONCEPTS))
    rows = list(bd.open_tables([f"{world}/yfcc/train.tsv"])[1])
    counts = bd.zipf_counts(len(rows), order, s["zipf"])
    truth = rng.permutation(np.repeat(np.arange(len(order)), counts))
    classes = bd.class_rows(f"{world}/classes.tsv")
    names = [(name, label) for label, row in enumerate(classes) for name in bd.names_of(row)]
    for rule in bd.RULES:
        found = bd.Matcher(names, rule, lemmas="none").match([row["caption"] for row in rows])
        labels = np.array([c[0] if len(c) == 1 else -1 for c in found])
        right = int(((labels >= 0) & (labels == truth)).sum())
        print(f"shapes {rule:>11}: precision {right / (labels >= 0).sum():.3f}, recall "
              f"{right / (truth < len(classes)).sum():.3f}, several {sum(len(c) > 1 for c in found)}")  # fmt: skip


def main(wnids, wordnet, *world):
    glosses = [gloss for part in ("noun", "verb", "adj", "adv") for _, gloss in bd.read_synsets(wordnet, part).values()]
    synsets = bd.read_synsets(wordnet)
    names = [(word, i) for i, wnid in enumerate(Path(wnids).read_text().split()) for word in synsets[wnid[1:]][0]]
    chunks = list(bd.in_chunks(glosses))
    repeats = 9  # 9 x 117,659 sentences, more than 1 M
    automaton = automaton_of([(name.lower(), label) for name, label in names])

    def ours(matcher):
        for chunk in chunks * repeats:
            matcher.match(chunk)

    def theirs(automaton, is_lower):
        for _ in range(repeats):
            for _ in by_automaton(automaton, glosses, is_lower):
                pass

    bag = bd.Matcher(names, "bag", wordnet=wordnet)
    word = bd.Matcher(names, "word")
    for rule, matcher in (("bag", bag), ("word", word)):
        n = repeats * len(glosses)
        compare(f"frequency --match {rule}", lambda m=matcher: ours(m), lambda: theirs(automaton, True), n, 3)

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
    automaton, repeats = automaton_of([(entry, i) for i, entry in enumerate(entries)]), 1
    compare("curate", lambda: ours(metaclip), lambda: theirs(automaton, False), len(glosses), 3)
    if world:
        shapes(world[0])


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
