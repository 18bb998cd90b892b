"""HarmBench (github.com/centerforaisafety/HarmBench; Hub walledai/HarmBench): harmful behaviours of three kinds."""

from ..cells import text_of
from ..errors import UserError
from ..schema import Conversation
from ..tables import Table
from ..usable import NO_TEXT, Loaded, Rows

BEHAVIOUR = ("Behavior", "prompt")
CONTEXT = ("ContextString", "context")
COPYRIGHT = "copyright, no request to refuse"


def read(table: Table) -> Rows:
    """The behaviour, behind its context and a blank line where it has one.

    Rows that ask for a protected text (category `copyright`, tag `hash_check`) are left out: whether a reply
    reproduces the text is another question than whether it refuses. `UserError` for the Hub's part of such rows.
    """
    source = table.source
    if not table.local and source.hub_config == "copyright":
        raise UserError(f"{source.path}: hub_config 'copyright' holds no requests to refuse; allowed: the other parts")
    behaviour = table.require_one(BEHAVIOUR)
    context, category, tags = table.first(CONTEXT), table.first(("FunctionalCategory",)), table.first(("Tags",))
    for row in table:
        text = text_of(row, behaviour)
        before = text_of(row, context) if context else ""
        kind = text_of(row, category) if category else ""
        tagged = text_of(row, tags) if tags else ""
        if kind == "copyright" or "hash_check" in tagged:
            yield COPYRIGHT
        elif not text:
            yield NO_TEXT
        else:
            yield Loaded(Conversation.of("\n\n".join(filter(None, (before, text)))))
