"""Write sizes, shares and times for people. Any process; pure."""

ABSENT = "-"


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def digits(value: float | None, form: str = ".1f") -> str:
    """Format a number with as many digits as `form` says."""
    return as_text(value, form, ABSENT)


def as_text(number: float | None, form: str, otherwise: str = "not finite") -> str:
    """Format a number of a record, whose JSON has null for one that is not finite."""
    return otherwise if number is None else format(number, form)


def duration(seconds: float) -> str:
    """Format seconds as `41 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
