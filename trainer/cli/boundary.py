"""What the libraries raise where a user's input is at fault, as one line; the last net under the errors of our own.

Most errors are raised near the file that they concern, and name it. What comes here without a name is told by its
class. A class that is not listed is a bug of ours, and shows as one.
"""

from __future__ import annotations

import re
import sys

from trainer.runtime.console import printable

OTHERS_ERRORS = {
    "safetensors": ("SafetensorError",),
    "jinja2": ("TemplateError",),
    "yaml": ("YAMLError",),
    "pyarrow": ("ArrowException",),
    "huggingface_hub.errors": (
        "HTTPError",
        "StrictDataclassError",
        "EntryNotFoundError",
        "CacheNotFound",
        "CorruptedCacheException",
        "RevisionResolutionError",
        "XetDownloadError",
    ),
}
"""Module -> classes that it raises for a file, an answer or a setting that it cannot take."""

NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad allocation", re.IGNORECASE)
SIZE = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)")


def refusal(error: Exception) -> str | None:
    """The line for an error that a user's input or machine caused; None for a bug of ours."""
    if _is_memory(error):
        return _no_memory(error)
    if isinstance(error, OSError | ValueError):
        return _said(error)
    if isinstance(error, OverflowError):
        return f"a number is too large: {_said(error)}"
    for module, names in OTHERS_ERRORS.items():
        # A library that was never imported raised nothing.
        classes = tuple(getattr(sys.modules[module], name, ()) for name in names) if module in sys.modules else ()
        if isinstance(error, tuple(found for found in classes if isinstance(found, type))):
            return f"{type(error).__name__}: {_said(error)}"
    return None


def one_line(message: str) -> str:
    """A message without line breaks, and without characters that a terminal would act on."""
    return printable(" ".join(message.split()))


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def _no_memory(error: Exception) -> str:
    found = SIZE.search(str(error))
    wanted = ""
    if found:
        wanted = f" for {found[2]} at once" if found[2] else f" for {int(found[1]) / 2**30:,.1f} GiB at once"
    return (
        f"out of memory{wanted}; `routealign plan RECIPE` says what a recipe needs: lower the batch sizes, "
        "repair.lora_rank, detect.max_pairs or max_length, or use more or larger devices"
    )


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
