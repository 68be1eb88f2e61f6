"""NeedleBench for `python -m opencompass.cli.main`; variables of the environment set it up.

An import statement would make mmengine read this file lazily, without running anything.
"""

datasets, models = __import__("evals.opencompass.needlebench", fromlist=["configured"]).configured()
