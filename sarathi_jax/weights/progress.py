"""The progress bar of reading and writing weights."""

from tqdm import tqdm


def bytes_bar(what: str, num_bytes: int, progress: bool) -> tqdm:
    """A bar over `num_bytes`, shown if `progress`."""
    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=not progress)
