"""What stands on lm-eval, imported only when something is evaluated, so that the project does without lm-eval."""
