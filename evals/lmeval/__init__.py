"""What stands on lm-eval, which only `evals/harness.py` imports, and only when it is asked to evaluate."""
