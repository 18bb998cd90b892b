"""The one error a user can cause."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A one-line message that names the key, file or column, what was found, and what is allowed.

    `exit_code`: of the command that it ends.
    """

    exit_code = 2


def unknown(what: str, found: object, allowed: Iterable[str]) -> UserError:
    """The error for a name outside `allowed`, with the closest match when there is one. Returned, not raised."""
    names = list(allowed)
    close = difflib.get_close_matches(str(found), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return UserError(f"unknown {what} {str(found)!r}{hint}; allowed: {', '.join(names)}")
