"""Caption embeddings of a model that has read text only, for clip.py --text-embeddings: latent semantic analysis.

    python recipes/text_embeddings.py CORPUS.tsv TRAIN.tsv classes.tsv OUT

Words of the corpus's captions are weighed by log(1 + count) * log(captions / captions with the word); 64 singular
vectors of that matrix are the language model (Deerwester et al., 1990). OUT.npy has a row for each row of TRAIN.tsv,
and OUT.classes.npy one for each class, of the prompt "a NAME". It stands for the paper's RoBERTa: no picture was seen.
"""

import csv
import sys
from collections import Counter

import numpy as np
import scipy.sparse.linalg


def column(path, name):
    with open(path, encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def counts(texts, word_ids):
    """[N, words] log(1 + count) of each known word."""
    rows, columns, values = [], [], []
    for i, text in enumerate(texts):
        for word, n in Counter(text.lower().split()).items():
            if word in word_ids:
                rows.append(i), columns.append(word_ids[word]), values.append(np.log1p(n))
    return scipy.sparse.csr_matrix((values, (rows, columns)), (len(texts), len(word_ids)))


def main(corpus, train, classes, out, width=64):
    captions = column(corpus, "caption")
    word_ids = {word: i for i, word in enumerate(sorted({w for c in captions for w in c.lower().split()}))}
    matrix = counts(captions, word_ids)
    idf = np.log(len(captions) / np.maximum(1, np.asarray((matrix > 0).sum(0)).ravel()))
    rng = np.random.default_rng(0)
    start = rng.normal(size=min(matrix.shape))
    _, _, directions = scipy.sparse.linalg.svds(matrix.multiply(idf).tocsr(), width, v0=start)
    directions = directions * np.sign(directions.sum(1, keepdims=True))  # a singular vector's sign is arbitrary
    for path, texts in ((f"{out}.npy", column(train, "caption")),
                        (f"{out}.classes.npy", [f"a {name}" for name in column(classes, "name")])):
        embedding = counts(texts, word_ids).multiply(idf).tocsr() @ directions.T
        length = np.linalg.norm(embedding, axis=1, keepdims=True)
        np.save(path, (embedding / np.maximum(length, 1e-12)).astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
