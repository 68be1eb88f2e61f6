"""What runs this project's models under OpenCompass, in an environment of its own; see docs/needlebench.md."""
