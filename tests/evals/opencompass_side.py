"""Run by test_opencompass.py in OpenCompass's environment: its evaluators' scores, and what the model class says."""

from __future__ import annotations

import contextlib
import io
import json
import sys


def main() -> None:
    order = json.load(sys.stdin)
    with contextlib.redirect_stdout(io.StringIO()):
        from opencompass.datasets.needlebench.multi import NeedleBenchMultiEvaluator
        from opencompass.datasets.needlebench.origin import NeedleBenchOriginEvaluator
        from opencompass.datasets.needlebench.parallel import NeedleBenchParallelEvaluator

        from evals.opencompass.model import RodimusLab

        kinds = {
            "single_retrieval": NeedleBenchOriginEvaluator,
            "multi_retrieval": NeedleBenchParallelEvaluator,
            "multi_reasoning": NeedleBenchMultiEvaluator,
        }
        scores = {
            task: [kinds[task]().score(predictions=[p], gold=[g]) for p, g in pairs]
            for task, pairs in order["scored"].items()
        }
        model = RodimusLab(order["model"], max_seq_len=96, device="cpu")
        said = {
            "texts": model.generate(order["prompts"], max_out_len=6),
            "ppl": model.get_ppl(order["prompts"]),
            "ppl_masked": model.get_ppl(order["prompts"], mask_length=[2] * len(order["prompts"])),
            "lengths": [model.get_token_len(text) for text in order["prompts"]],
        }
    print(json.dumps({"scores": scores, **said}))


if __name__ == "__main__":
    main()
