"""The one exception for mistakes of a user: a single line that says what was given, the rule and the mend."""

from functools import partial
from typing import Any


class UserError(ValueError):
    """Input that the user can mend.

    Commands print it as one line and end with exit status 2; nothing has been written by then.

    Args:
        given: what was given, with its value.
        rule: the rule that it breaks.
        remedy: what to do.
        key: the YAML key (``jobs[0].peft.r``), command line option or file that holds it.
    """

    def __init__(self, given: str, *, rule: str, remedy: str, key: str = "") -> None:
        self.given, self.rule, self.remedy, self.key = given, rule, remedy, key
        where = f"{key}: " if key else ""
        super().__init__(" ".join(f"{where}{given}; {rule}; {remedy}".split()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes whole: rank 0 broadcasts what it found, and every rank raises it."""
        return partial(UserError, rule=self.rule, remedy=self.remedy, key=self.key), (self.given,)
