"""Mean average precision of a multi-label set, exactly, without holding the scores of any class.

The average precision of a class is the mean, over its positive images, of the precision among all images that
score at least as high. So it needs, for every (image, label) pair, only how many images reach that score:
pass 1 gathers the scores of these pairs, pass 2 sorts every logit of every image in between them and counts.

Letters: n images, m rows of a piece, C classes, P (image, label) pairs of the set, i.e. its labels in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.scores import Link, LogitsOf, logits_in_pieces, targets_of, together
from megavit.evaluate.results import Count, Measurement

_WORD = 1 << 32


@torch.no_grad()
def mean_average_precision(features: Features, logits_of: LogitsOf, link: Link) -> Iterator[Measurement]:
    """map: the average precisions' mean over the classes that have a positive image (macro).

    Images are ranked by the logit (sigmoid), or by the probability (softmax, which also depends on the other
    classes). Equal scores, in float32, share one rank. There is no closed form for the standard error and a
    bootstrap would sort all logits again: none is given.

    Cost: two passes of the classifier over the features; a binary search of n x C logits among P + C keys
    (50,000 images x 29,593 classes: 3e10 comparisons, seconds on a GPU and minutes on a CPU core);
    memory P + C int64 and a piece of logits. Collective: two all-reduces of P + C numbers.
    """
    targets, candidates, classes = targets_of(features, logits_of, True)
    known = torch.from_numpy(_pairs(targets) & ~features.bad[:, None])  # [n, M]
    scores = torch.zeros(targets.shape, dtype=torch.float64, device=features.mesh.device)
    for rows, logits in logits_in_pieces(features, logits_of, candidates, classes):
        places = torch.from_numpy(targets[rows]).to(logits.device).clamp(min=0)
        scores[torch.from_numpy(rows).to(scores.device)] = _ranked(logits, link).gather(1, places).double()
    pair_scores = torch.from_numpy(together(features.mesh, scores)).float()[known]
    keys = _key(torch.from_numpy(targets)[known], pair_scores)
    # One more key opens every class: it lies below all of its scores, so that no position has two meanings.
    opening = torch.arange(classes) * _WORD
    ladder = torch.cat([opening, keys]).sort().values.to(features.mesh.device)

    counts = torch.zeros(len(ladder), dtype=torch.int64, device=ladder.device)
    class_ids = torch.arange(classes, device=ladder.device)
    for _, logits in logits_in_pieces(features, logits_of, candidates, classes):
        reached = torch.searchsorted(ladder, _key(class_ids, _ranked(logits, link)).flatten(), right=True) - 1
        counts += torch.bincount(reached, minlength=len(ladder))
    precisions = _average_precisions(ladder.cpu().numpy(), together(features.mesh, counts), classes)
    labelled = int(((targets >= 0).any(1) & ~features.bad).sum())
    found = ~np.isnan(precisions)
    yield Measurement(
        "map",
        float(precisions[found].mean()) if found.any() else float("nan"),
        Count(len(targets), int((~features.bad).sum()), int(features.bad.sum())),
        settings={
            "classes": classes,
            "classes_with_positives": int(found.sum()),
            "images_with_labels": labelled,
            "link": link,
        },
    )


def _pairs(targets: np.ndarray) -> np.ndarray:
    """bool [n, M], the labels, each once: an image that names a class twice is still one positive image."""
    again = targets[:, :, None] == targets[:, None, :]  # [n, M, M]
    return (targets >= 0) & ~np.tril(again, -1).any(2)


def _ranked(logits: Tensor, link: Link) -> Tensor:
    """What images are ranked by, float32."""
    return (logits if link == "sigmoid" else logits.log_softmax(1)).float()


def _key(classes: Tensor, scores: Tensor) -> Tensor:
    """int64 that orders by class, then by float32 score: a positive float's bits grow with it, a negative
    one's fall. Keys of class c lie in (c, c + 1) x 2^32."""
    bits = scores.view(torch.int32).long()  # the two zeros both become 0 below
    ordered = torch.where(bits < 0, -(_WORD >> 1) - bits, bits)
    return classes * _WORD + ordered + (_WORD >> 1)


def _average_precisions(ladder: np.ndarray, counts: np.ndarray, classes: int) -> np.ndarray:
    """float64 [C], NaN for a class without a positive image. `counts` says how many images have each step of
    the sorted `ladder` as the highest that they reach."""
    out = np.full(classes, np.nan)
    class_of = ladder // _WORD
    starts = np.searchsorted(class_of, np.arange(classes + 1))
    for c in np.flatnonzero(np.diff(starts) > 1):
        steps = slice(starts[c] + 1, starts[c + 1])  # without the opening key
        keys = ladder[steps]
        first = np.searchsorted(keys, keys)  # equal scores: the lowest of the equal steps
        images = np.cumsum(counts[steps][::-1])[::-1][first]  # that reach the score
        out[c] = np.mean((len(keys) - first) / images)
    return out
