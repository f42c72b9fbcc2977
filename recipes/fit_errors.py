"""What jsonargparse and Lightning say about wrong input, as one sentence each."""

from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import ArgumentParser  # noqa: F401
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from models.errors import UserError


@contextmanager
def explained(verb: str) -> Iterator[None]:
    """Turn the parser's and the trainer's complaints inside the block into UserError."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(f"espalier {verb}: {sentence(str(error))}") from None
    except MisconfigurationException as error:
        raise UserError(f"espalier {verb}: {' '.join(str(error).split())}") from None


def sentence(message: str) -> str:
    """Return what is wrong, where, and what would be right, from a complaint that spans lines and shows Python types."""
    return " ".join(message.split())
