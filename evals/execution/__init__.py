"""Generated programs, run where they can do no harm, and what their verdicts come to."""
