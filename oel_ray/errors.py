"""The errors that a person meets. Raised in any process, printed by the command line."""


class UserError(Exception):
    """A mistake that a person can mend: one line that says what is wrong and what to do. Exit code 2."""


class RunFailed(Exception):
    """The run could not go on although the input was right. One line. Exit code 1; the run stays resumable."""


class EngineUnavailable(RunFailed):
    """No engine is left that could answer, or none answered within its deadline."""
