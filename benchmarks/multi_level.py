"""Multi-level residual networks against the last-cycle model: time saved, and test errors, by the reduced protocol.

    python benchmarks/multi_level.py [--quick] [--seeds 5] [--workers 2]

CIFAR-10, 5,000 training images made small by the first convolution, 2-2-2 to 8-8-8 blocks, cycles of 42, 35 and 35
epochs; each worker has one core. Prints the table and, as its last line, the figures `time_saved` and `work_saved`
(share of the seconds and of the block evaluations of the last-cycle model, medians over the seeds),
`error_multi_level`, `error_last_cycle` and `error_first_cycle` (test errors, means) and `deviation_last_cycle`. With
--quick few images, filters and epochs.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import common  # first: one thread
from studies.multi_level.case import Case
from studies.multi_level.page import differences, figures
from studies.multi_level.runs import train
from studies.multi_level.tables import page
from studies.study import Study, of_seeds

REDUCED = Case(
    stem_stride=4, epochs=(42, 35, 35), precision="bfloat16", channels_last=True, train_images=5000, validate_every=14
)
QUICK = replace(REDUCED, filters=(4, 8, 16), epochs=(2, 1, 1), train_images=300, test_images=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, filters and epochs, one seed")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time")
    parser.add_argument("--data_dir", type=Path, help="folder of the images")
    arguments = parser.parse_args()
    base, seeds = (QUICK, arguments.seeds or 1) if arguments.quick else (REDUCED, arguments.seeds or 5)
    models = ("first", "last", "multilevel")
    cases = [replace(base, model=model, data_dir=arguments.data_dir) for model in models]
    with tempfile.TemporaryDirectory() as folder:
        rows = list(Study(Path(folder), train, arguments.workers).run(of_seeds(cases, range(seeds))))
    print(page(rows) + "\n" + differences(rows))
    common.finish("multi_level", figures(rows))


if __name__ == "__main__":
    main()
