"""OR-Bench (Hub bench-llm/or-bench): prompts that seem toxic and are not (80k, hard-1k), and toxic ones.

On the Hub the parts are configurations: `hub_config: or-bench-hard-1k`.
"""

from pathlib import Path

from ..errors import UserError
from ..tables import Table
from ..usable import Rows, prompts

TOXIC = "toxic"


def read(table: Table) -> Rows:
    """The prompt. `UserError` where the part of toxic prompts is to be answered, or another one to be refused."""
    source = table.source
    part = Path(source.path).stem if table.local else source.hub_config or ""
    toxic = TOXIC in part.lower()
    # A local file may be called anything; a part of the Hub is what its name says.
    if (toxic and source.kind != "harmful") or (not table.local and not toxic and source.kind == "harmful"):
        raise UserError(f"{source.path}: the part {part!r} of OR-Bench holds no {source.kind} prompts")
    return prompts(table, table.require(source.column or "prompt"))
