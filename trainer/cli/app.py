"""The command `routealign`: arguments in, one function call, one line where a user's input is at fault.

Everything heavy is imported inside a command, so that help and a typo answer at once.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from trainer import __version__
from trainer.cli.boundary import one_line, refusal
from trainer.runtime import signals
from trainer.runtime.console import is_main_process, say
from trainer.runtime.processes import check_environment, leave

if TYPE_CHECKING:
    from trainer.methods.method import Method
    from trainer.recipe.schema import Recipe

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
    from trainer.runtime.hub_client import limit_requests

    limit_requests()


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew: empties the run folder.")] = False,
    keep_replies: Annotated[
        bool, typer.Option("--keep-replies", help="Keep judged replies in the run folder, for you alone.")
    ] = False,
) -> None:
    """Run a recipe; run it again to resume."""
    loaded = _recipe(recipe, overrides)
    from trainer.pipeline.experiment import opened

    with opened(loaded, force=force, keep_replies=keep_replies) as folder:
        _method(loaded).run(folder)


@app.command()
def detect(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Find the safety-critical experts, and stop there."""
    loaded = _recipe(recipe, overrides)
    from trainer.pipeline.experiment import opened

    with opened(loaded) as folder:
        _method(loaded).detect(folder)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id or local folder.", metavar="MODEL")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Say what this recipe would train.")] = None,
) -> None:
    """Show a model's routers and experts."""
    _refuse_no_model("inspect", model)
    loaded = _recipe(recipe, None) if recipe else None
    from trainer.model.describe import caution, description, print_table, read
    from trainer.recipe.sections import ModelSection

    as_said = {"revision": loaded.model.revision, "dtype": loaded.model.dtype} if loaded else {}
    section = ModelSection.model_validate({"name_or_path": model, **as_said})
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        backbone = read(section)
    found = description(backbone)
    if said := caution(section):
        print(said, file=sys.stderr)
    if loaded is not None:
        from trainer.planning.parts import would_change

        found["would_train"] = would_change(_method(loaded).planned(loaded).footprint(backbone), backbone)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_table(found)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of one node; by default this machine's, or 1.")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of one GPU; by default this machine's.")] = None,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what a recipe needs on each GPU, without loading weights."""
    with contextlib.redirect_stdout(sys.stderr):
        loaded = _recipe(recipe, overrides)
    from trainer.planning.plan import machine
    from trainer.planning.plan import plan as make
    from trainer.planning.table import show

    found, memory = machine()
    gpus, gpu_memory = found if gpus is None else gpus, memory if gpu_memory is None else gpu_memory
    with contextlib.redirect_stdout(sys.stderr):
        made = make(loaded, _method(loaded).planned(loaded), gpus=gpus, gpu_memory_gb=gpu_memory, nodes=nodes)
        as_text = json.dumps(made.json(), indent=2) if as_json else ""
    if as_json:
        print(as_text)
    else:
        show(made)


@app.command()
def evaluate(
    model_or_run: Annotated[str, typer.Argument(help="Hub id, local folder or run folder.", metavar="MODEL_OR_RUN")],
    suite: Annotated[Path, typer.Option(help="The recipe whose data and evaluate sections say what is asked.")],
    overrides: Overrides = None,
    keep_replies: Annotated[Path | None, typer.Option(help="Keep judged replies in this file, for you alone.")] = None,
) -> None:
    """Measure a model or a run's model; prints JSON."""
    _refuse_no_model("evaluate", model_or_run)
    loaded = _recipe(suite, overrides)
    from trainer.pipeline.measure import measure_alone

    measured = measure_alone(loaded, model_or_run, keep_replies)
    if is_main_process():
        print(json.dumps(measured, indent=2))


@app.command()
def judge(
    run_or_file: Annotated[
        Path, typer.Argument(help="A run with kept replies, or a file of labelled ones.", metavar="RUN_OR_FILE")
    ],
    overrides: Overrides = None,
    name: Annotated[str, typer.Option("--with", help="The judge: phrases, guard or endpoint.")] = "phrases",
    inspect_log: Annotated[
        bool, typer.Option("--inspect-log", help="Write kept replies as logs for Inspect instead; judge nothing.")
    ] = False,
) -> None:
    """Grade kept replies with another judge, or labelled ones; describe it by evaluate.guard.format=... and so on."""
    from trainer.pipeline.inspect_log import write_inspect_logs
    from trainer.pipeline.judge_again import judge_again, judge_labelled, judge_section

    if inspect_log:
        write_inspect_logs(run_or_file)
        return
    section = judge_section(name, overrides or [])
    if run_or_file.is_file():
        judge_labelled(run_or_file, section)
    else:
        judge_again(run_or_file, section)


@app.command()
def report(run: RunFolder) -> None:
    """Write <run>/report.html."""
    from trainer.methods.table import report_of
    from trainer.pipeline.experiment import method_of_run
    from trainer.reporting import html

    say(f"report: {html.write(run, report_of(method_of_run(run)))}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="RUN ...")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Put runs side by side: figures and cost."""
    from trainer.reporting.compare import comparison, markdown
    from trainer.runtime.console import table

    columns, rows = comparison(runs)
    if as_markdown:
        print(markdown(columns, rows))
    else:
        table("runs", columns, rows)


@app.command()
def export(
    run: RunFolder,
    merge: Annotated[str | None, typer.Option(help="static: of a run of adapters, their merge.")] = None,
) -> None:
    """Write a run's model to <run>/model."""
    from data_prep.errors import UserError
    from trainer.methods.method import MixingMethod
    from trainer.methods.table import recipe_of
    from trainer.pipeline.experiment import reopened

    if merge not in (None, "static"):
        raise UserError(f"--merge: found {merge!r}; allowed: static")
    with reopened(run, recipe_of) as folder:
        method = _method(folder.recipe)
        if merge is None:
            method.export(folder)
        elif isinstance(method, MixingMethod):
            method.merge(folder)
        else:
            raise UserError(f"--merge: a run of method {folder.recipe.method} has no adapters to merge; leave it out")


@app.command()
def generate(
    run: RunFolder,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: .txt by lines, or a table.")] = None,
    mode: Annotated[str | None, typer.Option(help="weights, top1 or hidden; by default the recipe's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a reply.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1, max=65536)] = 16,
) -> None:
    """Answer prompts, by default the lines of standard input, with a run's mixture; prints JSON Lines."""
    from data_prep.errors import UserError
    from trainer.methods.method import MixingMethod
    from trainer.methods.table import load_recipe
    from trainer.pipeline.steer_replies import read_prompts

    loaded = load_recipe(run / "recipe.yaml")
    method = _method(loaded)
    if not isinstance(method, MixingMethod):
        raise UserError(
            f"{run}: a run of method {loaded.method} has no mixture; `routealign steer` or its model/ answer"
        )
    asked = read_prompts(prompts)
    with contextlib.redirect_stdout(sys.stderr):
        answers = method.generate(run, asked, mode, max_new_tokens, batch_size)
    for index, found in enumerate(answers):
        weights = {name: round(weight, 6) for name, weight in found.alpha.items()}
        print(json.dumps({"prompt": index, "alpha": weights, "reply": found.text}, ensure_ascii=False))


@app.command()
def apply(
    base: Annotated[str, typer.Argument(help="The patch's base: a folder or a Hub id.", metavar="BASE")],
    patch: Annotated[Path, typer.Argument(help="A folder with patch.safetensors and patch.json.", metavar="PATCH")],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the base; by default the patch's own.")] = None,
) -> None:
    """Reproduce a repaired checkpoint from its base and a patch."""
    from trainer.release.patch import apply_patch

    say(f"checkpoint: {apply_patch(base, patch, out, revision)}")


@app.command()
def audit(
    run: RunFolder,
    prompts: Annotated[int, typer.Option(help="Test prompts of each kind.", min=2, max=100_000)] = 60,
) -> None:
    """Measure, in memory, how far compact edits move the refusals of a run's base and of its model."""
    from trainer.methods.table import recipe_of, report_of
    from trainer.pipeline.experiment import reopened
    from trainer.pipeline.robustness import audit as curves
    from trainer.reporting import html

    with reopened(run, recipe_of) as folder:
        curves(folder.recipe, run, prompts)
        if is_main_process() and (run / "evaluation.json").is_file():
            say(f"report: {html.write(run, report_of(folder.recipe.method))}")


@app.command()
def push(
    run: RunFolder,
    repo: Annotated[str, typer.Option(help="The repository on the Hub, user/name.")],
    patch_only: Annotated[bool, typer.Option("--patch-only", help="Upload the patch, not the checkpoint.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, upload nothing.")] = False,
) -> None:
    """Publish a finished run on the Hub, with a model card."""
    from trainer.methods.table import refuse_adapters, report_of
    from trainer.pipeline.experiment import method_of_run
    from trainer.pipeline.push import push as upload

    name = method_of_run(run)
    refuse_adapters(name, run)
    report = report_of(name)
    upload(run, repo, patch_only=patch_only, private=private, dry_run=dry_run, report=report)


@app.command()
def steer(
    model: Annotated[str, typer.Argument(help="Hub id or local folder.", metavar="MODEL")],
    experts: Annotated[Path, typer.Option(help="A steering.json, or an expert_set.json to deactivate.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file of prompts: .txt by lines, or a table.")] = None,
    strength: Annotated[float | None, typer.Option(help="0 untouched to 1 forced; by default the file's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a reply.")] = 256,
) -> None:
    """Generate under steering (SteerMoE); prints JSON Lines."""
    from data_prep.errors import UserError
    from trainer.pipeline.steer_replies import read_prompts, steered_replies

    _refuse_no_model("steer", model)
    asked = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not asked:
        raise UserError("steer: no prompt given; use --prompt TEXT or --prompts FILE")
    with contextlib.redirect_stdout(sys.stderr):
        replies = steered_replies(model, experts, asked, strength, max_new_tokens)
    for index, text in enumerate(replies):
        print(json.dumps({"prompt": index, "reply": text}, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code: 0, 2 for a user's error, 130 when interrupted, 143 at SIGTERM.

    Exceptions that `boundary.refusal` does not know are our bugs and pass through, with their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in given
    _quiet()
    signals.install()
    try:
        check_environment()
        code = app([item for item in given if item != "--debug"], prog_name="routealign", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        leave(INTERRUPTED)
    except signals.Terminated:
        say("stopped by SIGTERM; the same command goes on from here")
        leave(signals.EXIT_CODE)
    except typer.TyperException as error:
        _fail(error.format_message())
    except Exception as error:
        line = refusal(error)
        if line is None:
            raise
        exit_code = getattr(error, "exit_code", USER_ERROR)
        if debug:
            traceback.print_exc()
            leave(exit_code)
        _fail(line, exit_code)
    leave(code if isinstance(code, int) else 0)


def _fail(message: str, code: int = USER_ERROR) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(f"error: {f'[rank {rank}] ' if rank != '0' else ''}{one_line(message)}", file=sys.stderr)
    leave(code)


def _quiet() -> None:
    # Before the libraries are imported. TRL tells the Hub which trainer runs, from a thread, unless it is told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Their warnings stay: "newly initialized weights" is one of them.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where bitsandbytes is installed it asks on some CPUs for `kernels`, which would fetch and run compiled code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _refuse_no_model(command: str, name: str) -> None:
    from data_prep.errors import UserError

    if not name.strip():
        raise UserError(f"{command}: found no model; expected a Hub id or a local folder")


def _recipe(path: Path, overrides: Sequence[str] | None) -> "Recipe":
    from trainer.methods.table import load_recipe

    return load_recipe(path, overrides or [])


def _method(recipe: "Recipe") -> "Method":
    from trainer.methods.table import method_of

    return method_of(recipe)
