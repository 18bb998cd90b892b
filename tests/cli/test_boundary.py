"""What libraries raise becomes one line where a user's input is at fault; a bug of ours stays one."""

import jinja2
import pyarrow as pa
import pytest
import torch
import yaml
from huggingface_hub.errors import CacheNotFound, StrictDataclassFieldValidationError
from safetensors import SafetensorError

from trainer.cli.boundary import one_line, refusal


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("found 1"), "found 1"),
        (ValueError(), "ValueError"),
        (SafetensorError("header too large"), "SafetensorError: header too large"),
        (jinja2.TemplateSyntaxError("no end", 3), "TemplateSyntaxError: no end"),
        (jinja2.exceptions.SecurityError("unsafe"), "SecurityError: unsafe"),
        (yaml.YAMLError("odd"), "YAMLError: odd"),
        (pa.ArrowCapacityError("too big"), "ArrowCapacityError: too big"),
        (CacheNotFound("gone", "here"), "CacheNotFound: gone"),
        (OverflowError("int too large"), "a number is too large: int too large"),
    ],
)
def test_a_librarys_error_is_one_line(error: Exception, line: str) -> None:
    found = refusal(error)
    assert found is not None and one_line(found).startswith(line)


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyError("a"), AssertionError("b"), RecursionError(), TypeError("c")]
)
def test_what_no_input_can_cause_stays_a_bug(error: Exception) -> None:
    assert refusal(error) is None


def test_memory_that_is_not_there_says_what_to_lower() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    found = refusal(caught.value)
    assert found and found.startswith("out of memory for 3,725,290.3 GiB at once") and "routealign plan" in found
    assert (refusal(MemoryError()) or "").startswith("out of memory;")
    assert (refusal(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) or "").startswith(
        "out of memory for 2.00 GiB"
    )


def test_a_wrong_value_in_a_config_is_no_bug() -> None:
    error = StrictDataclassFieldValidationError("num_experts", TypeError("expected int"))
    assert "num_experts" in (refusal(error) or "")


def test_a_line_holds_nothing_that_a_terminal_acts_on() -> None:
    assert one_line("a\n b\x1b[31mred\x07") == "a b\\x1b[31mred\\x07"
