"""Sample lengths shaped like the data sets of the LoRAFusion paper: no data needed.

Lengths are lognormal, fitted to what is published, plus the summary, clipped to 32 and 4,096 tokens:

- XSum and CNN/DailyMail: median and 90th percentile of the input in tokens, 359 and 920, 777 and 1,439, after Zaheer
  et al. (Big Bird, NeurIPS 2020, appendix); sigma = ln(p90 / median) / 1.2816. Summaries add 25 and 59 tokens (their
  medians).
- WikiSum (how-to articles): mean lengths after Cohen et al. (ACL 2021, short papers, pages 212-219), 1,334 words and
  101 in the summary, taken as 1.25 tokens a word. No spread is given: sigma 0.5 is assumed, as CNN/DailyMail has
  (0.48).

The tables were cited from the papers and could not be looked up again; what could be checked are sizes of files.
CNN/DailyMail's test set has 4,301 bytes a row (49,420,172 over 11,490, Hugging Face's xNoper/cnn-test), 4.6 for each of
the fitted mean's 931 tokens. WikiSum's training set has 8,813 bytes a row (315,275,236 over 35,775, d0rj/wikisum; with
address, title and the headers of the steps), 6.1 for each of the 1,435 words. XSum's figures are unchecked.
"""

import math
from collections.abc import Sequence

import numpy as np

from lorafusion_megatron.training.bench.workloads import SHAPES
from lorafusion_megatron.types import GlobalBatch, Sample

LOGNORMAL = {"xsum": (359 + 25, 0.734), "cnn": (777 + 59, 0.481), "wikisum": (1.25 * 1435 * math.exp(-0.125), 0.5)}
"""Data set -> (median, sigma)."""
WORKLOADS = {
    "xsum": ("xsum",) * 4,
    "cnn": ("cnn",) * 4,
    "wikisum": ("wikisum",) * 4,
    "mix": ("mix",) * 4,
    "each": ("xsum", "cnn", "wikisum", "mix"),
}
"""Workload -> data set of each of its jobs; mix draws each sample from one of the three."""
LLAMA_70B = SHAPES["llama-3.1-70b"]


def draw_lengths(rng: np.random.Generator, data_set: str, count: int) -> np.ndarray:
    """``count`` sample lengths in tokens."""
    names = rng.choice(list(LOGNORMAL), count) if data_set == "mix" else np.full(count, data_set)
    medians, sigmas = np.array([LOGNORMAL[name] for name in names]).T
    return np.clip(np.exp(np.log(medians) + sigmas * rng.standard_normal(count)), 32, 4096).astype(int)


def make_jobs(data_sets: Sequence[str], steps: int, batch: int, seed: int = 0) -> list[list[GlobalBatch]]:
    """A job per data set, each of ``steps`` global batches of ``batch`` samples."""
    rng = np.random.default_rng(seed)
    return [
        [make_batch(job, step, draw_lengths(rng, name, batch)) for step in range(1, steps + 1)]
        for job, name in enumerate(data_sets)
    ]


def make_batch(job: int, step: int, lengths: np.ndarray) -> GlobalBatch:
    """A global batch of samples of these lengths."""
    total = int(lengths.sum())
    samples = tuple(
        Sample(job=job, step=step, position=i, row=i, tokens=n, batch_label_tokens=total)
        for i, n in enumerate(lengths.tolist())
    )
    return GlobalBatch(job=job, step=step, samples=samples, label_tokens=total)
