"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input or a missing means: one sentence that names the thing and the mend. The CLI exits with `exit_code`."""

    exit_code = 2


class RunsFailed(UserError):
    """Runs of several failed; the message says which and why."""

    exit_code = 1
