"""Define the errors that users see. Raised in any process, printed by the command line."""


class UserError(Exception):
    """A mistake that the user can correct: one line with fault and remedy. Exit code 2."""


class RunFailed(Exception):
    """The run could not go on although the input was right. One line. Exit code 1; the run stays resumable."""


class EnvironmentFailed(Exception):
    """An environment raised an error; one line with its type. The game can be played again."""


class EngineUnavailable(RunFailed):
    """No engine is left that could answer, or none answered within its deadline."""


def one_line(error: BaseException, line: int | None = None) -> str:
    """Type and message of an error without line breaks: the whole message, or one of its lines (0 first, -1 last)."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = " ".join(" ".join(lines).split())[:300] if line is None else lines[line]
    return f"{type(error).__name__}: {text}"
