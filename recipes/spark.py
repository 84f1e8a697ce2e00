"""frequency, label, laionet or curate over many files on a Spark cluster.

    pip install pyspark                                            # and Java 17
    spark-submit --master local[2] recipes/spark.py 64 frequency shards/ --classes classes.tsv --out counts.tsv
    spark-submit --master local[2] recipes/spark.py 64 curate shards/ --metadata entries.tsv --out curated.tsv

The number is how many tasks the input files are dealt to; what follows is a command of build_datasets.py. A task runs
that command with --shard i/n, so it leaves a part for each of its files; when all are done the driver runs it once more
with --merge. So the result is that of a single process, bit for bit, and a killed job goes on where it was.
Workers and driver must see this repository, the inputs and OUT's folder at the same paths. The driver alone writes the
rows that curate keeps, a pass over the inputs that matches nothing.
"""

import subprocess
import sys
from pathlib import Path


def run_shard(i, n, command):
    """Exit code and messages of one shard, run on a worker."""
    done = subprocess.run([*command, "--workers", "1", "--shard", f"{i}/{n}"], capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def main(n, command):
    from pyspark.sql import SparkSession

    script = Path(__file__).resolve().parent.parent / "build_datasets.py"
    command = [sys.executable, str(script), *command]
    spark = SparkSession.builder.appName("build_datasets").getOrCreate()
    results = spark.sparkContext.parallelize(range(n), n).map(lambda i: run_shard(i, n, command)).collect()
    spark.stop()
    failed = [(i, message) for i, (code, message) in enumerate(results) if code]
    if failed:
        raise SystemExit("\n".join(f"shard {i}/{n}: {message}" for i, message in failed))
    sys.exit(subprocess.run([*command, "--merge"]).returncode)


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or sys.argv[1] == "0":
        raise SystemExit(__doc__)
    main(int(sys.argv[1]), sys.argv[2:])
