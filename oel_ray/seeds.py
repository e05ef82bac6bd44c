"""Derive seeds from names, so that no two uses share one and none depends on scheduling. Any process."""

import hashlib


def derive_seed(run_seed: int, *parts: str | int) -> int:
    """Derive a 31-bit seed for the use that `parts` name, e.g. `derive_seed(7, "play", round, episode_id, turn)`.

    The same arguments give the same seed on every machine and Python version.
    """
    text = "\x1f".join([str(run_seed), *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
