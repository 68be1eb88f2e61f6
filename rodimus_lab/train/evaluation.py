"""Perplexity during training, over all ranks, and what of it is remembered.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rodimus_lab.nn.model import IGNORE, LanguageModel
from rodimus_lab.scoring import Precision, autocast, negative_log_likelihood, recall, summarize
from rodimus_lab.train.distributed import World
from rodimus_lab.train.feed import Batch, Feed


def evaluate(model: LanguageModel, feed: Feed, world: World, rows: int, precision: Precision) -> dict[str, float]:
    """`<split>_ppl`, and `<split>_word_ppl` where the number of words is known, for every split of the feed. Of
    questions it is `<split>_accuracy` (0 to 1) and `<split>_loss` (nats an answer); where a row is one answer of
    several tokens, `<split>_accuracy` of whole answers and `<split>_ppl` of their tokens.

    Every token is scored once; the ranks share the blocks, and each scores `rows` of them at a time.
    """
    metrics: dict[str, float] = {}
    for split, batches in feed.evaluation.items():
        with autocast(world.device, precision):
            parts = map(world.part_of, filled(batches(rows), rows))
            if feed.questions or feed.answers:
                total = recall(model, parts, world.device)
            else:
                total = negative_log_likelihood(model, parts, world.device, feed.end_token)
        nll, tokens, *answered = world.sum(total).tolist()
        if answered:
            right, asked, whole = answered
            metrics[f"{split}_accuracy"] = right / tokens if feed.questions else whole / asked
        if feed.questions:
            metrics[f"{split}_loss"] = nll / tokens
            continue
        score = summarize(nll, int(tokens), feed.words.get(split))
        metrics |= {f"{split}_{name}": score[name] for name in ("ppl", "word_ppl") if name in score}
    return metrics


def filled(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The batches, each filled up to `rows` rows with ones that count nothing: one shape is compiled, not two."""
    for batch in batches:
        missing = rows - batch[0].shape[0]
        yield tuple(_filled(tensor, missing, IGNORE if index == 1 else 0) for index, tensor in enumerate(batch))


def _filled(tensor: Tensor, missing: int, value: int) -> Tensor:
    return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)]) if missing else tensor


def note_evaluation(seen: Mapping[str, float], new: Mapping[str, float]) -> tuple[dict[str, float], bool]:
    """Update the metrics of a run by an evaluation's, and say whether the validation perplexity is the best so far.

    Beside the last values stand the lowest that were ever seen, `best_valid_ppl` and `best_test_ppl` (each on its own:
    Table 15's second column), and `test_ppl_at_best_valid`; of accuracies the highest, `best_test_accuracy`.
    """
    metrics = dict(seen) | dict(new)
    better = "valid_ppl" in new and new["valid_ppl"] < seen.get("best_valid_ppl", float("inf"))
    for split in ("valid", "test"):
        if (name := f"{split}_ppl") in new:
            metrics[f"best_{name}"] = min(new[name], seen.get(f"best_{name}", float("inf")))
    if "test_accuracy" in new:
        metrics["best_test_accuracy"] = max(new["test_accuracy"], seen.get("best_test_accuracy", 0.0))
    if better and "test_ppl" in new:
        metrics["test_ppl_at_best_valid"] = new["test_ppl"]
    return metrics, better
