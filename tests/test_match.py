"""build_datasets.py, matching: lemmatisers against WordNet's files and NLTK, every rule against a slow independent one."""

import functools
import os
import random
import re
import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import build_datasets as bd

WORDNET = "/usr/share/wordnet"  # Debian: apt install wordnet-base
needs_wordnet = pytest.mark.skipif(not os.path.isfile(f"{WORDNET}/data.noun"), reason="WordNet's files are not here")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    """A small WordNet in the files' own format."""
    folder = tmp_path_factory.mktemp("wordnet")
    exceptions = "teeth tooth\nmen man\naxes ax axis\nattorneys_general attorney_general\nc-t cat\n"
    lemmas = "dog leaf boss bos church crane bird box woman us u as a cat data datum tooth man ax glass wolf pas pass"
    index = "  1 licence\n" + "".join(f"{w} n 1 0 1 0 {i:08d}  \n" for i, w in enumerate(lemmas.split(), 1))
    index += "attorney_general n 1 0 1 0 00000099  \n"
    lines = "  1 licence\n"
    for words, gloss in (
        ("02 maillot 0 tank_suit 0", 'a suit; "she wore a maillot"'),
        ("01 Crane 0", "a bird"),
        ("01 crane 1", "lifts; heavy"),
    ):
        lines += f"{len(lines):08d} 06 n {words} 001 @ 00000000 n 0000 | {gloss}  \n"
    for name, text in (("noun.exc", exceptions), ("index.noun", index), ("data.noun", lines)):
        (folder / name).write_text(text)
    return str(folder)


def slow_nltk(word, exceptions, index):
    """WordNetLemmatizer.lemmatize(word) as the methods describe it, written apart from the script."""
    rules = "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y".split()
    forms = [word]
    if word in exceptions:
        forms += exceptions[word]
    else:
        for rule in rules:
            old, new = rule.split(":")
            if word.endswith(old):
                forms.append(word[: len(word) - len(old)] + new)
    forms = [form for form in forms if form in index]
    return sorted(forms, key=len)[0] if forms else word


def test_morphy_and_nltk_differ_as_the_methods_say():
    exceptions, index = (
        {"men": ["man"], "data": ["datum"], "teeth": ["tooth"]},
        {*"us u as a boss bos pass pas men man data datum teeth tooth boxful leaf leaves sunglass".split()},
    )
    table = {  # word: (morphy, NLTK); methods_data.md 1.1
        "us": ("us", "u"), "as": ("as", "a"), "boss": ("boss", "bos"), "pass": ("pass", "pas"), "men": ("man", "men"),
        "data": ("datum", "data"), "teeth": ("tooth", "teeth"), "sunglasses": ("sunglass", "sunglass"),
    }  # fmt: skip
    for word, (morphy, nltk) in table.items():
        assert (bd.morphword(word, exceptions, index) or word, bd.nltk_lemma(word, exceptions, index)) == (morphy, nltk)


@needs_wordnet
def test_morphy_on_wordnet():
    exceptions, index = bd.read_nouns(WORDNET)
    lines = [line.split() for line in open(f"{WORDNET}/noun.exc", encoding="utf-8")]
    first = {}
    for form, *bases in lines:
        first.setdefault(form, bases)
    assert len(lines) == 2054 and sum(len(line) > 2 for line in lines) == 72
    assert all(bd.morphword(form, exceptions, index) == bases[0] for form, bases in first.items())
    oracles = {"axes": "ax", "churches": "church", "women": "woman", "ies": "ie", "glass": None,
               "boxesful": "boxful", "dog": None}  # fmt: skip
    assert {word: bd.morphword(word, exceptions, index) for word in oracles} == oracles
    single = [w for w in index if w.isalpha()]
    draw, n = random.Random(0), 0
    for word in draw.sample(
        [w for w in single if len(w) > 3], 30_000
    ):  # inflect regularly; skip what morphy reads in another way
        plural = (word + "es" if re.search("(s|x|z|ch|sh)$", word) else
                  word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s")  # fmt: skip
        base = bd.morphword(plural, exceptions, index)
        others = [plural[:-1], plural[:-2], plural[:-3] + "y"]
        assert base in (word, *exceptions.get(plural, ())) or base in others and base in index, (word, plural, base)
        n += base == word
    assert n > 20_000


@needs_wordnet
def test_nltk_lemma_and_its_inverse_on_wordnet():
    exceptions, index = bd.read_nouns(WORDNET)
    assert len(index) == 117_798
    words = [w for w in (*index, *exceptions) if w.isalpha()]
    words += [w + ending for w in words[::7] for ending in ("s", "es", "ful", "men", "ves")]
    reference = {w: slow_nltk(w, exceptions, index) for w in words}
    assert {w: bd.nltk_lemma(w, exceptions, index) for w in words} == reference
    draw = random.Random(1)
    for kind, lemma_of in (("nltk", reference), ("morphy", {w: bd.lemmatiser("morphy", WORDNET)(w) for w in words})):
        vocabulary = {lemma_of[w] for w in draw.sample(words, 2000)}
        forms = bd.forms_of(vocabulary, kind, WORDNET)
        assert {w: forms.get(w) for w in words} == {w: lemma if lemma in vocabulary else None for w, lemma in lemma_of.items()}  # fmt: skip


@needs_wordnet
def test_nltk_itself():
    nltk = pytest.importorskip("nltk")
    from nltk.corpus.reader.wordnet import WordNetCorpusReader
    from nltk.tokenize import NLTKWordTokenizer

    text = "we cannot and gonna gotta lemme gimme wanna wanna go dont tis twas more wanna"
    expected = [part for word in text.split() for part in bd.CONTRACTIONS.get(word, (word,))]
    assert NLTKWordTokenizer().tokenize(text) == expected and nltk
    reader = object.__new__(WordNetCorpusReader)  # only its lemmatiser, on our files
    exceptions, index = bd.read_nouns(WORDNET)
    reader._exception_map, reader._lemma_pos_offset_map = {"n": exceptions}, {w: {"n": 1} for w in index}
    for word in random.Random(2).sample(sorted(index), 5000) + sorted(exceptions):
        for form in (word, word + "s"):
            found = reader._morphy(form, "n")
            assert bd.nltk_lemma(form, exceptions, index) == (min(found, key=len) if found else form), form


@functools.lru_cache(20_000)
def slow_tokens(text, lemma_of):
    text = re.sub("[^a-z ]", " ", text.lower())
    for word in ("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"):
        text = re.sub(rf"\b({word[:3]})({word[3:]})\b", r"\1 \2", text)
    return {lemma_of(word) for word in text.split()}


def slow_match(caption, names, negatives, rule, lemma_of):
    """Classes of a caption, straight from the table of methods_data.md 1: all classes one after another."""
    found = set()

    def tokens(text):
        return slow_tokens(text, lemma_of)

    def holds(text, name):
        if rule == "bag":
            return tokens(name) <= tokens(text)
        if rule == "substring":
            return name.lower() in text.lower()
        if rule == "word":
            return re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", text.lower()) is not None
        if rule == "regex-lemma":
            return re.search(rf"\b({name})\b", text, re.I) is not None
        if rule == "laionet":
            text = text.translate(dict.fromkeys(map(ord, string.punctuation), " "))
        else:
            for mark in ",.;:?!`":
                text = text.replace(mark, f" {mark} ")
            text = re.sub("[\t\n\r]", " ", text)
        return f" {name} " in f" {text} "

    for name, label in names:
        if holds(caption, name):
            found.add(label)
    for name, label in negatives:
        bad = bool(tokens(name) & tokens(caption)) if rule == "bag" else holds(caption, name)
        if bad:
            found.discard(label)
    return tuple(sorted(found))


WORDS = (
    "red crane cranes bird St. R.V. o'clock dog dogs leaves glass-box cat café Great white shark sea lion cannot can"
)
WORDS = [
    *WORDS.split(),
    "a",
    "b",
    "lions",
    "over, sea",
    "not",
    "us",
    "new york",
    "(box)",
    "boxes",
    "rave",
    "Ünder",
    "_x",
    "b_1",
    "4x4",
    "İs",
]
GLUE = st.sampled_from([" ", "  ", ", ", "-", ".", "\n", "’", "", " ! ", "\t", "\0"])
CAPTION = st.lists(st.tuples(st.sampled_from(WORDS), GLUE), max_size=8).map(lambda p: "".join(a + b for a, b in p))
NAMES = ["crane", "red crane", "St.", "R.V.", "dog", "leaf", "glass", "box", "white shark", "sea lion", "lion", "a", "b a",
         "can not", "café", "o'clock", "new york sea lion", "great white shark", "cats", "us", "red red red", "lions sea",
         "4x4", "_x", "b_1", "crane", "lion", "sea"]  # fmt: skip


@pytest.mark.parametrize("rule", bd.RULES)
@settings(max_examples=150, deadline=None)
@given(captions=st.lists(CAPTION, min_size=1, max_size=4), seed=st.integers(0, 5))
def test_every_rule_equals_the_slow_one(wordnet, rule, captions, seed):
    draw = random.Random(seed)
    names = [(name, draw.randrange(12)) for name in NAMES]
    negatives = [("bird", draw.randrange(12)), ("red dog", draw.randrange(12))]
    matcher = bd.Matcher(names, rule, negatives, lemmas="nltk", wordnet=wordnet)
    lemma_of = lambda word: slow_nltk(word, *bd.read_nouns(wordnet))  # noqa: E731
    expected = [slow_match(c.replace("\0", " "), names, negatives, rule, lemma_of) for c in captions]  # NUL is a blank
    assert matcher.match(captions) == expected


LONG = "abcdefgh" * 3
TEXT = st.lists(
    st.sampled_from([*"abs sé_1'-.,?\0\n ΣİÅK日’\U0001f600\ud800", "as ", LONG, "cannot ", " s"]), max_size=25
)


@pytest.mark.parametrize("rule", bd.RULES)
@settings(max_examples=100, deadline=None)
@given(captions=st.lists(TEXT.map("".join), max_size=6), others=st.lists(TEXT.map("".join), max_size=3), data=st.data())
def test_any_text_in_any_blocks_whatever_the_hash(wordnet, rule, captions, others, data):
    """Names are cut from the captions, so that they are there, overlap and are shared. With a factor of 0 all hashes are
    one, with 1 the short ones lead to few slots: only what is compared byte by byte is right then."""
    if rule == "regex-lemma":  # which folds case in its own way beyond ASCII, and has names that are no expressions
        captions = [re.sub("[ΣİK]", "e", caption) for caption in captions]
    names, negatives = [], []
    for text in captions * 2 + others:
        start, size, label = (data.draw(st.integers(0, n)) for n in (20, 30, 4))
        name = text[start : start + size].replace("\0", " ")
        if rule == "regex-lemma":
            name = re.sub(r"[^\w ]|[ΣİK]", "", name)
        if re.search("[a-z]", name.lower()) if rule == "bag" else name not in ("", " "):
            (names if data.draw(st.booleans()) or not names else negatives).append((name, label))
            names.append((name, 4 - label))
    lemma_of = lambda word: slow_nltk(word, *bd.read_nouns(wordnet))  # noqa: E731
    expected = [slow_match(c.replace("\0", " "), names, negatives, rule, lemma_of) for c in captions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bd, "GOLDEN", np.uint64(data.draw(st.sampled_from([int(bd.GOLDEN), 0, 1]))))
        patch.setattr(bd, "CHARS_AT_ONCE", data.draw(st.sampled_from([bd.CHARS_AT_ONCE, 1, 20])))
        matcher = bd.Matcher(names, rule, negatives, wordnet=wordnet)
        assert matcher.match(captions) == expected
        rows, labels = matcher.pairs(captions)
    assert list(zip(rows.tolist(), labels.tolist())) == [(i, label) for i, row in enumerate(expected) for label in row]


def test_what_is_beside_a_token_decides():
    names = [
        ("(box)", 0),
        ("box", 1),
        ("a_b", 2),
        ("x-ray", 3),
        ("caf", 4),
        ("é", 5),
        (LONG, 6),
        (LONG[:-1], 7),
        ("$", 8),
    ]
    captions = ["(box)", "x(box)", "(box)x", "a_b", "a_b_", "x-ray x-rays", "café", "é é", LONG, "a$b $", "x\0ray", ""]
    expected = [(0, 1), (1,), (1,), (2,), (), (3,), (), (5,), (6,), (8,), (), ()]
    assert bd.Matcher(names, "word").match(captions) == expected
    assert bd.Matcher(names, "word").match([]) == []
    assert bd.Matcher([("a\0b", 0)], "word").match(["a b", "a\0b"]) == [(0,), (0,)]  # a NUL is a blank, in names too


def test_bag_takes_only_letters_for_words(wordnet):
    """The fixture's noun.exc has "c-t" as a form of "cat", but its words in a caption are "c" and "t"."""
    assert bd.Matcher([("cat", 0)], "bag", wordnet=wordnet).match(["c-t", "cat-s", "cats"]) == [(), (0,), (0,)]


@pytest.mark.parametrize("rule", ["word", "substring", "regex-lemma"])
def test_case(rule):
    matcher = bd.Matcher([("Dog", 0), ("R.V.", 1)], rule, is_sensitive=True)
    assert matcher.match(["a Dog", "a dog", "r.v. x"]) == [(0,), (), ()]


def test_oracles():
    names = [("sea lion", 150), ("lion", 291), ("crane", 134), ("crane", 517), ("red red", 5), ("red", 6)]
    matcher = bd.Matcher(names, "word", [("bird", 517)])
    captions = ["Two Sea Lions, one sea lion", "sealion", "a crane bird", "red red red"]
    assert matcher.match(captions) == [(150, 291), (), (134,), (5, 6)]
    assert matcher.longest(captions[0], (150, 291)) == (150,)
    assert matcher.longest("a sea lion and a lion", (150, 291)) == (150, 291)
    entries = ["photo", "red", "red red", "o'clock", "St. Louis", "photo!"]
    found = bd.Matcher([(e, i) for i, e in enumerate(entries)], "metaclip").match(
        ["A red red photo! St. Louis o'clock"]
    )
    assert [entries[i] for i in found[0]] == ["photo", "red", "red red", "o'clock"]  # methods_data.md 6
    laionet = bd.Matcher([("great white shark", 2)], "laionet")
    assert laionet.match(["A great, white shark", "great white shark.", "Great white shark"]) == [(), (2,), ()]
    assert bd.Matcher([("R.V.", 0)], "regex-lemma").match(["a rover", "a rove", "rave on"]) == [(), (0,), (0,)]


def test_names_that_say_nothing_are_refused(wordnet):
    for name, rule in (("日本", "bag"), ("", "word"), ("12", "bag"), ("", "substring")):
        with pytest.raises(SystemExit, match="nothing to look for"):
            bd.Matcher([(name, 0)], rule, lemmas="none")
    with pytest.raises(SystemExit, match="is no regular expression"):
        bd.Matcher([("a (b", 0)], "regex-lemma")
    with pytest.raises(SystemExit, match="--wordnet is the folder"):
        bd.Matcher([("a", 0)], "bag", wordnet="/nowhere")


@needs_wordnet
def test_bag_of_words_on_real_sentences():
    """The paper's counts, 2,000 glosses x 150 synsets' words, class by class, caption by caption."""
    synsets = list(bd.read_synsets(WORDNET).values())
    draw, lemma = random.Random(3), {}
    glosses = [gloss for _, gloss in draw.sample(synsets, 2000)] + ["Red cranes over the harbour", "silk bow tie"]
    names = [(word, label) for label, (words, _) in enumerate(draw.sample(synsets, 150)) for word in words]
    names = [pair for pair in names if re.search("[a-z]", pair[0].lower())] + [
        ("crane", 150),
        ("bow", 151),
        ("tree", 152),
    ]
    negatives = [("tie", 151), ("tall plant", 152)]
    matcher = bd.Matcher(names, "bag", negatives, wordnet=WORDNET)

    def lemma_of(word):
        return lemma.setdefault(word, slow_nltk(word, *bd.read_nouns(WORDNET)))

    expected = [slow_match(gloss, names, negatives, "bag", lemma_of) for gloss in glosses]
    assert matcher.match(glosses) == expected and sum(map(bool, expected)) > 20


@needs_wordnet
def test_the_benchmark_of_a_stream_runs(tmp_path):
    """benchmarks/stream.py calls the inside of frequency: a second of its captions."""
    ids = [line.split(" ")[0] for line in open(f"{WORDNET}/data.noun", encoding="utf-8") if line[0] != " "]
    (tmp_path / "wnids.txt").write_text("".join(f"n{number}\n" for number in ids[:50]))
    script = os.path.join(os.path.dirname(bd.__file__), "benchmarks", "stream.py")
    command = [sys.executable, script, str(tmp_path / "wnids.txt"), WORDNET, "0.01", "frequency"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" MiB") >= 2 and done.stdout.count("a projection") == 2
