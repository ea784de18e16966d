"""A fault that a person might make, as a text in a file that another text takes the place of."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        fault: what is wrong then, in words that no other fault has.
        file: the file of the fault.
        before: text that stands once in the file.
        after: the text in its place.
        tests: files below tests/ that should notice, the quickest first, with spaces between.
    """

    fault: str
    file: str
    before: str
    after: str
    tests: str

    def applied(self, text: str) -> str:
        """The file's text with the fault. Raises ValueError unless `before` stands once in it."""
        if (times := text.count(self.before)) != 1:
            raise ValueError(f"{self.fault}: {self.before!r} stands {times} times in {self.file}")
        return text.replace(self.before, self.after)
