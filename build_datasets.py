# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "scipy", "pillow", "tqdm", "torch>=2.6", "torchvision"]
# ///
"""Build the data sets that the training scripts read: a folder ("world") of TSV tables and uint8 pixels.

    python build_datasets.py shapes                                          # data/shapes, about a minute
    python build_datasets.py shapes --out data/shapes1 --seed 1              # frequencies, images and words redrawn
    python build_datasets.py shapes --out data/atomic --names atomic         # one invented word per class
    python build_datasets.py shapes --out data/noisy --caption-noise 0.065   # more captions that are vague or wrong
    python build_datasets.py shapes --out /tmp/small --size 0.02             # a few rows of everything, for tests
    python build_datasets.py index shards/ --out data/web/train.tsv --holdout 0.1      # tars of img2dataset
    python build_datasets.py index imagenet/train --out data/imagenet/train.tsv        # class folders
    python build_datasets.py index photos/ --out data/photos/train.tsv                 # 1.jpg 1.txt 2.jpg 2.txt ...

shapes renders a world from nothing: 32 x 32 pictures of 24 outlines x 5 surface patterns ("striped star"), 120 classes.

    in    a seed
    out   OUT/classes.tsv                 name, synonyms ("|" between), definition; row i is label i
          OUT/<set>.tsv, <set>.npy        test sets val v2 sketch rendition objectnet adversarial, 25 images per class
          OUT/<set>/train.tsv, train.npy  training sets imagenet incaps laionet balanced yfcc web
          OUT/unseen/                     classes.tsv, train.tsv, test.tsv of the 90 concepts that are no classes
          OUT/<set>4k/train.tsv           4,000 rows of incaps and of laionet, same images, same shape of the tail
          OUT/bpe.txt                     byte-level BPE merges of the world's words, CLIP's file format
          OUT/preview.png, world.json     a contact sheet; the parameters (present = the world is complete)

Tables have a header, tabs, no quoting, and the columns image (`val.npy:17` is row 17), label (empty: none), caption,
title, tags, description, similarity, source. A world appears whole or not at all: it is rendered in OUT.partial and
renamed. The same seed gives the same bytes for every number of workers; across machines a pixel may differ by one
grey level, as the last bit of a float32 sine may.

index lists images where they lie; nothing is unpacked, copied or decoded.

    in    tars: any uncompressed webdataset-like tar. Consecutive members with one key (the path up to the first dot of
          the base name) are a sample: an image, .txt (caption), .json (further columns), .cls (label). Beside it, if
          there: NAME.parquet (further columns for the same key; needs pyarrow) and NAME_stats.json (checked)
          or class folders: FOLDER/n01440764/*.JPEG; label = place of the folder in sorted order, or the row of
          classes.tsv whose wnid or name is the folder's name
          or a flat folder of images with .txt and .json of the same name; img2dataset's folders of files (its default
          format) are such: FOLDER/00000/*.jpg, with 00000.parquet and 00000_stats.json beside 00000, read as of a tar
    out   OUT.tsv        image (`00000.tar:512:34567` or `photos/1.jpg`, relative to the table's folder), label,
                         caption, then every further key, sorted; nested values as compact JSON
          val.tsv        beside it, with --holdout: the rows whose hash of seed and key is below that fraction
          classes.tsv    beside it, for class folders, if there is none yet
          OUT.tsv.json   command line, flags, inputs, counts of all that was dropped or repaired, warnings, date

The caption is the .txt, else the JSON's caption, text or title; the label is the .cls, else the JSON's label. The
JSON's own image, label and caption make no columns; a key in JSON and parquet is taken from the JSON. Rows are in the
order of the sources, sorted, and inside them of the tar or of the file names, whatever the number of workers.

classes, incaps, label, laionet, metadata, curate, frequency and status build tables from texts; each --help says what
goes in and has an example. Inputs are TSV, CSV, JSONL (each perhaps .gz), parquet and tars: files, folders and globs.
Beside OUT.tsv comes OUT.tsv.json with command line, flags, what was lost at each step and size and hash of each file
that was read, class lists, embeddings and WordNet's too; of a tar, which is not read whole, the hash of its first and
last MiB, of a folder of pictures that of names, sizes and texts. Input files are the unit of work: each leaves a part
in OUT.tsv.parts, named by what it was made from, so a killed run goes on where it was unless an input has changed, and
shards merge to the same bytes as one run.

    python build_datasets.py label data/shapes/yfcc/train.tsv --classes data/shapes/classes.tsv --out yfcc_cls.tsv
    python build_datasets.py metadata data/shapes/web/train.tsv --min-pmi 3 --out entries.tsv
    python build_datasets.py curate data/shapes/web/train.tsv --metadata entries.tsv --cap 200 --out curated.tsv

check, dedup, prune, subset, mix and stats work on tables of images, with the same reports; what is drawn depends on a
hash of the row, so a cut is the same for any order and repeated calls. All commands read img2dataset's folder, of tars
or of folders of files, with what lies beside these, as the table that index writes of it; one shard, and a flat folder
of pictures with texts, too. For texts alone shards/*.parquet is read faster, and is all there is of the format parquet.

    python build_datasets.py check data/shapes/laionet/train.tsv --out bad.tsv
    python build_datasets.py dedup data/shapes/web/train.tsv --by pixels phash --out web.tsv
    python build_datasets.py stats data/shapes/laionet/train.tsv data/shapes/incaps/train.tsv --out stats.tsv

Deviations from the paper's and the data sets' own builders:
 1. All names are looked for in one pass over the captions; theirs went through classes x captions. What a rule matches
    is what it matched there (RULES, tests), punctuation and case included.
 2. Negative words and rewritten names are columns of classes.tsv, not code, and names that several classes have
    (maillot, crane) are reported; theirs counted each caption for all of them silently.
 3. What is drawn depends on a seed and a hash of the row: theirs cut tails and matched frequencies without a seed, and
    depended on the order of the rows.
 4. Tables know no quoting; theirs were written quoted and read unquoted.
 5. ImageNet-Captions keeps title, tags and description as columns, and captions are made of them in training; theirs
    were one file a variant, with the class name put before the text and one template drawn an image.
 6. A threshold of laionet can be moved later: the similarity is a column.
"""

import argparse
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import heapq
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import struct
import sys
import tempfile
import threading
import time
import unicodedata
import zipfile
import zlib
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import compress, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

# ------------------------------------------------------------------------------ flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """An example stays in one line, so that it can be copied."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith("example: ") else super()._fill_text(text, width, indent)


def usable_cores():
    """Cores that this process may use, shared with those that torchrun started beside it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def parse_args(argv=None):
    style = dict(formatter_class=HelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(description="Build data sets for the training scripts.", **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, text, example, about):
        epilog = f"example: python build_datasets.py {name} {example}"
        return commands.add_parser(name, help=text, description=about, epilog=epilog, **style)

    shapes = add("shapes", "render the built-in world of shapes",
                 "--size 0.02 --out data/small",
                 "In: nothing. Out: a folder with classes.tsv, bpe.txt, test sets as SET.tsv and SET.npy, and "
                 "training sets as SET/train.tsv and train.npy, a long-tailed world of 120 classes at 32 px.")
    shapes.add_argument("--out", default="data/shapes", help="folder to write; must not exist, or hold this very world")
    shapes.add_argument("--seed", type=int, default=0, help="redraws class frequencies, images and captions")
    shapes.add_argument("--size", type=float, default=1.0, help="factor on the rows of every set; 0.02 for a test")
    shapes.add_argument("--names", choices=("compositional", "atomic"), default="compositional",
                        help="'striped star', or one invented word per class (then synonyms and definitions matter)")
    shapes.add_argument("--caption-noise", type=float, default=0.01,
                        help="share of the captions of laionet, balanced, yfcc and web that do not say what is shown: "
                             "8 of 13 name nothing, the others another class")

    index = add("index", "table of the images in tars, class folders or a flat folder",
                "tests/samples/shards --holdout 0.5 --out data/web/train.tsv",
                "In: tars as img2dataset and webdataset write them, folders of them, class folders, or a flat folder "
                "of pictures with .txt and .json of the same names. Out: a table of image, label, caption and the "
                "keys of the .json; images stay where they are.")
    index.add_argument("sources", nargs="+", metavar="SOURCE", help="tars, or folders (of tars, of classes, or flat)")
    index.add_argument("--out", required=True, help="table to write, ending in .tsv; val.tsv and OUT.json go beside it")
    index.add_argument("--holdout", type=float, default=0.0, help="fraction of rows that go to val.tsv; 0: none")
    index.add_argument("--classes", help="classes.tsv that gives folders their labels; default: beside --out, if any")
    index.add_argument("--seed", type=int, default=0, help="redraws which rows --holdout takes")

    classes = add("classes", "classes.tsv from a list of wnids or names",
                  "data/shapes/classes.tsv --out names.tsv",
                  "In: a text file of wnids, which need --wordnet, or of names, which may do without. Out: "
                  "classes.tsv, row i is label i; on the screen the names that several classes or synsets have.")
    classes.add_argument("list", help="text file, a class a line in label order: wnid or name, perhaps a tab and the "
                         "name to show (wnid) or synonyms with | and a definition (name); or a wnid, a blank and its "
                         "names, commas between, as in LOC_synset_mapping.txt; a line `#`, or one that begins with # "
                         "and a blank, is a comment, `#1 pencil` is a class; a header `name synonyms definition`, or "
                         "`wnid`, is none")
    classes.add_argument("--out", required=True,
                         help="classes.tsv to write: name, synonyms, definition, wnid, negative, match, query")
    classes.add_argument("--wordnet", help="folder of WordNet 3.0's data.noun, index.noun, noun.exc")
    classes.add_argument("--extra", help="table with wnid or name, and columns that replace: negative (words that "
                         "exclude a caption, | between), match (names to look for instead of name and synonyms), "
                         "query (laionet compares captions with `query which is definition`; default: a wnid's "
                         "first synonym, else the name)")

    incaps = add("incaps", "ImageNet-Captions: its JSON joined with the images",
                 "tests/samples/imagenet_captions.json --images tests/samples/imagenet --classes "
                 "tests/samples/imagenet_classes.tsv --out incaps.tsv",
                 "In: the JSON, ImageNet's pictures, classes.tsv with wnids. Out: a row for each picture that is "
                 "there, with label, title, tags, description, all three as caption; counts of what each join lost.")
    incaps.add_argument("json", help="imagenet_captions.json, perhaps .gz: list of filename, wnid, title, description, "
                        "tags")  # fmt: skip
    incaps.add_argument("--images", required=True, help="folder of class folders, or index's table of it")
    incaps.add_argument("--seed", type=int, default=0, help="redraws the order of the rows")
    incaps.add_argument("--keep-repeats", action=argparse.BooleanOptionalAction, default=False,
                        help="keep records that repeat a file name (448,896 rows instead of 443,798)")

    label = add("label", "class labels for captions that name a class",
                "data/shapes/yfcc/train.tsv --classes data/shapes/classes.tsv --match word --out yfcc_cls.tsv",
                "In: tables with texts. Out: the rows that name a class, all their columns, with label; the label they "
                "had is source_label.")
    label.add_argument("--match", choices=("bag", "word", "regex-lemma", "substring"), default="word",
                       help="; ".join(f"{rule}: {RULES[rule]}" for rule in ("bag", "word", "regex-lemma", "substring")))
    label.add_argument("--multi", choices=("longest", "drop", "all", "first"), default="longest",
                       help="rows that name several classes: longest: a name inside a longer one does not count, then "
                       "drop; drop: out (YFCC15M-Cls); all: a row for each (CC12M-Cls); first: the lowest label")
    label.add_argument("--case", choices=("auto", "sensitive", "insensitive"), default="auto",
                       help="auto: as published, sensitive for substring only; bag never is")

    laionet = add("laionet", "LAIONet: rows that name just one class and are similar to its definition",
                  "data/shapes/laionet/train.tsv --classes data/shapes/classes.tsv --threshold 0.3 --out laionet.tsv",
                  "In: tables with texts. Out: their rows that name just one class and are similar to its definition, "
                  "with label and similarity; OUT.all.tsv has those that are less similar too. Rows whose NSFW, if "
                  "there is such a column, is not UNLIKELY are left out.")
    laionet.add_argument("--threshold", type=float, default=0.7,
                         help="least similarity of caption and definition; OUT.all.tsv keeps all matched rows with it")
    laionet.add_argument("--clip", help="checkpoint of clip.py whose text tower measures the similarity")
    laionet.add_argument("--embeddings", help="folder with classes.npy [C, D] and TABLE.npy [rows, D] for each input "
                         "file TABLE")
    laionet.add_argument("--similarity", metavar="COLUMN", help="column that has the similarity of text and definition "
                         "already; without any of the three `similarity`, if there are labels too, as in laionet's own "
                         "tables and the shapes world: LAION's is of image and text (it stays, as source_similarity)")

    curate = add("curate", "MetaCLIP: captions balanced over the entries of a metadata",
                 "data/shapes/web/train.tsv --metadata tests/samples/entries.tsv --cap 200 --out curated.tsv",
                 "In: tables with texts, and entries. Out: the rows that are kept, all their columns; OUT.entries.tsv "
                 "has entry, count, probability (of a row to be kept by it) and kept.")
    curate.add_argument("--metadata", required=True, help="table with the column entry (see metadata)")
    curate.add_argument("--cap", type=int, default=20_000, help="t: about so many rows are drawn by each entry")
    curate.add_argument("--tail-share", type=float, default=0.0,
                        help="set the cap so that entries up to it have about this share of matches (MetaCLIP: 0.06); "
                        "0: off")
    curate.add_argument("--seed", type=int, default=0, help="redraws which rows are kept")

    metadata = add("metadata", "MetaCLIP's metadata: entries from WordNet and from a corpus",
                   "data/shapes/web/train.tsv --min-pmi 3 --out entries.tsv",
                   "In: texts, perhaps WordNet. Out: a table of entry, source (number, wordnet, word, pair) "
                   "and count. One process, whose memory grows with the distinct words and rare pairs.")
    metadata.add_argument("--wordnet", help="folder of WordNet 3.0's data files; without it none of its synsets")
    metadata.add_argument("--min-count", type=int, default=100, help="least count of a word")
    metadata.add_argument("--min-pmi", type=float, default=30.0,
                          help="least pointwise mutual information of a pair, bits; in n words none has over log2 n")
    metadata.add_argument("--max-entries", type=int, default=500_000, help="stop after so many entries")

    frequency = add("frequency", "how many captions name each class",
                    "data/shapes/web/train.tsv --classes data/shapes/classes.tsv --lemmas none --out counts.tsv",
                    "In: tables with texts. Out: name and count of each class, in label order; with --relevance "
                    "judged, relevant, estimate, low and high too (Wilson, 95 %). With --sample OUT.sample.tsv: name, "
                    "label, definition, key, caption, relevant (empty, to be judged).")
    frequency.add_argument("--match", choices=tuple(RULES), default="bag",
                           help="; ".join(f"{rule}: {text}" for rule, text in RULES.items()))
    frequency.add_argument("--synonyms", help="table of further names: name (of the class; or its "
                           "wnid, which may be a column too), synonyms (| between)")
    frequency.add_argument("--weights", metavar="COLUMN", default="",
                           help="column of whole numbers that a caption counts by, as MetaCLIP's query strings do")
    frequency.add_argument("--sample", type=int, default=0,
                           help="captions per class to write for judging, OUT.sample.tsv, the smallest hashes; 0: none")
    frequency.add_argument("--relevance", help="the judged sample (relevant: yes or no): adds estimates with intervals")
    frequency.add_argument("--seed", type=int, default=0, help="redraws the sample")

    for command in (label, frequency):
        command.add_argument("--lemmas", choices=("nltk", "morphy", "none"), default="nltk",
                             help="for bag: lemmatiser of names and captions; nltk: the paper's; none: none")
        command.add_argument("--wordnet", default="/usr/share/wordnet", help="folder of WordNet 3.0, for lemmas (bag)")
    for command in (incaps, label, laionet, frequency):
        command.add_argument("--classes", required=True,
                             help="classes.tsv: name, synonyms, definition, match, query, negative (not laionet)")
    for command in (label, laionet, curate, metadata, frequency):
        command.add_argument("inputs", nargs="+", metavar="TABLE",
                             help="TSV, CSV, JSONL (or .gz), parquet, img2dataset's tars or folders; folders, globs")
        command.add_argument("--columns", nargs="+", default=["caption"],
                             help="columns whose texts are joined and searched")
    for command in (label, laionet, curate, frequency):
        command.add_argument("--workers", type=int, default=usable_cores(),
                             help="processes, a file each; no effect on results")
        command.add_argument("--shard", default="",
                             help="i/n: do every n-th file from the i-th (0-based), then --merge; without it "
                             "torchrun's ranks (RANK of WORLD_SIZE) are such shares, and rank 0 waits for all")
        command.add_argument("--merge", action="store_true", help="only merge what all shards have done")
        command.add_argument("--skip-bad", action="store_true", help="leave out and count rows that cannot be read")

    status = add("status", "what img2dataset got: successes by class and cause, rows to try again",
                 "tests/samples/shards --out retry.tsv",
                 "In: img2dataset's folder. Out: the rows to try again: key, url, caption, label, status, "
                 "error_message; OUT.classes.tsv has label, name, rows, count and success of each class.")
    status.add_argument("folder", help="output folder of img2dataset: NNNNN.parquet, NNNNN_stats.json (needs pyarrow)")
    status.add_argument("--classes", help="classes.tsv, for the names of labels")
    for command in (incaps, label, laionet, curate, metadata, frequency, status):
        command.add_argument("--out", required=True, help="table to write, ending in .tsv; its report is OUT.json")
    def add_common(sub, out="table to write; its report is OUT.json, with what came in, what was lost and why"):
        sub.add_argument("tables", nargs="+", metavar="DATA", help="tables (.tsv .csv .jsonl, .gz of them, .parquet), "
                         "tars of img2dataset, patterns, folders of these, img2dataset's folders of files")  # fmt: skip
        sub.add_argument("--out", required=True, help=out)

    check = add("check", "decode every image, list bad rows, show what is in a table",
                "data/shapes/laionet/train.tsv --sample 1000 --out bad.tsv",
                "In: tables. Out: bad rows with file, line and reason; on the screen three rows, classes and their "
                "frequencies, repeated captions. Exit code 1 when more than --max-bad of the rows are bad.")
    add_common(check, "table of bad rows to write: file, line, image, reason")
    check.add_argument("--sample", type=int, default=0, help="decode so many images, picked by hash; 0: all")
    check.add_argument("--max-bad", type=float, default=0.0, help="fraction of bad rows that is still exit code 0")
    check.add_argument("--max-pixels", type=int, default=89_478_485, help="an image with more is bad, not decoded")
    check.add_argument("--seed", type=int, default=0, help="redraws which images --sample takes")

    dedup = add("dedup", "drop copies inside a data set, or of the images of test sets",
                "data/shapes/web/train.tsv --by pixels phash --out web.tsv",
                "In: tables, and their embeddings for --by embedding. Out: the table without copies: of each "
                "connected component of copies one row stays, by: table of --protect, labelled, larger image (decoded "
                "for --by pixels, dhash, phash; else by the columns width, height or original_width, original_height, "
                "if there), longer caption, smaller name. OUT.pairs.tsv lists the pairs that joined components. With "
                "--against: without the rows that are copies of a row there, nothing else.")
    add_common(dedup)
    dedup.add_argument("--by", nargs="+", required=True, metavar="WHAT",
                       help="what makes copies, one or more of: bytes (of the file), pixels, dhash, phash, caption "
                       "(regardless of case and blanks), embedding, or a column (sha256, url)")  # fmt: skip
    dedup.add_argument("--distance", type=int, default=3, help="dhash, phash: bits that may differ, 0 to 7")
    dedup.add_argument("--cosine", type=float, default=0.6, help="embedding: copies are above it (DINOv2: 0.6 inside a "
                       "set, 0.45 against test sets, with SSCD embeddings)")  # fmt: skip
    dedup.add_argument("--embeddings", nargs="+", default=[], metavar="FILE", help="of the rows, tables by name: .npy "
                       "[N, D], or .npz with `features` (clip.py --eval-only writes it); of pictures, their pixels")
    dedup.add_argument("--protect", nargs="+", default=[], metavar="DATA", help="those of DATA whose rows win")
    dedup.add_argument("--against", nargs="+", default=[], metavar="DATA", help="test sets; their copies are dropped")
    dedup.add_argument("--against-embeddings", nargs="+", default=[], metavar="FILE", help="of the rows of --against")
    dedup.add_argument("--chain", action=argparse.BooleanOptionalAction, default=False, help="with --against: drop the "
                       "copies of a test image's copies too (DINOv2); compares all rows with each other")  # fmt: skip
    dedup.add_argument("--max-pixels", type=int, default=89_478_485, help="an image with more is kept, not decoded")
    dedup.add_argument("--backend", choices=("blocks", "faiss"), default="blocks", help="for embeddings: blocks of a "
                       "matrix product, or exact search by faiss (pip install faiss-cpu); the result is the same")
    dedup.add_argument("--device", default="cpu", help="cpu, or cuda: where embeddings are compared")

    prune = add("prune", "drop rows that are closer to a test set than a small training set is",
                "data/shapes/web/train.tsv --embeddings data/shapes/web/train.npy --small "
                "data/shapes/imagenet/train.npy --tests val=data/shapes/val.npy sketch=data/shapes/sketch.npy --out "
                "'web-{set}.tsv'",
                "In: a table with embeddings, embeddings of a small training set (ImageNet) and of test sets. Out: "
                "one table per test set, without rows whose cosine to some test image is above that image's best in "
                "the small set; `combined` without all of them; of --keep rows: near, far, rand. A table `leaks` "
                "lists what was dropped.")
    add_common(prune, "tables to write; {set} in the name becomes the test set, combined, near, far, rand, leaks")
    prune.add_argument("--embeddings", nargs="+", required=True, metavar="FILE", help="of the rows, tables "
                       "sorted by name: .npy [N, D], or .npz with `features`, as clip.py --eval-only writes; "
                       "pictures: their pixels")  # fmt: skip
    prune.add_argument("--small", nargs="+", required=True, metavar="FILE", help="embeddings of the small training set")
    prune.add_argument("--tests", nargs="+", required=True, metavar="NAME=FILE", help="embeddings of the test sets")
    prune.add_argument("--keep", type=int, default=0, help="rows of near (the least similar stay: the nearest are "
                       "pruned), far (the most similar stay) and rand; 0: none of the three")  # fmt: skip
    prune.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help="compare the rows that "
                       "stay once more with the test sets, and stop if the gap is not closed")  # fmt: skip
    prune.add_argument("--device", default="cpu", help="cpu, or cuda: where embeddings are compared")
    prune.add_argument("--seed", type=int, default=0, help="redraws rand, and the order of equal similarities")

    subset = add("subset", "cut a data set: fraction, shots, classes, frequencies",
                 "data/shapes/laionet/train.tsv --fraction 0.25 --out small.tsv",
                 "In: tables. Out: one table with a part of the rows. Rows are chosen by the hash of seed and key: "
                 "whatever their order (equal image names in several folders share a draw), and the smaller cut lies "
                 "inside the larger, but for --rows with --rescue or --profile. Steps in this order: --threshold, "
                 "--class-list, rows per class (--match-frequency, --shots, --profile), rows in all (--fraction or "
                 "--rows).")
    add_common(subset)
    subset.add_argument("--threshold", metavar="COLUMN=VALUE", help="keep rows of at least that, as similarity=0.7")
    subset.add_argument("--class-list", metavar="FILE", help="keep classes in it: number, name or wnid, one a line; "
                        "adds the column subset_label, their place in the list")  # fmt: skip
    subset.add_argument("--match-frequency", metavar="DATA", help="as many rows of each class as this table has, or as "
                        "its column count says")  # fmt: skip
    subset.add_argument("--fill", nargs="+", default=[], metavar="DATA", help="tables that give what --match-frequency "
                        "lacks; a row that is there already, by --key and label, is not taken again")  # fmt: skip
    subset.add_argument("--shots", type=int, default=-1, help="at most so many rows of each class; -1: no limit")
    subset.add_argument("--trim-tail", type=int, default=0, help="--shots only for so many classes, the least frequent")
    subset.add_argument("--profile", choices=("balanced", "exponential", "pareto"), help="rows per class, the class of "
                        "the most rows first: equal; F^(-i/(C-1)) (Cui et al. 2019); (i+1)^(-ln F/ln C)")  # fmt: skip
    subset.add_argument("--imbalance", type=float, default=100.0, help="F of --profile: largest over smallest class")
    subset.add_argument("--fraction", type=float, default=0.0, help="of the rows left by the other steps; 0: all")
    subset.add_argument("--rows", type=int, default=0, help="rows in all, exactly; 0: as they come")
    subset.add_argument("--rescue", action=argparse.BooleanOptionalAction, default=True, help="--fraction, --rows: a "
                        "class that lost all rows gets one back (--rows: instead of one of a large class)")  # fmt: skip
    subset.add_argument("--key", default="image", help="column that names a row for the hash, e.g. url; names of "
                        "images are relative to the table's folder: of a cut in another folder, a further cut draws "
                        "other rows, unless --key is a column that stays, as url or key")  # fmt: skip
    subset.add_argument("--dry-run", action="store_true", help="print the resulting histogram and write nothing")
    subset.add_argument("--seed", type=int, default=0, help="redraws the rows")

    mix = add("mix", "join data sets in proportions, or whole",
              "data/shapes/laionet/train.tsv data/shapes/incaps/train.tsv --rows 500 --out mix.tsv",
              "In: tables, each a source. Out: one table with a column source. A row whose key is in an earlier "
              "source is a copy and goes.")
    add_common(mix)
    mix.add_argument("--rows", type=int, default=0, help="rows in all; 0: the union, all rows of all sources")
    mix.add_argument("--weights", nargs="+", type=float, default=[], help="share of each source; default: equal")
    mix.add_argument("--spill", action=argparse.BooleanOptionalAction, default=False, help="what a source is short of "
                     "comes from the others; without it that is an error")  # fmt: skip
    mix.add_argument("--key", default="image", help="column that names a row, e.g. url")
    mix.add_argument("--seed", type=int, default=0, help="redraws the rows")

    stats = add("stats", "class frequencies, imbalance and captions of data sets, side by side",
                "data/shapes/incaps/train.tsv data/shapes/laionet/train.tsv --out stats.tsv",
                "In: tables with labels, or with columns name and count. Out: a table on the screen and in --out: "
                "rows, classes, Gini, head share, tail counts, caption lengths; Spearman correlation of the class "
                "counts of each two.")
    add_common(stats)
    stats.add_argument("--plot", help="picture to write: the sorted class counts (needs matplotlib)")
    for command in (shapes, index, check, dedup):
        command.add_argument("--workers", type=int, default=usable_cores(), help="processes; the result is the same")
    for command in (check, subset, stats):
        command.add_argument("--classes", help="classes.tsv; default: beside the first table, or one folder up, if any")

    args = parser.parse_args(argv)
    command = commands.choices[args.command]
    if args.command not in ("shapes", "prune") and not args.out.endswith(".tsv"):
        command.error(f"--out: got {args.out}, expected a file name that ends in .tsv")
    for name, value in vars(args).items():
        if any(v != v for v in (value if isinstance(value, list) else [value])):
            command.error(f"--{name.replace('_', '-')}: got NaN, expected a number")
    for name, least in dict(workers=1, sample=0, keep=0, rows=0, trim_tail=0, max_entries=0, min_count=0).items():
        if (given := getattr(args, name, least)) < least:
            command.error(f"--{name.replace('_', '-')}: got {given}, expected {least} or more")
    for name, most in dict(caption_noise=1, distance=7, cosine=1).items():
        if not 0 <= (given := getattr(args, name, 0)) <= most:
            command.error(f"--{name.replace('_', '-')}: got {given}, expected 0 to {most}")
    if args.command == "shapes":
        if args.seed < 0:
            shapes.error(f"--seed: got {args.seed}, expected 0 or more")
        if not 0 < args.size <= 1000:
            shapes.error(f"--size: got {args.size}, expected a factor above 0 and at most 1000")
    if args.command == "index":
        if not 0 <= args.holdout < 1:
            index.error(f"--holdout: got {args.holdout}, expected a fraction of at least 0 and below 1")
        if args.holdout and os.path.basename(args.out) == "val.tsv":
            index.error("--out: val.tsv is where --holdout writes; call the table train.tsv, or drop --holdout")
        if os.path.basename(args.out) == "classes.tsv":
            index.error("--out: classes.tsv beside a table lists its classes; call the table train.tsv")
    if args.command in ("label", "laionet", "curate", "frequency"):
        place = re.fullmatch(r"(\d+)/(\d+)", args.shard)
        if args.shard and not (place and int(place[1]) < int(place[2])):
            command.error(f"--shard: got {args.shard}, expected i/n with i from 0 to n - 1")
    if args.command == "label" and args.match == "bag" and args.multi == "longest":
        label.error("--multi longest: bag finds words, not places; choose drop, all or first")
    if args.command == "label" and args.match == "bag" and args.case == "sensitive":
        label.error("--case sensitive: bag has no case; choose word, regex-lemma or substring")
    if args.command == "laionet" and sum(map(bool, (args.clip, args.embeddings, args.similarity))) > 1:
        laionet.error("--clip, --embeddings and --similarity: give one of them, by which captions are compared")
    if args.command == "frequency" and args.weights and (args.sample or args.weights in args.columns):
        frequency.error("--weights: a column of its own, and not with --sample, which draws captions, not counts")
    if args.command == "curate" and (args.cap < 1 or not 0 <= args.tail_share < 1):
        curate.error(f"--cap {args.cap} --tail-share {args.tail_share}: expected a cap of 1 or more, a share in 0..1")
    if args.command == "dedup":
        if ("embedding" in args.by) != bool(args.embeddings):
            dedup.error("--by embedding and --embeddings go together")
        if args.backend == "faiss" and not args.embeddings:
            dedup.error("--backend faiss: only embeddings are searched by faiss")
        if args.against_embeddings and not (args.against and args.embeddings):
            dedup.error("--against-embeddings: only with --against and --by embedding")
        if args.chain and not args.against:
            dedup.error("--chain: only with --against; without it copies of copies go anyway")
        if args.against and not args.chain and len(args.by) > 1:
            dedup.error("--against: give one --by at a time, or --chain")
        if args.against and args.protect:
            dedup.error("--protect: with --against no row is kept because it comes first; protect has no use there")
    if args.command == "prune":
        if "{set}" not in os.path.basename(args.out) or not args.out.endswith(".tsv"):
            prune.error(f"--out: got {args.out}, expected a file name with {{set}} in it that ends in .tsv")
        names = [test.partition("=")[0] for test in args.tests]
        if not all("=" in test for test in args.tests) or len(set(names)) < len(names):
            prune.error(f"--tests: got {' '.join(args.tests)}, expected NAME=FILE, each name once")
        if set(names) & {"combined", "near", "far", "rand", "leaks"}:
            prune.error("--tests: combined, near, far, rand and leaks are the names of other tables")
    if args.command == "subset":
        if not 0 <= args.fraction <= 1 or args.fraction and args.rows:
            subset.error("--fraction and --rows: expected one of them, the fraction 0 to 1")
        if args.profile and (args.match_frequency or args.fraction or not 1 <= args.imbalance < math.inf):
            subset.error("--profile: not with --match-frequency or --fraction, and --imbalance is a number from 1 on")
        if args.profile and args.rows and args.shots >= 0:
            subset.error("--profile with --rows: not with --shots, which leaves other numbers of rows")
        if args.trim_tail and args.shots < 0 or args.fill and not args.match_frequency:
            subset.error("--trim-tail needs --shots, --fill needs --match-frequency")
        if args.threshold and not re.fullmatch(r".+=-?(\d+\.?\d*|\.\d+)", args.threshold, re.A):
            subset.error(f"--threshold: got {args.threshold}, expected COLUMN=NUMBER")
    if args.command == "mix" and args.weights and not args.rows:
        mix.error("--weights are of --rows, which is not given")
    if args.command == "mix" and args.weights and (len(args.weights) != len(args.tables) or min(args.weights) <= 0
                                                   or not math.isfinite(2.0**63 * sum(args.weights))):
        mix.error(f"--weights: got {args.weights}, expected a positive number for each of {len(args.tables)} sources")
    if args.command == "stats" and os.path.splitext(args.plot or "")[1] not in ("", ".png", ".pdf", ".svg", ".jpg"):
        stats.error(f"--plot: got {args.plot}, expected a name that ends in .png, .pdf, .svg or .jpg")
    return args


# ------------------------------------------------------------------------------ tables

# Everything that some reader of text takes for the end of a line, of a field or of the text.
BREAKS = re.compile("\r\n|[\0\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")


def tsv_field(value) -> str:
    """One field of a table: tabs, NUL, line breaks become spaces; None, NaN are empty; lists, dicts, bools are JSON."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif isinstance(value, (dict, list, bool)):
        # default=str: parquet nests dates. Escaped line breaks stay escaped inside JSON.
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    text = str(value)
    return text if text.isprintable() else BREAKS.sub(" ", text)  # isprintable: a fast test that nearly all pass


@contextlib.contextmanager
def whole_file(path):
    """A new file, open for writing bytes, that appears whole or not at all; a full disk is an OSError with its path."""
    partial, is_whole = f"{path}.partial", False
    try:
        with open(partial, "wb") as f:
            yield f
        os.replace(partial, place_of(path))
        is_whole = True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = path  # write() does not say which file found the disk full
        raise
    finally:
        if not is_whole and os.path.exists(partial):  # bad input or a full disk
            os.remove(partial)


@contextlib.contextmanager
def with_reports(tables, others):
    """Each of these tables appears together with its report: until write_report has written TABLE.json, the table lies
    at TABLE.partial, and an empty, locked TABLE.json.partial says so. others: tables without a report."""
    locks = {}
    for path in (*tables, *(f"{path}.json" for path in tables), *others):
        if os.path.isdir(path):
            raise SystemExit(f"{path}: is a folder, expected the name of a file to write")
    stale = [path for path in others if os.path.exists(f"{path}.json.partial")]  # a killed run called its table so
    try:
        for path in (*tables, *stale):  # now, not after all the work
            lock = open(f"{path}.json.partial", "ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"{path}: another process is writing it; give another --out, or wait") from None
            locks[path] = lock
            if os.path.exists(f"{path}.partial"):
                print(f"note: {path}.partial is of a run that was killed; it is made anew", file=sys.stderr)
        for path in stale:
            Path(f"{path}.json.partial").unlink(missing_ok=True)
            locks.pop(path).close()
        yield
    finally:  # what has no report by now will have none
        for path, lock in locks.items():
            Path(f"{path}.json.partial").unlink(missing_ok=True)
            Path(f"{path}.partial").unlink(missing_ok=True)
            lock.close()


def place_of(path):
    """Where a table is, or is written to: PATH.partial while its report is to come, else PATH."""
    return f"{path}.partial" if os.path.exists(f"{path}.json.partial") else path


def write_tsv(path, columns, rows):
    """A table with a header, tabs between fields, no quoting. It appears whole, and with its report, or not at all.

    rows: iterable of dicts; a missing key is an empty field. Returns: number of rows.
    """
    n, place = 0, {column: i for i, column in enumerate(columns)}
    with whole_file(path) as f:
        f.write("\t".join(map(tsv_field, columns)).encode("utf-8", "replace") + b"\n")
        for n, row in enumerate(rows, 1):  # noqa: B007 (n is the number of rows)
            if len(row) * 8 > len(columns):
                line = "\t".join([tsv_field(row.get(c)) for c in columns])
            else:  # most fields are empty: their tabs at once
                parts, at = [], 0
                for i, column in sorted((place[c], c) for c in row if c in place):
                    parts += "\t" * (i - at), tsv_field(row[column])
                    at = i
                line = "".join(parts) + "\t" * (len(columns) - 1 - at)
            f.write(line.encode("utf-8", "replace") + b"\n")
    return n


def die_with_parent():
    """In a worker: end when the main process is gone, even by kill -9, instead of waiting for jobs for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------ shapes: words

# Word: (synonyms, gloss). No word stands for two things, and no gloss of a class's word uses those of another class.
SHAPES = {
    "circle": (("disc", "round"), "a figure whose rim is everywhere equally far from its middle"),
    "triangle": (("trigon",), "a figure with three straight sides"),
    "square": (("quadrate", "box"), "a figure with four equal sides and right corners"),
    "hexagon": (("hex",), "a figure with six equal sides"),
    "star": (("pentagram",), "a figure with five points"),
    "cross": (("plus",), "a figure of two bars that meet at right corners"),
    "crescent": (("moon", "lune"), "a curved sickle with two thin tips"),
    "heart": (("valentine",), "a figure with two lobes above one tip, the sign of love"),
    "arrow": (("pointer",), "a shaft with a pointed head that shows a direction"),
    "diamond": (("rhombus", "lozenge"), "a figure with four equal sides standing on its tip"),
    "semicircle": (("dome",), "one side of a ring cut through its middle"),
    "oval": (("ellipse", "egg"), "a figure like a stretched ring"),
    "trapezoid": (("trapezium",), "a figure with four sides of which two are parallel and unequal"),
    "ell": (("bracket",), "the capital letter with one upright and one foot"),
    "tee": (("tau",), "the capital letter with one upright and one bar on top"),
    "house": (("hut", "cottage"), "a building with walls, a roof and a chimney"),
    "arch": (("gateway", "vault"), "a curved opening carried by two legs"),
    "bolt": (("lightning", "zigzag"), "a jagged flash from the sky"),
    "drop": (("tear",), "a bead of liquid with a tip above"),
    "hourglass": (("sandglass", "timer"), "a vessel with a narrow waist that measures time with sand"),
    "chevron": (("vee",), "a bent bar that looks like a rank badge"),
    "flower": (("blossom", "bloom"), "a figure with five petals"),
    "crown": (("tiara", "coronet"), "the jagged headdress of a king"),
    "fish": (("trout",), "an animal of the sea with a tail fin"),
    # only in yfcc and web: concepts outside classes.tsv
    "tree": (("pine", "fir"), "a plant with a trunk"),
    "boat": (("ship",), "a vessel with a hull and a sail"),
    "bowtie": (("bow",), "a ribbon knotted at the neck"),
    "gear": (("cog",), "a wheel with teeth"),
    "mushroom": (("toadstool",), "a fungus with a cap on a stem"),
    "parallelogram": (("rhomboid",), "a slanted figure with opposite sides parallel"),
}
PATTERNS = {
    "solid": (("plain", "filled"), "filled with one even colour"),
    "striped": (("banded", "barred"), "covered with parallel bands"),
    "dotted": (("spotted", "speckled"), "covered with little spots"),
    "hollow": (("empty", "outlined"), "drawn as a line with nothing inside"),
    "checkered": (("checked", "chequered"), "covered with fields of two alternating colours"),
    # only in yfcc and web
    "gridded": (("latticed", "meshed"), "covered with thin crossing lines"),
    "halved": (("split", "parted"), "filled on one side only"),
}
N_CLASS_SHAPES, N_CLASS_PATTERNS = 24, 5
# A concept is (shape, pattern). The first 120 are the classes, so a concept's number is its label; then the open world.
CONCEPTS = [(s, p) for s in range(N_CLASS_SHAPES) for p in range(N_CLASS_PATTERNS)]
CONCEPTS += [(s, p) for s in range(len(SHAPES)) for p in range(len(PATTERNS)) if (s, p) not in CONCEPTS]
N_CLASSES = N_CLASS_SHAPES * N_CLASS_PATTERNS

COLOURS = {
    "red": (0.86, 0.12, 0.14), "orange": (0.96, 0.53, 0.10), "yellow": (0.97, 0.87, 0.20), "green": (0.15, 0.58, 0.22),
    "teal": (0.10, 0.62, 0.64), "blue": (0.14, 0.28, 0.82), "purple": (0.48, 0.18, 0.64), "pink": (0.96, 0.56, 0.74),
    "brown": (0.46, 0.29, 0.15), "black": (0.08, 0.08, 0.09), "grey": (0.55, 0.55, 0.56), "white": (0.95, 0.95, 0.94),
}  # fmt: skip
COLOUR_NAMES, COLOUR_RGB = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float32)

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a photo of the {}", "a picture of the {}", "a {}", "the {}")
SENTENCES = ("this is a {}", "here is the {}", "one {} seen from the front", "we see a {}", "{} in detail", "just a {}")
VAGUE = ("figure", "shape", "thing", "object", "item", "something")
NOISE = (
    "vintage", "new", "free", "sale", "cute", "art", "collection", "wallpaper", "logo", "icon", "sticker", "print",
    "design", "poster", "card", "gift", "sample", "original", "handmade", "classic", "modern", "retro", "holiday",
    "summer", "winter", "best", "shop", "stock", "clip", "draft", "copy", "series", "edition", "tutorial", "school",
    "project", "archive", "scan", "untitled", "misc",
)  # fmt: skip


def rng_of(*key):
    """A numpy generator that depends on the key (numbers and strings) and on nothing else."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


@functools.cache
def concept_table(seed, names):
    """The names of all concepts.

    names: "compositional" ("striped star") or "atomic" (one invented word, drawn from the seed).
    Returns: list of dicts, one per concept: name, shape and pattern (each a tuple: the word, then its synonyms),
    synonyms (list of phrases), definition.
    """
    draw = random.Random(f"names {seed}")
    taken = {w for table in (SHAPES, PATTERNS) for word, (others, _) in table.items() for w in (word, *others)}
    table = []
    for s, p in CONCEPTS:
        (shape, (shape_others, shape_gloss)), (pattern, (pattern_others, pattern_gloss)) = (
            list(SHAPES.items())[s], list(PATTERNS.items())[p])  # fmt: skip
        phrases = [f"{a} {b}" for a in (pattern, *pattern_others) for b in (shape, *shape_others)]
        name, synonyms, definition = phrases[0], phrases[1:], f"{shape_gloss}, {pattern_gloss}"
        if names == "atomic":
            name = pattern
            while name in taken:
                name = "".join(draw.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 2 + ("klmnrst",))
            taken.add(name)
            synonyms, definition = phrases, f"a {phrases[0]}, {definition}"
        table.append(dict(name=name, synonyms=synonyms, definition=definition,
                          shape=(shape, *shape_others), pattern=(pattern, *pattern_others)))  # fmt: skip
    return table


def write_caption(draw, concept, seen, is_atomic, is_vague):
    """Title, tags and description of one image, as strings; about 3, 3 and 5 words.

    The class's words stand in each part, nuisances are named rarely: were colour and position always named, a
    contrastive batch would be told apart by them alone (prototype: zero-shot accuracy .14 instead of .85).

    draw: random.Random; concept: a row of concept_table; seen: dict of words for colour, background, position, size;
    is_atomic: title and tags say the invented name, only the description says shape and pattern; is_vague: the caption
    never says what is shown.
    """

    def slot(words):
        return words[0] if draw.random() < 0.7 else draw.choice(words[1:])

    def class_words(part):
        if is_vague:
            return [draw.choice(VAGUE)]
        if is_atomic and part != "description":
            return [concept["name"]]
        return [slot(concept["pattern"]), slot(concept["shape"])]

    def phrase(part):
        words = class_words(part)
        if draw.random() < 0.15:
            words = [seen["colour"], *words]
        if draw.random() < 0.05:
            words = [seen["size"], *words]
        if draw.random() < 0.05:
            words = [*words, "on", seen["background"]]
        if draw.random() < 0.05:
            words = [*words, seen["position"]]
        return " ".join(words)

    def fill(template, text):
        return (template.replace("a {}", "an {}") if text[0] in "aeiou" else template).format(text)

    title, description = phrase("title"), phrase("description")
    if draw.random() < 1 / 3:
        title = fill(draw.choice(TEMPLATES), title)
    elif draw.random() < 0.4:
        title = f"{draw.choice(NOISE)} {title}" if draw.random() < 0.5 else f"{title} {draw.choice(NOISE)}"
    description = fill(draw.choice(TEMPLATES if draw.random() < 1 / 3 else SENTENCES), description)
    if draw.random() < 0.25:
        description = f"{description} {draw.choice(NOISE)}"
    tags = class_words("tags")
    if draw.random() < 0.5:
        tags.append(draw.choice(NOISE) if draw.random() < 0.6 else class_words("tags")[-1])
    if draw.random() < 0.15:
        tags.append(seen["colour"])
    draw.shuffle(tags)
    return title, " ".join(tags), description


def word_similarity(a, b):
    """Cosine of the word-count vectors of two texts, 0..1: an honest stand-in for a text encoder's similarity."""
    a, b = Counter(a.replace(",", "").split()), Counter(b.replace(",", "").split())
    dot = sum(n * b[word] for word, n in a.items())
    return dot / math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))


# ------------------------------------------------------------------------------ shapes: pixels

SIDE = 32  # px
FAINT = 0.3  # ink between bands, dots and fields: the outline stays visible
MAP_SIDE, MAP_REACH = 128, 1.5  # a distance map covers [-1.5, 1.5] x [-1.5, 1.5] of an outline of radius 1

# How hard each rendering process is. radius: px, of the circle around the outline; shift: px, of its centre, each way;
# rotation: degrees, each way; noise: sigma, of 1 = white; specks: at most so many; contrast: least RGB distance of
# foreground and background, of sqrt(3); gradient: change of colour from the image's middle to its edge.
PROCESSES = {
    "plain": dict(radius=(9.7, 14.0), shift=2.5, rotation=19, noise=0.057, specks=2, contrast=0.60, gradient=0.10),
    "wide": dict(radius=(9.2, 14.0), shift=3.0, rotation=22, noise=0.06, specks=3, contrast=0.56, gradient=0.10),
    "harder": dict(radius=(9.0, 13.5), shift=3.0, rotation=24, noise=0.075, specks=4, contrast=0.52, gradient=0.10),
    "sketch": dict(radius=(9.0, 13.5), shift=3.0, rotation=20, noise=0.03, specks=0, contrast=0.50, gradient=0.04),
    "rendition": dict(radius=(9.0, 13.5), shift=3.5, rotation=20, noise=0.04, specks=2, contrast=0.70, gradient=0.15),
    "objectnet": dict(radius=(8.0, 10.5), shift=5.0, rotation=180, noise=0.05, specks=4, contrast=0.60, gradient=0.12),
}


def arc(start, stop, radius=1.0, x=0.0, y=0.0, squeeze=1.0):
    """25 points of an arc, degrees clockwise from the right; squeeze: its width over its height. [25, 2]"""
    angle = np.radians(np.linspace(start, stop, 25))
    return np.stack([x + squeeze * radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def spokes(radii):
    """A closed outline with the given radii at equal angles, the first at the top. [len(radii), 2]"""
    angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False) - np.pi / 2
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], axis=1)


def outlines():
    """The polygon of each shape, x to the right and y down; centred and scaled afterwards, so any unit will do."""
    turn = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    heart = np.stack([16 * np.sin(turn) ** 3, -13 * np.cos(turn) + 5 * np.cos(2 * turn)
                      + 2 * np.cos(3 * turn) + np.cos(4 * turn)], axis=1)  # fmt: skip
    return {
        "circle": spokes(np.ones(60)),
        "triangle": spokes(np.ones(3)),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "hexagon": spokes(np.ones(6)),
        "star": spokes(np.tile([1, 0.45], 5)),
        "cross": [(-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1),
                  (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1)],
        "crescent": np.concatenate([arc(50, 310), arc(298, 62, 0.87, x=0.234)]),
        "heart": heart,
        "arrow": [(0, -10), (8, -1), (3.5, -1), (3.5, 10), (-3.5, 10), (-3.5, -1), (-8, -1)],
        "diamond": [(0, -10), (6.2, 0), (0, 10), (-6.2, 0)],
        "semicircle": arc(180, 360),
        "oval": arc(0, 360, squeeze=0.6),
        "trapezoid": [(-4.5, -5), (4.5, -5), (10, 6), (-10, 6)],
        "ell": [(-6.5, -10), (0, -10), (0, 3.5), (7, 3.5), (7, 10), (-6.5, 10)],
        "tee": [(-9, -9), (9, -9), (9, -3), (3.2, -3), (3.2, 9.5), (-3.2, 9.5), (-3.2, -3), (-9, -3)],
        "house": [(0, -10), (3.5, -6.5), (3.5, -9.5), (6.2, -9.5), (6.2, -3.9),
                  (8, -2.2), (8, 9), (-8, 9), (-8, -2.2)],
        "arch": np.concatenate([[(-0.9, 0.9)], arc(180, 360, 0.9), [(0.9, 0.9), (0.4, 0.9)],
                                arc(360, 180, 0.4), [(-0.4, 0.9)]]),
        "bolt": [(3.5, -10), (-6, 2), (-0.8, 2), (-3.5, 10), (6, -2.5), (1, -2.5)],
        "drop": np.concatenate([[(0, -1.0)], arc(-30, 210, 0.65, y=0.3)]),
        "hourglass": [(-7.5, -10), (7.5, -10), (1.8, 0), (7.5, 10), (-7.5, 10), (-1.8, 0)],
        "chevron": [(0, -7.5), (10, 0.5), (10, 7.5), (0, 0), (-10, 7.5), (-10, 0.5)],
        "flower": spokes(0.72 + 0.28 * np.cos(5 * turn)),
        "crown": [(-9.5, 7), (-9.5, -6.5), (-4.5, 0), (0, -8), (4.5, 0), (9.5, -6.5), (9.5, 7)],
        "fish": np.concatenate([arc(25, 335, 0.55, x=-0.25, squeeze=1.35), [(1, -0.55), (0.8, 0), (1, 0.55)]]),
        "tree": [(0, -10), (5, -4), (2.5, -4), (7.5, 4), (1.8, 4), (1.8, 10), (-1.8, 10),
                 (-1.8, 4), (-7.5, 4), (-2.5, -4), (-5, -4)],
        "boat": [(-9.5, 3.5), (-1.5, 3.5), (-1.5, -9.5), (7, 3.5), (9.5, 3.5), (6, 9), (-6, 9)],
        "bowtie": [(-10, -6), (-2, -2), (2, -2), (10, -6), (10, 6), (2, 2), (-2, 2), (-10, 6)],
        "gear": spokes(np.tile([1, 1, 0.7, 0.7], 8)),
        "mushroom": np.concatenate([arc(180, 360, 0.95), [(0.35, 0), (0.35, 0.9), (-0.35, 0.9), (-0.35, 0)]]),
        "parallelogram": [(-5, -5.5), (10, -5.5), (5, 5.5), (-10, 5.5)],
    }  # fmt: skip


@functools.cache
def distance_maps():
    """Signed distance to each outline, in units of its radius, negative inside. [30, 128, 128] float32"""
    from scipy.ndimage import distance_transform_edt  # not above: a call that finds its world need not wait for it

    fine = 2 * MAP_SIDE
    scale = fine / (2 * MAP_REACH)
    maps = []
    for polygon in outlines().values():
        points = np.array(polygon, dtype=np.float64)
        points -= (points.min(axis=0) + points.max(axis=0)) / 2
        points *= scale / np.sqrt((points**2).sum(axis=1)).max()
        canvas = Image.new("1", (fine, fine))
        ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points + (fine - 1) / 2], fill=1)
        inside = np.array(canvas)
        # The outline runs between the pixels, half a pixel from the centres on either side.
        signed = np.where(inside, 0.5 - distance_transform_edt(inside), distance_transform_edt(~inside) - 0.5)
        maps.append(signed.reshape(MAP_SIDE, 2, MAP_SIDE, 2).mean(axis=(1, 3)) / scale)
    return np.array(maps, dtype=np.float32)


def look_up(maps, shapes, x, y):
    """Bilinear value of maps[shapes] at (x, y), in units of the outline's radius; outside the map, its edge.

    maps: [30, 128, 128] float32; shapes: [n] int; x, y: [n, 32, 32] float32. Returns: [n, 32, 32] float32.
    """
    column, row = ((np.clip(c, -MAP_REACH, MAP_REACH) + MAP_REACH) * (MAP_SIDE / (2 * MAP_REACH)) - 0.5 for c in (x, y))
    column, row = np.clip(column, 0, MAP_SIDE - 1.001), np.clip(row, 0, MAP_SIDE - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    right_share, bottom_share = column - left, row - top
    flat = maps.reshape(-1)
    at = (shapes[:, None, None].astype(np.int32) * MAP_SIDE + top) * MAP_SIDE + left
    upper = flat[at] * (1 - right_share) + flat[at + 1] * right_share
    lower = flat[at + MAP_SIDE] * (1 - right_share) + flat[at + MAP_SIDE + 1] * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


def soft(signed):
    """Anti-aliased step: how much of a pixel is covered whose centre lies `signed` px inside an edge."""
    return np.clip(signed + 0.5, 0, 1)


def pattern_ink(pattern, distance, u, v, period, is_line_art):
    """How much of each pixel the foreground covers, 0..1. [n, 32, 32]

    pattern: a name of PATTERNS; distance: px to the outline, negative inside; u, v: px in the shape's own frame,
    shifted by a random phase; period: px, [n, 1, 1]; is_line_art: a pen drawing, where the outline always shows, bands
    and squares are narrower and dots are ink instead of holes.
    """

    def to_middle(w):  # px to the middle of the nearest band, 0..period / 2
        return np.abs((w / period) % 1 - 0.5) * period

    fill = soft(-distance)
    width = 1.3 if is_line_art else 2.2  # px of a drawn outline
    line = soft(np.minimum(-distance, distance + width))
    if pattern == "solid":
        return fill
    if pattern == "hollow":
        return line
    if pattern == "striped":
        ink = soft(period * (0.16 if is_line_art else 0.25) - to_middle(u))
    elif pattern == "dotted":
        dots = soft(period * 0.31 - np.hypot(to_middle(u), to_middle(v)))
        ink = dots if is_line_art else 1 - dots
    elif pattern == "checkered":
        across, along = soft(period * 0.25 - to_middle(u)), soft(period * 0.25 - to_middle(v))
        ink = across * along + (1 - across) * (1 - along)
    elif pattern == "gridded":
        mesh = soft(0.55 - np.minimum(to_middle(u), to_middle(v)))
        ink = mesh if is_line_art else 1 - mesh
    else:  # halved, along the line u = 0: its caller gives it no phase
        return np.maximum(fill * soft(u), line)
    return np.maximum(fill * ink, line) if is_line_art else fill * (FAINT + (1 - FAINT) * ink)


def draw_colours(process, n, rng):
    """Two colours per image, at least `contrast` apart, each with a name and a little jitter.

    Returns: foreground and background RGB [n, 3] float32, and the numbers of their names [n], [n].
    """
    gap = PROCESSES[process]["contrast"]
    if process == "sketch":
        foreground = np.full(n, COLOUR_NAMES.index("black"))
        background = np.full(n, COLOUR_NAMES.index("white"))
        return COLOUR_RGB[foreground], COLOUR_RGB[background] + 0.03, foreground, background
    if process == "rendition":  # any colours: of eight pairs the first that is far enough apart, else the best
        pairs = rng.random((n, 8, 2, 3), dtype=np.float32)
        apart = np.linalg.norm(pairs[:, :, 0] - pairs[:, :, 1], axis=2)
        colours = pairs[np.arange(n), np.argmax(np.minimum(apart, gap), axis=1)]
        nearest = np.linalg.norm(colours[:, :, None] - COLOUR_RGB, axis=3).argmin(axis=2)
        return colours[:, 0], colours[:, 1], nearest[:, 0], nearest[:, 1]
    apart = np.linalg.norm(COLOUR_RGB[:, None] - COLOUR_RGB, axis=2)
    foreground, background = np.argwhere(apart >= gap)[rng.integers((apart >= gap).sum(), size=n)].T
    jitter = rng.normal(0, 0.04, (2, n, 3)).astype(np.float32)
    return COLOUR_RGB[foreground] + jitter[0], COLOUR_RGB[background] + jitter[1], foreground, background


def render(shapes, patterns, process, rng):
    """Draw n images.

    shapes, patterns: [n] int, numbers in SHAPES and PATTERNS; process: a name of PROCESSES.
    Returns: images [n, 32, 32, 3] uint8, and a dict of what a caption may mention: colour and background [n] (numbers
    in COLOURS), x and y [n] (px of the shape's centre from the image's), radius [n] (px).
    """
    n, p = len(shapes), PROCESSES[process]

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    # Where each pixel lies in the shape's own frame: centred, turned, in px.
    ys, xs = np.mgrid[:SIDE, :SIDE].astype(np.float32)[:, None] + (0.5 - SIDE / 2)  # [1, 32, 32] each
    radius = uniform(*p["radius"])
    x, y = uniform(-p["shift"], p["shift"]), uniform(-p["shift"], p["shift"])
    angle = np.radians(uniform(-p["rotation"], p["rotation"]))
    dx, dy = xs - x, ys - y
    if process == "sketch":  # an unsteady hand: slow waves of 0.4 px
        dx = dx + 0.4 * np.sin(ys * uniform(0.3, 0.7) + uniform(0, 6.28))
        dy = dy + 0.4 * np.sin(xs * uniform(0.3, 0.7) + uniform(0, 6.28))
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    distance = look_up(distance_maps(), shapes, u / radius, v / radius) * radius

    # The surface. A period of 4 px is the least that 32 px show well.
    period = uniform(4.2, 6.0)
    u_phase, v_phase = uniform(0, 1) * period, uniform(0, 1) * period
    ink = np.empty_like(distance)
    for number, pattern in enumerate(PATTERNS):
        rows = np.flatnonzero(patterns == number)
        if len(rows):
            phase = (0, 0) if pattern == "halved" else (u_phase[rows], v_phase[rows])
            ink[rows] = pattern_ink(pattern, distance[rows], u[rows] + phase[0], v[rows] + phase[1], period[rows],
                                    process == "sketch")  # fmt: skip

    # Colours: each of the two changes a little along its own direction.
    foreground, background, colour, background_colour = draw_colours(process, n, rng)

    def shaded(rgb, amount):  # [n, 3] -> [n, 32, 32, 3]
        direction, steepness = uniform(0, 2 * np.pi), uniform(0, amount)
        slope = steepness * (np.cos(direction) * xs + np.sin(direction) * ys) / (SIDE / 2)
        return rgb[:, None, None] + slope[..., None]

    images, paint = shaded(background, p["gradient"]), shaded(foreground, p["gradient"])
    if process == "rendition":  # a weave behind, and paint that runs from one colour into another
        for _ in range(3):
            direction, pitch = uniform(0, np.pi), uniform(0.5, 1.6)
            wave = np.sin(pitch * (np.cos(direction) * xs + np.sin(direction) * ys) + uniform(0, 6.28))
            images += wave[..., None] * rng.normal(0, 0.07, (n, 1, 1, 3)).astype(np.float32)
        paint += (v / radius)[..., None] * rng.uniform(-0.3, 0.3, (n, 1, 1, 3)).astype(np.float32)
    images += (paint - images) * ink[..., None]

    # Clutter lies on top, so it may hide a little of the shape.
    n_specks = rng.integers(0, p["specks"] + 1, n)
    for speck in range(p["specks"]):
        rows = np.flatnonzero(n_specks > speck)
        where = rng.uniform(-SIDE / 2, SIDE / 2, (2, len(rows), 1, 1)).astype(np.float32)
        size = rng.uniform(0.7, 2.2, (len(rows), 1, 1)).astype(np.float32)
        rgb = COLOUR_RGB[rng.integers(len(COLOURS), size=len(rows))][:, None, None]
        cover = soft(size - np.hypot(xs - where[0], ys - where[1]))[..., None]
        images[rows] += (rgb - images[rows]) * cover

    images += p["noise"] * rng.standard_normal(images.shape, dtype=np.float32)
    seen = dict(colour=colour, background=background_colour, x=x.ravel(), y=y.ravel(), radius=radius.ravel())
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8), seen


# ------------------------------------------------------------------------------ shapes: sets

N_PER_CLASS = 25  # images per class of a test set
N_CANDIDATES = 4  # adversarial: images drawn for each one that is kept
TEST_SETS = dict(val="plain", v2="harder", sketch="sketch", rendition="rendition", objectnet="objectnet",
                 adversarial="harder")  # fmt: skip
# zipf: the class at rank r of the set's own random order has a share of r ** -zipf. cut: rows of the smaller copy.
# odd: share of images drawn as sketch, rendition or objectnet, as a crawl of the web has them too. is_noisy: some
# captions do not name the class, or name another (--caption-noise). is_open: all 210 concepts, no labels.
# balanced is laionet without its imbalance: the control that differs in nothing else.
TRAIN_SETS = {
    "imagenet": dict(process="plain", odd=0.0, n_rows=15_000, zipf=0.0, cut=0, is_noisy=False, is_open=False),
    "incaps": dict(process="plain", odd=0.0, n_rows=15_000, zipf=0.3, cut=4_000, is_noisy=False, is_open=False),
    "laionet": dict(process="wide", odd=0.0, n_rows=15_000, zipf=1.0, cut=4_000, is_noisy=True, is_open=False),
    "balanced": dict(process="wide", odd=0.0, n_rows=15_000, zipf=0.0, cut=0, is_noisy=True, is_open=False),
    "yfcc": dict(process="wide", odd=0.0, n_rows=15_000, zipf=1.0, cut=0, is_noisy=True, is_open=True),
    "web": dict(process="wide", odd=0.15, n_rows=60_000, zipf=0.7, cut=0, is_noisy=True, is_open=True),
}
UNSEEN = dict(train=50, test=25)  # images per concept of the open world, to probe features on classes never trained on
COLUMNS = ("image", "label", "caption", "title", "tags", "description", "similarity", "source")
CHUNK = 250  # images per job, a constant: the random numbers depend on the chunk, not on the worker


def zipf_counts(n_rows, order, exponent):
    """Rows per concept: shares rank ** -exponent, at least one each, n_rows in all (or one each if that is more).

    order: [C] the concept at each rank. Returns: [C] int64, by concept.
    """
    weight = np.arange(1, len(order) + 1) ** -float(exponent)
    counts = np.ones(len(order), dtype=np.int64)
    for _ in range(n_rows - len(order)):
        counts[np.argmax(weight / (counts + 0.5))] += 1  # Sainte-Lague: the fairest whole numbers
    return counts[np.argsort(order)]


def make_chunk(job):
    """Render rows [first, first + CHUNK) of one set into its .npy, in a worker. Returns: texts, {column: text} each."""
    path, set_name, style, concepts, first, seed, names, caption_noise = job
    chunk = first // CHUNK
    shapes, patterns = np.array(CONCEPTS)[concepts].T
    images, seen = render(shapes, patterns, style["process"], rng_of(seed, set_name, "pixels", chunk))
    if style["odd"]:
        rng = rng_of(seed, set_name, "odd", chunk)
        process = np.where(rng.random(len(images)) < style["odd"], rng.integers(3, size=len(images)), -1)
        for number, name in enumerate(("sketch", "rendition", "objectnet")):
            rows = np.flatnonzero(process == number)
            images[rows], odd = render(shapes[rows], patterns[rows], name, rng)
            for key in seen:
                seen[key][rows] = odd[key]
    np.lib.format.open_memmap(path, mode="r+")[first : first + len(images)] = images

    table, texts = concept_table(seed, names), []
    draw = random.Random(f"{seed} {set_name} captions {chunk}")
    noise = caption_noise if style["is_noisy"] else 0.0
    n_named = len(CONCEPTS) if style["is_open"] else N_CLASSES
    for i, number in enumerate(concepts):
        concept, luck = table[number], draw.random()
        if set_name == "imagenet":
            texts.append(dict(caption=f"a photo of a {concept['name']}", title="", tags="", description=""))
            continue
        x, y = seen["x"][i], seen["y"][i]
        words = dict(colour=COLOUR_NAMES[seen["colour"][i]], background=COLOUR_NAMES[seen["background"][i]],
                     position=("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom"),
                     size="small" if seen["radius"][i] < 10.5 else "large")  # fmt: skip
        is_vague, is_wrong = luck < noise * 8 / 13, noise * 8 / 13 <= luck < noise
        told = table[(number + draw.randrange(1, n_named)) % n_named] if is_wrong else concept
        parts = write_caption(draw, told, words, names == "atomic", is_vague)
        row = dict(zip(("title", "tags", "description"), parts, strict=True), caption=" ".join(parts))
        if set_name == "laionet":
            meaning = f"{concept['name']} which is {concept['definition']}"
            row["similarity"] = f"{word_similarity(row['caption'], meaning):.4f}"
        texts.append(row)
    return texts


def edge_histograms(images):
    """Histograms of oriented gradients: 8 px cells every 4 px, 8 directions. [n, 7 * 7 * 8] float64, 0..100"""
    features = []
    for part in np.array_split(images, max(1, len(images) // CHUNK)):
        grey = part.astype(np.float32).mean(axis=3)
        dy, dx = np.zeros_like(grey), np.zeros_like(grey)
        dy[:, 1:-1], dx[:, :, 1:-1] = grey[:, 2:] - grey[:, :-2], grey[:, :, 2:] - grey[:, :, :-2]
        strength = np.hypot(dx, dy)
        direction = np.floor(np.arctan2(dy, dx) / np.pi * 8 + 0.5).astype(np.int64) % 8
        blocks = np.stack([(strength * (direction == d)).reshape(-1, 8, 4, 8, 4).sum(axis=(2, 4)) for d in range(8)], 3)
        cells = blocks[:, :-1, :-1] + blocks[:, 1:, :-1] + blocks[:, :-1, 1:] + blocks[:, 1:, 1:]  # [n, 7, 7, 8]
        cells /= np.sqrt((cells**2).sum(axis=3, keepdims=True)) + 200  # local contrast; 200 is about the noise
        features.append(100 * cells.reshape(len(part), -1))
    return np.concatenate(features).astype(np.float64)


def hardest(folder, train_labels, val_labels, pool_labels, keep):
    """Choose the adversarial set as ImageNet-A did: of a pool, the images that a plain model gets most wrong.

    The plain model is ridge regression on 2,000 random Fourier features of edge histograms (Rahimi and Recht,
    NeurIPS 2007), fitted to the imagenet set. The features are rounded to whole numbers, so that sums of their
    products are exact and do not depend on how a matrix product is split.
    folder: holds imagenet/train.npy, val.npy and adversarial.pool.npy; keep: images per class.
    Returns: rows of the pool to keep, sorted, [C * keep]; the model's accuracy on val and on what is kept, fractions.
    Source: arXiv 1907.07174, section 3.
    """
    rng = np.random.default_rng(0)
    frequency, phase = rng.normal(0, 0.002, (7 * 7 * 8, 2000)), rng.uniform(0, 2 * np.pi, 2000)

    def features(name):  # [n, 2000] float64
        histograms = edge_histograms(np.load(os.path.join(folder, name), mmap_mode="r"))
        return np.rint(100 * np.cos(histograms @ frequency + phase))

    train = features("imagenet/train.npy")
    gram = train.T @ train
    target = np.where(train_labels[:, None] == np.arange(N_CLASSES), 1.0, 0.0)
    ridge = 0.01 * np.trace(gram) / len(gram)
    weight = np.linalg.solve(gram + ridge * np.eye(len(gram)), train.T @ target)

    val_accuracy = np.mean((features("val.npy") @ weight).argmax(axis=1) == val_labels)
    scores = features("adversarial.pool.npy") @ weight
    everyone = np.arange(len(scores))
    is_right = scores.argmax(axis=1) == pool_labels
    true_score = scores[everyone, pool_labels]
    scores[everyone, pool_labels] = -np.inf
    margin = np.round(true_score - scores.max(axis=1), 6)  # rounded: the last bits are the linear solver's
    kept = np.flatnonzero(bottom_per_class(margin, pool_labels, np.ones(len(scores), bool), np.full(N_CLASSES, keep)))
    return kept, float(val_accuracy), float(is_right[kept].mean())


# ------------------------------------------------------------------------------ shapes: files


def write_preview(path, folder, labels):
    """A contact sheet: a line per test set, a column per shape, patterns in turn. labels: {set: [N] int}"""
    zoom, margin, head = 2, 70, 26
    cell = zoom * SIDE + 2
    sheet = Image.new("RGB", (margin + N_CLASS_SHAPES * cell, head + len(labels) * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for shape in range(N_CLASS_SHAPES):
        pattern = shape % N_CLASS_PATTERNS
        text = f"{list(PATTERNS)[pattern]}\n{list(SHAPES)[shape]}"
        pen.multiline_text((margin + shape * cell + 2, 1), text, "black", font, spacing=1)
        for line, (name, of_set) in enumerate(labels.items()):
            images = np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r")
            image = images[np.flatnonzero(of_set == shape * N_CLASS_PATTERNS + pattern)[0]]
            large = Image.fromarray(image).resize((zoom * SIDE, zoom * SIDE), Image.Resampling.NEAREST)
            sheet.paste(large, (margin + shape * cell, head + line * cell))
            pen.text((3, head + line * cell + SIDE - 6), name, "black", font)
    sheet.save(path)


# Copied from clip.py
def bytes_to_unicode() -> dict[int, str]:
    """Map each of the 256 bytes to a printable character, in the order of CLIP's vocabulary.

    Source: GPT-2 / openai/CLIP simple_tokenizer.py; the order fixes the first 256 token ids.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# Copied from clip.py
@functools.cache
def word_pattern() -> re.Pattern:
    """CLIP's word pattern (letters, one digit, other signs, "'s" and its like), written for Python's `re`."""
    numbers = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Nl", "No"))
    # A fraction or a Roman numeral is a letter to \w, a number to CLIP; [a-z] comes first, since that test is slow.
    letter = rf"(?:[a-z]|(?![{numbers}])[^\W\d_])"
    other = rf"(?:(?!{letter})[^\s\d{numbers}])"
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|{letter}+|[\d{numbers}]|{other}+", re.IGNORECASE)


# Copied from clip.py
def bpe_words(text: str) -> list[str]:
    """Split a text into the pieces that byte-pair merges never cross: CLIP's cleaning, lower case and word pattern.

    The literals of start and end tokens are dropped. CLIP also runs `ftfy` first, which repairs mis-decoded text
    (full-width forms, curly quotes, bytes read in a wrong encoding); that is left out, so such texts get other ids.
    """
    text = re.sub(r"<\|(?:start|end)oftext\|>|<(?:start|end)_of_text>", " ", html.unescape(html.unescape(text)))
    return [piece for word in text.lower().split() for piece in word_pattern().findall(word)]


# Copied from clip.py
def train_bpe(texts: Iterable[str], n_merges: int) -> list[str]:
    """Learn byte-pair merges from texts: the most frequent neighbouring pair is merged, again and again.

    n_merges: upper bound; fewer when every word has become one token.
    Returns: lines "left right", first merge first; ties go to the pair that sorts first, so the result is a
    function of the texts alone. Source: Sennrich et al., arXiv 1508.07909, algorithm 1.
    """
    to_unicode = bytes_to_unicode()
    counts = Counter(word for text in texts for word in bpe_words(text))
    words, pairs, where = [], Counter(), defaultdict(set)  # symbols of each distinct word; pair -> words that have it
    for i, word in enumerate(counts):
        symbols = [to_unicode[byte] for byte in word.encode("utf-8")]
        words.append(symbols[:-1] + [symbols[-1] + "</w>"])
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] += counts[word]
            where[pair].add(i)
    counts = list(counts.values())
    queue, merges = [(-count, pair) for pair, count in pairs.items()], []
    heapq.heapify(queue)
    while queue and len(merges) < n_merges:
        count, best = heapq.heappop(queue)
        if -count != pairs[best] or not count:
            continue  # the count has changed since: the pair stands in the queue again
        merges.append(" ".join(best))
        changed = set()
        for i in where.pop(best):
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] -= counts[i]
                changed.add(pair)
            words[i] = merge_pair(words[i], *best)
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
                changed.add(pair)
        for pair in changed:
            heapq.heappush(queue, (-pairs[pair], pair))
    return merges


# Copied from clip.py
def merge_pair(symbols: list[str], left: str, right: str) -> list[str]:
    """Join each occurrence of `left right` in a list of symbols, from the left."""
    merged = []
    for symbol in symbols:
        if symbol == right and merged[-1:] == [left]:
            merged[-1] += right
        else:
            merged.append(symbol)
    return merged


def render_world(folder, seed, size, names, caption_noise, workers):
    """Write every file of the world except world.json into an empty folder; return what world.json says besides.

    folder: exists and is empty; size: factor on the numbers of rows; the others: as the flags.
    Returns: dict with rows ({set: rows}) and plain_model (accuracies, fractions).
    """
    # Workers start fresh and read these when they import numpy: one thread each, so that neither the speed of
    # rendering nor the last bits of the plain model depend on the number of cores.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    table = concept_table(seed, names)
    os.mkdir(os.path.join(folder, "unseen"))
    for place, part in (("", table[:N_CLASSES]), ("unseen", table[N_CLASSES:])):
        classes = [dict(row, synonyms="|".join(row["synonyms"])) for row in part]
        write_tsv(os.path.join(folder, place, "classes.tsv"), ("name", "synonyms", "definition"), classes)

    # Which concept each row shows. {set: [N] int64}; {set: [C] int64}
    keep = max(1, round(N_PER_CLASS * size))
    concepts, cut_counts = {}, {}
    for name in TEST_SETS:
        repeat = keep * N_CANDIDATES if name == "adversarial" else keep
        concepts[name] = rng_of(seed, name, "order").permutation(np.repeat(np.arange(N_CLASSES), repeat))
    for part, n_images in UNSEEN.items():
        open_world = np.repeat(np.arange(N_CLASSES, len(CONCEPTS)), max(1, round(n_images * size)))
        concepts[f"unseen/{part}"] = rng_of(seed, "unseen", part, "order").permutation(open_world)
    for name, s in TRAIN_SETS.items():
        rng = rng_of(seed, name, "order")
        order = rng.permutation(len(CONCEPTS) if s["is_open"] else N_CLASSES)
        counts = zipf_counts(round(s["n_rows"] * size), order, s["zipf"])
        concepts[name] = rng.permutation(np.repeat(np.arange(len(order)), counts))
        if s["cut"]:
            cut_counts[name] = np.minimum(zipf_counts(round(s["cut"] * size), order, s["zipf"]), counts)

    stem = {name: f"{name}/train" if name in TRAIN_SETS else name for name in concepts}  # of its .npy and .tsv

    # One job per chunk. imagenet, val and the adversarial pool go first: the plain model waits for them.
    jobs = []
    for name in sorted(concepts, key=lambda name: name not in ("imagenet", "val", "adversarial")):
        of_tests = dict(process=TEST_SETS.get(name, "plain"), odd=0.0, is_noisy=False, is_open=False)
        style = TRAIN_SETS.get(name, of_tests)
        path = os.path.join(folder, f"{'adversarial.pool' if name == 'adversarial' else stem[name]}.npy")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with whole_file(path) as f:  # zeros take the room: a worker that writes to the map of a full disk is killed
            header = dict(descr="|u1", fortran_order=False, shape=(len(concepts[name]), SIDE, SIDE, 3))
            np.lib.format.write_array_header_1_0(f, header)
            for _ in concepts[name]:
                f.write(bytes(SIDE * SIDE * 3))
        jobs += [(path, name, style, concepts[name][first : first + CHUNK], first, seed, names, caption_noise)
                 for first in range(0, len(concepts[name]), CHUNK)]  # fmt: skip

    texts = {name: [] for name in concepts}
    first_jobs = sum(job[1] in ("imagenet", "val", "adversarial") for job in jobs)
    # spawn: a forked worker would hold the lock of build_shapes after a kill -9 of the main process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=die_with_parent) as pool:
        running = [pool.submit(make_chunk, job) for job in jobs]
        for i, future in enumerate(tqdm(running, "rendering", unit="chunk", disable=None)):
            texts[jobs[i][1]] += future.result()
            if i + 1 == first_jobs:
                labels = [concepts[name] for name in ("imagenet", "val", "adversarial")]
                choosing = pool.submit(hardest, folder, *labels, keep)
        kept, val_accuracy, adversarial_accuracy = choosing.result()

    pool_path = os.path.join(folder, "adversarial.pool.npy")
    np.save(os.path.join(folder, "adversarial.npy"), np.load(pool_path, mmap_mode="r")[kept])
    os.remove(pool_path)
    concepts["adversarial"] = concepts["adversarial"][kept]
    texts["adversarial"] = [texts["adversarial"][i] for i in kept]

    rows = {}
    for name in concepts:
        first_label = N_CLASSES if name.startswith("unseen/") else 0  # it has a list of classes of its own
        is_labelled = name not in TRAIN_SETS or not TRAIN_SETS[name]["is_open"]
        pixels = f"{os.path.basename(stem[name])}.npy"
        lines = [dict(text, image=f"{pixels}:{i}", label=concept - first_label if is_labelled else "", source=name)
                 for i, (concept, text) in enumerate(zip(concepts[name], texts[name], strict=True))]  # fmt: skip
        write_tsv(os.path.join(folder, f"{stem[name]}.tsv"), COLUMNS, lines)
        rows[name] = len(lines)
        if name in cut_counts:  # the first rows of each class, in the order of the whole set
            cut, order = f"{name}4k", np.arange(len(lines))
            mask = bottom_per_class(order, concepts[name], np.ones(len(lines), bool), cut_counts[name])
            small = [dict(line, image=f"../{name}/{line['image']}", source=cut) for line in compress(lines, mask)]
            os.mkdir(os.path.join(folder, cut))
            write_tsv(os.path.join(folder, cut, "train.tsv"), COLUMNS, small)
            rows[cut] = len(small)

    # Merges until every word is one token; 100,000 is never reached.
    sentences = [row["caption"] for rows_of_set in texts.values() for row in rows_of_set]
    sentences += [text for row in table[:N_CLASSES] for text in (row["name"], *row["synonyms"], row["definition"])]
    with open(os.path.join(folder, "bpe.txt"), "w", encoding="utf-8", newline="\n") as f:
        f.write("\n".join(["#version: 0.2 shapes", *train_bpe(sentences, 100_000)]) + "\n")
    write_preview(os.path.join(folder, "preview.png"), folder, {name: concepts[name] for name in TEST_SETS})
    return dict(rows=rows, plain_model=dict(val=round(val_accuracy, 4), adversarial=round(adversarial_accuracy, 4)))


def is_built(out, wanted):
    """Whether out holds the wanted world. Raises SystemExit if something else is there: nothing of it is touched."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return False
    try:
        found = json.loads(Path(out, "world.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no JSON, or no UTF-8
        found = {}
    if not isinstance(found, dict) or found.get("world") != "shapes":
        raise SystemExit(f"--out: {out} exists and is not a shapes world; give another --out (nothing was changed)")
    if differing := [f"{k} is {found.get(k)}, asked for {v}" for k, v in wanted.items() if found.get(k) != v]:
        raise SystemExit(f"--out: {out} holds another world: {'; '.join(differing)}. Give another --out or delete it")
    return True


def build_shapes(out, seed, size, names, caption_noise, workers):
    """Render the shapes world into the folder out, or find it there. Two calls at once: the second waits."""
    out = os.path.realpath(out)
    wanted = dict(world="shapes", version=3, seed=seed, size=size, names=names, caption_noise=caption_noise)
    if is_built(out, wanted):  # before the lock, so that a world on a read-only disk is fine
        print(f"{out} is complete")
        return
    start = time.perf_counter()
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with open(out + ".lock", "w") as lock:  # stays behind: a lock file that is removed protects nobody
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_built(out, wanted):
            print(f"{out} is complete (another process rendered it)")
            return
        partial, unfinished = out + ".partial", os.path.join(out + ".partial", "world.json.tmp")
        if os.path.isdir(partial):  # a killed call's
            if os.listdir(partial) and not os.path.exists(unfinished):
                raise SystemExit(f"--out: {partial} is in the way and is not ours; move it or give another --out")
            shutil.rmtree(partial)
        os.mkdir(partial)
        open(unfinished, "w").close()
        facts = render_world(partial, seed, size, names, caption_noise, workers)
        with open(unfinished, "w", encoding="utf-8") as f:
            f.write(json.dumps({**wanted, **facts}, indent=1) + "\n")
        os.replace(unfinished, os.path.join(partial, "world.json"))
        os.rename(partial, out)
    print(f"{out}: {N_CLASSES} classes, {sum(facts['rows'].values()):,} rows, {time.perf_counter() - start:.0f} s")


# ------------------------------------------------------------------------------ index: tar

MAX_TEXT_BYTES = 1 << 22  # of one .txt, .json or tar header: more is no caption, and a row must stay below MAX_LINE
TAR_NAME = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$")  # compressed ones too: to refuse them, not to miss them
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def tar_number(field):
    """A number of a tar header: octal digits, or base 256 if the first bit is set. Raises ValueError if neither."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) + (1 << (8 * len(field) - 1))
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def pax_records(payload):
    """{key: value} in bytes of a pax header, records `length key=value\\n`. Raises ValueError if it is damaged."""
    records, start = {}, 0
    while start < len(payload) and payload[start]:  # some writers pad with zeros
        space = payload.index(b" ", start)
        end = start + int(payload[start:space])
        key, equals, value = payload[space + 1 : end].partition(b"=")
        if end <= space or not equals or not value.endswith(b"\n"):
            raise ValueError("damaged pax record")
        records[key] = value[:-1]
        if key == b"size" and int(value) < 0:
            raise ValueError("negative size")
        start = end
    return records


class NotATarError(ValueError):
    """A file that is compressed, or something else altogether."""


class TarReader:
    """The plain files of an uncompressed tar as (name, offset, size in bytes), from one small read per member.

    tarfile builds an object per member and hides where a damaged archive ends; this is several times as fast and says
    so in `problem` ("" if the tar is sound) once iterated. Equal to tarfile's name, offset_data and size
    (tests/test_index.py) for the formats ustar, gnu and pax.
    Raises: NotATarError on the first step if the file is compressed or no tar at all.
    """

    def __init__(self, path):
        self.file = open(path, "rb", buffering=8192)  # holds the json and txt that follow an image
        self.n_bytes = os.fstat(self.file.fileno()).st_size
        self.problem, self.n_other = "", 0  # n_other: folders, links, sparse files

    def read(self, offset, size):
        self.file.seek(offset)
        return self.file.read(size)

    def header(self, pos):
        """The fields (name, size, kind) of the header at pos; (None, 0, problem) where the members end."""
        block = self.read(pos, 512)
        is_tar = pos or block[257:262] == b"ustar"  # a member's name may begin as a compressed file does
        if kinds := [kind for magic, kind in COMPRESSED.items() if not is_tar and block.startswith(magic)]:
            hint = "a compressed tar has no positions to read from; decompress it first (gunzip, bunzip2, unxz, unzstd)"
            raise NotATarError(f"{kinds[0]}: {hint}")
        if len(block) < 512:
            if not self.n_bytes:
                return None, 0, "empty file (0 bytes)"
            cut = f"truncated at byte {self.n_bytes}, inside the header that starts at byte {pos}"
            return None, 0, cut if block else f"no end marker at byte {self.n_bytes}; the last samples may be missing"
        if not any(block):
            return None, 0, self.after_zeros(pos)
        try:
            # The checksum counts its own field as blanks (8 * 32).
            if tar_number(block[148:156]) != sum(block) - sum(block[148:156]) + 256:
                raise ValueError("checksum")
            name, size, kind = block[:100].partition(b"\0")[0], tar_number(block[124:136]), block[156:157]
            if size < 0 or kind in b"LKxg" and size > MAX_TEXT_BYTES:
                raise ValueError("size")
        except ValueError:
            if pos == 0:
                raise NotATarError("not a tar (no header in its first 512 bytes)") from None
            return None, 0, f"damaged header at byte {pos} of {self.n_bytes}; the rest is not read"
        if block[257:263] == b"ustar\0" and block[345] != 0:
            name = block[345:500].partition(b"\0")[0] + b"/" + name
        if kind in b"123456":
            size = 0
        if kind == b"S":  # gnu sparse: the map of its holes goes on in extra blocks
            is_extended, start = block[482], pos
            while is_extended:
                pos += 512
                extra = self.read(pos, 512)
                is_extended = extra[504] if len(extra) == 512 else 0
            size += pos - start
        return name, size, kind

    def after_zeros(self, pos):
        """What is wrong with a tar whose first zero block is at pos: two end it, more may fill its last record."""
        rest = self.read(pos, 1 << 20)
        if rest.count(0) < len(rest):
            return f"zero block at byte {pos} of {self.n_bytes} but data behind it, which is not read (joined tars?)"
        return "" if len(rest) >= 1024 else f"half an end marker at byte {pos}"

    def __iter__(self):
        pos, long_name, local, shared = 0, None, {}, {}
        while True:
            name, size, kind = self.header(pos)
            if name is None:
                self.problem = kind
                return
            start = pos + 512
            fields = {**shared, **local}
            if kind not in b"LKxg" and b"size" in fields:  # over 8 GiB
                size = int(fields[b"size"])
            if start + size > self.n_bytes:
                what = os.fsdecode(fields.get(b"path", long_name or name))
                self.problem = f"truncated at byte {self.n_bytes}, inside {what!r} whose header is at byte {pos}"
                return
            pos = start + -(-size // 512) * 512
            if kind == b"L":
                long_name = self.read(start, size).partition(b"\0")[0]
            elif kind in b"xg":
                try:
                    records = pax_records(self.read(start, size))
                except ValueError:
                    self.problem = f"damaged pax header at byte {start - 512} of {self.n_bytes}; the rest is not read"
                    return
                if kind == b"x":
                    local = records
                else:
                    shared.update(records)
            elif kind != b"K":  # a member of its own: the headers before it are used up
                name = fields.get(b"path", long_name or name)
                long_name, local = None, {}
                is_sparse = any(key.startswith(b"GNU.sparse") for key in fields)
                if kind in b"07\0" and not is_sparse and not name.endswith(b"/"):
                    yield name.decode("utf-8", "surrogateescape"), start, size
                else:
                    self.n_other += 1


# ------------------------------------------------------------------------------ index: samples

IMAGE_SUFFIXES = frozenset("jpg jpeg png webp bmp gif tif tiff ppm pgm pbm pnm".split())


def tar_samples(reader, tar_name, counts):
    """Group consecutive members with one key, as webdataset does.

    tar_name: relative to the table. counts: Counter, updated.
    Yields: (key, image as the table names it or None, size of the image in bytes, {suffix: payload of txt, json, cls}).
    """
    key, image, n_bytes, texts, suffixes = None, None, 0, {}, set()
    for name, offset, size in reader:
        counts["members"] += 1
        stem, dot, suffix = name[name.rfind("/") + 1 :].partition(".")
        if not stem or not dot or re.fullmatch("__[^/]*__", name):
            counts["members whose name has no key and suffix"] += 1
            continue
        member_key, suffix = name[: len(name) - len(suffix) - 1], suffix.lower()
        if member_key != key:
            if key is not None:
                yield key, image, n_bytes, texts
            key, image, n_bytes, texts, suffixes = member_key, None, 0, {}, set()
        if suffix in suffixes:
            counts["repeated suffix (first kept)"] += 1
        elif suffix in IMAGE_SUFFIXES:
            if image is None:
                image, n_bytes = f"{tar_name}:{offset}:{size}", size
            else:
                counts["second image of a sample (first kept)"] += 1
        elif suffix in ("txt", "json", "cls"):
            if size <= MAX_TEXT_BYTES:
                texts[suffix] = reader.read(offset, size)
            else:
                counts["text over 4 MiB (ignored)"] += 1
        suffixes.add(suffix)
    if key is not None:
        yield key, image, n_bytes, texts


def stop(error):
    """For os.walk, which would pass over a folder that it cannot read."""
    raise error


def folder_samples(folder, prefix, is_recursive, counts):
    """The images of a folder in the order of their names, as tar_samples. prefix: the folder, seen from the table."""
    seen = set()  # a link may lead back
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders[:] = []
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if is_recursive else []
        relative = os.path.relpath(parent, folder).replace(os.sep, "/")
        inside = "" if relative == "." else relative + "/"
        present, stems = set(files), set()
        for name in sorted(files):
            stem, dot_suffix = os.path.splitext(name)
            if dot_suffix[1:].lower() not in IMAGE_SUFFIXES or name.startswith("."):
                continue
            stems.add(stem)
            texts = {}
            for suffix in ("txt", "json"):
                if f"{stem}.{suffix}" in present:
                    path = os.path.join(parent, f"{stem}.{suffix}")
                    if os.path.getsize(path) <= MAX_TEXT_BYTES:
                        with open(path, "rb") as f:
                            texts[suffix] = f.read()
                    else:
                        counts["text over 4 MiB (ignored)"] += 1
            path = os.path.join(parent, name)
            n_bytes = os.path.getsize(path) if os.path.exists(path) else 0  # 0: a dead link
            yield inside + name, f"{prefix}/{inside}{name}".removeprefix("./"), n_bytes, texts
        for stem in sorted({os.path.splitext(name)[0] for name in files if name.endswith(".txt")} - stems):
            yield inside + stem, None, 0, {}


def sample_bytes(sample):
    """What tells one sample from another, for a hash: its key, the image's size and the texts."""
    key, _, n_bytes, texts = sample
    return b"\0".join([os.fsencode(key), str(n_bytes).encode(), *texts.values(), b""])


def decode(payload, counts):
    """Text of a payload without surrounding blanks; invalid UTF-8 is replaced and counted."""
    try:
        return payload.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        counts["invalid UTF-8 (replaced)"] += 1
        return payload.decode("utf-8-sig", "replace").strip()


def sample_fields(texts, label, classes, n_classes, counts):
    """Label, caption and further columns of a sample.

    texts: {suffix: payload}; label: of a class folder, or None; classes, n_classes: of labels_by_name, or {}, 0; for
    classes None a label may be a name. Returns: (label int, name or "", caption, {column: value})
    """
    fields = {}
    if "json" in texts:
        try:
            fields = json.loads(decode(texts["json"], counts))
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            fields = {}
            counts["JSON that cannot be read or is no object (ignored)"] += 1
    own_label, own_caption = fields.pop("label", None), fields.pop("caption", None)
    fields.pop("image", None)
    caption = decode(texts["txt"], counts) if "txt" in texts else ""
    if not caption:
        captions = (tsv_field(c).strip() for c in (own_caption, fields.get("text"), fields.get("title")))
        caption = next(filter(None, captions), "")
    if label is None:
        named = decode(texts["cls"], counts) if "cls" in texts else tsv_field(own_label).strip()
        number = re.fullmatch(r"(\d{1,18})(\.0*)?", named, re.A)  # as in label_number
        label = int(number[1]) if number else named if classes is None else classes.get(named)
        if label is None or n_classes and label >= n_classes:
            counts["label that is neither a number nor in --classes, or beyond it (left empty)"] += bool(named)
            label = ""
    return label, caption, fields


def sample_row(sample, label, classes, beside, counts):
    """A sample of tar_samples or folder_samples as a row. label, classes: as of sample_fields; beside: of read_beside.

    Returns: ("" or why it is left out, label, caption, {column: value}); counts: Counter, updated.
    """
    key, image, n_bytes, texts = sample
    counts["samples"] += 1
    label, caption, fields = sample_fields(texts, label, *classes, counts)
    losses = {"without an image": image is None,
              "file name with a tab, line break or invalid UTF-8": not is_writable_name(image or ""),
              "empty image": n_bytes == 0, "neither caption nor label": not caption and label == ""}  # fmt: skip
    loss = next(filter(losses.get, losses), "")
    row_of, extra = beside
    if extra and not loss:
        place = row_of.get(key.rpartition("/")[2].partition(".")[0])  # a file's key has its suffix
        counts["not in the parquet"] += place is None
        if place is not None:
            fields = {**{column: values[place] for column, values in extra.items()}, **fields}
    if not loss and is_long([caption, *map(tsv_field, fields.values())]):
        loss = "texts of more than 10 MiB"
    counts[loss] += bool(loss)
    return loss, label, caption, fields


def unit_hash(seed, key):
    """A number in [0, 1) that depends on the two alone: 64 bits of BLAKE2b of length-prefixed parts."""
    return hash64(str(seed), key) / 2**64


def is_writable_name(name):
    """Whether a table can hold a file's name: valid UTF-8 without tabs or line breaks."""
    return BREAKS.search(name) is None and not re.search("[\ud800-\udfff]", name)


def index_source(job):
    """Write the rows of one tar or folder to two files, JOB.train and JOB.val, whose columns may grow from row to row.

    job: dict with kind (tar | folder), path, name (relative to the table), key (stands before a sample's key in the
    hash), label, is_recursive, classes (of labels_by_name), rows (path without suffix), holdout, seed. No row is kept,
    so that memory does not grow with them.
    Returns: dict with columns, counts, warnings, stats (of img2dataset, or None), and error ("" or why it is refused).
    """
    counts, columns = Counter(), {"image": 0, "label": 1, "caption": 2}
    result = dict(path=job["path"], columns=columns, counts=counts, warnings=[], stats=None, error="", is_full=False)
    names, n_image_bytes = hashlib.sha256(), 0
    samples = read_samples(job["path"], job["name"], job["is_recursive"], job["label"], job["classes"], result)
    try:
        with open(job["rows"] + ".train", "wb") as train, open(job["rows"] + ".val", "wb") as val:
            for sample, loss, label, caption, fields in samples:
                key, image, n_bytes, _ = sample
                n_image_bytes += n_bytes
                names.update(sample_bytes(sample))
                if not loss:
                    is_val = unit_hash(job["seed"], f"{job['key']}/{key}") < job["holdout"]
                    counts["rows in val.tsv" if is_val else "rows"] += 1
                    (val if is_val else train).write(row_bytes(image, label, caption, fields, columns, counts))
    except (OSError, NotATarError) as error:  # OSError: no permission, bad disk, full disk
        result["is_full"] = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        result["error"] = f"{os.path.dirname(job['rows']) if result['is_full'] else job['path']}: {error}"
        return result
    result["read"] = dict(image_bytes=n_image_bytes, sha256_of_names_sizes_texts=names.hexdigest())
    return result


def row_bytes(image, label, caption, fields, columns, counts):
    """A line of a source's own table. columns: {name: place}, extended by keys not seen before."""
    row = [image, str(label), tsv_field(caption)] + [""] * (len(columns) - 3)
    for name, value in fields.items():
        place = columns.setdefault(tsv_field(name) or "_", len(columns))
        if place == len(row):
            row.append("")
        row[place] = tsv_field(value)
    line = "\t".join(row) + "\n"
    try:
        return line.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        counts["invalid UTF-8 (replaced)"] += 1
        return line.encode("utf-8", "replace")


def shard_files(path):
    """NAME.parquet and NAME_stats.json, if they lie beside a shard of img2dataset's, NAME.tar or the folder NAME."""
    stem = path.removesuffix(".tar").rstrip("/")
    return [stem + end for end in (".parquet", "_stats.json") if os.path.isfile(stem + end)]


def read_beside(path, result):
    """Read NAME_stats.json (into result) and NAME.parquet. Returns: ({key: row}, {column: list}) of the parquet."""
    stem = path.removesuffix(".tar").rstrip("/")
    if os.path.exists(stem + "_stats.json"):
        try:
            with open(stem + "_stats.json", encoding="utf-8") as f:
                result["stats"] = {k: v for k, v in json.load(f).items() if isinstance(v, int)}
        except (ValueError, RecursionError, AttributeError):  # AttributeError: JSON, but no object
            result["warnings"].append(f"{stem}_stats.json: cannot be read (img2dataset killed while writing?)")
    if os.path.exists(stem + ".parquet"):
        try:
            import pyarrow.parquet

            columns = pyarrow.parquet.read_table(stem + ".parquet").to_pydict()
            if "key" not in columns:
                raise ValueError(f"no column `key`; found {', '.join(columns)}")
            row_of = {str(key): row for row, key in enumerate(columns["key"])}
            return row_of, {k: v for k, v in columns.items() if k not in ("image", "label", "caption")}
        except ImportError:  # optional: img2dataset writes the same values into the tar's JSON
            result["no_pyarrow"] = True
        except (OSError, ValueError, OverflowError) as error:  # pyarrow's ArrowInvalid is a ValueError; dates too far
            result["warnings"].append(f"{stem}.parquet: not used: {error}")
    return {}, {}


def read_samples(path, name, is_recursive, label, classes, result):
    """The samples of a tar or folder: (sample, *sample_row). name: of tar_samples or folder_samples.

    result: of index_source. It gets warnings of a damaged tar, and of a shard that does not hold the images that
    img2dataset says it wrote.
    """
    counts, reader = result["counts"], None if os.path.isdir(path) else TarReader(path)
    with reader.file if reader else contextlib.nullcontext():
        beside = ({}, {}) if is_recursive else read_beside(path, result)
        samples = tar_samples(reader, name, counts) if reader else folder_samples(path, name, is_recursive, counts)
        for sample in samples:
            yield sample, *sample_row(sample, label, classes, beside, counts)
    n_images = counts["samples"] - counts["without an image"]
    if reader:
        if reader.problem:
            kept = f"({counts['members']} members, {n_images} images kept)"
            result["warnings"].append(f"{path}: {reader.problem} {kept}")
        counts["members that are no plain files"] = reader.n_other
        counts["members"] += reader.n_other
    if (claimed := (result["stats"] or {}).get("successes", n_images)) != n_images:
        result["warnings"].append(f"{path}: {n_images} images, but its _stats.json counts {claimed} successes")


# ------------------------------------------------------------------------------ index: sources


def has_images(folder):
    """Whether a folder or one below it holds a file named like an image."""
    walk = os.walk(folder, onerror=stop, followlinks=True)
    names = (name for _, _, files in walk for name in files if not name.startswith("."))
    return any(os.path.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES for name in names)


def shard_folders(folder, names):
    """Those of a folder's subfolders that are img2dataset's; one that it was killed at has nothing beside it."""
    shards = {n for n in names if shard_files(os.path.join(folder, n))}
    return [n for n in names if n in shards or shards and n.isdigit()]


def look_into(folder):
    """What a folder holds: ("tars", paths), ("class folders", names) or ("flat folder", [folder]).

    Raises: SystemExit if it holds nothing of use, or several kinds.
    """
    names = sorted(n for n in os.listdir(folder) if not n.startswith((".", "__")))
    files = [n for n in names if os.path.isfile(os.path.join(folder, n))]
    folders = [n for n in names if os.path.isdir(os.path.join(folder, n))]
    tars = [os.path.join(folder, n) for n in files if TAR_NAME.search(n)]
    images = [n for n in files if os.path.splitext(n)[1][1:].lower() in IMAGE_SUFFIXES]
    shards = set(shard_folders(folder, folders))
    classes = [n for n in folders if n not in shards and has_images(os.path.join(folder, n))]
    kinds = {"tars": tars, "flat folder": images, "shards in folders": shards, "class folders": classes}
    found = [(kind, of) for kind, of in kinds.items() if of]
    if len(found) > 1:
        what = ", ".join(f"{len(of)} {'images' if kind == 'flat folder' else kind}" for kind, of in found)
        raise SystemExit(f"{folder}: holds {what} side by side, so what is meant is unclear; "
                         "index tars, class folders and flat folders from folders of their own")  # fmt: skip
    if not found:
        inner = [n for n in folders if any(f.endswith(".tar") for f in os.listdir(os.path.join(folder, n)))]
        hint = f"; its subfolders hold tars: pass {os.path.join(folder, '*/')}" if inner else ""
        raise SystemExit(f"{folder}: no tars, no images and no class folders in it "
                         f"({len(files)} other files, {len(folders)} folders without images){hint}")  # fmt: skip
    kind, of = found[0]
    if kind == "shards in folders":  # no classes: 00000 is no label
        return "flat folder", [os.path.join(folder, n) for n in sorted(of)]
    if kind == "class folders":
        return kind, folders  # empty ones too: a class without images keeps its label
    return kind, tars if kind == "tars" else [folder]


def find_sources(paths):
    """What the command line names, as (kind, [(path, class name or None)]) in sorted order. Raises SystemExit."""
    kinds, sources = {}, []
    for path in paths:
        if not os.path.exists(path):
            raise SystemExit(f"{path}: no such file or folder")
        is_folder = os.path.isdir(path)
        if not is_folder and not TAR_NAME.search(path):
            raise SystemExit(f"{path}: expected a folder or a name that ends in .tar; for shards pass their folder")
        kind, found = look_into(path) if is_folder else ("tars", [path])
        is_class = kind == "class folders"
        sources += [(os.path.join(path, n), n) if is_class else (n, None) for n in found]
        kinds.setdefault(kind, path)
    if len(kinds) > 1:
        what = ", ".join(f"{kind} ({path})" for kind, path in kinds.items())
        raise SystemExit(f"got {what}; index each kind into a table of its own, and mix them in training")
    if repeated := [path for path, n in Counter(os.path.realpath(path) for path, _ in sources).items() if n > 1]:
        raise SystemExit(f"given twice: {', '.join(repeated[:10])}")
    if bad := [path for path, _ in sources if not is_writable_name(path)]:
        raise SystemExit(f"rename these, a table cannot hold their tabs, line breaks or invalid UTF-8: {bad[:10]}")
    return next(iter(kinds)), sorted(sources, key=lambda source: (source[1] or "", source[0]))


def labels_by_name(path):
    """Labels by name and by wnid of a classes.tsv, and how many. A name of several classes (crane) maps to None.

    Returns: ({name or wnid: row, or None if it has several}, number of rows)
    """
    header, rows = open_tables([path])
    rows, labels = list(rows), {}
    if {"name", "wnid"}.isdisjoint(header):
        raise SystemExit(f"{path}: got columns {', '.join(header)}, expected name or wnid among them")
    for column in ("name", "wnid"):  # wnid last: it wins
        names = [row.get(column, "") for row in rows]
        count = Counter(names)
        labels.update({name: label if count[name] == 1 else None for label, name in enumerate(names)})
    labels.pop("", None)
    return labels, len(rows)


def folder_labels(names, path, labels):
    """The label of each class folder. names: sorted; path: of classes.tsv, or None; labels: its labels by name."""
    if path is None:
        return {name: label for label, name in enumerate(names)}
    if unknown := [name for name in names if labels.get(name) is None]:
        shown = ", ".join(unknown[:20]) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        raise SystemExit(f"{path}: {len(unknown)} of {len(names)} class folders are not wnid or name of exactly one "
                         f"row: {shown}. Add them, or give another --classes")  # fmt: skip
    return {name: labels[name] for name in names}


# ------------------------------------------------------------------------------ index: table

# What is subtracted on the way from members to rows; every other count is a remark.
LOSSES = {
    "members": ("members whose name has no key and suffix", "members that are no plain files"),
    "samples": ("without an image", "empty image", "file name with a tab, line break or invalid UTF-8",
                "neither caption nor label", "texts of more than 10 MiB"),
}  # fmt: skip


def refuse_sources(errors):
    """SystemExit with the errors of sources, if there are any."""
    if errors:
        more = f"\n... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise SystemExit("\n".join(errors[:20]) + more + "\nnothing was written")


def tar_error(path):
    """Why a file cannot be read as a tar, from its first header; "" if it can."""
    try:
        reader = TarReader(path)
        with reader.file:
            reader.header(0)
    except (OSError, NotATarError) as error:
        return f"{path}: {error}"
    return ""


def run_jobs(jobs, workers):
    """index_source of every job, in order. Raises: SystemExit if a worker dies or a source is refused."""
    refuse_sources(list(filter(None, (tar_error(job["path"]) for job in jobs if job["kind"] == "tar"))))
    running, results = in_processes(index_source, zip(jobs), min(workers, len(jobs))), []
    for result in tqdm(running, total=len(jobs), unit=" sources", disable=None):
        results.append(result)
        if result["is_full"]:  # all others would fail too
            refuse_sources([result["error"]])
    refuse_sources([r["error"] for r in results if r["error"]])
    return results


def rows_of(results, jobs, suffix):
    """The rows of all sources, from their own files, as dicts with strings."""
    for result, job in zip(results, jobs, strict=True):
        columns = list(result["columns"])
        with open(job["rows"] + suffix, encoding="utf-8", newline="\n") as f:
            for line in f:  # rows from before a column was first seen are shorter
                fields = line[:-1].split("\t")
                yield dict(compress(zip(columns, fields, strict=False), fields))


def funnel(counts):
    """The counts as lines: what came in, what was lost and why, what is left; then remarks."""
    lines, told = [], {"rows", "rows in val.tsv"}
    for total, losses in LOSSES.items():
        if counts[total]:
            lines.append(f"{counts[total]:>12,}  {total}")
            lines += [f"{-counts[loss]:>12,}    {loss}" for loss in losses if counts[loss]]
        told.update((total, *losses))
    lines.append(f"{counts['rows'] + counts['rows in val.tsv']:>12,}  rows")
    lines += [f"{'':12}  note: {n:,} x {what}" for what, n in sorted(counts.items()) if n and what not in told]
    return "\n".join(lines)


def is_held_out(val, out):
    """Whether OUT.json says that this val.tsv, or one that a kill kept from its place, was written with OUT."""
    failures = (OSError, ValueError, LookupError, TypeError, RecursionError)
    with contextlib.suppress(*failures), open(f"{out}.json", encoding="utf-8") as f:
        return json.load(f)["val"]["sha256"] in [file_hash(p) for p in (val, f"{val}.partial") if os.path.exists(p)]
    return False


def build_index(sources, out, holdout, classes, workers, seed):
    """Write the table out of the images in sources, with what goes beside it. Arguments: as the flags."""
    start = time.perf_counter()
    kind, found = find_sources(sources)
    folder = os.path.dirname(os.path.abspath(out))
    beside, val = (os.path.join(os.path.dirname(out), name) for name in ("classes.tsv", "val.tsv"))
    if classes is None and kind == "class folders" and os.path.exists(beside):
        classes = beside
    if classes and not os.path.isfile(classes):
        raise SystemExit(f"--classes: no such file: {classes}")
    if holdout and os.path.exists(val) and not is_held_out(val, out):
        raise SystemExit(f"--holdout: {val} is there, and not of the last call that wrote {out}: move it away, or "
                         "write to another folder")  # fmt: skip
    labels = labels_by_name(classes) if classes else ({}, 0)
    names = sorted({name for _, name in found if name is not None})
    label_of = folder_labels(names, classes, labels[0])

    prefix = f".index-{os.path.basename(out)}-"
    with os.scandir(folder) as entries:  # of killed runs: OUT is locked
        for old in [entry.path for entry in entries if re.fullmatch(re.escape(prefix) + r"\w{8}", entry.name)]:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as partial:
        jobs = []
        for i, (path, name) in enumerate(found):
            # The folder's real place, since `..` after a link leads elsewhere; not the file's: links to shards stay.
            parent, base = os.path.split(os.path.abspath(path))
            relative = os.path.relpath(os.path.join(os.path.realpath(parent), base), os.path.realpath(folder))
            jobs.append(dict(
                kind="tar" if kind == "tars" else "folder", path=path, name=relative.replace(os.sep, "/"),
                key=base if kind != "flat folder" else "", label=label_of.get(name), is_recursive=name is not None,
                classes=labels, rows=os.path.join(partial, str(i)), holdout=holdout, seed=seed))  # fmt: skip
        results = run_jobs(jobs, workers)
        counts = sum((r["counts"] for r in results), Counter())
        n_train, n_val = counts["rows"], counts["rows in val.tsv"]
        if not n_train + n_val:
            told = [f"no rows; nothing was written. Of {len(found)} sources ({kind}):", funnel(counts)]
            told += [warning for result in results for warning in result["warnings"]][:20]
            told += ["An image needs a .txt or a caption, text or title in a .json, or a label"]
            raise SystemExit("\n".join(told))
        keys = {column for r in results for column in r["columns"]} - {"image", "label", "caption"}
        columns = ["image", "label", "caption", *sorted(keys)]
        if holdout:
            write_tsv(val, columns, rows_of(results, jobs, ".val"))
        write_tsv(out, columns, rows_of(results, jobs, ".train"))
    if names and not classes:
        classes = beside
        with with_reports([], [beside]):
            write_tsv(beside, ("name", "synonyms", "definition"), [dict(name=name) for name in names])

    warnings, is_bare = [w for r in results for w in r["warnings"]], [r["stats"] is None for r in results]
    if not all(is_bare):  # img2dataset writes it last
        warnings += [f"{r['path']}: no readable _stats.json, unlike its neighbours; an unfinished shard?"
                     for r in compress(results, is_bare)]  # fmt: skip
    if any(r.get("no_pyarrow") for r in results):
        warnings.append(".parquet beside the shards was not read: pip install pyarrow, unless the JSON has all")
    if names:
        empty = [j["path"] for j, r in zip(jobs, results, strict=True) if not r["counts"]["samples"]]
        warnings += [f"{path}: a class folder without images" for path in empty]
    if not holdout and os.path.exists(val) and os.path.basename(out).removesuffix(".tsv") not in TEST_SETS:
        warnings.append(f"{val} is older and may share images with {out}; move it away")
    if holdout and not (n_train and n_val):
        warnings.append(f"--holdout {holdout} left {n_train} rows in {out} and {n_val} in val.tsv")
    of_shards = [r["stats"] for r in results if r["stats"]]
    steps = ("count", "successes", "failed_to_download", "failed_to_resize") if of_shards else ()
    stats = {step: sum(shard.get(step, 0) for shard in of_shards) for step in steps}
    read = [dict(name=job["name"], **r["read"], **{k: r["counts"][k] for k in ("samples", "rows", "rows in val.tsv")})
            for job, r in zip(jobs, results)]  # fmt: skip
    read_files = [path for path, _ in found] if kind == "tars" else [
        file for path, name in found if name is None for file in shard_files(path)]  # fmt: skip
    write_report(out, [*read_files, classes if labels[1] else None],
                 dict(sources=sources, holdout=holdout, classes=classes, seed=seed, columns=columns), {}, kind=kind,
                 rows=n_train, rows_in_val=n_val, counts={k: n for k, n in sorted(counts.items()) if n},
                 img2dataset=stats, sources=read, warnings=warnings,
                 val=dict(path=val, sha256=file_hash(place_of(val))) if holdout else None)  # fmt: skip
    if holdout:
        os.replace(place_of(val), val)
    for warning in warnings[:20]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(warnings) > 20:
        print(f"warning: {len(warnings) - 20} more in {out}.json", file=sys.stderr)
    print(f"{len(found):>12,}  {kind if kind != 'flat folder' else 'flat folders'}"
          + (f", labels from {classes}" if names else ""))  # fmt: skip
    if stats:
        print(f"{'':12}  img2dataset: {stats['count']:,} pairs in, {stats['successes']:,} out, "
              f"{stats['failed_to_download']:,} not downloaded, {stats['failed_to_resize']:,} bad images")  # fmt: skip
    print(funnel(counts))
    print(f"{n_train:>12,}    in {out}")
    if holdout:
        print(f"{n_val:>12,}    in {val}")
    print(f"{time.perf_counter() - start:12.1f}  s")


# ------------------------------------------------------------------------------ readers

# What other tools call our columns, whatever the case; a table that has our name too keeps both.
COLUMN_ALIASES = {"image": ("filepath", "path", "file"), "caption": ("text", "title"), "label": ("class", "wnid")}
TABLE_SUFFIXES = tuple(kind + end for kind in (".tsv", ".csv", ".jsonl") for end in ("", ".gz")) + (".parquet", ".tar")
MAX_LINE = 10 * 2**20  # bytes; a longer line is a wrong file or a missing line break, not a row


def matches_of(pattern):
    """What a pattern fits. glob.glob passes over folders that it cannot read; here they raise an OSError."""
    parts = pattern.split(os.sep)
    for n in range(1, len(parts)):
        if glob.has_magic(os.sep.join(parts[: n + 1])):
            for folder in glob.glob(os.sep.join(parts[:n]) or os.sep, recursive=True):
                if os.path.isdir(folder):
                    os.scandir(os.path.join(folder, ".")).close()  # the dot: search permission is needed too
    return glob.glob(pattern, recursive=True)


def find_tables(paths):
    """The tables that paths, globs and folders name, files and folders of pictures, sorted. Raises: SystemExit."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            path = path.rstrip("/") or "/"
            with os.scandir(path) as entries:
                is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
            names = sorted(n for n in is_folder if n.endswith(TABLE_SUFFIXES))
            has_tars = any(n.endswith(".tar") for n in names)
            folders = [] if has_tars else shard_folders(path, sorted(filter(is_folder.get, is_folder)))
            if has_tars or folders:  # img2dataset's: what its .parquet tells is read with the tar or the folder
                names = [n for n in names if not n.endswith(".parquet")] + folders
            elif not names and any(os.path.splitext(n)[1][1:].lower() in IMAGE_SUFFIXES for n in is_folder):
                is_named = os.path.basename(path) not in (".", "..")  # images are named by the folder
                found.append(path if is_named else os.path.abspath(path))
                continue
            is_shard = set(folders)
            kinds = {"folder" if n in is_shard else os.path.splitext(n.removesuffix(".gz"))[1] for n in names}
            if len(kinds) != 1:
                what = f"tables of kinds {', '.join(sorted(kinds))}: name the files" if kinds else "no table"
                raise SystemExit(f"{path}: a folder with {what} (expected one kind of {', '.join(TABLE_SUFFIXES)}, or "
                                 "folders of img2dataset's; of class folders `index` makes a table)")  # fmt: skip
            found += [os.path.join(path, n) for n in names]
        elif os.path.exists(path):
            if not path.endswith(TABLE_SUFFIXES):
                why = "what a killed run left; " if path.endswith(".partial") else ""
                raise SystemExit(f"{path}: {why}expected a name that ends in one of {', '.join(TABLE_SUFFIXES)}")
            found.append(path)
        else:
            if os.path.islink(path):
                raise SystemExit(f"{path}: a link to {os.readlink(path)}, which is not there")
            of_killed = re.compile(r"\.(partial|tsv\.parts(\.old)?)(/|$)")  # runs, or such as are at work
            matches = [match for match in matches_of(path) if of_killed.search(path) or not of_killed.search(match)]
            if not matches:
                raise SystemExit(f"{path}: no such file or folder, and as a pattern it fits none")
            found += find_tables(matches)
    odd = [path for path in found if not os.path.isfile(path) and not os.path.isdir(path)]
    if odd:  # a pipe would be waited for, and could not be read twice
        raise SystemExit(f"{odd[0]}: expected a regular file or a folder")
    if twice := [path for path, n in Counter(map(os.path.realpath, found)).items() if n > 1]:
        raise SystemExit(f"given twice: {', '.join(twice[:10])}")
    return sorted(found)


def note_bad(bad, path, line, reason):
    """Count a row that cannot be read in the Counter `bad`, or list it; without that it ends the program."""
    if bad is None:
        raise SystemExit(f"{path}:{line}: {reason}")
    if isinstance(bad, list):
        bad.append((path, line, reason))
    else:
        bad[reason] += 1


def text_lines(path, bad=None):
    """(number, text) of each line of a UTF-8 file, plain or gzipped, without line end and byte order mark.

    bad: Counter of reasons for lines that are left out; None: the first one raises SystemExit.
    """
    is_gzip, number = path.endswith(".gz"), 0
    with open(path, "rb") as raw:
        start = raw.read(2)
        if start and (start == b"\x1f\x8b") != is_gzip:
            is_what = "not gzip data, though its name ends in .gz" if is_gzip else "gzip data: its name must end in .gz"
            raise SystemExit(f"{path}:1: {is_what}")
        raw.seek(0)
        file = gzip.GzipFile(fileobj=raw) if is_gzip and start else raw
        try:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    note_bad(bad, path, number, f"a line of more than {MAX_LINE // 2**20} MiB")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE)
                    continue
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    note_bad(bad, path, number, f"not UTF-8 (byte {error.object[error.start]:#04x})")
                    continue
                if "\0" in text:
                    note_bad(bad, path, number, "a NUL byte")
                    continue
                yield number, (text.removeprefix("\ufeff") if number == 1 else text).rstrip("\r\n")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise SystemExit(f"{path}:{number + 1}: damaged gzip data ({error})") from None


def tsv_rows(lines, n_fields, path, bad):
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) == n_fields:
            yield number, fields
        elif line:  # a blank line is no row but in a table of one column
            note_bad(bad, path, number, f"{len(fields)} fields, but the header has {n_fields}")


def is_long(fields):
    """Whether a line of these, and of a few more columns, could be longer than is read."""
    if sum(map(len, fields)) <= MAX_LINE // 4 - 2**16:  # a fast test: characters have up to 4 bytes
        return False
    return sum(len(field.encode("utf-8", "replace")) for field in fields) > MAX_LINE - 2**16


def csv_rows(lines, n_fields, path, bad):
    """Rows of a CSV, quoted as RFC 4180 has it; the number is of a row's last line. n_fields 0: as the first row.

    A quote that is never closed takes all lines behind it, up to MAX_LINE characters; each counts as bad.
    """
    csv.field_size_limit(MAX_LINE)
    taken = []  # numbers of a row's lines: reader.line_num does not count lines that are left out

    def texts():
        for number, line in lines:
            taken.append(number)
            yield line + "\n"

    reader = csv.reader(texts(), strict=True)
    while True:
        taken.clear()
        try:
            fields = next(reader, None)
        except csv.Error as error:
            for number in taken:
                note_bad(bad, path, number, f"not CSV ({error})")
            continue
        if fields is None:
            return
        n_fields = n_fields or len(fields)
        if len(fields) == n_fields:
            fields = list(map(tsv_field, fields))
            if is_long(fields):
                note_bad(bad, path, taken[-1], f"a row of more than {MAX_LINE // 2**20} MiB")
            else:
                yield taken[-1], fields
        elif fields:
            note_bad(bad, path, taken[-1], f"{len(fields)} fields, but the header has {n_fields}")


def json_objects(path, bad):
    for number, line in text_lines(path, bad):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = error if bad is None else getattr(error, "msg", type(error).__name__)  # by cause, not by column
                note_bad(bad, path, number, f"not JSON ({what})")
                continue
            if isinstance(row, dict):
                is_flat = all(name.isprintable() and name for name in row)
                yield number, row if is_flat else {tsv_field(name) or "_": value for name, value in row.items()}
            else:
                note_bad(bad, path, number, f"a JSON {type(row).__name__}, expected an object")


def parquet_rows(path, wanted, bad=None, has_failed=False):
    """Columns of a parquet file, and its rows as lists. wanted: names to read, or None for all; bad: as text_lines.

    Returns: names of all columns, names of those read, an iterator of (row number, fields of those read).
    img2dataset's files list rows that it did not get too, with a status; without has_failed these are left out.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise SystemExit(f"{path}: parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise SystemExit(f"{path}:1: not readable as parquet ({str(error).splitlines()[0]})") from None
    is_shard = {"key", "status", "error_message"} <= set(file.schema_arrow.names)
    pictures = IMAGE_SUFFIXES if is_shard else ()  # in img2dataset's format parquet they are a column, and no text
    columns = [name for name in file.schema_arrow.names if (wanted is None or name in wanted) and name not in pictures]
    is_shard, status = is_shard and not has_failed, columns.index("status") if "status" in columns else -1

    def rows():
        number = 0
        try:
            read = columns + ["status"] * (is_shard and status < 0)
            for batch in file.iter_batches(batch_size=16384, columns=read):
                batch = batch.select(read)  # in this order
                for values in zip(*(column.to_pylist() for column in batch.columns)):
                    number += 1
                    fields = list(map(tsv_field, values))
                    if is_shard and fields[status] not in ("", "success"):
                        continue
                    fields = fields[: len(columns)]
                    if is_long(fields):
                        note_bad(bad, path, number, f"a row of more than {MAX_LINE // 2**20} MiB")
                    else:
                        yield number, fields
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # text that is none, dates too far
            raise SystemExit(f"{path}:{number + 1}: cannot be read ({str(error).splitlines()[0]})") from None

    return file.schema_arrow.names, columns, rows()


def has_samples(path):
    """Whether a table is a tar or a folder, of samples: pictures with texts."""
    return path.endswith(".tar") or os.path.isdir(path)


def tar_rows(path, bad, warnings=None):
    """(number of the sample, {column: text}) of a tar or folder as `index` reads it; labels may be names.

    bad: Counter or list, as of note_bad, of samples that are left out; warnings: of what is wrong with the tar, else
    in bad too.
    """
    counts = Counter()
    result = dict(counts=counts, warnings=[], stats=None)
    samples = read_samples(path, os.path.basename(path), False, None, (None, 0), result)
    try:
        for sample, loss, label, caption, fields in samples:
            if loss:
                note_bad(bad, path, counts["samples"], loss)
            else:
                fields = {name or "_": value for name, value in fields.items()}
                fields |= dict(image=sample[1], label=label, caption=caption)
                yield counts["samples"], {tsv_field(name): tsv_field(value) for name, value in fields.items()}
    except NotATarError as error:
        raise SystemExit(f"{path}: {error}") from None
    if result.get("no_pyarrow") and warnings is not None:
        note_bad(warnings, path, 0, ".parquet beside it was not read: pip install pyarrow, unless the JSON has all")
    for warning in result["warnings"]:
        note_bad(bad if warnings is None else warnings, path, counts["samples"], warning)


@functools.lru_cache(2**16)
def tar_facts(path):
    """Columns of the rows of tar_rows, which takes a pass; {why a sample is left out: how often}, printed too."""
    columns, lost, warnings = set(), Counter(), Counter()
    for _, row in tar_rows(path, lost, warnings):
        columns.update(row)
    for reason, n in (lost + warnings).items():
        print(f"warning: {path}: {n} x {reason}", file=sys.stderr)
    return ["image", "label", "caption", *sorted(columns - {"image", "label", "caption"})], lost


def our_names(columns, path):
    """Names of columns, aliases replaced by ours. Raises: SystemExit if names are empty or double."""
    if wrong := sorted(name or "an empty name" for name, n in Counter(columns).items() if n > 1 or not name):
        raise SystemExit(f"{path}:1: the header has no or double names ({', '.join(wrong)}): {', '.join(columns)}")
    names, lower = list(columns), [name.lower() for name in columns]
    for ours, others in COLUMN_ALIASES.items():
        place = next((lower.index(name) for name in (ours, *others) if name in lower), None)
        is_classes = ours == "label" and {"image", "caption"}.isdisjoint(names)  # classes.tsv: its wnid is no label
        if ours not in columns and place is not None and not is_classes:
            names[place] = ours
    return names


class Row(dict):
    """A row of a table that may have thousands of columns, most of them empty: these need no keys."""

    def __missing__(self, column):
        return ""


def read_table(path, needed=(), bad=None, is_all=True):
    """One table, TSV, CSV, JSONL (each perhaps .gz), parquet, or a tar or folder of img2dataset's, as a stream.

    needed: columns that must be there; is_all: False reads only these, as lists; bad: as of note_bad.
    Returns: (names of the columns, iterator of (line, {column: string}, a Row where most fields are empty, or list of
    strings)). None and NaN are empty, nested values JSON.
    Raises: SystemExit "file:line: reason".
    """
    kind, lines, found = os.path.splitext(path.removesuffix(".gz").removesuffix(".partial"))[1], None, None
    if has_samples(path):
        header, found = tar_facts(path)[0], tar_rows(path, bad if isinstance(bad, list) else Counter())
    elif kind == ".parquet":
        _, own_names, rows = parquet_rows(path, None, bad)
        header = list(map(tsv_field, own_names))
    elif kind == ".jsonl":  # rows may differ in their keys: one more pass finds all of them
        header = list(dict.fromkeys(key for _, row in json_objects(path, Counter()) for key in row))
        found = json_objects(path, bad)
    else:
        lines = text_lines(path)  # a header that cannot be read is never passed over
        first = next(lines if kind == ".tsv" else csv_rows(lines, 0, path, None), None)
        header = [] if first is None else first[1].split("\t") if kind == ".tsv" else first[1]
    if not header and kind == ".jsonl":
        deque(json_objects(path, None), maxlen=0)  # raises, if there are lines
    if not header or header == [""]:
        raise SystemExit(f"{path}:1: an empty file; expected a header and rows")
    names = our_names(header, path)
    missing = [name for name in needed if name not in names]
    if "image" in missing and kind == ".parquet" and {"key", "status", "error_message"} <= set(names):
        raise SystemExit(f"{path}:1: no column image: img2dataset's own table; give the folder of its tars or folders "
                         "of files (--output_format webdataset or files; parquet, tfrecord: texts alone)")  # fmt: skip
    if missing:
        there = (name if name == ours else f"{name} (read as {ours})" for name, ours in zip(header, names))
        raise SystemExit(f"{path}:1: no column {', '.join(missing)}; found {', '.join(there)}")
    if lines is not None:
        lines.close()
        rows = (tsv_rows if kind == ".tsv" else csv_rows)(text_lines(path, bad), len(header), path, bad)
        next(rows)  # the header
    usual = [(name, "") for name in COLUMN_ALIASES if name in names]  # a Row tells that its table has these
    if is_all and found:
        ours = dict(zip(header, names))
        return names, ((n, Row(usual, **{ours[k]: tsv_field(v) for k, v in row.items()})) for n, row in found)
    if is_all and len(names) > 256:
        return names, ((n, Row(itertools.chain(usual, compress(zip(names, fields), fields)))) for n, fields in rows)
    if is_all:
        return names, ((n, dict(zip(names, fields))) for n, fields in rows)
    places = [names.index(name) for name in needed]
    if found:
        keys = [header[place] for place in places]
        return list(needed), ((n, [tsv_field(row.get(key)) for key in keys]) for n, row in found)
    if kind == ".parquet":
        _, read, rows = parquet_rows(path, {own_names[place] for place in places}, bad)
        places = [read.index(own_names[place]) for place in places]
    return list(needed), ((line, [fields[place] for place in places]) for line, fields in rows)


def relocate(image, source, target):
    """An image's name for a table in the folder `target`, from its name in a table in the folder `source`."""
    if os.path.isabs(image) or "://" in image or not image:
        return image
    return os.path.normpath(os.path.join(os.path.relpath(source or ".", target or "."), image)).replace(os.sep, "/")


def open_tables(paths, needed=(), bad=None, out=None):
    """The rows of several tables one after another, as dicts.

    paths: files, as find_tables gives them; out: table that will hold the rows; images are named relative to it.
    Returns: (names of all columns in order of appearance, iterator of dicts; a column a file lacks is "").
    """
    opened = [read_table(path, needed, bad)[0] for path in paths]
    columns = list(dict.fromkeys(name for names in opened for name in names))

    def rows():
        for path in paths:
            names, table = read_table(path, needed, bad)
            source, target = (os.path.realpath(os.path.dirname(p or path) or ".") for p in (path, out))
            empty = dict.fromkeys(columns, "")
            for _, row in table:
                if type(row) is dict and len(names) < len(columns):
                    row = empty | row
                if source != target and "image" in row:
                    row["image"] = relocate(row["image"], source, target)
                yield row

    return columns, rows()


def file_hash(path):
    """sha256 of a file's bytes, hexadecimal; read once, as one file may be an input of several reports and parts."""
    stat = os.stat(path)
    return hash_of_version(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(2**16)
def hash_of_version(path, *_):
    with open(path, "rb") as f:
        state = hashlib.sha256()
        while block := f.read(2**20):
            state.update(block)
    return state.hexdigest()


def with_beside(paths):
    """Tables that are given (not None), each once, and behind a tar or folder those of img2dataset's read with it."""
    for path in dict.fromkeys(filter(None, paths)):
        yield path
        if has_samples(path):
            yield from shard_files(path)


def facts_of(path):
    """What OUT.json tells of an input. Of a tar only headers and texts are read, so neither is it hashed as a whole."""
    if os.path.isdir(path):  # as index has it
        samples, n_bytes = hashlib.sha256(), 0
        for sample in folder_samples(path, "", False, Counter()):
            samples.update(sample_bytes(sample))
            n_bytes += sample[2]
        return dict(path=path, image_bytes=n_bytes, sha256_of_names_sizes_texts=samples.hexdigest())
    stat = os.stat(path)
    facts = dict(path=path, bytes=stat.st_size)
    if not path.endswith(".tar"):
        return facts | dict(sha256=file_hash(path))
    with open(path, "rb") as f:
        ends = f.read(2**20) + os.pread(f.fileno(), 2**20, max(0, stat.st_size - 2**20))
    return facts | dict(mtime_ns=stat.st_mtime_ns, sha256_of_first_and_last_mib=hashlib.sha256(ends).hexdigest())


def write_report(out, inputs, flags, steps, parts="", **more):
    """Write OUT.json, what a table was made from and how: equal for equal inputs and flags but for command and date.

    inputs: all files that were read, None for those not given; flags: dict of those that change the result, seed
    included; steps: the funnel, an ordered dict from what came in over what was lost, and why, to what came out; parts:
    folder that is removed while the lock is held; more: further facts, as histograms.
    """
    table = place_of(out)
    command = shlex.join(["python", *(arg for arg in sys.argv if arg != "--merge")])
    content = dict(
        command=re.sub(r" --shard[ =]\S+", "", command),  # makes the table again, from nothing
        script=file_hash(os.path.abspath(__file__)),
        versions=dict(python=sys.version.split()[0], numpy=np.__version__), flags=flags, funnel=steps, **more,
        inputs=list(map(facts_of, with_beside(inputs))),
        outputs=[dict(path=out, bytes=os.path.getsize(table), sha256=file_hash(table))],
        date=time.strftime("%Y-%m-%d %H:%M:%S"))  # fmt: skip
    with whole_file(f"{out}.json") as f:
        f.write(json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        f.flush()  # a full disk shows here
        if os.path.isdir(parts):
            shutil.rmtree(f"{parts}.old", ignore_errors=True)  # a killed run's
            os.rename(parts, f"{parts}.old")  # at once, and while the lock is held: the next run has its own
        if table != out:
            Path(out).unlink(missing_ok=True)  # a kill must not leave it with the report of the new one
    os.replace(table, out)  # a table that is there has its report
    shutil.rmtree(f"{parts}.old", ignore_errors=True)  # last: they may be many


def print_funnel(counts):
    """The steps of write_report as lines; losses are negative numbers and stand to the right."""
    for what, n in counts.items():
        print(f"{n:>12,}  {'  ' if n < 0 else ''}{what}")


# ------------------------------------------------------------------------------ wordnet

# Plural endings and what stands for them, in morphy's order (morphy(7WN)); NLTK has ves -> f after ses -> s.
DETACHMENTS = (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
               ("ies", "y"))  # fmt: skip
NLTK_DETACHMENTS = (*DETACHMENTS[:2], ("ves", "f"), *DETACHMENTS[2:])


def wordnet_paths(folder, *names):
    """Paths of WordNet's files, none without its folder. Raises: SystemExit if one is not there."""
    paths = [os.path.join(folder, name) for name in names if folder]
    for path in paths:
        if not os.path.isfile(path):
            raise SystemExit(f"{path}: no such file; --wordnet is the folder of WordNet 3.0's data.noun, noun.exc, ...")
    return paths


def wordnet_file(folder, name, pattern):
    """Matches of the lines of one of WordNet's files with a pattern, without the licence on top.

    Raises: SystemExit for another version, and for a line that does not fit or does not lie where it says (offset).
    """
    if not folder:
        raise SystemExit("--wordnet: got no folder, expected that of WordNet 3.0's data.noun, noun.exc, ...")
    (path,) = wordnet_paths(folder, name)
    offset = 0
    for number, line in text_lines(path):
        if line.startswith("  "):
            version = re.search(r"WordNet (\d\S*) Copyright", line)
            if version and version[1] != "3.0":  # wnids are offsets, which are others there
                raise SystemExit(f"{path}:{number}: WordNet {version[1]}, expected 3.0")
        else:
            match = re.match(pattern, line)
            if not match or "offset" in match.groupdict() and int(match["offset"]) != offset:
                raise SystemExit(f"{path}:{number}: no line of WordNet's {name} at byte {offset}: {line[:40]!r}")
            yield match
        offset += len(line.encode()) + 1


@functools.lru_cache(2)
def read_nouns(folder):
    """WordNet's nouns. Returns: (exceptions {form: its bases}, index {lemma: offsets of its synsets in sense order}).

    Lemmas are in lower case, with "_" for blanks. A form that stands twice in noun.exc keeps its first line.
    """
    exceptions, index = {}, {}
    for line in wordnet_file(folder, "noun.exc", r"\S+( +\S+)+ *$"):
        form, *bases = line[0].split()
        exceptions.setdefault(form, bases)
    for line in wordnet_file(folder, "index.noun", r"\S+ n (\d+) \d+ (\S+ )*?\d+ \d+(( \d{8})+) *$"):
        index[line[0].split()[0]] = line[3].split()
    return exceptions, index


def morphword(word, exceptions, index):
    """Base form of one lower-case noun by WordNet's morphy, or None. Source: WordNet 3.0, lib/morph.c."""
    if word in exceptions:
        return exceptions[word][0]
    stem, tail = (word[: word.rindex("f")], "ful") if word.endswith("ful") else (word, "")
    if not tail and (word.endswith("ss") or len(word) <= 2):
        return None
    for suffix, ending in DETACHMENTS:
        if len(stem) > len(suffix) and stem.endswith(suffix):
            if (base := stem[: -len(suffix)] + ending) in index:
                return base + tail
    return None


def nltk_lemma(word, exceptions, index):
    """The noun lemma that NLTK's WordNetLemmatizer gives (the paper's counts), which is not morphy's: us -> u.

    Of two lines of noun.exc for a form NLTK takes the last: aurar and involucra, of WordNet's, have other lemmas there.
    """
    if (found := exceptions.get(word)) is None:
        found = [word[: -len(suffix)] + ending for suffix, ending in NLTK_DETACHMENTS if word.endswith(suffix)]
    return min((form for form in [word, *found] if form in index), key=len, default=word)  # the first of the shortest


def lemmatiser(kind, folder):
    """The function from word to lemma. kind: nltk, morphy or none; folder: of WordNet's files."""
    if kind == "none":
        return str
    if kind == "nltk":
        return lambda word: nltk_lemma(word, *read_nouns(folder))
    return lambda word: morphword(word, *read_nouns(folder)) or word


def forms_of(lemmas, kind, folder):
    """{word: lemma} of every word whose lemma is one of `lemmas`: the lemmatiser turned round, exact and finite.

    Captions need no lemmatiser then: a word outside this map can't matter. Equal to lemmatising (tests/test_match.py).
    """
    if kind == "none":
        return {lemma: lemma for lemma in lemmas}
    lemma_of, exceptions = lemmatiser(kind, folder), read_nouns(folder)[0]
    candidates = set(lemmas) | {form for form, bases in exceptions.items() if not lemmas.isdisjoint(bases)}
    for lemma in lemmas:
        for suffix, ending in NLTK_DETACHMENTS:
            for stem, tail in ((lemma, ""), (lemma.removesuffix("ful"), "ful")):
                if stem.endswith(ending) and (not tail or lemma.endswith(tail)):
                    candidates.add(stem[: len(stem) - len(ending)] + suffix + tail)
    return {word: lemma_of(word) for word in candidates if lemma_of(word) in lemmas}


def read_synsets(folder, part="noun"):
    """{offset: (words, definition)} of WordNet's data file of a part of speech; the definition has no examples."""
    synsets = {}
    for line in wordnet_file(folder, f"data.{part}", r"(?P<offset>\d{8}) \d\d [nvasr] ([\da-f]{2}) (.+?) \| (.*)"):
        words = line[3].split(" ")[: 2 * int(line[2], 16) : 2]
        words = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in words]
        synsets[line["offset"]] = words, re.sub('"[^"]*"', "", line[4]).strip(" ;")
    return synsets


# ------------------------------------------------------------------------------ match

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"  # the 32 marks that LAIONet takes for blanks
# NLTK's tokeniser cuts these in two, and nothing else that has only letters.
CONTRACTIONS = {w: (w[:3], w[3:]) for w in ("cannot", "gonna", "gotta", "lemme", "gimme", "wanna")}
RULES = {
    "bag": "all words of a name, lemmatised, in any order and place (the paper's frequencies)",
    "word": "the name between word boundaries",
    "regex-lemma": r"the regular expression \b(name|name)\b, not escaped (the paper's YFCC15M-Cls, CC12M-Cls)",
    "substring": "the name anywhere, in words too (YFCC-Classification)",
    "laionet": "the name between blanks, after ASCII punctuation in the caption became blanks; case counts",
    "metaclip": "the name between blanks, after , . ; : ? ! ` got blanks around; case counts",
}
# Which bytes of UTF-8 tokens are made of, as 0 and 1.
TOKENS = {
    "bag": bytes(97 <= c <= 122 for c in range(256)),
    "word": bytes(c == 95 or c < 128 and chr(c).isalnum() for c in range(256)),  # \w; beyond ASCII: word_bytes
    "substring": bytes(c > 0 for c in range(256)),
    "laionet": bytes(c not in (0, 32) for c in range(256)),
}
TOKENS |= {"regex-lemma": TOKENS["word"], "metaclip": TOKENS["laionet"]}
KEY_LENGTH = 3  # bytes of a token of `substring`; one begins at every byte
CHARS_AT_ONCE = 1 << 17  # of captions matched together: 8 bytes for each stay in a core's cache (2 MiB)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: a product with it has well mixed high bits
FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # a mask of n of eight bytes


def with_spaced_marks(text):
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")


def blocks_of(texts, places=None):
    """Texts joined by NUL, about CHARS_AT_ONCE together, ASCII apart: one other letter makes str.lower slow for all.

    A NUL in a text becomes a blank. Yields: places of texts, [n], and these texts as one.
    """
    places, half, joined = np.arange(len(texts)) if places is None else places, len(texts) // 2, "".join(texts)
    if half and len(joined) > CHARS_AT_ONCE:
        yield from blocks_of(texts[:half], places[:half])
        yield from blocks_of(texts[half:], places[half:])
    elif joined.isascii() or not any(map(str.isascii, texts)):
        yield places, "\0".join([text.replace("\0", " ") for text in texts] if "\0" in joined else texts)
    else:
        is_ascii = np.array([text.isascii() for text in texts])
        for is_wanted in (is_ascii, ~is_ascii):
            yield from blocks_of(list(compress(texts, is_wanted.tolist())), places[is_wanted])


def group(pairs, n):
    """Values by key. pairs: (key, value), keys below n. Returns: cuts [n + 1], values; k has [cuts[k]:cuts[k + 1]]."""
    keys, values = np.array(pairs, np.int64).reshape(-1, 2).T
    order = np.argsort(keys, kind="stable")
    return np.searchsorted(keys[order], np.arange(n + 1)), values[order]


def members(cuts, keys):
    """All values of keys, one after another. Returns: for each the place of its key in keys, its own in the values."""
    stops = cuts[keys + 1]
    sizes = stops - cuts[keys]
    which = np.repeat(np.arange(len(keys)), sizes)
    return which, np.arange(len(which)) + (stops - np.cumsum(sizes))[which]


def eights_of(data):
    """The eight bytes of data from each place on, those beyond the end 0, as [N] uint64."""
    return np.ndarray(len(data), "<u8", data + bytes(8), strides=(1,)).copy()  # aligned, which is faster to index


def pieces(eights, starts, lengths):
    """The bytes from starts on, at most eight, as numbers; lengths: how many, more than eight are cut."""
    return eights.take(starts, mode="clip") & FIRST_BYTES[np.minimum(lengths, 8)]


def word_bytes(text):
    """Which bytes of a text's UTF-8 are of word characters, as in \\w of regular expressions: [N] bool."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_word = np.frombuffer(text.encode("ascii", "replace").translate(TOKENS["word"]), bool).copy()
    places = np.flatnonzero(codes > 127)
    kinds, which = np.unique(codes[places], return_inverse=True)
    is_word[places] = np.array([chr(code).isalnum() for code in kinds.tolist()], bool)[which]
    return np.repeat(is_word, 1 + np.digitize(codes, (0x80, 0x800, 0x10000)))


class Tokens:
    """The tokens of several texts by a rule; no loop goes over texts or tokens.

    starts, ends: [T] places in the texts' UTF-8, which has a NUL before each text and after the last; nuls: places of
    these. is_inside: [N] bool, bytes of tokens; eights: [N], see eights_of.
    """

    def __init__(self, text, rule):
        """text: the texts joined by NUL."""
        data = f"\0{text}\0".encode("utf-8", "surrogatepass")
        self.eights, self.is_inside = eights_of(data), np.frombuffer(data.translate(TOKENS[rule]), bool)
        if TOKENS[rule] is TOKENS["word"] and not text.isascii():
            self.is_inside = word_bytes(f"\0{text}\0")
        if rule == "substring":
            self.starts = np.flatnonzero(self.is_inside[:-2] & self.is_inside[1:-1] & self.is_inside[2:])
            self.ends = self.starts + KEY_LENGTH
        else:
            self.starts, self.ends = (np.flatnonzero(self.is_inside[1:] != self.is_inside[:-1]) + 1).reshape(-1, 2).T
        self.nuls = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)

    def row_of(self, tokens):
        return np.searchsorted(self.nuls, self.starts[tokens]) - 1

    def hashes(self, first, last, longest):
        """Hashes of what stands from the start of tokens `first` to the end of `last`, or of so many bytes of it."""
        starts = self.starts[first]
        lengths = np.minimum(self.ends[last] - starts, longest)
        hashes, left, done = pieces(self.eights, starts, lengths) * GOLDEN, np.flatnonzero(lengths > 8), 8
        while len(left):
            hashes[left] = (hashes[left] ^ pieces(self.eights, starts[left] + done, lengths[left] - done)) * GOLDEN
            done += 8
            left = left[lengths[left] > done]
        return hashes


class Finder:
    """Where strings are in texts, if no token goes on beyond their ends. As fast for half a million strings as for one.

    A trie: its keys are the hashes of a string's first token, of the text to the end of its second, and so on; only
    where a key is the beginning of more is the next token looked up. What the hashes find is compared byte by byte, so
    two texts with one hash cost time, not truth.
    """

    def __init__(self, strings, rule, is_decisive=None):
        """is_decisive: [S] bool; texts with none of these strings are passed over; without it no text is."""
        self.rule, self.is_decisive, self.offsets, columns = rule, is_decisive, np.zeros(len(strings), np.int64), []
        data = [string.encode("utf-8", "surrogatepass") for string in strings]
        self.eights, self.sizes = eights_of(b"".join(data)), np.fromiter(map(len, data), np.int64)
        self.starts, self.longest = np.cumsum(self.sizes) - self.sizes, self.sizes.max(initial=0) + 1
        for places, text in blocks_of(strings):
            tokens = Tokens(text, rule)
            rows = tokens.row_of(np.arange(len(tokens.starts)))
            numbers, first = places[rows], np.searchsorted(rows, rows)
            hashes = tokens.hashes(first, np.arange(len(first)), self.longest)
            columns.append((numbers, hashes, np.diff(rows, append=-1) != 0))
            self.offsets[numbers] = tokens.starts[first] - tokens.nuls[rows] - 1  # of the first token
        numbers, hashes, is_last = map(np.concatenate, zip(*columns))
        self.without_tokens = np.setdiff1d(np.arange(len(strings)), numbers)  # can't be found
        keys, which = np.unique(hashes, return_inverse=True)
        self.keys = np.append(keys, np.uint64(2**64 - 1))  # the last stands for nothing
        self.cuts, self.strings = group(np.stack([which, numbers], 1)[is_last], len(self.keys))
        self.goes_on = np.bincount(which[~is_last], minlength=len(self.keys)) > 0
        bits = (4 * len(keys)).bit_length()  # of a hash; they say which is the first key with these bits, if any is
        self.shift = np.uint64(64 - bits)
        self.slots = np.searchsorted(keys, np.arange(1 << bits, dtype=np.uint64) << self.shift)
        self.slots[np.diff(self.slots, append=len(keys)) == 0] = len(keys)

    def find(self, tokens):
        """Returns: texts and strings found in them, numbers [F] each, as often as they are there."""
        first = last = np.arange(len(tokens.starts))
        at, found = [], []
        while not at or len(first):
            hashes = tokens.hashes(first, last, self.longest)
            place = self.slots[(hashes >> self.shift).view(np.int64)]
            hits = np.flatnonzero(place < len(self.keys) - 1)
            place, hashes = place[hits], hashes[hits]
            behind = np.flatnonzero(self.keys[place] < hashes)
            while len(behind):
                place[behind] += 1
                behind = behind[self.keys[place[behind]] < hashes[behind]]
            is_key = np.flatnonzero(self.keys[place] == hashes)
            place, first, last = place[is_key], first[hits[is_key]], last[hits[is_key]]
            which, places = members(self.cuts, place)
            at.append(first[which])
            found.append(self.strings[places])
            goes_on = np.flatnonzero(self.goes_on[place] & (last + 1 < len(tokens.starts)))
            first, last = first[goes_on], last[goes_on] + 1
        at, found = np.concatenate(at), np.concatenate(found)
        rows = tokens.row_of(at)
        if self.is_decisive is not None:
            is_row = np.zeros(len(tokens.nuls), bool)
            is_row[rows[self.is_decisive[found]]] = True
            is_left = np.flatnonzero(is_row[rows])
            rows, at, found = rows[is_left], at[is_left], found[is_left]
        begins, starts, sizes = tokens.starts[at] - self.offsets[found], self.starts[found], self.sizes[found]
        is_there = np.ones(len(at), bool)
        if self.rule != "substring":
            is_there &= ~tokens.is_inside.take(begins - 1, mode="clip")
            is_there &= ~tokens.is_inside.take(begins + sizes, mode="clip")
        for done in range(0, sizes.max(initial=0), 8):
            left = np.flatnonzero(sizes > done) if done else slice(None)
            text = pieces(tokens.eights, begins[left] + done, sizes[left] - done)
            is_there[left] &= text == pieces(self.eights, starts[left] + done, sizes[left] - done)
        return rows[is_there], found[is_there]


class Matcher:
    """Which classes captions name, by one of RULES. The time does not grow with the number of classes.

    names, negatives: lists of (text, class); a caption with a negative of a class does not name it. For `bag` each word
    of a negative counts by itself, as published. is_sensitive: case counts (word, regex-lemma, substring).
    """

    def __init__(self, names, rule, negatives=(), is_sensitive=False, lemmas="nltk", wordnet=""):
        self.rule, self.is_sensitive = rule, is_sensitive or rule in ("laionet", "metaclip")
        needles, pairs = {}, ([], [])  # text, or frozenset of lemmas -> its number; its (number, class), for both signs
        for sign, given in enumerate((names, negatives)):
            for text, label in given:
                for needle in self.needles_of(text.replace("\0", " "), sign, lemmatiser(lemmas, wordnet)):
                    pairs[sign].append((needles.setdefault(needle, len(needles)), label))
        self.needles, self.n_classes = list(needles), 1 + max((label for p in pairs for _, label in p), default=0)
        self.named, self.excluded = (group(p, len(needles)) for p in pairs)
        if rule == "bag":
            self.index_lemmas(lemmas, wordnet)
            return
        regex = re.compile(r"^\W|\W$|[\\^$.|?*+()\[{]")  # a name that is more than itself as a regular expression
        self.finder = Finder([n if rule != "regex-lemma" or not regex.search(n) else "" for n in self.needles], rule)
        self.odd, flags = [], re.I if rule == "regex-lemma" and not is_sensitive else 0  # tried on every caption
        for number in self.finder.without_tokens.tolist():
            try:
                self.odd.append((re.compile("".join(self.pattern(self.needles[number])), flags), number))
            except re.error as error:
                raise SystemExit(f"the name {self.needles[number]!r} is no regular expression ({error}); "
                                 "use --match word") from None  # fmt: skip
        self.odd_any = re.compile("|".join(p.pattern for p, _ in self.odd), flags)

    def needles_of(self, text, is_negative, lemma_of):
        """What is looked for: the prepared text, or for `bag` sets of lemmas."""
        if self.rule == "bag":
            words = [part for w in re.findall("[a-z]+", text.lower()) for part in CONTRACTIONS.get(w, (w,))]
            found = [frozenset(map(lemma_of, words))]
            if is_negative:
                found = [frozenset([lemma]) for lemma in found[0]]
        else:
            found = [text if self.is_sensitive else text.lower()]
        if not found or not found[0] or found == [" "]:
            raise SystemExit(f"the name {text!r} has nothing to look for by the rule {self.rule}; remove it")
        return found

    def index_lemmas(self, kind, wordnet):
        """For `bag`: all forms of the names' lemmas are looked for; where a name's rarest lemma is, it is tried."""
        n_names = Counter(lemma for needle in self.needles for lemma in needle)
        forms = forms_of(set(n_names), kind, wordnet).items()
        forms = {word: (lemma,) for word, lemma in forms if word.isascii() and word.isalpha()}  # as tokens are
        for word, parts in CONTRACTIONS.items():
            forms[word] = tuple(forms[part][0] for part in parts if part in forms)
        # The longest word is mostly the rarest; so "hen of the woods" is not tried wherever there is a "the".
        rarest = [min(needle, key=lambda lemma: (-len(lemma), n_names[lemma], lemma)) for needle in self.needles]
        decisive = {rarest[number] for number in np.flatnonzero(np.diff(self.named[0]))}
        self.finder = Finder(list(forms), "bag", np.array([not decisive.isdisjoint(found) for found in forms.values()]))
        place = {lemma: number for number, lemma in enumerate(n_names)}
        self.n_lemmas = len(place)
        self.lemmas = group([(number, place[lemma]) for number, found in enumerate(forms.values()) for lemma in found],
                            len(forms))  # fmt: skip
        self.tried = group([(place[lemma], number) for number, lemma in enumerate(rarest)], self.n_lemmas)
        self.others = group([(number, place[lemma]) for number, (needle, rare) in enumerate(zip(self.needles, rarest))
                             for lemma in needle if lemma != rare], len(rarest))  # fmt: skip

    def pattern(self, needle):
        """Regular expressions of what stands left of a needle, of itself, and right of it."""
        if self.rule in ("laionet", "metaclip"):
            return "(?<![^ ])", re.escape(needle), "(?![^ ])"
        if self.rule == "regex-lemma":
            return r"\b", f"(?:{needle})", r"\b"
        return ("", re.escape(needle), "") if self.rule == "substring" else (r"(?<!\w)", re.escape(needle), r"(?!\w)")

    def prepared(self, text):
        """What is searched for a caption, or for several joined by NUL."""
        if self.rule == "laionet":
            for mark in PUNCTUATION:
                text = text.replace(mark, " ")
            return text
        if self.rule == "metaclip":
            return with_spaced_marks(text)
        return text.lower() if self.rule == "bag" or not self.is_sensitive else text

    def pairs(self, captions):
        """What captions name: numbers of captions, and a class of each, [P] int64 both; sorted, no pair twice."""
        found = []
        for places, text in blocks_of(captions):
            text = self.prepared(text)
            rows, needles = self.finder.find(Tokens(text, self.rule))
            if self.rule == "bag":
                rows, needles = self.of_forms(rows, needles)
            elif self.odd:
                texts = zip(range(len(places)), text.split("\0"))
                odd = [(row, number) for row, one in texts if self.odd_any.search(one)
                       for pattern, number in self.odd if pattern.search(one)]  # fmt: skip
                rows, needles = np.concatenate([np.stack([rows, needles]), np.array(odd, np.int64).reshape(-1, 2).T], 1)
            named, excluded = (places[rows[which]] * self.n_classes + labels[at]
                               for cuts, labels in (self.named, self.excluded)
                               for which, at in [members(cuts, needles)])  # fmt: skip
            found.append(named[np.isin(named, excluded, invert=True)] if len(excluded) else named)
        codes = np.sort(np.concatenate(found))
        return np.divmod(codes[np.diff(codes, prepend=-1) != 0], self.n_classes)

    def of_forms(self, rows, forms):
        """Forms that captions have -> names of which they have all lemmas; rows: numbers of the captions of both."""
        which, at = members(self.lemmas[0], forms)
        rows, lemmas = rows[which], self.lemmas[1][at]
        held = np.sort(rows * self.n_lemmas + lemmas)
        which, at = members(self.tried[0], lemmas)
        rows, needles = rows[which], self.tried[1][at]
        which, at = members(self.others[0], needles)
        wanted = rows[which] * self.n_lemmas + self.others[1][at]
        has_all = np.ones(len(rows), bool)
        has_all[which[held.take(np.searchsorted(held, wanted), mode="clip") != wanted]] = False
        return rows[has_all], needles[has_all]

    def match(self, captions):
        """Classes that each caption names: list of sorted tuples."""
        rows, labels = self.pairs(captions)
        cuts, labels = np.searchsorted(rows, np.arange(len(captions) + 1)).tolist(), labels.tolist()
        return [tuple(labels[start:stop]) for start, stop in zip(cuts, cuts[1:])]

    def longest(self, caption, classes):
        """Of the classes that a caption names, those with a place that is not strictly inside one of another class.

        Not for `bag`, whose names have no place.
        """
        text, places = self.prepared(caption), []  # (start, end, class)
        for label in classes:
            for number in np.searchsorted(self.named[0], np.flatnonzero(self.named[1] == label), "right") - 1:
                left, middle, right = self.pattern(self.needles[number])
                places += [(*found.span(1), label) for found in re.finditer(f"{left}(?=({middle}){right})", text)]
        # From the left, the longer first: what holds a place came before it and reaches as far. Places inside one of
        # their own class need no exception: either that one stays, or what holds it, of another class, holds all.
        kept, far = set(), (0, 0)  # far: (end, -start) of the one that reaches farthest
        for start, end, label in sorted(places, key=lambda place: (place[0], -place[1])):
            if far <= (end, -start):
                kept.add(label)
                far = end, -start
        return tuple(sorted(kept))


def class_rows(path):
    """Rows of a classes.tsv as dicts, in label order. Raises: SystemExit for empty names, for double wnids or, without
    wnids, names."""
    rows, seen = [], {}
    for line, row in read_table(path, ["name"])[1]:
        if not row["name"].strip():
            raise SystemExit(f"{path}:{line}: an empty name")
        if (key := row.get("wnid") or row["name"]) in seen:
            raise SystemExit(f"{path}:{line}: {key} stands in line {seen[key]} too")
        seen[key] = line
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}:2: no classes below the header")
    return rows


def split_names(field):
    return [name.strip() for name in field.split("|") if name.strip()]


def names_of(row):
    """Names by which a class is found: the column match if it has something, else name and synonyms."""
    names = split_names(row.get("match", "")) or [row["name"].strip(), *split_names(row.get("synonyms", ""))]
    return list(dict.fromkeys(names))


def shared_names(names):
    """{name in lower case: labels} of the names that several classes have. names: list of names of each class."""
    owners = defaultdict(set)
    for label, own in enumerate(names):
        for name in own:
            owners[name.lower()].add(label)
    return {name: sorted(labels) for name, labels in sorted(owners.items()) if len(labels) > 1}


def warn_of_shared(names):
    """shared_names, of which a warning is printed."""
    if shared := shared_names(names):
        print(f"warning: names of several classes: {', '.join(list(shared)[:20])}", file=sys.stderr)
    return shared


@functools.lru_cache(1)
def matcher_of(settings):
    """The Matcher of a command's settings (JSON); made once in each worker.

    settings: names and negatives as lists per class, or entries (a table of curate), and Matcher's other arguments;
    what else a command has among them does not matter here.
    """
    settings = json.loads(settings)
    if "entries" in settings:
        names = [(row["entry"], i) for i, row in enumerate(open_tables([settings["entries"]], ["entry"])[1])]
        return Matcher(names, "metaclip")
    names, negatives = ([(text, label) for label, texts in enumerate(settings[key]) for text in texts]
                        for key in ("names", "negatives"))  # fmt: skip
    others = (settings[key] for key in ("is_sensitive", "lemmas", "wordnet"))
    return Matcher(names, settings["rule"], negatives, *others)


def match_settings(rows, rule, is_sensitive=False, lemmas="none", wordnet="", more_names=None, files=()):
    """The settings of matcher_of for classes. more_names: {name or wnid of one class: further names}; files: those read
    for all.

    The hashes of these, inputs, are among the settings: what was made from other contents is not taken up.
    """
    owners, more_names = defaultdict(list), more_names or {}
    for label, row in enumerate(rows):
        for key in {row["name"], row.get("wnid") or row["name"]}:
            owners[key].append(label)
    if unknown := sorted(set(more_names) - set(owners)):
        raise SystemExit(f"--synonyms: {len(unknown)} names are not in classes.tsv: {', '.join(unknown[:10])}")
    for key in more_names:
        if len(owners[key]) > 1:
            raise SystemExit(f"--synonyms: {key} is the name of classes {', '.join(map(str, owners[key]))}; give their "
                             "wnids instead, in the column name or wnid")  # fmt: skip
    nouns = wordnet_paths(wordnet, "index.noun", "noun.exc") if rule == "bag" and lemmas != "none" else []
    return dict(rule=rule, is_sensitive=is_sensitive, lemmas=lemmas, wordnet=wordnet,
                inputs={path: file_hash(path) for path in [*files, *nouns] if path},
                names=[names_of(row) + [name for key in dict.fromkeys((row["name"], row.get("wnid")))
                                        for name in more_names.get(key, ())] for row in rows],
                negatives=[split_names(row.get("negative", "")) for row in rows])  # fmt: skip


def in_chunks(rows, texts, size=4096):
    """Lists of at most so many rows, and of about MAX_LINE characters: rows of that length must not add up.

    texts: function from a row to its strings. They are measured size // 256 rows at a time, which hardly costs time.
    """
    rows, chunk, n = iter(rows), [], 0
    while group := list(islice(rows, max(1, size // 256))):
        chunk += group
        n += sum(map(len, itertools.chain.from_iterable(map(texts, group))))
        if len(chunk) >= size or n >= MAX_LINE:
            yield chunk
            chunk, n = [], 0
    if chunk:
        yield chunk


def count_lost(path, bad, counts):
    """Add to counts the rows of a table that were not read: bad, not downloaded by img2dataset, or not in the tar."""
    lost = Counter(bad)
    if has_samples(path):
        lost += tar_facts(path)[1]
    elif path.endswith(".parquet"):
        names, _, rows = parquet_rows(path, {"status"}, None, True)
        if {"key", "error_message"} <= set(names):
            lost["not downloaded by img2dataset"] = sum(fields[0] not in ("", "success") for _, fields in rows)
    counts.update({f"bad: {reason}": n for reason, n in lost.items()})
    counts["rows"] += lost.total()


def matched_rows(path, out, settings, counts):
    """(row as a dict, text, classes) of the rows of one table, images named relative to the table out.

    settings: those of matcher_of and columns (joined to the text), skip_bad; counts: Counter that is added to.
    """
    bad = Counter() if settings["skip_bad"] else None
    _, rows = open_tables([path], settings["columns"], bad, out)
    matcher = matcher_of(json.dumps(settings))
    for chunk in in_chunks(rows, dict.values):
        texts = [" ".join(filter(None, [row[column] for column in settings["columns"]])) for row in chunk]
        counts["rows"] += len(chunk)
        yield from zip(chunk, texts, matcher.match(texts))
    count_lost(path, bad, counts)


def save_part(part, funnel_counts, counts=None, **arrays):
    """Write the result of one input file: an .npz with arrays and the Counter of its rows, whole or not at all.

    counts: [n] int64; stored as [2, k + 1], the places of those that are not 0, and these; last n: a file has few of
    half a million entries.
    """
    if counts is not None:
        ids = np.flatnonzero(counts)
        arrays["counts"] = np.stack([np.append(ids, len(counts)), np.append(counts[ids], 0)])
    with whole_file(part) as f:
        np.savez(f, funnel=np.array(json.dumps(funnel_counts)), **arrays)


def part_of(path, out, key):
    """Where the result of an input file lies: named by the file's path, size and time, and key, a hash of settings."""
    inside = sorted(glob.glob(os.path.join(glob.escape(path), "*"))) if os.path.isdir(path) else []
    files = filter(os.path.exists, [*with_beside([path]), *inside])  # a folder may have dead links
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    facts = [os.path.abspath(path), stats, key, file_hash(os.path.abspath(__file__))]
    return os.path.join(f"{out}.parts", f"{hash64(json.dumps(facts)):016x}.npz")


def launched():
    """Rank and number of processes that torchrun, or whatever else sets RANK and WORLD_SIZE for each, has started."""
    ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return tuple(map(int, ranks)) if all(map(str.isdecimal, ranks)) else (0, 1)


def run_files(work, paths, out, settings, run):
    """Call work(path, part, settings) for each input file that has no result yet.

    run: (workers, shard "i/n", "all" or "", is_merge). Without a shard each of several ranks does its share and rank 0
    goes on alone.
    Returns: parts in the order of paths; None if this process was one of several and has no more to do.
    """
    workers, shard, is_merge = run
    rank, n_shards = (0, 1) if shard == "all" else map(int, shard.split("/")) if shard else launched()
    key = hash64(json.dumps(settings))
    parts = [part_of(path, out, key) for path in paths]
    todo = [(path, part) for i, (path, part) in enumerate(zip(paths, parts))
            if i % n_shards == rank and not os.path.exists(part)]  # fmt: skip
    if not is_merge:
        os.makedirs(f"{out}.parts", exist_ok=True)
        done = in_processes(work, [(*files, settings) for files in todo], max(1, min(workers, len(todo))))
        try:
            for _ in tqdm(done, total=len(todo), unit=" files", disable=None):
                pass
        finally:
            if n_shards == 1 and not os.listdir(f"{out}.parts"):  # bad input; other shards may be about to write
                os.rmdir(f"{out}.parts")
    if not is_merge and (rank or "/" in shard):
        then = "; when all are, the same command with --merge" if shard else ""  # torchrun's rank 0 merges
        print(f"shard {rank}/{n_shards}: {len(todo)} files done{then}")
        return None
    missing = [path for path, part in zip(paths, parts) if not os.path.exists(part)]
    if missing and is_merge:
        raise SystemExit(f"--merge: no result yet of {len(missing)} of {len(paths)} files, the first {missing[0]}")
    if missing:  # torchrun ends all ranks if one fails; others may not, or there are none
        print(f"note: rank 0 of {n_shards} waits for {len(missing)} files of the others, the first {missing[0]}; if "
              "nothing started them, unset RANK and WORLD_SIZE", file=sys.stderr, flush=True)  # fmt: skip
    while not all(map(os.path.exists, parts)):
        time.sleep(1)
    return parts


def merge_counts(parts):
    """The funnel Counters of all parts, added, and their counts, [n] int64, added (None without)."""
    counts, total = Counter(), None
    for part in parts:
        with np.load(part) as arrays:
            counts.update(json.loads(str(arrays["funnel"])))
            if "counts" not in arrays:
                continue
            (ids, more), n = arrays["counts"][:, :-1], arrays["counts"][0, -1]
            total = np.zeros(n, np.int64) if total is None else total
            total[ids] += more
            if np.any(total[ids] < 0):
                raise SystemExit("the counts of all inputs add up to more than 2^63")
    return counts, total


def bad_rows(counts):
    """The losses of the readers, as entries of a funnel."""
    return {reason: -n for reason, n in sorted(counts.items()) if reason.startswith("bad: ") and n}


def finish(out, paths, flags, funnel_counts, **more):
    """Write OUT.json, print the funnel, and remove the parts."""
    write_report(out, paths, flags, funnel_counts, f"{out}.parts", **more)
    print_funnel(funnel_counts)


# ------------------------------------------------------------------------------ label


def label_file(path, part, settings):
    """Label one table: PART.tsv with the rows that keep a label, PART with the counts. Arguments: as run_files."""
    counts, multi, matcher = Counter(), settings["multi"], matcher_of(json.dumps(settings))

    def rows():
        for row, text, classes in matched_rows(path, settings["out"], settings, counts):
            counts[f"rows that name {min(len(classes), 3)}{'+' if len(classes) > 2 else ''} classes"] += 1
            if multi == "longest" and len(classes) > 1:
                classes = matcher.longest(text, classes)
            if len(classes) > 1 and multi in ("longest", "drop"):
                counts["several classes"] += 1
                continue
            counts["no class"] += not classes
            if row.get("label"):
                row["source_label"] = row["label"]
            for label in classes[:1] if multi == "first" else classes:
                counts[f"class {label}"] += 1
                yield row | {"label": label}

    columns = read_table(path)[0]
    columns += [name for name in ("label", "source_label") if name not in columns]
    write_tsv(f"{part}.tsv", columns, rows())
    save_part(part, counts)


def merge_tables(parts, out):
    """Write the tables of all parts as one, without source_label if that is empty. Returns: its number of rows."""
    tables = [f"{part}.tsv" for part in parts]  # images are named relative to OUT already
    columns, rows = open_tables(tables)
    if "source_label" in columns and not any(row["source_label"] for row in rows):
        columns.remove("source_label")
    return write_tsv(out, columns, (row for table in tables for _, row in read_table(table)[1]))


def build_labels(paths, out, classes, settings, run):
    """Write the rows that name a class, with its label. settings: of label_file but for the names."""
    rows, shared = class_rows(classes), warn_of_shared(settings["names"])
    parts = run_files(label_file, paths, out, settings, run)
    if parts is None:
        return
    counts, n = merge_counts(parts)[0], merge_tables(parts, out)
    histogram = [counts[f"class {label}"] for label in range(len(rows))]
    funnel_counts = {"rows": counts["rows"], **bad_rows(counts), "no class": -counts["no class"],
                     "several classes": -counts["several classes"]}  # fmt: skip
    extra = n - sum(funnel_counts.values())
    funnel_counts |= ({"further labels of rows with several": extra} if extra > 0 else {}) | {f"rows in {out}": n}
    flags = {k: v for k, v in settings.items() if k not in ("names", "negatives", "inputs")}
    finish(out, [*paths, *settings["inputs"]], dict(classes=classes, **flags), funnel_counts,
           labels_per_row={k: counts[k] for k in sorted(counts) if k.startswith("rows that name")},
           class_counts=histogram, empty_classes=histogram.count(0), shared_names=shared)  # fmt: skip
    print(f"{histogram.count(0):>12,}  of {len(rows):,} classes are empty")


# ------------------------------------------------------------------------------ classes


def clean_name(name):
    """Names in one entry of a label set: "(..)" deleted, "_" a blank, parted at " or " and " / " (the paper's rule)."""
    name = re.sub(r"\([^)]*\)", "", name.replace("_", " "))
    return [" ".join(part.split()) for part in re.split(r" or | / ", name) if part.strip()]


def class_of_line(line, where, wordnet, synsets, ambiguous):
    """One line of a class list (a wnid or a name, perhaps a tab and the display name or synonyms) as a row.

    ambiguous: {name of several senses: ["wnid: definition"]}, extended.
    """
    first, *more = [field.strip() for field in line.split("\t")]
    if of_list := re.fullmatch(r"(n\d{8}) +(\S.*)", first):  # LOC_synset_mapping.txt: the synset's words behind it
        first, more = of_list[1], [*of_list[2].split(", "), *more]
        synsets = synsets or {first[1:]: (more, "")}
    if re.fullmatch(r"n\d{8}", first):
        if first[1:] not in synsets:
            raise SystemExit(f"{where}: {first} is not a synset of {wordnet or 'WordNet: pass --wordnet'}")
        words, definition = synsets[first[1:]]
        names = list(dict.fromkeys([*filter(None, more[:1]), *words]))
        return dict(name=names[0], synonyms="|".join(names[1:]), definition=definition, wnid=first, query=words[0])
    if not (names := clean_name(first)):
        raise SystemExit(f"{where}: an empty name")
    names += [name for field in more[:1] for name in split_names(field)]
    definition, wnid = more[1] if len(more) > 1 else "", ""
    senses = read_nouns(wordnet)[1].get(names[0].lower().replace(" ", "_"), []) if wordnet else []
    if unknown := [offset for offset in senses if offset not in synsets]:
        raise SystemExit(f"{where}: {wordnet}/index.noun has {names[0]} at {unknown[0]}, where data.noun has no synset")
    if len(senses) > 1:  # none is chosen silently
        ambiguous[names[0]] = [f"n{offset}: {synsets[offset][1]}" for offset in senses]
    if len(senses) == 1:
        words, gloss = synsets[senses[0]]
        names, definition, wnid = names + words, definition or gloss, f"n{senses[0]}"
    names = [name for i, name in enumerate(names) if name.lower() not in [n.lower() for n in names[:i]]]
    return dict(name=names[0], synonyms="|".join(names[1:]), definition=definition, wnid=wnid)


def build_classes(path, out, wordnet, extra):
    """Write classes.tsv. path: list, one class a line in label order; extra: table of columns that replace, or None."""
    lines = [(number, line) for number, line in text_lines(path) if line.split(" ")[0] != "#"]
    header = lines[0][1].split("\t") if lines else []
    if header == ["name"] or header and header[0].lower() in ("wnid", "synset"):
        print(f"note: {path}:{lines[0][0]} is taken for the header", file=sys.stderr)
        del lines[0]
    elif header[:1] == ["name"] and {*header} & {"synonyms", "definition", "wnid", "negative", "match", "query"}:
        if header[1:] not in (["synonyms"], ["synonyms", "definition"]):
            raise SystemExit(f"{path}:1: got columns {', '.join(header)}; a list has name, synonyms, definition alone; "
                             "cut the others off, and give the table as --extra")  # fmt: skip
        del lines[0]
    synsets = read_synsets(wordnet) if wordnet else {}
    rows, seen, senses = [], {}, {}
    for number, line in lines:
        row = class_of_line(line, f"{path}:{number}", wordnet, synsets, senses)
        key = row["wnid"] or row["name"]  # as class_rows wants it: "crane (bird)", "crane (machine)" are both crane
        if key in seen:
            raise SystemExit(f"{path}:{number}: {key} stands in line {seen[key]} too")
        seen[key] = number
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}:1: an empty file; expected a wnid or a name a line")
    named = [number for number, line in lines if not re.match(r"n\d{8}\b", line)]
    if 0 < len(named) < len(lines):
        print(f"warning: {path}:{named[0]}: a name, not a wnid as {len(lines) - len(named)} other lines are; is it one "
              "of the classes?", file=sys.stderr)  # fmt: skip
    columns = ["name", "synonyms", "definition", "wnid", "negative", "match", "query"]
    if extra:
        keys = Counter(key for row in rows for key in {row["name"], row["wnid"]})
        by_key = {key: row for row in rows for key in (row["name"], row["wnid"]) if key and keys[key] == 1}
        for line, more in read_table(extra)[1]:
            if (key := more.pop("wnid", "") or more.get("name", "")) not in by_key:
                raise SystemExit(f"{extra}:{line}: {key!r} is not name or wnid of just one class of {path}")
            by_key[key].update({k: v for k, v in more.items() if v})
        columns += [name for name in read_table(extra)[0] if name not in columns]
    wnids = [row["wnid"] for row in rows]
    if all(wnids) and wnids != sorted(wnids):
        print(f"warning: {path} is not in sorted order, which is the order of ImageNet's labels", file=sys.stderr)
    shared = shared_names(map(names_of, rows))
    write_tsv(out, columns, rows)
    write_report(out, [path, extra, *wordnet_paths(wordnet, "data.noun", "index.noun", "noun.exc")], {},
                 {"lines": len(lines), f"classes in {out}": len(rows)}, shared_names=shared,
                 ambiguous_names=senses,
                 without_definition=[row["name"] for row in rows if not row["definition"]])  # fmt: skip
    print_funnel({"classes": len(rows), "names": sum(len(names_of(row)) for row in rows),
                  "names of several senses in WordNet, of which none was taken: list the wnid": len(senses),
                  "names that several classes share": len(shared)})  # fmt: skip
    for name, found in senses.items():
        print(f"{'':12}    {name}: " + ", ".join(sense.partition(":")[0] for sense in found))
    for name, labels in shared.items():
        print(f"{'':12}    {name}: " + ", ".join(f"{label} {rows[label]['name']}" for label in labels))


# ------------------------------------------------------------------------------ incaps


def incaps_records(path):
    """The records of imagenet_captions.json. Raises: SystemExit if it is something else."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
            records = json.load(f)
    except (ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: not JSON ({error})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SystemExit(f"{path}: damaged gzip data ({error})") from None
    needed = ("filename", "wnid")
    if not isinstance(records, list) or not all(isinstance(r, dict) and all(isinstance(r.get(k), str) for k in needed)
                                                for r in records):  # fmt: skip
        raise SystemExit(f"{path}: expected a list of objects with filename, wnid, title, tags, description")
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("tags") or [], (str, list)):
            raise SystemExit(f"{path}: record {number}: tags is {str(record['tags'])[:40]}, expected a list of texts")
    return records


def build_incaps(path, images, classes, out, seed, keep_repeats):
    """Join ImageNet-Captions with its images: a folder of class folders, or a table whose images are files so named.

    Rows are ordered by a hash of seed and file name; a repeated one keeps its longest text (then the first, sorted).
    """
    records, rows = incaps_records(path), class_rows(classes)
    n_classes, label_of = len(rows), {row["wnid"]: i for i, row in enumerate(rows) if row.get("wnid")}
    places = None
    if os.path.isfile(images):
        rows = open_tables([images], ["image"], out=out)[1]
        places = {os.path.basename(row["image"]): row["image"] for row in rows}
    folder = os.path.relpath(os.path.realpath(images), os.path.realpath(os.path.dirname(out) or "."))
    counts, kept = {"records": len(records), "unknown wnid": 0, "no such image": 0, "repeated file name": 0}, {}
    for number, record in enumerate(records):
        name, wnid = record["filename"], record["wnid"]
        if wnid not in label_of or name.split("_")[0] != wnid:
            counts["unknown wnid"] -= 1
            continue
        image = os.path.join(folder, wnid, name) if places is None else places.get(name)
        if image is None or places is None and not os.path.isfile(os.path.join(images, wnid, name)):
            counts["no such image"] -= 1
            continue
        tags = record.get("tags") or []
        tags = tags if isinstance(tags, str) else " ".join(filter(None, map(tsv_field, tags)))  # nulls drop out
        texts = dict(title=record.get("title"), tags=tags, description=record.get("description"))
        texts = {key: tsv_field(text).strip() for key, text in texts.items()}
        caption = " ".join(filter(None, texts.values()))
        row = dict(image=image, label=label_of[wnid], wnid=wnid, filename=name, caption=caption, **texts)
        key = (name, number) if keep_repeats else name
        if key in kept:
            counts["repeated file name"] -= 1
        kept[key] = min(kept.get(key, row), row, key=lambda row: (-len(row["caption"]), row["caption"]))
    rows = sorted(kept.values(), key=lambda row: (unit_hash(seed, row["filename"]), row["filename"]))
    if not rows:
        raise SystemExit(f"no rows; nothing was written: {counts}")
    write_tsv(out, ("image", "label", "caption", "title", "tags", "description", "wnid", "filename"), rows)
    variants = "title tags description title+description tags+description title+tags".split()
    usable = {v: sum(any(row[part] for part in v.split("+")) for row in rows) for v in variants}
    class_counts = np.bincount([row["label"] for row in rows], minlength=n_classes).tolist()
    counts[f"rows in {out}"] = len(rows)
    write_report(out, [path, classes, None if places is None else images],
                 dict(images=images, seed=seed, keep_repeats=keep_repeats), counts,
                 rows_with_text=usable, class_counts=class_counts)  # fmt: skip
    print_funnel(counts | {f"rows with {k}": n for k, n in usable.items()})


# ------------------------------------------------------------------------------ laionet


@functools.lru_cache(1)
def load_text_tower(path):
    """Text weights of a checkpoint of clip.py: (state dict, ranks of the merges, activation)."""
    try:
        import torch
    except ImportError:
        raise SystemExit("--clip needs torch (pip install torch)") from None
    if multiprocessing.parent_process():  # a worker, one for each core
        torch.set_num_threads(1)
    if not os.path.isfile(path):
        raise SystemExit(f"--clip: no such file: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = {k: v.float() for k, v in checkpoint["state_dict"].items() if not k.startswith("visual.")}
        merges = [tuple(merge.split()) for merge in (checkpoint["bpe"].split("\n") if checkpoint["bpe"] else [])]
        needed = ["token_embedding.weight", "ln_final.weight", "ln_final.bias", "text_projection"]
        for name in needed + ["positional_embedding"] * any(name.startswith("transformer.") for name in weights):
            weights[name]
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        what = f"--clip: {path} is no checkpoint of clip.py with a text tower and its merges"
        raise SystemExit(f"{what} ({repr(error)[:100]})") from None
    return weights, {merge: i for i, merge in enumerate(merges)}, checkpoint.get("activation", "gelu")


def token_ids(text, ranks, cache, context_length):
    """Ids of a text as clip.py's Tokenizer gives them (tests/test_label.py)."""
    if not cache:
        symbols = list(bytes_to_unicode().values())
        symbols += [symbol + "</w>" for symbol in symbols] + ["".join(merge) for merge in ranks]
        cache[""] = {symbol: i for i, symbol in enumerate(symbols)}
    ids = [len(cache[""])]
    for word in bpe_words(text):
        if word not in cache:
            symbols = [bytes_to_unicode()[byte] for byte in word.encode("utf-8", "replace")]
            symbols[-1] += "</w>"
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda pair: ranks.get(pair, math.inf))
                if pair not in ranks:
                    break
                symbols = merge_pair(symbols, *pair)
            cache[word] = [cache[""][symbol] for symbol in symbols]
        ids += cache[word]
    return ids[: context_length - 1] + [len(cache[""]) + 1]


def text_features(path, texts, batch_size=256):
    """Unit embeddings [N, D] float32 of texts by the text tower of a checkpoint of clip.py."""
    import torch
    import torch.nn.functional as F

    w, ranks, activation = load_text_tower(path)
    width, n_layers, cache, features = w["token_embedding.weight"].shape[1], 0, {}, []
    while f"transformer.resblocks.{n_layers}.ln_1.weight" in w:
        n_layers += 1
    length = len(w["positional_embedding"]) if n_layers else 77

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    with torch.no_grad():
        for first in range(0, len(texts), batch_size):
            rows = [token_ids(text, ranks, cache, length) for text in texts[first : first + batch_size]]
            ends = torch.tensor([len(row) - 1 for row in rows])
            tokens = torch.tensor([row + [0] * (int(ends.max()) + 1 - len(row)) for row in rows])  # [B, L]
            x, place = w["token_embedding.weight"][tokens], torch.arange(tokens.shape[1])  # [B, L, width]
            if n_layers == 0:  # clip.py's bag of words
                is_word = (place > 0) & (place < ends[:, None])
                x = (x * is_word[..., None]).sum(1) / is_word.sum(1, keepdim=True).clamp(min=1)
                x = F.gelu(linear(norm(x, "ln_final"), "text_hidden")) @ w["text_projection"]
            else:
                x = x + w["positional_embedding"][: len(place)]
                for i in range(n_layers):
                    block = f"transformer.resblocks.{i}"
                    weights = w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]
                    qkv = F.linear(norm(x, f"{block}.ln_1"), *weights)
                    q, k, v = qkv.unflatten(2, (3, width // 64, 64)).permute(2, 0, 3, 1, 4)  # [B, H, L, 64] each
                    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    x = x + linear(heads.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
                    h = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
                    h = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else F.gelu(h)
                    x = x + linear(h, f"{block}.mlp.c_proj")
                x = norm(x, "ln_final")[torch.arange(len(x)), ends] @ w["text_projection"]
            features.append(F.normalize(x, dim=1).numpy())
    return np.concatenate(features)


def read_embeddings(folder, name, n_rows):
    """[n_rows, D] from FOLDER/NAME.npy, as it is there (memory map). Raises: SystemExit for anything else."""
    path = os.path.join(folder, f"{name}.npy")
    (found,) = load_features([path])
    if found.ndim != 2 or len(found) != n_rows:
        raise SystemExit(f"--embeddings: {path}: got shape {found.shape}, expected {n_rows} rows")
    return found


def cosine(a, b):
    """Cosine of rows, [N, D] and [N, D] -> [N] float32; zero rows give 0."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def own_similarity(row, column, path, number):
    """The number in a column of a row. Raises: SystemExit if there is none. number: of the row, from 0."""
    try:
        return float(row.get(column, ""))
    except ValueError:
        line, _ = next(islice(read_table(path, bad=Counter())[1], number, None))
        what = f"{column} is {row.get(column, '')!r}, expected a number; or pass --clip or --embeddings"
        raise SystemExit(f"{path}:{line}: {what}") from None


@functools.lru_cache(1)
def query_features(path, queries):
    """text_features of the definitions of all classes, once in each worker."""
    return text_features(path, queries)


def laionet_file(path, part, settings):
    """Rows of one table that name just one class, with label and similarity of caption and definition, as PART.tsv."""
    counts, names = Counter(), ("clip", "embeddings", "queries", "similarity")
    clip, embeddings, queries, column = (settings[name] for name in names)
    if clip:
        definitions = query_features(clip, tuple(queries))
    elif embeddings:
        if settings["skip_bad"]:
            raise SystemExit("--skip-bad: rows left out would shift --embeddings; repair the tables first")
        n_rows = sum(1 for _ in read_table(path, settings["columns"], is_all=False)[1])
        captions = read_embeddings(embeddings, os.path.basename(path), n_rows)
        definitions = read_embeddings(embeddings, "classes", len(queries))
        if captions.shape[1] != definitions.shape[1]:
            raise SystemExit(f"--embeddings: {path}: {captions.shape[1]} numbers a row, classes {definitions.shape[1]}")

    def named():
        for number, (row, text, classes) in enumerate(matched_rows(path, settings["out"], settings, counts)):
            is_tagged = nsfw is not None and row.get(nsfw, "").upper() != "UNLIKELY"
            losses = {"no class": not classes, "several classes": len(classes) > 1, "NSFW tag": is_tagged}
            if any(losses.values()):
                counts[next(filter(losses.get, losses))] += 1
                continue
            if row.get("label"):
                row["source_label"] = row["label"]
            if is_replaced:
                row["source_similarity"] = row.get("source_similarity") or row.get("similarity", "")
            yield number, row | {"label": classes[0]}, text

    def rows():
        for chunk in in_chunks(named(), lambda found: map(str, found[1].values())):  # all need not fit in memory
            numbers, kept, texts = map(list, zip(*chunk))
            labels = [row["label"] for row in kept]
            if clip:
                place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
                similarity = cosine(text_features(clip, list(place))[[place[t] for t in texts]], definitions[labels])
            elif embeddings:
                similarity = cosine(captions[numbers], definitions[labels])
            else:
                similarity = [own_similarity(row, column, path, number) for number, row in zip(numbers, kept)]
            yield from (row | {"similarity": f"{s:.6f}"} for row, s in zip(kept, similarity))

    columns = read_table(path)[0]
    nsfw = next((name for name in columns if name.lower() == "nsfw"), None)
    if not (clip or embeddings or column):
        column = "similarity"
        if not {"label", "similarity"} <= set(columns) or nsfw and "source_similarity" not in columns:
            raise SystemExit(f"{path}: no label and similarity, or LAION's, whose similarity is of image and text: "
                             "pass --clip or --embeddings, or --similarity COLUMN for that of text and definition")
    counts["tables without NSFW"] = int(nsfw is None)
    is_replaced = "similarity" in columns and column != "similarity"
    more = ("label", "similarity", "source_label", *["source_similarity"][:is_replaced])
    columns += [name for name in more if name not in columns]
    write_tsv(f"{part}.tsv", columns, rows())
    save_part(part, counts)


def build_laionet(paths, out, classes, threshold, settings, run):
    """Write the rows that name one class and are similar enough to its definition."""
    rows = class_rows(classes)
    n_owners = Counter(name for row in rows for name in names_of(row))  # names_of has no name twice
    names = [[name for name in names_of(row) if n_owners[name] == 1] for row in rows]
    queries = [f"{(row.get('query') or row['name']).lower()} which is {row.get('definition', '')}" for row in rows]
    models = [settings["clip"]] if settings["clip"] else []
    if settings["embeddings"] and not models:
        files = list(map(os.path.basename, paths))
        if len(set(files)) < len(files):
            raise SystemExit("--embeddings: several tables have one file name, so whose rows TABLE.npy has is unclear")
        models = [os.path.join(settings["embeddings"], f"{name}.npy") for name in ("classes", *files)]
    settings |= match_settings([], "laionet", files=[classes, *models]) | dict(names=names, queries=queries)
    parts = run_files(laionet_file, paths, out, settings, run)
    if parts is None:
        return
    every = f"{out.removesuffix('.tsv')}.all.tsv"
    counts, n_all = merge_counts(parts)[0], merge_tables(parts, every)
    columns, table = open_tables([every])
    class_counts = Counter()

    def above():
        for row in table:
            if float(row["similarity"]) >= threshold:
                class_counts[int(row["label"])] += 1
                yield row

    n = write_tsv(out, columns, above())
    losses = {loss: -counts[loss] for loss in ("no class", "several classes", "NSFW tag")}
    histogram = [class_counts[label] for label in range(len(rows))]
    finish(out, [*paths, *settings["inputs"]],
           dict(classes=classes, threshold=threshold,
                **{k: settings[k] for k in ("clip", "embeddings", "similarity", "columns", "skip_bad")}),
           {"rows": counts["rows"], **bad_rows(counts), **losses, f"rows in {every}": n_all,
            "less similar": n - n_all, f"rows in {out}": n},
           class_counts=histogram, empty_classes=histogram.count(0),
           without_unique_name=[row["name"] for row, unique in zip(rows, names) if not unique])  # fmt: skip
    if n_bare := counts["tables without NSFW"]:
        print(f"note: no NSFW column in {n_bare} of {len(paths)} tables: no row was left out for it", file=sys.stderr)


# ------------------------------------------------------------------------------ curate


def splitmix64(x):
    """Uniform 64-bit hash of uint64. Source: the finaliser of splitmix64 (Steele et al., OOPSLA 2014)."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts):
    """64-bit BLAKE2b of length-prefixed strings."""
    data = b"".join(len(p).to_bytes(8, "big") + p for p in (part.encode("utf-8", "surrogatepass") for part in parts))
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def key_of(row):
    """What a row's random numbers depend on: the first there is of url, key, image and caption, never a position.

    An image is named as in its table, so equal names in several folders share a draw.
    """
    return next((row[name] for name in ("url", "URL", "key", "image", "caption") if row.get(name)), "")


def name_of(row, source=".", target="."):
    """What reports call a row: its image, named as in relocate, or without images its key."""
    return relocate(row["image"], source, target) if row.get("image") else key_of(row)


def naming_column(path):
    """The column that names a table's rows: image, or one that key_of takes if the images are not downloaded yet."""
    names = read_table(path)[0]
    if path.endswith(".parquet") and {"key", "status", "error_message"} <= set(names):  # the tars have the images
        return "image"
    return next((name for name in ("image", "url", "URL", "key", "caption") if name in names), "image")


def entry_file(path, part, settings):
    """First pass over one table: counts per entry, and in PART.rows which entries each row has; no row is held."""
    counts, n_entries, seed = Counter(), settings["n_entries"], str(settings["seed"])
    rows = matched_rows(path, path, settings, counts)  # an image is hashed by its name here, wherever OUT lies
    entry_counts = np.zeros(n_entries, np.int64)
    with whole_file(f"{part}.rows") as f:
        for chunk in in_chunks(rows, lambda found: found[0].values()):
            lengths = np.array([len(entries) for _, _, entries in chunk], np.int32)
            ids = np.fromiter(itertools.chain.from_iterable(entries for _, _, entries in chunk), np.int32)
            keys = np.array([hash64(seed, key_of(row)) for row, _, entries in chunk if entries], np.uint64)
            buffer = io.BytesIO()  # into a file itself numpy writes with no word on why that failed
            for block in (lengths, ids, keys):
                np.save(buffer, block)
            f.write(buffer.getvalue())
            entry_counts += np.bincount(ids, minlength=n_entries)
            counts["no entry"] += len(lengths) - len(keys)
    save_part(part, counts, counts=entry_counts)


def draw(ids, lengths, keys, entry_keys, probability):
    """Rows kept: some entry of the row draws a number below its probability. Source: MetaCLIP, arXiv 2309.16671.

    ids, lengths: entries of all rows one after another, [n] int32, and how many each row has, [R], at least 1; keys:
    [R] uint64 hashes of the rows; entry_keys, probability: [E]. Returns: [R] bool. A function of hashes alone, so
    neither order nor shards matter, and a larger cap keeps a superset.
    """
    u = splitmix64(np.repeat(keys, lengths) ^ entry_keys[ids]) / 2.0**64
    return np.logical_or.reduceat(u < probability[ids], np.cumsum(lengths) - lengths)


def keep_file(path, part, settings):
    """Second pass over one table: PART.tsv with the rows that are kept, PART with kept rows per entry."""
    first = part_of(path, settings["out"], settings["first"])
    with np.load(settings["draws"]) as draws:
        entry_keys, probability = draws["keys"], draws["probability"]
    kept = np.zeros(len(entry_keys), np.int64)

    def is_kept():
        with open(f"{first}.rows", "rb") as f:
            while f.peek(1):
                lengths, ids, keys = (np.load(f) for _ in range(3))
                mask = lengths > 0
                if len(keys):
                    mask[mask] = draw(ids, lengths[mask], keys, entry_keys, probability)
                kept[:] += np.bincount(ids[np.repeat(mask, lengths)], minlength=len(kept))
                yield from mask.tolist()

    columns, rows = open_tables([path], bad=Counter() if settings["skip_bad"] else None, out=settings["out"])
    write_tsv(f"{part}.tsv", columns, compress(rows, is_kept()))
    save_part(part, {}, counts=kept)


def cap_of_share(counts, share):
    """The cap t whose tail share is nearest: the count where the cumulative share of sorted counts comes nearest."""
    ordered = np.sort(counts[counts > 0])
    return int(ordered[np.abs(np.cumsum(ordered) / ordered.sum() - share).argmin()])


def build_curate(paths, out, metadata, cap, share, seed, settings, run):
    """MetaCLIP's balancing: write the rows that some entry of the metadata draws, each entry about `cap` times."""
    entries = [row["entry"] for row in open_tables([metadata], ["entry"])[1]]
    if len(set(entries)) != len(entries) or "" in entries:
        raise SystemExit(f"{metadata}: empty or double entries; build it with the subcommand metadata")
    settings |= dict(entries=metadata, inputs={metadata: file_hash(metadata)}, n_entries=len(entries), seed=seed)
    parts = run_files(entry_file, paths, out, settings, run)
    if parts is None:
        return
    counts, total_counts = merge_counts(parts)
    if not total_counts.any():
        raise SystemExit(f"no entry of {metadata} is in any of {counts['rows']} captions; nothing was written")
    cap = cap_of_share(total_counts, share) if share else cap
    probability = np.minimum(1, cap / np.maximum(total_counts, 1))
    draws = f"{out}.parts/draws.npz"
    with whole_file(draws) as f:
        np.savez(f, keys=np.array([hash64(entry) for entry in entries], np.uint64), probability=probability)
    # The draws depend on all files, so those of another set of files name other parts.
    second = dict(first=hash64(json.dumps(settings)), draws=draws, draws_sha256=file_hash(draws), out=out,
                  skip_bad=settings["skip_bad"])  # fmt: skip
    kept_parts = run_files(keep_file, paths, out, second, (run[0], "all", False))
    kept, n = merge_counts(kept_parts)[1], merge_tables(kept_parts, out)
    order = np.argsort(-total_counts, kind="stable")
    write_tsv(f"{out.removesuffix('.tsv')}.entries.tsv", ("entry", "count", "probability", "kept"),
              (dict(entry=entries[i], count=total_counts[i], probability=f"{probability[i]:.6g}", kept=kept[i])
               for i in order))  # fmt: skip
    is_head, matches = total_counts > cap, int(total_counts.sum())
    facts = {"entries": len(entries), "entries never found": int((total_counts == 0).sum()),
             "entries above the cap": int(is_head.sum()), "cap": cap,
             "tail share": float(total_counts[total_counts < cap].sum() / matches), "matches": matches,
             "matches of entries above the cap": int(total_counts[is_head].sum())}  # fmt: skip
    head = [(entries[i], int(total_counts[i]), int(kept[i])) for i in order[:20]]
    balanced = counts["rows"] - counts["no entry"] + sum(bad_rows(counts).values()) - n
    finish(out, [*paths, metadata],
           dict(metadata=metadata, cap=cap, tail_share=share, seed=seed,
                **{k: settings[k] for k in ("columns", "skip_bad")}),
           {"rows": counts["rows"], **bad_rows(counts), "no entry": -counts["no entry"], "balancing": -balanced,
            f"rows in {out}": n}, **facts, head=head)  # fmt: skip
    for what, value in facts.items():
        print(f"{value:>12,}  {what}" if isinstance(value, int) else f"{value:12.4f}  {what}")


def build_metadata(paths, out, wordnet, min_count, min_pmi, max_entries, columns):
    """Write MetaCLIP's entries: "0".."99", WordNet's synsets, words and pairs of words of a corpus (2309.16671)."""
    words, found, sources, n_rows = Counter(), {}, Counter(), 0

    def captions():
        for path in paths:
            for chunk in in_chunks(read_table(path, columns, is_all=False)[1], lambda row: row[1]):
                texts = "\0".join([" ".join(fields).replace("\0", " ") for _, fields in chunk])
                yield from (text.split() for text in with_spaced_marks(texts).split("\0"))

    for tokens in captions():
        n_rows += 1
        words.update(tokens)
    n = words.total()
    if n and math.log2(n) < min_pmi:
        print(f"note: no pair can reach {min_pmi:g} bits in {n:,} words, at most {math.log2(n):.1f}; see --min-pmi",
              file=sys.stderr)  # fmt: skip
    # A pair is at most as frequent as each of its words, so a frequent word is in no pair of much information. Counting
    # only the others' pairs, in a second pass, saves most of the memory.
    rare = {word for word, count in words.items() if math.log2(n / count) >= min_pmi - 1e-9}
    pairs = Counter(pair for tokens in captions() for pair in zip(tokens, tokens[1:]) if rare.issuperset(pair))

    def take(entry, source, count):
        is_mark = len(entry) == 1 and entry.isascii() and not entry.isalnum()
        if entry and not is_mark and entry not in found and len(found) < max_entries:
            found[entry] = dict(entry=entry, source=source, count=count)
            sources[source] += 1

    for number in range(100):
        take(str(number), "number", "")
    parts = ("noun", "verb", "adj", "adv") if wordnet else ()
    for part in parts:
        for synonyms, _ in read_synsets(wordnet, part).values():
            take(synonyms[0], "wordnet", "")
    for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        if count >= min_count:
            take(word, "word", count)
    kept = (pair for pair, c in pairs.items() if math.log2(c * n / (words[pair[0]] * words[pair[1]])) >= min_pmi)
    for pair in sorted(filter(set(",.;:?!`").isdisjoint, kept), key=lambda p: (-pairs[p], p)):
        take(" ".join(pair), "pair", pairs[pair])
    write_tsv(out, ("entry", "source", "count"), found.values())
    counts = {"captions": n_rows, "words": n, **{f"entries: {k}": v for k, v in sources.items()}}
    counts[f"entries in {out}"] = len(found)
    files = wordnet_paths(wordnet, *(f"data.{part}" for part in parts))
    write_report(out, paths + files, dict(min_count=min_count, min_pmi=min_pmi, max_entries=max_entries,
                                          wordnet=bool(wordnet), columns=columns), counts)  # fmt: skip
    print_funnel(counts)


# ------------------------------------------------------------------------------ frequency


def wilson(yes, n, total, z=1.959964):
    """95 % interval of a share of yes among n drawn of total, as fractions. Source: Wilson, JASA 1927.

    n counts as so many draws with replacement as have the same variance: the finite-population correction.
    """
    if n >= total or not n:  # nothing is left to chance, or all is
        return (yes / n,) * 2 if n else (0.0, 1.0)
    p, n, z2 = yes / n, n * (total - 1) / (total - n), z * z
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def frequency_file(path, part, settings):
    """Count the captions of one table that name each class, or add up their weights; with n_sample the captions of the
    smallest hashes too."""
    n_sample, seed, n_classes, weights = (settings[key] for key in ("n_sample", "seed", "n_classes", "weights"))
    counts, class_counts, samples = Counter(), np.zeros(n_classes, np.int64), defaultdict(list)
    if n_sample:
        for row, text, classes in matched_rows(path, path, settings, counts):  # path: as in entry_file
            for label in classes:
                class_counts[label] += 1
                drawn = (-hash64(str(seed), str(label), key_of(row)), key_of(row), text)
                (heapq.heappush if len(samples[label]) < n_sample else heapq.heappushpop)(samples[label], drawn)
    else:  # only the captions are read
        bad = Counter() if settings["skip_bad"] else None
        matcher = matcher_of(json.dumps(settings))
        n, needed, weighed = len(settings["columns"]), settings["columns"] + ([weights] if weights else []), 0
        for chunk in in_chunks(read_table(path, needed, bad, is_all=False)[1], lambda row: row[1]):
            counts["rows"] += len(chunk)
            rows, labels = matcher.pairs([" ".join(filter(None, fields[:n])) for _, fields in chunk])
            for line, fields in chunk if weights else ():
                if not re.fullmatch("[0-9]{1,15}", fields[n]):
                    raise SystemExit(f"{path}:{line}: {weights} is {fields[n]!r}, expected a whole number")
            amounts = np.array([int(fields[n]) if weights else 1 for _, fields in chunk], np.int64)
            if (weighed := weighed + int(amounts.sum())) >= 2**63:
                raise SystemExit(f"{path}:{chunk[-1][0]}: the weights in {weights} add up to more than 2^63")
            np.add.at(class_counts, labels, amounts[rows])
        count_lost(path, bad, counts)
    drawn = json.dumps(sorted(samples.items())).encode()
    save_part(part, counts, counts=class_counts, sample=np.frombuffer(drawn, np.uint8))


def read_relevance(path, names):
    """{label: (judged, relevant)} of a judged sample: columns name, relevant (yes, no or empty), perhaps label.

    names: of the classes; without a label a name must be one class's.
    """
    judged, labels = defaultdict(lambda: [0, 0]), defaultdict(list)
    for label, name in enumerate(names):
        labels[name].append(label)
    for line, row in read_table(path, ["name", "relevant"])[1]:
        answer, given = row["relevant"].strip().lower().rstrip("."), row.get("label", "")
        if answer not in ("", "yes", "no", "1", "0"):
            raise SystemExit(f"{path}:{line}: relevant is {row['relevant']!r}, expected yes or no")
        found = [label for label in labels.get(row["name"], ()) if given in ("", str(label))]
        if len(found) != 1:
            raise SystemExit(f"{path}:{line}: name {row['name']!r}, label {given or 'none'}: not just one of --classes")
        if answer:
            judged[found[0]][0] += 1
            judged[found[0]][1] += answer in ("yes", "1")
    return judged


def build_frequency(paths, out, classes, synonyms, relevance, settings, run):
    """Write how many captions name each class, in label order. synonyms: table that is in settings, for the report."""
    rows, n_sample = class_rows(classes), settings["n_sample"]
    judged = read_relevance(relevance, [row["name"] for row in rows]) if relevance else {}
    shared = warn_of_shared(settings["names"])
    parts = run_files(frequency_file, paths, out, settings | dict(n_classes=len(rows)), run)
    if parts is None:
        return
    (counts, class_counts), samples = merge_counts(parts), defaultdict(list)
    for part in parts:
        with np.load(part) as arrays:
            for label, drawn in json.loads(bytes(arrays["sample"])):
                for one in drawn:
                    (heapq.heappush if len(samples[label]) < n_sample else heapq.heappushpop)(samples[label], one)
    if n_sample:
        columns = ("name", "label", "definition", "key", "caption", "relevant")
        write_tsv(f"{out.removesuffix('.tsv')}.sample.tsv", columns,
                  (dict(name=row["name"], label=label, definition=row.get("definition"), key=key, caption=text)
                   for label, row in enumerate(rows)
                   for _, key, text in sorted(samples.get(label, ()), reverse=True)))  # fmt: skip
    table = []
    for label, (row, n) in enumerate(zip(rows, class_counts.tolist())):
        line = dict(name=row["name"], count=n)
        if relevance:
            seen, yes = judged.get(label, (0, 0))
            low, high = wilson(yes, seen, n)
            line |= dict(judged=seen, relevant=yes, estimate=round(n * yes / seen) if seen else "",
                         low=round(n * low), high=round(n * high))  # fmt: skip
        table.append(line)
    write_tsv(out, list(table[0]), table)
    order = np.argsort(-class_counts, kind="stable")
    finish(out, [*paths, *settings["inputs"], relevance],
           dict(classes=classes, synonyms=synonyms, relevance=relevance,
                **{k: v for k, v in settings.items() if k not in ("names", "negatives", "inputs")}),
           {"rows": counts["rows"], **bad_rows(counts)}, matches=sum(class_counts.tolist()),
           empty_classes=int((class_counts == 0).sum()), shared_names=shared)  # fmt: skip
    n_matches, n_empty = sum(class_counts.tolist()), (class_counts == 0).sum()
    print(f"{n_matches:>12,}  matches; {n_empty} of {len(rows)} classes in no caption")
    for i in (*order[:3], *order[3:][-3:]):
        print(f"{class_counts[i]:>12,}    {rows[i]['name']}")


# ------------------------------------------------------------------------------ status


def build_status(folder, out, classes):
    """What img2dataset got: successes by class and cause, frequencies of the survivors, list of rows to try again."""
    shards = sorted(n.removesuffix(".parquet") for n in os.listdir(folder) if n.endswith(".parquet"))
    if not shards:
        raise SystemExit(f"{folder}: no .parquet files; expected the output folder of img2dataset")
    causes, before, after, warnings = Counter(), Counter(), Counter(), []
    done = [shard for shard in shards if os.path.isfile(os.path.join(folder, f"{shard}_stats.json"))]  # written last
    if not done:
        raise SystemExit(f"{folder}: no shard has a _stats.json, which img2dataset writes when it is done with one")
    warnings += [f"{folder}/{shard}.parquet: no _stats.json beside it; an unfinished shard, not counted"
                 for shard in sorted(set(shards) - set(done))]  # fmt: skip

    def failures():
        for shard in done:
            path, seen = os.path.join(folder, f"{shard}.parquet"), Counter()
            _, columns, rows = parquet_rows(path, None, None, True)
            if "status" not in columns:
                raise SystemExit(f"{path}:1: no column status; found {', '.join(columns)}")
            columns = our_names(columns, path)
            for row in (dict(zip(columns, fields)) for _, fields in rows):
                seen[row["status"]] += 1
                label = row.get("label") or "none"
                before[label] += 1
                if row["status"] == "success":
                    after[label] += 1
                    continue
                message = row.get("error_message", "")
                causes[f"{row['status']}: {message[:80]}"] += 1
                yield {k: row.get(k, "") for k in ("key", "url", "caption", "label", "status", "error_message")}
            check_shard(folder, shard, seen, warnings)

    n_failed = write_tsv(out, ("key", "url", "caption", "label", "status", "error_message"), failures())
    n, (names, ids, _) = before.total(), find_classes(classes, out) if classes else ([], {}, None)
    order = sorted(before, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))
    by_class = f"{out.removesuffix('.tsv')}.classes.tsv"
    numbers = {label: label_number(label, ids, len(names)) for label in order}
    named = {label: names[k] for label, k in numbers.items() if names and k is not None and k >= 0}
    write_tsv(by_class, ("label", "name", "rows", "count", "success"),
              (dict(label=label, name=named.get(label, ""), rows=before[label], count=after[label],
                    success=f"{after[label] / before[label]:.4f}") for label in order))  # fmt: skip
    counts = {"rows": n, **{cause: -k for cause, k in causes.most_common()}, "images": n - n_failed}
    inputs = [os.path.join(folder, f"{shard}.parquet") for shard in done]
    write_report(out, [*inputs, classes], dict(folder=folder, classes=classes), counts, warnings=warnings,
                 lost_classes=[label for label in order if not after[label]])  # fmt: skip
    print_funnel(dict(list(counts.items())[:12] + [("images", n - n_failed)]))
    for warning in warnings[:20]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{n_failed:>12,}  rows to try again in {out}; by class in {by_class}")


def check_shard(folder, shard, seen, warnings):
    """Warn if a shard's _stats.json cannot be read or disagrees with its parquet. seen: Counter of status."""
    path = os.path.join(folder, f"{shard}_stats.json")
    try:
        with open(path, encoding="utf-8") as f:
            stats = {**json.load(f)}
    except (OSError, ValueError, RecursionError, TypeError):  # TypeError: JSON, but no object
        warnings.append(f"{path}: not readable; an unfinished shard?")
        return
    for key, n in (("successes", seen["success"]), ("count", seen.total())):
        if stats.get(key) != n:
            warnings.append(f"{path}: {key} is {stats.get(key)}, but {shard}.parquet has {n}")


# ------------------------------------------------------------------------------ check

MAX_CLASSES = 2**24  # of labels without a classes.tsv; there are arrays of that length
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # not EPS: Pillow would run Ghostscript on it
NO_DRAFT = 2**16  # px, min_side of read_image: no JPEG is decoded at a smaller size
ROWS_PER_JOB = 256


class ImageNames:
    """What read_image needs of a table: the names of images, relative to folder."""

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), names

    def get(self, row, _):
        return self.names[row]


Table = ImageNames  # the name it has in functions that come from clip.py


# Copied from clip.py
def locate_image(table: Table, row: int) -> tuple[Path, int, int]:
    """Where the image of a row is: path, offset (row of an .npy, -1 if none is named), size in bytes or -1 for all."""
    field = table.get(row, "image")
    if match := re.fullmatch(r"(.+\.tar):(\d{1,4000}):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), int(match[3])
    if match := re.fullmatch(r"(.+\.npy):(\d{1,4000})", field):
        return table.folder / match[1], int(match[2]), -1
    return table.folder / field, -1 if field.endswith(".npy") else 0, -1


# Copied from clip.py
@functools.lru_cache(maxsize=64)
def open_npy(path: Path) -> np.ndarray:
    """Memory map of a uint8 array (N, H, W, 3)."""
    array = np.lib.format.open_memmap(path, mode="r")  # np.load would take an .npz by another name
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
    return array


# Copied from clip.py
def read_image(table: Table, row: int, min_side: float, max_pixels: int) -> Image.Image | str:
    """Decode an image to RGB, turned as its EXIF says, alpha on white; or the reason why that cannot be done.

    min_side: px that the caller needs of each side; JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves enough.
    max_pixels: limit on what the header announces, checked before a pixel is decoded.
    """
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns at a fixed size; ours is a flag and comes before decoding
    path, offset, size = locate_image(table, row)
    try:
        if offset < 0:
            return "no row of the .npy file is named"
        if path.suffix == ".npy":
            return Image.fromarray(open_npy(path)[offset])
        with open(path, "rb", buffering=0) as file:
            if offset + size > os.fstat(file.fileno()).st_size:  # before read() asks for that much memory
                return "offset or size beyond the end of the file"
            file.seek(offset)
            image = Image.open(io.BytesIO(file.read(size)), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            return "more pixels than --max-pixels"
        image.draft("RGB", (math.ceil(min_side), math.ceil(min_side)))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
            return "values that are not finite"
        if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey: Pillow's convert would clip at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError:
        return "missing file"
    except IndexError:
        return "row beyond the end of the .npy file"
    except Image.UnidentifiedImageError:
        return "not an image"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError, SyntaxError,
            EOFError, struct.error, zlib.error) as error:  # Pillow's; odd EXIF data give any of the first six
        if path.suffix == ".npy":
            return "no .npy file of uint8 (N, H, W, 3)"
        return "truncated" if "truncated" in str(error).lower() else "cannot be decoded"


def in_processes(function, jobs, workers):
    """function(*job) of each job, in order; at most 8 a worker wait or are done, so memory does not grow with them."""
    if workers == 1:
        yield from itertools.starmap(function, jobs)
        return
    spawn, running = multiprocessing.get_context("spawn"), deque()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=die_with_parent) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(function, *job))
                if len(running) > 8 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error what waits is not begun


def find_classes(given, table):
    """Class names in label order, {name or wnid: label, None if several have it}, path; [], {}, None without the file.

    given: --classes, or None: beside the table or one folder up.
    """
    folder = os.path.dirname(table)
    beside = (os.path.normpath(os.path.join(folder, up, "classes.tsv")) for up in ("", ".."))
    path = given or next(filter(os.path.isfile, beside), None)
    if path is None:
        return [], {}, None
    labels, _ = labels_by_name(path)
    return [row["name"] for row in open_tables([path], ["name"])[1]], labels, path


def label_number(field, ids, n_classes):
    """The class number in a label field (3, 3.0, `3|17`, a name or wnid); -1: empty; None: no such class."""
    field = field.strip("| ").split("|")[0].strip()
    if not field:
        return -1
    # pandas makes floats of integers where one is missing
    label = int(field.partition(".")[0]) if re.fullmatch(r"\d{1,18}(\.0*)?", field, re.A) else ids.get(field)
    return None if label is None or label >= (n_classes or MAX_CLASSES) else label


def read_whole(images, row, max_pixels):
    """read_image without reduction, of regular files alone: at a pipe it would wait for ever."""
    path = locate_image(images, row)[0]
    is_odd = not os.path.isfile(path) and os.path.exists(path)
    return "not a regular file" if is_odd else read_image(images, row, NO_DRAFT, max_pixels)


def why_bad(folder, names, max_pixels):
    """Decode the images of a folder. Returns: for each the reason it is bad, or its (width, height)."""
    images = (read_whole(ImageNames(folder, names), row, max_pixels) for row in range(len(names)))
    return [image if isinstance(image, str) else image.size for image in images]


def text_hash(text):
    """64 bits of a text, never 0. Two of 400 M different texts share it with a probability of 0.4 %."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") or 1


def check_tables(tables, out, sample, max_bad, classes, max_pixels, workers, seed):
    """Write the bad rows of tables to out, print what is in them. Returns: 1 if more than max_bad are bad, else 0."""
    paths = find_tables(tables)
    names, ids, classes = find_classes(classes, paths[0])
    bad, broken, of_class, hashes = [], [], Counter(), array("Q")  # rows of each class, hashes of captions
    shown, n_decoded, n_undecoded, n_without = [], 0, 0, 0

    def scan():  # yields (file, line, {column: field}) of each row whose text is in order
        for path in paths:
            for line, row in read_table(path, [naming_column(path)], broken)[1]:
                label = label_number(row.get("label", ""), ids, len(names))
                of_class[label] += 1
                hashes.append(text_hash(row.get("caption", "")))
                if label is None:
                    bad.append((path, line, name_of(row), f"label {row['label']!r} is no class"))
                elif label < 0 and not row.get("caption"):
                    bad.append((path, line, name_of(row), "neither label nor caption"))
                else:
                    yield path, line, row

    rows = scan()
    if sample:  # the rows of the smallest hashes
        rows = heapq.nsmallest(sample, rows, key=lambda row: (unit_hash(seed, name_of(row[2])), row[0], row[1]))
        rows.sort(key=lambda row: row[:2])
    waiting = deque()  # rows in the hands of workers

    def jobs():
        nonlocal n_without
        for path, group in itertools.groupby(rows, key=lambda row: row[0]):
            for chunk in in_chunks(group, lambda row: row[2].values(), ROWS_PER_JOB):
                if "image" not in chunk[0][2]:
                    n_without += len(chunk)
                    continue
                waiting.append(chunk)
                yield os.path.dirname(os.path.abspath(path)), [row["image"] for _, _, row in chunk], max_pixels

    for results in in_processes(why_bad, jobs(), workers):
        for (path, line, row), result in zip(waiting.popleft(), results):
            n_decoded += 1
            if isinstance(result, str):
                n_undecoded += 1
                bad.append((path, line, row["image"], result))
            elif len(shown) < 3:
                shown.append((path, line, row, result))
    for path, line, row, (width, height) in shown:
        print(f"{path}:{line}: {row['image']}, {width} x {height}, label {row.get('label', '') or 'none'}"
              f"\n    {row.get('caption', '')[:200].encode('utf-8', 'replace').decode()}")  # fmt: skip
    bad = sorted(bad + [(path, line, "", reason) for path, line, reason in broken], key=lambda row: row[:2])
    n_rows = of_class.total() + len(broken)
    write_tsv(out, ("file", "line", "image", "reason"),
              (dict(zip(("file", "line", "image", "reason"), row)) for row in bad))  # fmt: skip
    print_classes(names, of_class)
    copies = repeated_captions(paths, hashes)
    # The table of bad rows has the labels themselves.
    reasons = Counter("label is no class" if reason.startswith("label ") else reason for *_, reason in bad)
    counts = {"rows": n_rows, "decoded": n_decoded, **{r: -n for r, n in sorted(reasons.items())}}
    print_funnel(counts)
    print(f"{len(bad):>12,}  bad rows, in {out}")
    if n_without:
        print(f"{'':12}  note: {n_without:,} rows are of tables without a column image; their texts alone were checked")
    write_report(out, [*paths, classes], dict(sample=sample, seed=seed, max_pixels=max_pixels, classes=classes), counts,
                 repeated_captions=copies)  # fmt: skip
    # Text is checked in all rows, pixels perhaps in a sample.
    n_rows = max(n_rows, 1)
    share = n_undecoded / (max(n_decoded, 1) if sample else n_rows) + (len(bad) - n_undecoded) / n_rows
    return int(share > max_bad)


def print_classes(names, counts):
    """How many classes have rows, and which have the most and the fewest. counts: {label: rows}; -1, None: no class."""
    n_unlabelled = counts.pop(-1, 0) + counts.pop(None, 0)
    n_classes = len(names) or max(counts, default=-1) + 1
    print(f"{n_unlabelled:>12,}  rows without a class\n{len(counts):>12,}  of {n_classes:,} classes have rows")
    order = sorted(counts, key=lambda label: (-counts[label], label))
    for label in order[:3] + order[3:][-3:]:
        print(f"{counts[label]:>12,}    {names[label] if names else label}")


def repeated_captions(paths, hashes):
    """Print how many captions occur again, and the three most frequent. Returns: [(caption, times)], non-empty ones."""
    values, first, times = np.unique(np.array(hashes), return_index=True, return_counts=True)
    is_text = (times > 1) & (values != text_hash(""))
    print(f"{int((times[is_text] - 1).sum()):>12,}  repetitions of a caption")
    most = [i for i in np.argsort(-times, kind="stable")[:4] if is_text[i]][:3]
    captions = (fields.get("caption", "") for fields in open_tables(paths, bad=[])[1]) if most else ()
    place = {int(first[i]): int(times[i]) for i in most}
    found = [(caption, place[row]) for row, caption in enumerate(captions) if row in place]
    for caption, n in sorted(found, key=lambda pair: -pair[1]):
        print(f"{n:>12,}    x {caption[:100]!r}")
    return found


# ------------------------------------------------------------------------------ dedup

IMAGE_HASHES = ("bytes", "pixels", "dhash", "phash")
NEAR = ("dhash", "phash")  # compared by Hamming distance; all others by equality
BLOCK = 1024  # rows of a product of embeddings: fits the cache of a core, and fills a GPU well enough


def dhash(image):
    """64 bits: is a pixel brighter than its left neighbour, of 9 x 8 grey ones; equal to imagehash.dhash."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def phash(image):
    """64 bits: which of the 8 x 8 lowest DCT frequencies lie above their median; equal to imagehash.phash."""
    from scipy.fft import dct

    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dct(dct(grey, axis=0), axis=1)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def hash_rows(folder, rows, by, max_pixels):
    """Hashes of rows: list of (image, {column: text}). by: methods.

    Returns: [rows, methods + 1] uint64, 0 where a hash says nothing: no image or text, or a picture so flat that its
    perceptual hash has under 4 or over 60 bits set. The last column is the image's area in px.
    """
    found = np.zeros((len(rows), len(by) + 1), np.uint64)
    images = ImageNames(folder, [image for image, _ in rows])
    for i, (_, texts) in enumerate(rows):
        is_decoded = {"pixels", "dhash", "phash"} & set(by)
        image = read_whole(images, i, max_pixels) if is_decoded else ""
        for k, method in enumerate(by):
            if method == "bytes":
                found[i, k] = file_piece_hash(*locate_image(images, i))
            elif method not in IMAGE_HASHES:
                found[i, k] = text_hash(texts[method]) if texts[method] else 0
            elif not isinstance(image, str):
                if method == "pixels":
                    found[i, k] = text_hash(f"{image.size}{hashlib.sha256(image.tobytes()).hexdigest()}")
                else:
                    value = dhash(image) if method == "dhash" else phash(image)
                    found[i, k] = value if 4 <= value.bit_count() <= 60 else 0
        found[i, -1] = 0 if isinstance(image, str) else image.width * image.height
    return found


def file_piece_hash(path, offset, size):
    """64 bits of an image's bytes as stored; 0 if they cannot be read. Arguments: of locate_image."""
    try:
        if path.suffix == ".npy":
            content = open_npy(path)[offset].tobytes() if offset >= 0 else b""  # -1: no row is named
        elif not os.path.isfile(path):  # a pipe would be waited for
            return 0
        else:
            with open(path, "rb") as file:
                if offset + size > os.fstat(file.fileno()).st_size:  # before read() asks for that much memory
                    return 0
                file.seek(offset)
                content = file.read(size)
    except (OSError, ValueError, IndexError):
        return 0
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") or 1 if content else 0


def hash_tables(paths, by, max_pixels, workers):
    """hash_rows of all rows of tables, [N, methods + 1]."""
    columns = [method for method in by if method not in IMAGE_HASHES]

    def jobs():
        for path in paths:
            folder = os.path.realpath(os.path.dirname(path))
            needed = ["image" if set(by) & set(IMAGE_HASHES) else naming_column(path), *columns]
            _, rows = read_table(path, needed, is_all=False)
            for chunk in in_chunks(rows, lambda row: row[1], ROWS_PER_JOB):
                texts = [(fields[0], dict(zip(columns, fields[1:]))) for _, fields in chunk]
                for _, text in texts:
                    if text.get("image"):  # of another folder the same name is another image
                        text["image"] = relocate(text["image"], folder, "/").lstrip("/")
                    if "caption" in text:
                        caption = unicodedata.normalize("NFC", text["caption"]).casefold()
                        text["caption"] = " ".join(caption.split())
                yield os.path.dirname(os.path.abspath(path)), texts, by, max_pixels

    found = list(in_processes(hash_rows, tqdm(jobs(), unit=f" x {ROWS_PER_JOB} rows", disable=None), workers))
    return np.concatenate([np.zeros((0, len(by) + 1), np.uint64), *found])


def count_bits(x):
    """Set bits of each uint64. Source: Hacker's Delight, 5-1."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def near_hashes(hashes, distance):
    """All pairs of different hashes at most so many bits apart, each at least once.

    hashes: [n] uint64, all different; distance: 0..7. Of four bands of 16 bits one is equal in a pair up to 3 bits
    apart, and differs in one bit at most up to 7 bits apart (pigeonhole).
    Yields: (i, j, bits) int64 arrays, i < j, of at most a few million candidates a time.
    """
    flips = [0] + ([1 << k for k in range(16)] if distance > 3 else [])
    for band in range(4 if distance else 0):
        values = ((hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(values, kind="stable")
        starts = np.searchsorted(values[order], np.arange(2**16 + 1))
        for flip in flips:
            keys, start = values ^ flip, 0
            ends = np.cumsum(np.diff(starts)[keys])
            while start < len(hashes):
                stop = max(start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + 2**22, "right")))
                i, at = members(starts, keys[start:stop])
                i, j = i + start, order[at]
                i, j = i[i < j], j[i < j]
                bits = count_bits(hashes[i] ^ hashes[j])
                yield i[bits <= distance], j[bits <= distance], bits[bits <= distance]
                start = stop


def hash_pairs(hashes, distance, n, is_chain):
    """Pairs of rows with equal hashes (to the first of them) and with near ones (the first rows of both hashes).

    hashes: [n + test rows] uint64, 0: none. is_chain: False leaves out near pairs without a test row.
    Yields: (i, j, bits) arrays of row numbers, i != j.
    """
    known = np.flatnonzero(hashes)
    values, first, inverse = np.unique(hashes[known], return_index=True, return_inverse=True)
    equal = np.flatnonzero(first[inverse] != np.arange(len(known)))
    yield known[first[inverse[equal]]], known[equal], np.zeros(len(equal), np.int64)
    has_test = np.zeros(len(values), bool)
    has_test[inverse[known >= n]] = True
    for i, j, bits in near_hashes(values, distance):
        keep = has_test[i] | has_test[j] | is_chain
        yield known[first[i[keep]]], known[first[j[keep]]], bits[keep]


def load_features(paths, like=()):
    """Embeddings as memory maps, one array [n, D] (pixels: [n, H, W, 3]) per file; an .npz is read whole.

    like: arrays whose D they share. Raises: SystemExit if a file holds something else.
    """
    arrays = []
    for path in paths:
        try:
            array = np.load(path, mmap_mode="r")
            array = array["features"] if isinstance(array, np.lib.npyio.NpzFile) else array
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{path}: not readable as embeddings, .npy or .npz with `features` ({error})") from None
        size = [*like, *arrays, array][0].shape[1:]
        if array.ndim < 2 or array.dtype.kind not in "fu" or array.shape[1:] != size:
            raise SystemExit(f"{path}: got {array.dtype} {array.shape}, expected floats [rows, D], D as in the first "
                             f"file ({', '.join(map(str, size))})")  # fmt: skip
        arrays.append(array)
    return arrays


def row_features(flag, files, tables, like=()):
    """load_features of the rows of tables. Raises: SystemExit if files and tables, as they were given, do not match."""
    paths, given = find_tables(tables), [path for table in tables for path in find_tables([table])]
    if len(files) > 1 and given != paths:
        raise SystemExit(f"--{flag}: give tables and files in the order of the tables' names: {' '.join(paths)}")
    arrays = load_features(files, like)
    n_rows = [sum(1 for _ in read_table(path, [naming_column(path)], is_all=False)[1]) for path in paths]
    n_found = list(map(len, arrays))
    if sum(n_found) != sum(n_rows) or len(n_found) == len(n_rows) != 1 and n_found != n_rows:
        found, rows = (" + ".join(map(str, n)) or 0 for n in (n_found, n_rows))
        raise SystemExit(f"--{flag}: got {found} rows, the tables have {rows}")
    return arrays


def unit_blocks(arrays, device, keep=None):
    """Blocks of embeddings in order: (first row, [<= BLOCK, D] float32 of unit length, zeros if that is impossible).

    keep: [N] bool; a block holds the kept rows of BLOCK ones.
    """
    import torch  # not above: it takes seconds, and --help needs none of it

    first = 0
    for part in arrays:
        for start in range(0, len(part), BLOCK):
            rows = part[start : start + BLOCK]
            rows = rows if keep is None else rows[keep[first : first + len(rows)]]
            block = torch.from_numpy(np.array(rows, dtype=np.float32)).flatten(1).to(device)
            yield first, block.div_(block.norm(dim=1, keepdim=True)).nan_to_num_(0, 0, 0)
            first += min(BLOCK, len(part) - start)


def cosine_pairs(rows, tests, threshold, is_chain, device, backend="blocks"):
    """All pairs of rows above a cosine, among rows or, not is_chain, only between rows and tests (numbered behind).

    rows, tests: lists of [n, D] arrays; backend: faiss finds the pairs of blocks that have any, which alone are then
    multiplied as blocks does, so its rounding has no say in the result.
    Source: DINOv2 (2304.07193) A.3, with all edges instead of 64 nearest ones.
    Yields: (i, j, cosine) arrays, i < j.
    """
    n = sum(map(len, rows))
    held = list(unit_blocks(rows + tests if is_chain else tests, device))
    index = faiss_index(held) if backend == "faiss" and held else None
    for first, block in held if is_chain else unit_blocks(rows, device):
        if index:  # float32 products of one pair differ by less than 1e-5
            _, _, found = index.range_search(block.cpu().numpy(), threshold - 1e-5)
            near = set(np.searchsorted([start for start, _ in held], np.unique(found), "right") - 1)
        for place, (other_first, other) in enumerate(held):
            other_first += 0 if is_chain else n
            if other_first < first or index and place not in near:
                continue
            cosines = block @ other.T
            if cosines.amax() > threshold:
                i, j = (cosines > threshold).nonzero(as_tuple=True)
                values, i, j = cosines[i, j].cpu().numpy(), i.cpu().numpy() + first, j.cpu().numpy() + other_first
                yield i[i < j], j[i < j], values[i < j]


def faiss_index(blocks):
    """faiss's exact inner products with all rows of unit_blocks."""
    try:
        import faiss
    except ImportError:
        raise SystemExit("--backend faiss needs faiss (pip install faiss-cpu)") from None
    index = faiss.IndexFlatIP(blocks[0][1].shape[1])
    for _, block in blocks:
        index.add(block.cpu().numpy())
    return index


def roots_of(parent, rows):
    """The smallest row of each row's component; shortens their paths. parent: [N] int64, changed."""
    roots = parent[rows]
    while (roots != parent[roots]).any():
        roots = parent[roots]
    parent[rows] = roots
    return roots


def join(parent, i, j):
    """Join the components of rows i and j, edge by edge. Returns: positions of the edges that joined two."""
    left, right = roots_of(parent, i), roots_of(parent, j)
    joined = []
    for edge in np.flatnonzero(left != right).tolist():
        a, b = int(left[edge]), int(right[edge])
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = int(parent[a])
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = int(parent[b])
        if a != b:
            parent[max(a, b)] = min(a, b)
            joined.append(edge)
    return joined


def connect(n_all, sources):
    """Connected components of rows.

    sources: {method: iterator of (i, j, distance) arrays}. Returns: ([n_all] smallest row of each row's component,
    list of (i, j, method, distance), the edges that joined two components, closest first within a block).
    """
    parent, edges = np.arange(n_all), []
    for method, blocks in sources.items():
        for i, j, distance in blocks:
            order = np.argsort(-distance if method == "embedding" else distance, kind="stable")
            i, j, distance = i[order], j[order], distance[order]
            edges += [(int(i[e]), int(j[e]), method, distance[e].item()) for e in join(parent, i, j)]
    return roots_of(parent, np.arange(n_all)), edges


def area_of(row):
    """Pixels of an image by img2dataset's columns: as stored, or else (not resized) of the original; 0: unknown."""
    for width, height in (("width", "height"), ("original_width", "original_height")):
        try:
            area = float(row.get(width, "")) * float(row.get(height, ""))
        except ValueError:  # no such column, or empty
            continue
        if area > 0:  # not NaN
            return area
    return 0


def keep_best(paths, roots, area, protect, out):
    """Which row of each component of several stays, and the names of all their rows, relative to the table out.

    Rule: a row of a table in protect, a labelled one, the larger image, the longer caption, the smaller name with its
    folder. area: [N] px, of decoded images; None: as area_of. Returns: ({root: row that stays}, {row: name}).
    """
    size, protected = np.bincount(roots, minlength=len(roots)), set(map(os.path.realpath, protect))
    best, names, n = {}, {}, 0
    for path in paths:
        folder, target = (os.path.realpath(os.path.dirname(p)) for p in (path, out))
        is_late = os.path.realpath(path) not in protected
        for row, (_, fields) in enumerate(read_table(path)[1], n):
            n = row + 1
            if size[roots[row]] > 1:
                names[row] = name_of(fields, folder, target)
                pixels = area_of(fields) if area is None else int(area[row])
                rule = (is_late, not fields.get("label"), -pixels, -len(fields.get("caption", "")),
                        os.path.join(folder, name_of(fields)), row)  # fmt: skip
                best[roots[row]] = min(best.get(roots[row], rule), rule)
    return {root: rule[-1] for root, rule in best.items()}, names


def dedup_tables(tables, out, by, distance, cosine, embeddings, protect, against, against_embeddings, chain,
                 max_pixels, backend, device, workers):  # fmt: skip
    """Write the rows of tables that are no copies of others, or of rows of `against`. Arguments: as the flags."""
    paths, tests, protected = map(find_tables, (tables, against, protect))
    if missing := set(map(os.path.realpath, protected)) - set(map(os.path.realpath, paths)):
        raise SystemExit(f"--protect: not among the tables: {', '.join(sorted(missing))}")
    hashed = [method for method in by if method != "embedding"]
    workers = workers if set(hashed) & set(IMAGE_HASHES) else 1  # texts alone are not worth the start of processes
    found = [hash_tables(each, hashed, max_pixels, workers) for each in (paths, tests)]
    n, found = len(found[0]), np.concatenate(found)
    n_all = len(found)
    is_chain = chain or not against
    sources = {method: hash_pairs(found[:, k], distance if method in NEAR else 0, n, is_chain)
               for k, method in enumerate(hashed)}  # fmt: skip
    is_blank = {method: found[:, k] == 0 for k, method in enumerate(hashed)}
    if "embedding" in by:
        rows = row_features("embeddings", embeddings, tables)
        test_rows = row_features("against-embeddings", against_embeddings, against, rows)
        sources["embedding"] = cosine_pairs(rows, test_rows, cosine, is_chain, device, backend)
        blocks = [(block == 0).all(1).cpu().numpy() for _, block in unit_blocks(rows + test_rows, device)]
        is_blank["embedding"] = np.concatenate([np.zeros(0, bool), *blocks])
    why = "empty, cannot be read, flat picture, no direction"
    if against and all(blank[n:].all() for blank in is_blank.values()):
        raise SystemExit(f"--against: none of {n_all - n} rows of {', '.join(tests)} has {' or '.join(by)} ({why}); "
                         "nothing would be found")  # fmt: skip
    roots, edges = connect(n_all, sources)
    columns, stream = open_tables(paths, out=out)
    is_decoded, is_told = {"pixels", "dhash", "phash"} & set(by), {"width", "original_width"} & set(columns)
    best, names = keep_best(paths + tests, roots, found[:, -1] if is_decoded else None, protected, out)
    sizes = np.bincount(roots, minlength=n_all)
    if against:
        keep = ~np.isin(roots[:n], roots[n:])
    else:
        keep = sizes[roots] == 1
        keep[list(best.values())] = True
    n_kept = write_tsv(out, columns, itertools.compress(stream, keep))
    stem = out.removesuffix(".tsv")
    pairs = (dict(image=names[i], other=names[j], by=method, distance=round(d, 6),
                  kept="" if against else names[best[roots[i]]]) for i, j, method, d in edges)  # fmt: skip
    write_tsv(f"{stem}.pairs.tsv", ("image", "other", "by", "distance", "kept"), pairs)
    flags = dict(image_sizes="decoded" if is_decoded else "columns" if is_told else "unknown",
                 by=by, distance=distance, cosine=cosine, chain=chain, embeddings=embeddings, protect=protect,
                 against=against, against_embeddings=against_embeddings, max_pixels=max_pixels)  # fmt: skip
    what = "copies of a row of --against" if against else "copies of a row that stays"
    counts = {"rows": n, what: n_kept - n, "rows left": n_kept}
    print_funnel(counts)
    print(f"{'':12}  note: image sizes, by which the larger stays: {flags['image_sizes']}")
    unknown, unknown_tests = ({method: int(blank[part].sum()) for method, blank in is_blank.items()}
                              for part in (slice(n), slice(n, None)))  # fmt: skip
    for where, numbers in (("", unknown), ("of --against: ", unknown_tests)):
        for method, n_unknown in numbers.items():
            if n_unknown:
                print(f"{'':12}  note: {where}{n_unknown:,} x no {method} ({why}); not compared")
    histogram = {int(size): int(times) for size, times in zip(*np.unique(sizes[sizes > 1], return_counts=True))}
    print(f"{sum(histogram.values()):>12,}  components of several rows, in {stem}.pairs.tsv")
    for root in np.argsort(-sizes, kind="stable")[:3]:
        if sizes[root] > 1:
            print(f"{sizes[root]:>12,}    rows with {names[best[root]]}")
    write_report(out, [*paths, *tests, *embeddings, *against_embeddings], flags, counts,
                 component_sizes=histogram, not_compared=unknown, against_not_compared=unknown_tests)  # fmt: skip


# ------------------------------------------------------------------------------ prune

TIE = 1e-6  # cosines are float32, off by about 1e-7: one that exceeds a limit by less is equal to it, and stays


def nearest(queries, arrays, device, keep=None):
    """The largest cosine of each query to any row. queries: list of [<= BLOCK, D] blocks. Returns: list of [n] tensors.

    Rows without a direction (zero, NaN) do not count. Source: similarity gap, Mayilvahanan et al. (2310.09562).
    """
    best = [query.new_full((len(query),), -math.inf) for query in queries]
    for _, block in unit_blocks(arrays, device, keep):
        block = block[block.any(dim=1)]
        for k, query in enumerate(queries if len(block) else ()):
            best[k] = best[k].maximum((query @ block.T).amax(dim=1))
    return best


def prune_rows(arrays, queries, limits, device):
    """Which rows lie closer to some query than its limit: inside the hull of the test set, in the paper's words.

    arrays: list of [n, D]; queries, limits: {test set: list of blocks [<= BLOCK, D], of [<= BLOCK]}.
    Returns: {test set: (drop [N] bool, best cosine [N] float32, its query [N] int64)}; a row without a direction goes,
    and its cosine is NaN.
    """
    n = sum(map(len, arrays))
    found = {name: (np.zeros(n, bool), np.full(n, -2, np.float32), np.zeros(n, np.int64)) for name in queries}
    for first, block in unit_blocks(arrays, device):
        rows = slice(first, first + len(block))
        for name, (drop, best, query) in found.items():
            top = excess = block.new_full((len(block),), -2).masked_fill_(block.norm(dim=1) == 0, math.nan)  # stays NaN
            place = block.new_zeros(len(block), dtype=int)
            for k, limit in enumerate(limits[name]):
                cosines = block @ queries[name][k].T
                # on a CPU NumPy finds the same columns several times faster than torch, for it uses vector units
                index = place.new_tensor(cosines.numpy().argmax(axis=1)) if cosines.is_cpu else cosines.argmax(dim=1)
                value = cosines.gather(1, index[:, None])[:, 0]
                place = (index + k * BLOCK).where(value > top, place)  # of equal ones the first query
                top, excess = top.maximum(value), excess.maximum(cosines.sub_(limit).amax(dim=1))
            drop[rows], best[rows], query[rows] = (~(excess <= TIE)).cpu(), top.cpu(), place.cpu()  # drops NaN too
    return found


def prune_table(tables, out, embeddings, small, tests, keep, verify, device, seed):
    """Write the pruned tables, and the table of what was dropped. Arguments: as the flags."""
    paths = find_tables(tables)
    arrays = row_features("embeddings", embeddings, tables)
    small_arrays, queries, n = load_features(small, arrays), {}, sum(map(len, arrays))
    for name, path in (test.split("=", 1) for test in tests):
        queries[name] = [block for _, block in unit_blocks(load_features([path], arrays), device)]
        if not queries[name] or any((~block.any(dim=1)).any() for block in queries[name]):
            raise SystemExit(f"{path}: no rows, or a row that is zero or not finite; a test set needs whole embeddings")
    limits = {name: nearest(blocks, small_arrays, device) for name, blocks in queries.items()}
    if any((limit < -1.5).any() for blocks in limits.values() for limit in blocks):
        raise SystemExit(f"--small: no usable row in {', '.join(small)}; against nothing, all rows would go")
    found = prune_rows(arrays, queries, limits, device)
    drops = {name: drop for name, (drop, _, _) in found.items()}
    if len(drops) > 1:
        drops["combined"] = np.logical_or.reduce(list(drops.values()))
    if keep:
        drops |= least_similar(paths, np.max([best for _, best, _ in found.values()], axis=0), keep, seed)
    flags = dict(embeddings=embeddings, small=small, tests=tests, keep=keep, seed=seed)
    gaps = {}
    for name in found if verify else ():
        after = nearest(queries[name], arrays, device, ~drops[name])
        over = max(float((a - limit).max()) for a, limit in zip(after, limits[name]))
        if not over <= 2 * TIE:  # a NaN too
            raise SystemExit(f"--verify: {name}: a row that is left exceeds its limit by {over}; nothing was written")
        gaps[name] = dict(small=round(float(sum(x.sum() for x in limits[name])) / sum(map(len, limits[name])), 4),
                          pruned=round(float(sum(x.clamp(min=-1).sum() for x in after)) / sum(map(len, after)), 4))
        print(f"{name}: mean cosine to the nearest row: {gaps[name]['small']} of the small set, "
              f"{gaps[name]['pruned']} of the rows left")  # fmt: skip
    n_blank = int(np.isnan(next(iter(found.values()))[1]).sum())
    target = out.replace("{set}", "leaks")
    leaks = write_leaks(open_tables(paths, out=target)[1], target, found, limits)
    for name, drop in drops.items():
        target = out.replace("{set}", name)
        columns, rows = open_tables(paths, out=target)
        n_left = write_tsv(target, columns, itertools.compress(rows, ~drop))
        why = "closer to a test image than the small set" if name in (*found, "combined") else "not chosen"
        counts = {"rows": n, "zero or not finite embedding": -n_blank, why: n_left - n + n_blank, "rows left": n_left}
        print(target)
        print_funnel(counts)
        inputs = [*paths, *embeddings, *small, *(test.partition("=")[2] for test in tests)]
        write_report(target, inputs, flags, counts, gap=gaps.get(name), leaks=leaks)


def least_similar(paths, similarity, keep, seed):
    """Masks of what to drop so that `keep` rows stay: near keeps the least similar, far the most, rand any.

    similarity: [N], NaN for rows without an embedding, which never stay.
    """
    hashes = ranks_of(scan_rows(paths, "image", seed)[0])
    n_usable = int((~np.isnan(similarity)).sum())
    if keep > n_usable:
        raise SystemExit(f"--keep: got {keep}, the tables have {n_usable} rows with an embedding")
    masks = {}
    for name, score in (("near", similarity), ("far", -similarity), ("rand", 0 * similarity)):  # NaN is sorted last
        masks[name] = np.ones(len(hashes), bool)
        masks[name][np.lexsort((hashes, score))[:keep]] = False
    return masks


def write_leaks(rows, path, found, limits):
    """Write what was dropped with the test image it is closest to. Returns: {test set: rows with a cosine over .95}."""
    limit_of = {name: np.concatenate([x.cpu().numpy() for x in blocks]) for name, blocks in limits.items()}

    def leaks():
        for i, row in enumerate(rows):
            for name, (drop, best, query) in found.items():
                if drop[i] and best[i] == best[i]:  # NaN: a row without an embedding, which is like nothing
                    yield dict(set=name, image=name_of(row), caption=row.get("caption", ""), test_row=int(query[i]),
                               similarity=f"{best[i]:.6f}", limit=f"{limit_of[name][query[i]]:.6f}")  # fmt: skip

    write_tsv(path, ("set", "image", "caption", "test_row", "similarity", "limit"), leaks())
    return {name: int((best > 0.95).sum()) for name, (_, best, _) in found.items()}


# ------------------------------------------------------------------------------ subset

PROFILES = {  # share of class i of C, the largest first, of the largest; F: largest over smallest
    "balanced": lambda i, C, F: np.ones(C),
    "exponential": lambda i, C, F: F ** (-i / max(C - 1, 1)),  # Cui et al., 1901.05555, section 5
    "pareto": lambda i, C, F: (i + 1.0) ** (-math.log(F) / math.log(max(C, 2))),
}


def scan_rows(paths, key, seed, classes=None, column=None):
    """One pass over tables. key: column that names a row, None: any; classes: of find_classes, or None: labels are not
    read; column: of numbers, or None.

    Returns: (hashes [N, 2] float64 in [0, 1), of the key and of the whole row, labels [N] int32, -1: none, values [N]
    float64, NaN: empty).
    """
    hashes, labels, values = array("d"), array("i"), array("d")
    for path in paths:
        needed = [name for name in (naming_column(path) if key == "image" else key, column) if name is not None]
        for line, row in read_table(path, needed)[1]:
            label = -1 if classes is None else label_number(row.get("label", ""), classes[1], len(classes[0]))
            if label is None:
                what = f"not one of {len(classes[0])} classes" if classes[0] else f"no number below {MAX_CLASSES:,}"
                more = "" if classes[0] else "; names and wnids need --classes"
                raise SystemExit(f"{path}:{line}: label {row['label'][:40]!r} is {what}{more}")
            fields = (part for pair in sorted(row.items()) if pair[1] for part in pair)  # in any order of columns
            hashes.extend((unit_hash(seed, row.get(key) or key_of(row)), hash64(str(seed), *fields) / 2**64))
            labels.append(label)
            if column is not None:
                try:
                    values.append(float(row[column] or "nan"))
                except ValueError:
                    raise SystemExit(f"{path}:{line}: {column} is {row[column]!r}, expected a number") from None
    return np.frombuffer(hashes).reshape(-1, 2), np.frombuffer(labels, np.int32), np.frombuffer(values)


def ranks_of(hashes):
    """Places of rows in the order of their hashes, of scan_rows: rows of one key are told apart by their fields."""
    return np.argsort(np.lexsort((hashes[:, 1], hashes[:, 0])))  # of a permutation: its inverse


def class_counts(labels, n_classes):
    """Rows of each class. Returns: [C] int64."""
    return np.bincount(labels[labels >= 0], minlength=n_classes)


def bottom(hashes, mask, k):
    """Of the rows in mask the k with the smallest hashes. Returns: mask. Raises: SystemExit if there are fewer."""
    if k > mask.sum():
        raise SystemExit(f"{k:,} rows wanted, {mask.sum():,} there; rows are never repeated")
    return bottom_per_class(hashes, np.zeros(len(mask), np.int64), mask, np.array([k]))


def bottom_per_class(hashes, labels, mask, quota):
    """Of the rows in mask the quota[c] of each class c with the smallest hashes; all if a class has fewer."""
    rows = np.flatnonzero(mask & (labels >= 0))
    rows = rows[np.lexsort((hashes[rows], labels[rows]))]
    counts = class_counts(labels[rows], len(quota))
    rank = np.arange(len(rows)) - (np.cumsum(counts) - counts)[labels[rows]]
    chosen = np.zeros_like(mask)
    chosen[rows[rank < quota[labels[rows]]]] = True
    return chosen


def round_shares(total, shares):
    """Whole numbers in the ratio of shares that sum to total: largest remainders, ties to the first."""
    exact = total * np.asarray(shares, float) / np.sum(shares)
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def profile_quota(counts, profile, imbalance, rows, seed):
    """Rows per class that follow a profile over the classes that have rows, those with the most first.

    counts: [C]; rows: in all, or 0: the most that keep the profile exact. Equal counts: in the order of a hash.
    Returns: [C] int64; at least 1 for each class that has rows. With `rows` it may be more than a class has.
    """
    present = np.flatnonzero(counts)
    if not len(present):
        raise SystemExit("--profile: no row has a label")
    if 0 < rows < len(present):
        raise SystemExit(f"--rows: got {rows:,}, a profile has a row of each of the {len(present):,} classes")
    present = np.array(sorted(present, key=lambda c: (-counts[c], unit_hash(seed, str(c)))))
    shares, quota = PROFILES[profile](np.arange(len(present)), len(present), imbalance), np.zeros_like(counts)
    if not rows:  # rounded up, a table that has the profile keeps all its rows; 1e-12: of a float's error
        quota[present] = np.ceil((counts[present] / shares).min() * shares * (1 - 1e-12))
        return quota
    is_free = np.ones(len(present), bool)
    while (quota[present] < 1).any():  # the others, by their shares, give what a class needs to have a row
        quota[present] = 1
        quota[present[is_free]] = round_shares(rows - (~is_free).sum(), shares[is_free])
        is_free &= quota[present] > 0
    return quota


def rescue(hashes, labels, mask, pool, is_equal):
    """Give each class of the pool that lost all rows its row of the smallest hash back.

    is_equal: so many rows of the 10 largest classes go instead, largest hash first, never a class's last; rows without
    a label are one class more, which needs none.
    Returns: (mask, number of rescued rows).
    """
    n, n_classes = mask.sum(), int(labels.max(initial=-1)) + 1
    lost = (class_counts(labels[mask], n_classes) == 0).astype(np.int64)
    mask = mask | bottom_per_class(hashes, labels, pool, lost)
    n_rescued = mask.sum() - n
    while is_equal and mask.sum() > n:
        counts = np.r_[class_counts(labels[mask], n_classes), (labels[mask] < 0).sum()]
        largest = np.where((order := np.argsort(-counts, kind="stable")[:10]) < n_classes, order, -1)
        last = bottom_per_class(hashes, labels, mask, np.ones(n_classes, np.int64))
        rows = np.flatnonzero(mask & ~last & np.isin(labels, largest))
        if not len(rows):
            n_kept = (counts[:-1] > 0).sum()
            raise SystemExit(f"--rows {n} cannot hold a row of each of {n_kept} classes; try --no-rescue")
        mask[rows[np.argsort(-hashes[rows], kind="stable")[: mask.sum() - n]]] = False
    return mask, int(n_rescued)


def table_counts(table, classes, n_classes):
    """Class counts of a table by its labels, or of one with the columns name and count. Returns: [C] int64."""
    paths = find_tables([table])
    columns, rows = open_tables(paths)
    if "count" not in columns or "label" in columns and not {"image", "caption"}.isdisjoint(columns):
        labels = scan_rows(paths, None, 0, classes)[1]
        return class_counts(labels, n_classes or int(labels.max(initial=-1)) + 1)
    counts, rows = np.zeros(n_classes, np.int64), [row for row in rows if row.get("label") != "none"]  # of status
    is_in_order = [row.get("name") for row in rows] == classes[0]  # frequency's: two classes may have one name
    for place, row in enumerate(rows):
        label = label_number(row.get("label", ""), classes[1], len(classes[0]))
        if label == -1:  # no column label
            label = place if is_in_order else classes[1].get(row.get("name", ""))
        if label is None or label >= n_classes or not re.fullmatch(r"\d{1,18}", row["count"], re.A):
            what = f"{row.get('name') or row.get('label')!r} {row['count']!r}"
            raise SystemExit(f"{table}: {what}: no class of classes.tsv, or no count")
        counts[label] += int(row["count"])
    return counts


def rows_per_class(hashes, labels, mask, is_fill, wanted, counts, match, profile, imbalance, rows, shots, trim_tail,
                   seed):  # fmt: skip
    """The steps of subset that set numbers per class. counts: [C], of mask; match: [C], or None; wanted: classes of
    --class-list, or empty: the tail is among them.

    Returns: (mask, [C] rows that were wanted and are not there).
    """
    deficit = np.zeros_like(counts)
    if match is not None:
        mask = bottom_per_class(hashes, labels, mask, match)
        mask |= bottom_per_class(hashes, labels, is_fill, match - class_counts(labels[mask], len(counts)))
        counts = class_counts(labels[mask], len(counts))
        deficit = match - counts
    if profile:
        if rows > counts.sum() > 0:
            raise SystemExit(f"--rows: got {rows:,}, there are {counts.sum():,} rows to choose from")
        quota = profile_quota(counts, profile, imbalance, rows, seed)
        deficit = np.maximum(quota - counts, 0)
        quota = source_quota(rows, quota, counts, True) if rows else quota  # what classes lack comes from the others
        mask = bottom_per_class(hashes, labels, mask, quota)
    if shots >= 0:
        order = np.argsort(counts, kind="stable")
        tail = (order[np.isin(order, wanted)] if wanted else order)[: trim_tail or len(counts)]
        if trim_tail and not counts[tail].all():
            print(f"warning: {(counts[tail] == 0).sum()} of the {trim_tail} rarest classes have no rows to trim",
                  file=sys.stderr)
        if not trim_tail and not counts.any():
            raise SystemExit("--shots: no row has a label")
        quota = np.full(len(counts), len(labels))
        quota[tail] = min(shots, len(labels))
        mask = bottom_per_class(hashes, labels, mask, quota) | mask & (labels < 0) & bool(trim_tail)
    return mask, deficit


def subset_tables(tables, out, threshold, class_list, match_frequency, fill, shots, trim_tail, profile, imbalance,
                  fraction, rows, is_rescue, key, classes, dry_run, seed):  # fmt: skip
    """Write a part of the rows of tables. Arguments: as the flags."""
    paths, fill_paths = find_tables(tables), find_tables(fill)
    known = find_classes(classes, paths[0])
    column, _, least = threshold.rpartition("=") if threshold else (None, "", "nan")
    hashes, labels, values = scan_rows(paths, key, seed, known, column)
    lacking = [path for path in fill_paths if column and column not in read_table(path)[0]]
    fill_column = column if fill and not lacking else None
    if lacking:
        print(f"note: --fill: no column {column} in {lacking[0]}: its rows are taken whatever --threshold says",
              file=sys.stderr)
    n, more = len(hashes), scan_rows(fill_paths, key, seed, known, fill_column)
    hashes, labels = ranks_of(np.concatenate([hashes, more[0]])), np.concatenate([labels, more[1]])
    n_classes = len(known[0]) or int(labels.max(initial=-1)) + 1
    match = table_counts(match_frequency, known, n_classes) if match_frequency else None
    n_classes = n_classes if match is None else len(match)  # it may have classes that the tables lack
    is_fill = np.arange(len(hashes)) >= n
    mask, counts, wanted = ~is_fill, {"rows": n}, []
    if fill_column:
        is_fill[n:] = more[2] >= float(least)
    n_copies = 0
    if fill:  # no row is taken twice, under whatever name of its image; --multi all gives rows that differ in label
        named = (row.get(key) or key_of(row) for row in open_tables(paths + fill_paths, out=out)[1])
        keys = np.fromiter((text_hash(f"{label} {name}") for label, name in zip(labels.tolist(), named)), np.uint64)
        may_stay = is_fill & (labels >= 0)
        may_stay[:n] = values >= float(least) if threshold else True  # what goes anyway has no copies
        places = np.flatnonzero(may_stay)
        first = places[np.unique(keys[places], return_index=True)[1]]
        is_copy = may_stay & is_fill
        is_copy[first] = False
        n_copies, is_fill = int(is_copy.sum()), is_fill & ~is_copy
    before = class_counts(labels[mask], n_classes)

    def count(what, was):
        counts[what] = int(mask.sum() - was.sum())

    if class_list:
        for number, line in text_lines(class_list):
            label = label_number(line, known[1], n_classes)
            if label is None or label < 0 or label in wanted:
                what = "is there twice" if label in wanted else "is no class"
                raise SystemExit(f"{class_list}:{number}: {line!r} {what}; expected a number or name a line")
            wanted.append(label)
        if not wanted:
            raise SystemExit(f"{class_list}:1: an empty file; expected classes, one a line")
        was, mask = mask, mask & np.isin(labels, wanted)
        match = match if match is None else np.where(np.isin(np.arange(n_classes), wanted), match, 0)
        count("not in --class-list", was)
    pool = mask
    if threshold:
        was, mask = mask, mask & (np.concatenate([values, np.zeros(len(more[0]))]) >= float(least))
        count(f"{column} below {least}", was)
    was = mask
    mask, deficit = rows_per_class(hashes, labels, mask, is_fill, wanted, class_counts(labels[mask], n_classes), match,
                                   profile, imbalance, rows, shots, trim_tail, seed)  # fmt: skip
    gone = (class_counts(labels[was], n_classes) > 0) & (class_counts(labels[mask], n_classes) == 0)
    pool = pool & ~np.isin(labels, np.flatnonzero(gone))  # what these steps empty is not rescued
    counts["not among the rows wanted of a class"] = int((mask & ~is_fill).sum() - was.sum())
    if fill:
        counts["added from --fill"] = int((mask & is_fill).sum())
    if (fraction or rows) and not profile:
        was, mask = mask, bottom(hashes, mask, rows or int(fraction * mask.sum() + 0.5))
        count("not drawn", was)
        if is_rescue:  # the classes of the tables, and those that --fill alone has
            mask, n_rescued = rescue(hashes, labels, mask, pool | was & ~np.isin(labels, labels[pool]), bool(rows))
            counts |= {"rescued of lost classes": n_rescued, "taken from large ones instead": -n_rescued * bool(rows)}
    counts["rows left"] = int(mask.sum())
    after = class_counts(labels[mask], n_classes)
    print_funnel({what: c for what, c in counts.items() if c or what.startswith("rows")})
    if n_copies:
        print(f"{'':12}  note: of --fill: {n_copies:,} copies of rows of DATA or of its own, left out")
    print_histogram(before, after, deficit, known[0])
    if dry_run:
        return
    first = (next((row.get("image") for row in open_tables(paths, out=to)[1]), None) for to in (None, out))
    if key == "image" and len(set(first)) > 1:
        print(f"{'':12}  note: images are named from the folder of --out, so cuts of this cut draw other rows than "
              "cuts of its tables; with --key url, or another column that stays, or in one folder, they are nested")
    columns, stream = open_tables(paths + fill_paths, out=out)
    chosen = itertools.compress(stream, mask)
    if wanted:
        place = {label: str(i) for i, label in enumerate(wanted)}
        chosen = (row | {"subset_label": place[label_number(row["label"], known[1], n_classes)]} for row in chosen)
    write_tsv(out, list(dict.fromkeys([*columns, *["subset_label"][: len(wanted)]])), chosen)
    written = class_counts(scan_rows([place_of(out)], None, 0, known)[1], n_classes)
    assert (written == after).all(), "the table written does not have the counts that were planned"
    flags = dict(threshold=threshold, class_list=class_list, match_frequency=match_frequency, fill=fill, shots=shots,
                 trim_tail=trim_tail, profile=profile, imbalance=imbalance, fraction=fraction, rows=rows,
                 rescue=is_rescue, key=key, classes=known[2], seed=seed)  # fmt: skip
    frequency = find_tables([match_frequency]) if match_frequency else []
    write_report(out, [*paths, *fill_paths, *frequency, class_list, known[2]], flags, counts, fill_copies=n_copies,
                 classes_before=before.tolist(), classes_after=written.tolist(), deficit=deficit.tolist())  # fmt: skip


def gini_of(counts):
    """Gini coefficient of class counts, 0 (equal) to 1, empty classes included; 0 if all are empty."""
    counts = np.sort(counts).astype(float)
    n, total = len(counts), counts.sum()
    return float(2 * (np.arange(1, n + 1) * counts).sum() / (n * total) - (n + 1) / n) if total else 0.0


def print_histogram(before, after, deficit, names):
    """Print how many classes have so many rows, before and after; Gini; the classes lost and those short of rows."""
    edges = [0, 1] + [m * 10**e for e in range(10) for m in (2, 5, 10)]
    print(f"{'rows per class':>20}  {'classes before':>14}  after")
    for low, high in zip(edges, edges[1:]):
        n_before, n_after = (int(((c >= low) & (c < high)).sum()) for c in (before, after))
        if n_before or n_after:
            print(f"{low if high == low + 1 else f'{low} to {high - 1}':>20}  {n_before:14,}  {n_after:5,}")
    print(f"{'Gini':>20}  {gini_of(before):14.3f}  {gini_of(after):.3f}")
    for what, which in (("lost", (before > 0) & (after == 0)), ("short of rows", deficit > 0)):
        if which.any():
            shown = [names[c] if names else str(c) for c in np.flatnonzero(which)]
            more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
            n_rows = f" ({deficit[which].sum():,} rows)" if what != "lost" else ""
            print(f"{len(shown):>20,}  classes {what}{n_rows}: {', '.join(shown[:10])}{more}")


def source_name(path):
    """What mix and stats call a table: its file name, or its folder's, if that says more (laionet/train.tsv)."""
    folder, name = os.path.split(os.path.abspath(path.rstrip("/")))
    stem = name.split(".")[0]
    return os.path.basename(folder) if stem == "train" else stem


def source_quota(rows, weights, available, is_spill):
    """Rows of each source. weights, available: [S]. Raises: SystemExit if they are short and is_spill is False."""
    if rows > available.sum():
        raise SystemExit(f"--rows: got {rows:,}, there are {available.sum():,} rows to choose from")
    quota = round_shares(rows, weights)
    while (quota > available).any():
        if not is_spill:
            raise SystemExit(f"the sources have {available.tolist()} rows, wanted {quota.tolist()}; fewer --rows, "
                             "other --weights, or --spill")  # fmt: skip
        quota = np.minimum(quota, available)
        quota += round_shares(rows - quota.sum(), np.where(quota < available, weights, 0))
    return quota


def mix_tables(tables, out, rows, weights, is_spill, key, seed):
    """Write rows of several sources as one table. Arguments: as the flags; each of tables is a source."""
    sources = [find_tables([table]) for table in tables]
    names = [source_name(table) for table in tables]
    if len(set(names)) < len(names):
        names = [f"{name}{i}" for i, name in enumerate(names)]
    paths = [path for source in sources for path in source]
    hashes = [scan_rows(source, key, seed)[0] for source in sources]
    of = np.repeat(np.arange(len(sources)), list(map(len, hashes)))
    hashes = ranks_of(np.concatenate(hashes))
    keys = np.fromiter((text_hash(row.get(key) or key_of(row)) for row in open_tables(paths, out=out)[1]), np.uint64)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    is_own = of == of[first[inverse]]
    available = np.bincount(of[is_own], minlength=len(sources))
    quota = source_quota(rows, weights or [1] * len(sources), available, is_spill) if rows else available
    mask = bottom_per_class(hashes, of, is_own, quota)
    columns, stream = open_tables(paths, out=out)
    before = {"source_before": "source"} if "source" in columns else {}  # of mixes of mixes the first
    chosen = (row | {new: row.get(new) or row[old] for new, old in before.items()} | {"source": names[s]}
              for row, s, is_in in zip(stream, of.tolist(), mask.tolist()) if is_in)
    n = write_tsv(out, list(dict.fromkeys([*columns, "source", *before])), chosen)
    counts = {"rows": len(of), "copies of a row of an earlier source": int(is_own.sum()) - len(of),
              "not drawn": n - int(is_own.sum()), "rows left": n}  # fmt: skip
    shares = {name: dict(rows=int(k), share=round(int(k) / max(n, 1), 4)) for name, k in zip(names, quota)}
    print_funnel(counts)
    for name, share in shares.items():
        print(f"{share['rows']:>12,}    {share['share']:.1%} {name}")
    flags = dict(rows=rows, weights=weights, spill=is_spill, key=key, seed=seed)
    write_report(out, paths, flags, counts, shares=shares)


# ------------------------------------------------------------------------------ stats


def caption_lengths(table):
    """Mean and median number of words of a table's captions, and the share of different ones; None without captions."""
    columns, rows = open_tables(find_tables([table]))
    if "caption" not in columns:
        return dict(words_mean=None, words_median=None, captions_distinct=None)
    words, hashes = array("I"), array("Q")
    for row in rows:
        words.append(len(row["caption"].split()))
        hashes.append(text_hash(row["caption"]))
    n = max(len(words), 1)
    return dict(words_mean=sum(words) / n, words_median=float(np.median(words or [0])),
                captions_distinct=len(np.unique(np.array(hashes))) / n)  # fmt: skip


def describe_counts(counts):
    """What class counts [C] say of imbalance. head_share: of the most frequent tenth of the classes."""
    ordered = np.sort(counts)[::-1]
    total = max(int(counts.sum()), 1)
    return dict(labelled=int(counts.sum()), classes=int((counts > 0).sum()), empty=int((counts == 0).sum()),
                max=int(ordered[0]), median=float(np.median(counts)), min=int(ordered[-1]), gini=gini_of(counts),
                head_share=float(ordered[: max(1, len(counts) // 10)].sum() / total),
                below_20=int((counts < 20).sum()), below_100=int((counts < 100).sum()))  # fmt: skip


def compare_tables(tables, out, classes, plot):
    """Print and write describe_counts, caption_lengths and rank correlations of tables. Arguments: as the flags."""
    from scipy.stats import spearmanr

    known = find_classes(classes, find_tables(tables[:1])[0])
    counts = [table_counts(table, known, len(known[0])) for table in tables]
    n_classes = max(1, *map(len, counts))
    counts = [np.pad(c, (0, n_classes - len(c))) for c in counts]
    names = [source_name(table) for table in tables]
    if len(set(names)) < len(names):
        names = list(tables)
    rows = [dict(name=name) | describe_counts(c) | caption_lengths(table)
            for name, c, table in zip(names, counts, tables)]  # fmt: skip
    for row, own in zip(rows, counts):
        for name, other in zip(names, counts):
            is_flat = np.ptp(own) == 0 or np.ptp(other) == 0
            row[f"spearman {name}"] = None if is_flat else float(spearmanr(own, other).statistic)
    shown = [{c: f"{v:.4g}" if isinstance(v, float) else tsv_field(v) for c, v in row.items()} for row in rows]
    for column in shown[0]:
        print(f"{column:>26}" + "".join(f"  {row[column]:>14}" for row in shown))
    if plot:
        plot_counts(names, counts, plot)
    write_tsv(out, list(rows[0]), rows)
    write_report(out, [*(p for table in tables for p in find_tables([table])), known[2]], dict(classes=known[2]), {},
                 class_counts={name: c.tolist() for name, c in zip(names, counts)})  # fmt: skip


def plot_counts(names, counts, path):
    """Plot class counts of data sets, in their own order and in that of the first. Source: Wen et al., Fig 1a."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    order = np.argsort(-counts[0], kind="stable")
    for name, c in zip(names, counts):
        left.plot(np.sort(c)[::-1], label=name)
        right.plot(c[order], label=name, linewidth=0.8)
    left.set(yscale="symlog", ylabel="rows", xlabel="class, in the order of each set")
    right.set(xlabel=f"class, in the order of {names[0]}")
    left.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=os.path.splitext(path)[1][1:] or "png", dpi=150)
    with whole_file(path) as f:
        f.write(picture.getvalue())


# ------------------------------------------------------------------------------ main


def outputs_of(args):
    """Tables that a command writes: those with a report, those without."""
    if args.command == "prune":
        sets = [test.partition("=")[0] for test in args.tests]
        sets += ["combined"] * (len(sets) > 1) + ["near", "far", "rand"] * (args.keep > 0) + ["leaks"]
        names = [args.out.replace("{set}", name) for name in sets]
        return names[:-1], names[-1:]
    beside = dict(laionet="all", dedup="pairs", curate="entries", status="classes")
    beside["frequency"] = "sample" if getattr(args, "sample", 0) else ""
    kind = beside.get(args.command)
    if args.command == "index" and args.holdout:  # they appear together: other cuts may share images
        return [args.out, os.path.join(os.path.dirname(args.out), "val.tsv")], []
    return [args.out], [f"{args.out.removesuffix('.tsv')}.{kind}.tsv"] if kind else []


def check_out(args):
    """SystemExit if a table or report to be written is one to be read, by this call or when it is made again."""
    tables, others = outputs_of(args)
    written = {os.path.realpath(path) for path in (*tables, *(f"{table}.json" for table in tables), *others)}
    files = []
    for name in ("inputs", "tables", "against", "fill", "match_frequency"):
        given = getattr(args, name, None) or []
        files += [file for path in ([given] if isinstance(given, str) else given) for file in find_tables([path])]
    for name in ("list", "json", "images", "classes", "extra", "metadata", "synonyms", "relevance", "class_list"):
        files += [getattr(args, name)] if getattr(args, name, None) else []
    if args.command in ("check", "subset", "stats"):  # without --classes they look for it beside the first table
        tables = args.tables[:1] if args.command == "stats" else args.tables
        files += filter(None, [find_classes(args.classes, find_tables(tables)[0])[2]])
    for path in files:
        if os.path.realpath(path) in written:
            raise SystemExit(f"--out {args.out}: {path}, which it would replace, is an input")


def main(args):
    has_outputs = args.command != "shapes" and not getattr(args, "dry_run", False)
    if has_outputs:
        check_out(args)
        for path in filter(None, [args.out, getattr(args, "plot", None)]):  # now, not after all the work
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if getattr(args, "device", "cpu") != "cpu":  # now, not after all images were hashed
        import torch

        try:
            torch.zeros(1, device=args.device).item()
        except (RuntimeError, AssertionError) as error:
            raise SystemExit(f"--device {args.device}: {str(error).splitlines()[0][:100]}") from None
    is_share = hasattr(args, "shard") and not args.merge and (args.shard or launched()[0])
    # A share leaves parts, no table.
    with with_reports(*outputs_of(args)) if has_outputs and not is_share else contextlib.nullcontext():
        run_command(args)


def run_command(args):
    if args.command == "shapes":
        build_shapes(args.out, args.seed, args.size, args.names, args.caption_noise, args.workers)
    elif args.command == "index":
        build_index(args.sources, args.out, args.holdout, args.classes, args.workers, args.seed)
    elif args.command == "classes":
        build_classes(args.list, args.out, args.wordnet, args.extra)
    elif args.command == "incaps":
        build_incaps(args.json, args.images, args.classes, args.out, args.seed, args.keep_repeats)
    elif args.command == "metadata":
        build_metadata(find_tables(args.inputs), args.out, args.wordnet, args.min_count, args.min_pmi, args.max_entries,
                       args.columns)
    elif args.command == "status":
        build_status(args.folder, args.out, args.classes)
    elif args.command in ("label", "laionet", "curate", "frequency"):
        paths, run = find_tables(args.inputs), (args.workers, args.shard, args.merge)
        settings = dict(columns=args.columns, out=args.out, skip_bad=args.skip_bad)
        if args.command == "label":
            is_sensitive = args.case == "sensitive" or args.case == "auto" and args.match == "substring"
            names = match_settings(class_rows(args.classes), args.match, is_sensitive, args.lemmas, args.wordnet,
                                   files=[args.classes])  # fmt: skip
            build_labels(paths, args.out, args.classes, settings | names | dict(multi=args.multi), run)
        elif args.command == "laionet":
            settings |= dict(clip=args.clip, embeddings=args.embeddings, similarity=args.similarity)
            build_laionet(paths, args.out, args.classes, args.threshold, settings, run)
        elif args.command == "curate":
            build_curate(paths, args.out, args.metadata, args.cap, args.tail_share, args.seed, settings, run)
        else:
            rows, more = class_rows(args.classes), defaultdict(list)
            wnids = {row.get("wnid") for row in rows} - {None, ""}
            for row in open_tables([args.synonyms], ["name", "synonyms"])[1] if args.synonyms else ():
                more[row["wnid"] if row.get("wnid") in wnids else row["name"]] += split_names(row["synonyms"])
            names = match_settings(rows, args.match, args.match == "substring", args.lemmas,
                                   args.wordnet, more, [args.classes, args.synonyms])  # fmt: skip
            settings |= names | dict(n_sample=args.sample, seed=args.seed, weights=args.weights)
            build_frequency(paths, args.out, args.classes, args.synonyms, args.relevance, settings, run)
    elif args.command == "check":
        sys.exit(check_tables(args.tables, args.out, args.sample, args.max_bad, args.classes, args.max_pixels,
                              args.workers, args.seed))  # fmt: skip
    elif args.command == "dedup":
        dedup_tables(args.tables, args.out, args.by, args.distance, args.cosine, args.embeddings, args.protect,
                     args.against, args.against_embeddings, args.chain, args.max_pixels, args.backend,
                     args.device, args.workers)  # fmt: skip
    elif args.command == "prune":
        prune_table(args.tables, args.out, args.embeddings, args.small, args.tests, args.keep, args.verify,
                    args.device, args.seed)  # fmt: skip
    elif args.command == "subset":
        subset_tables(args.tables, args.out, args.threshold, args.class_list, args.match_frequency, args.fill,
                      args.shots, args.trim_tail, args.profile, args.imbalance, args.fraction, args.rows, args.rescue,
                      args.key, args.classes, args.dry_run, args.seed)  # fmt: skip
    elif args.command == "mix":
        mix_tables(args.tables, args.out, args.rows, args.weights, args.spill, args.key, args.seed)
    elif args.command == "stats":
        compare_tables(args.tables, args.out, args.classes, args.plot)


if __name__ == "__main__":
    ARGS = parse_args()
    try:
        main(ARGS)
    except BrokenProcessPool:
        print("a worker process was killed (out of memory?); try fewer --workers", file=sys.stderr)
        sys.exit(2)
    except (SystemExit, OSError) as error:  # bad input, a full disk: one line and exit code 2
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            raise
        is_os = isinstance(error, OSError)
        print(f"{error.filename or 'error'}: {error.strerror or error}" if is_os else error.code, file=sys.stderr)
        sys.exit(2)
