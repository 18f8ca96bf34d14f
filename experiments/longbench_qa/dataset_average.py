"""The average over data sets as LongBench has it, each data set counting the same, with its interval and test.

Sources: Y. Bai et al., LongBench, 2023, whose overall score is the plain mean over its data sets' scores; B. Efron,
R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8, on data in several samples.
"""

from collections.abc import Mapping

import numpy as np

from experiments.longbench_qa.significance import (
    BATCH,
    CONFIDENCE,
    RESAMPLES,
    Mean,
    PairedDifference,
    sign_flip_p_value,
)

Scores = Mapping[str, Mapping[str, float]]
"""{data set: {sample id: score}}"""


def average_interval(scores: Scores, seed: int = 0) -> Mean:
    """The mean of the data sets' means, with its bootstrap percentile interval; `n` counts all samples.

    Each of 10 000 resamples draws every data set's samples anew from that data set: the data sets themselves are
    given, not drawn. Without an interval (None) where a data set has one sample only.

    Raises ValueError for no data sets, or one without samples.
    """
    if not scores or not all(scores.values()):
        raise ValueError(f"need one or more data sets with samples, got {', '.join(scores) or 'none'}")
    arrays = [np.array([of_set[sample] for sample in sorted(of_set)]) for _, of_set in sorted(scores.items())]
    n, mean = sum(map(len, arrays)), float(np.mean([array.mean() for array in arrays]))
    if min(map(len, arrays)) == 1:
        return Mean(n, mean, None, None)
    random = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for array in arrays:
        draws = (random.integers(0, len(array), (BATCH, len(array))) for _ in range(0, RESAMPLES, BATCH))
        means += np.concatenate([array[drawn].mean(1) for drawn in draws]) / len(arrays)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Mean(n, mean, float(low), float(high))


def average_difference(a: Scores, b: Scores, seed: int = 0) -> PairedDifference:
    """Compare two methods' averages: that of a - b, its interval, and the sign-flip p-value.

    A sample's difference is weighted by one over its data set's size and the number of data sets, so that the sum,
    whose signs are flipped, is the difference of the averages.

    Raises ValueError if the two do not have the same data sets and samples.
    """
    ids = [{(name, sample) for name, of_set in scores.items() for sample in of_set} for scores in (a, b)]
    if ids[0] != ids[1]:
        raise ValueError(f"the two must have the same samples: {len(ids[0] ^ ids[1])} are in one only")
    differences = {name: {sample: a[name][sample] - b[name][sample] for sample in a[name]} for name in a}
    weighted = [
        difference / len(of_set) / len(differences)
        for _, of_set in sorted(differences.items())
        for _, difference in sorted(of_set.items())
    ]
    return PairedDifference(average_interval(differences, seed), sign_flip_p_value(weighted, seed))
