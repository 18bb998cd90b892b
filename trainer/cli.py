"""The command `routealign`: arguments in, one function call, one line where a user's input is at fault.

Everything heavy is imported inside a command, so that help and a typo answer at once.
"""

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from trainer import __version__
from trainer.console import say

if TYPE_CHECKING:
    from trainer.recipe import Recipe

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="routealign",
    help="Repair the safety-critical experts of a Mixture-of-Experts language model.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, over the recipe.", metavar="[key=value ...]")
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"routealign {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    # `main` takes --debug out of the arguments; it is declared for the help page.
    pass


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew: empties the run folder.")] = False,
) -> None:
    """Run a recipe; run it again to resume."""
    from trainer.run import Run

    loaded = _recipe(recipe, overrides)
    with Run.open(loaded, force=force) as opened:
        _method(loaded).run(loaded, opened)


@app.command()
def detect(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find the safety-critical experts, and stop there."""
    from trainer.run import Run

    loaded = _recipe(recipe, overrides)
    with Run.open(loaded) as opened:
        _method(loaded).detect(loaded, opened)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or local folder.", metavar="MODEL")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Say what this recipe would train.")] = None,
) -> None:
    """Show a model's routers and experts."""
    from trainer import preflight

    loaded = _recipe(recipe, None) if recipe else None
    section = loaded.model if loaded else None
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = preflight.describe(model, section.revision if section else None, section.dtype if section else "auto")
    if not as_json:
        preflight.print_table(found, loaded)
    elif loaded:
        print(json.dumps(found | {"would_train": preflight.would_train(found, loaded)}, indent=2))
    else:
        print(json.dumps(found, indent=2))


@app.command()
def evaluate(
    model_or_run: Annotated[str, typer.Argument(help="Hub id, local folder or run folder.", metavar="MODEL_OR_RUN")],
    suite: Annotated[Path, typer.Option(help="The recipe whose data and evaluate sections say what is asked.")],
    overrides: Overrides = None,
) -> None:
    """Measure a model or a run's model; prints JSON."""
    from trainer.recipe import ModelSection
    from trainer.run import model_of
    from trainer.subject import Subject

    loaded = _recipe(suite, overrides)
    model = ModelSection(
        name_or_path=model_of(model_or_run),
        dtype=loaded.model.dtype,
        trust_remote_code=loaded.model.trust_remote_code,
    )
    # Only the result goes to standard output, so that it can be piped.
    with contextlib.redirect_stdout(sys.stderr):
        subject = Subject.of(loaded.model_copy(update={"model": model}))
        measured = subject.suite.measure(subject.model, subject.tokenizer, label="evaluate")
    print(json.dumps(measured.metrics, indent=2))


@app.command()
def report(run: RunFolder) -> None:
    """Write <run>/report.html."""
    from trainer.reporting import html
    from trainer.run import Manifest

    Manifest.read(run)
    say(f"report: {html.write(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN ...")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Put runs side by side: figures and cost."""
    from trainer.console import table
    from trainer.reporting.compare import comparison, markdown

    columns, rows = comparison(runs)
    if as_markdown:
        print(markdown(columns, rows))
    else:
        table("runs", columns, rows)


@app.command()
def export(run: RunFolder) -> None:
    """Write a run's model to <run>/model."""
    from trainer.run import Run

    with Run.reopen(run) as opened:
        _method(opened.recipe).export(opened.recipe, opened)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code: 0, 2 for a user's error, 130 when interrupted.

    Exceptions other than `ValueError` and `OSError` are our bugs and pass through.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    _quiet()
    try:
        code = app([item for item in given if item != "--debug"], prog_name="routealign", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except typer.TyperException as error:
        _fail(error.format_message())
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
            sys.exit(USER_ERROR)
        _fail(str(error) or type(error).__name__)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    rank = int(os.environ.get("RANK", "0"))
    print(f"error: {f'[rank {rank}] ' if rank else ''}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def _quiet() -> None:
    # Before the libraries are imported. Their warnings stay: "newly initialized weights" is one of them.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _recipe(path: Path, overrides: Sequence[str] | None) -> "Recipe":
    from trainer.recipe import Recipe

    return Recipe.load(path, overrides or [])


def _method(recipe: "Recipe") -> ModuleType:
    return importlib.import_module(f"trainer.methods.{recipe.method}")
