"""lm-eval's own command line with the model `rodimus-lab` in it.

    python -m evals.lmeval --model rodimus-lab --model_args pretrained=RUN_OR_DIR --tasks arc_easy

lm-eval 0.4.13 has no way for a package to announce a model: one has to be registered before the command line starts.
"""

from __future__ import annotations

import sys

from evals.harness import require_lm_eval
from rodimus_lab.errors import UserError


def main() -> None:
    """Run lm-eval; what a user can mend ends in one sentence and exit code 2."""
    try:
        require_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        from evals.lmeval import adapter  # noqa: F401  (registers the model)

        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
