"""GPT-2's tokens by tiktoken, which fetches their vocabulary once: `python data/gpt2.py`.

It is kept in the folder that the variable TIKTOKEN_CACHE_DIR names, by default a temporary one.
"""

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

FOLDER = "TIKTOKEN_CACHE_DIR"


class VocabularyError(RuntimeError):
    """GPT-2's vocabulary is missing. One line: why, and what to do."""


@cache
def gpt2() -> "tiktoken.Encoding":
    """GPT-2's tokens, 50257 of them. Raises VocabularyError where their vocabulary is missing."""
    try:
        import tiktoken  # not needed for bytes

        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken's own, and those of its client, of any kind
        folder = os.environ.get(FOLDER)
        where = f"{FOLDER}={folder} does not have it" if folder else f"{FOLDER} is not set"
        raise VocabularyError(
            f"GPT-2's vocabulary cannot be fetched ({_reason(error)}), and {where}: run "
            f"`{FOLDER}=<a folder> python data/gpt2.py` where there is a network, bring the folder "
            f"here, and give the same command again with {FOLDER}=<the folder> before it"
        ) from error


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    try:
        gpt2()
    except VocabularyError as error:
        sys.exit(f"error: {error}")
