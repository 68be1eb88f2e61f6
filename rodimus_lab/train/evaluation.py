"""Perplexity during training, over all ranks, and what of it is remembered.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.scoring import Precision, answers, autocast, negative_log_likelihood, summarize
from rodimus_lab.train.distributed import World
from rodimus_lab.train.feed import Batch, Feed


def evaluate(model: LanguageModel, feed: Feed, world: World, rows: int, precision: Precision) -> dict[str, float]:
    """`<split>_ppl`, and `<split>_word_ppl` where the number of words is known, for every split of the feed; where
    a row is one answer, `<split>_accuracy` as well, the share (0 to 1) of those that are the likeliest, token by token.

    Every token is scored once; the ranks share the blocks, and each scores `rows` of them at a time.
    """
    metrics: dict[str, float] = {}
    for split, batches in feed.evaluation.items():
        count = answers if feed.answers else negative_log_likelihood
        with autocast(world.device, precision):
            total = count(model, filled(batches(rows), rows), world.device)
        nll, tokens, *right = world.sum(total).tolist()
        if right:
            metrics[f"{split}_accuracy"] = right[0] / right[1]
        score = summarize(nll, int(tokens), feed.words.get(split))
        metrics |= {f"{split}_{name}": score[name] for name in ("ppl", "word_ppl") if name in score}
    return metrics


def filled(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The batches, each filled up to `rows` rows with ones that count nothing: one shape is compiled, not two."""
    for inputs_BT, targets_BT in batches:
        filler = inputs_BT.new_zeros(rows - inputs_BT.shape[0], inputs_BT.shape[1])
        yield torch.cat([inputs_BT, filler]), torch.cat([targets_BT, torch.full_like(filler, IGNORE)])


def note_evaluation(seen: Mapping[str, float], new: Mapping[str, float]) -> tuple[dict[str, float], bool]:
    """Update the metrics of a run by an evaluation's, and say whether the validation perplexity is the best so far.

    Beside the last values stand the lowest that were ever seen, `best_valid_ppl` and `best_test_ppl` (each on its own:
    Table 15's second column), and `test_ppl_at_best_valid`.
    """
    metrics = dict(seen) | dict(new)
    better = "valid_ppl" in new and new["valid_ppl"] < seen.get("best_valid_ppl", float("inf"))
    for split in ("valid", "test"):
        if (name := f"{split}_ppl") in new:
            metrics[f"best_{name}"] = min(new[name], seen.get(f"best_{name}", float("inf")))
    if better and "test_ppl" in new:
        metrics["test_ppl_at_best_valid"] = new["test_ppl"]
    return metrics, better
