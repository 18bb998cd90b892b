"""Publish a finished run on the Hugging Face Hub: the checkpoint or the patch, with its card and how it was made.

Only a repair that its own evidence supports leaves the house: a run that is unfinished, whose audit failed, or whose
evaluation shows the model less safe than it was, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from yaml import YAMLError

from data_prep.errors import UserError
from trainer.model.weight_files import WEIGHTS
from trainer.release.card import Licence, model_card
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.figures import collect
from trainer.runtime.console import say, table
from trainer.runtime.hub_client import NOT_UNDERSTOOD, limit_requests, not_understood
from trainer.runtime.redaction import is_local, without_paths, without_secret_values, without_secrets

PATCH = ("patch.safetensors", "patch.json")
MODEL = "model/"
_PROGRAMS = (".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".js", ".ipynb")
_LARGEST_TEXT = 64 * 2**20
"""Bytes; larger files are weights, and are not searched for secrets."""
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Recorded:
    """A file that a step of the run wrote, with the hex sha256 that it had then."""

    path: Path
    sha256: str


Uploads = dict[str, Recorded | bytes]
"""Path in the repository -> file on disk, or content."""


@dataclass(frozen=True)
class Made:
    """How a run was made. `stages`: name -> {"inputs": hash, "outputs": {path in the run folder: hash}}."""

    recipe: dict[str, Any]
    recipe_hash: str
    seed: int
    versions: dict[str, str]
    stages: dict[str, dict[str, Any]]


# --- what may be published ------------------------------------------------------------------------


def check_name(repo: str) -> None:
    """`UserError` unless this can be the name of a repository on the Hub."""
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"--repo: {repo!r} is no repository's name; allowed: user/name")


def check_finished(run_dir: Path, stages: Mapping[str, str]) -> None:
    """`UserError` unless every stage (name -> status) is finished and the evaluation and the audit are there."""
    open_stages = [name for name, status in stages.items() if status != "finished"]
    missing = [name for name in ("evaluation.json", "audit.json") if not (run_dir / name).is_file()]
    if open_stages or missing or "export" not in stages:
        what = [f"stage {name} is not finished" for name in open_stages] + [f"no {name}" for name in missing]
        raise UserError(f"{run_dir}: this run is not finished ({(what or ['nothing was exported'])[0]}); run it again")


def check_audit(run: Artefacts) -> None:
    """`UserError` unless the audit found nothing moved that must not, and the checkpoint read back the same."""
    path = run.folder / "audit.json"
    if run.audit.get("reload_ok") is not True:
        raise UserError(f"{path}: the audit failed: the checkpoint read back answers differently (reload_ok)")
    identical = run.audit.get("untouched_identical")
    if identical is False:
        raise UserError(f"{path}: the audit failed: weights outside the footprint moved (untouched_identical)")
    footprint = run.audit.get("footprint") or {"parameters": 0, "of": None}  # audits of earlier releases have none
    if identical is None and footprint["parameters"] != footprint["of"]:
        raise UserError(
            f"{path}: untouched_identical is null, and nothing shows that weights outside the footprint stayed; "
            "export the run again"
        )


def check_safer(run: Artefacts) -> None:
    """`UserError` where safety was not measured before and after, or is worse after beyond the 95 % intervals."""
    path = run.folder / "evaluation.json"
    figures = {figure.key: figure for figure in collect(run.evaluation)}
    safety = [figure for key, figure in figures.items() if key.startswith("asr") or key == "harmful_refusal"]
    for needed in ("asr_unseen" if "asr_unseen" in figures else "asr_seen", "harmful_refusal"):
        if needed not in figures or figures[needed].before is None or figures[needed].after is None:
            raise UserError(f"{path}: {needed} was not measured before and after; only a measured repair is pushed")
    for figure in safety:
        if figure.trend == "worse" and figure.before and figure.after:
            raise UserError(
                f"{path}: less safe than before: {figure.key} was {figure.before['rate']:.3f}, is "
                f"{figure.after['rate']:.3f}, beyond the 95 % intervals; such a model is not pushed"
            )


def check_kinds(files: Mapping[str, Recorded]) -> None:
    """`UserError` where a file (path in the repository -> file) is of a kind that no checkpoint is made of.

    Hidden files, pickled weights, programs, and code that no configuration names; a text that holds a secret.
    """
    named_code = any(_names_code(file.path) for name, file in files.items() if name.endswith("config.json"))
    for name, file in files.items():
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") and part != ".gitattributes" for part in path.parts)
        pickled = path.suffix in WEIGHTS and path.suffix != ".safetensors"
        if hidden or pickled or path.suffix in _PROGRAMS or (path.suffix == ".py" and not named_code):
            what = "a hidden file" if hidden else "a pickle" if pickled else "code that no configuration names"
            raise UserError(f"{file.path}: {what}, which is not pushed; take it out of the base and run again")
        if file.path.stat().st_size <= _LARGEST_TEXT and path.suffix != ".safetensors":
            text = file.path.read_bytes().decode(errors="replace")
            if without_secrets(text) != text:
                raise UserError(f"{file.path}: holds what looks like a password, key or token; it is not pushed")


def _names_code(path: Path) -> bool:
    try:
        return "auto_map" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, RecursionError):
        return False


# --- what is uploaded -----------------------------------------------------------------------------


def gather(
    run: Artefacts,
    made: Made,
    repo: str,
    exported: Mapping[str, str],
    *,
    patch_only: bool,
    edited: str | None = None,
) -> Uploads:
    """Every file of the commit: checkpoint, patch, card (which `edited` is for), reproduction.

    Args:
        exported: path in the run folder -> hex sha256 of what the export wrote; nothing else is uploaded.

    Raises:
        UserError: the run kept no checkpoint, or no patch where only that is wanted; a file holds a secret, or is of a
            kind that no checkpoint is made of.
    """
    recorded = {name: Recorded(run.folder / name, digest) for name, digest in exported.items()}
    model = {name.removeprefix(MODEL): file for name, file in recorded.items() if name.startswith(MODEL)}
    patch = {name: recorded[name] for name in PATCH if name in recorded}
    if not patch_only and not model:
        raise UserError(f"{run.folder}: this run holds no model/; export it, or use --patch-only")
    if patch_only and len(patch) < len(PATCH):
        raise UserError(f"{run.folder}: this run holds no patch ({', '.join(PATCH)}); push the checkpoint instead")
    files = patch if patch_only else model | patch
    check_kinds(files)
    licence = licence_of(run.recipe.get("model") or {})
    has_patch = len(patch) == len(PATCH)
    card = model_card(run, repo, licence, has_model=not patch_only, has_patch=has_patch, edited=edited)
    # Of the base's files of these names ours take the place.
    uploads: Uploads = {**files}
    uploads["README.md"] = without_secrets(card).encode()
    uploads["reproduction.json"] = without_secrets(json.dumps(reproduction(run, made), indent=1)).encode()
    return uploads


def reproduction(run: Artefacts, made: Made) -> dict[str, Any]:
    """All it takes to make the run again and to see that it came out the same; paths are cut, secrets taken out."""
    return asdict(made) | {
        "recipe": without_paths(without_secret_values(made.recipe)),
        "expert_set": without_paths(without_secret_values(run.expert_set)),
        "evaluation": run.evaluation,
        "audit": run.audit,
    }


def licence_of(model: dict[str, Any]) -> Licence:
    """The base's licence from its own card, where that is a local file or in the Hub's cache."""
    name = str(model.get("name_or_path", ""))
    found: object = Path(name) / "README.md"
    if not is_local(name):
        found = try_to_load_from_cache(name, "README.md", revision=model.get("revision"))
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return Licence()
    try:
        data = ModelCard.load(found, ignore_metadata_errors=True).data
    except (ValueError, YAMLError) as error:
        raise UserError(f"{found}: the base's card cannot be read for its licence: {error}; mend it") from error
    return Licence(data.get("license"), data.get("license_name"), data.get("license_link"))


def show(uploads: Uploads, repo: str) -> None:
    """Print what would be uploaded: every file with its size, and the two that are made for it."""
    sizes = {name: _size(content) for name, content in uploads.items()}
    sizes["total"] = sum(sizes.values())
    table(f"would be uploaded to {repo}", ["file", "bytes"], [[name, f"{size:,}"] for name, size in sizes.items()])
    for name in ("README.md", "reproduction.json"):
        content = uploads[name]
        assert isinstance(content, bytes), "the card and the reproduction file are made here"
        say(f"--- {name}")
        say(content.decode())


def _size(content: Recorded | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.path.stat().st_size


# --- upload ---------------------------------------------------------------------------------------


def publish(uploads: Uploads, repo: str, message: str, *, private: bool) -> str:
    """Upload as one commit, the repository made where there is none; returns the commit's address.

    The token is the one huggingface_hub itself finds (`hf auth login`, or HF_TOKEN).

    Raises:
        UserError: the Hub refuses or cannot be reached, or the repository is public and must not be.
    """
    if not re.fullmatch(r"https?://[^\s/:@\[\]]+(:\d{1,5})?(/\S*)?", constants.ENDPOINT):
        raise UserError(f"HF_ENDPOINT: found {without_secrets(constants.ENDPOINT)!r}, allowed: https://host")
    limit_requests()
    api = HfApi()
    operations = []
    for name, content in uploads.items():
        data = content if isinstance(content, bytes) else str(content.path)
        operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=data)
        if isinstance(content, Recorded) and operation.upload_info.sha256.hex() != content.sha256:
            raise UserError(f"{content.path}: changed while it was being pushed; export the run again")
        operations.append(operation)
    with _refusals(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
    if private:
        with _refusals(repo):
            found = api.repo_info(repo).private
        if found is not True:
            raise UserError(f"{repo}: exists and is public; make it private on the Hub, or leave out --private")
    with _refusals(repo):
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)


@contextmanager
def _refusals(repo: str) -> Iterator[None]:
    """What the Hub refuses, and what it answers that is no answer, as one line."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, *NOT_UNDERSTOOD) as error:
        # huggingface_hub wraps a failed upload of a large file in a RuntimeError.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, HTTPError | OSError):
            raise _refusal(repo, cause) from None
        if not isinstance(cause, NOT_UNDERSTOOD):
            raise
        raise not_understood(repo, cause) from error


def _refusal(repo: str, error: Exception) -> UserError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    first = without_secrets((str(error).strip() or type(error).__name__).splitlines()[0])
    reasons = {
        401: "the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN",
        403: "you may not write there; the token needs the right to write, and the name must be yours",
        404: "not found on the Hub, or not visible to you; check the name",
    }
    return UserError(f"{repo}: {reasons.get(status or 0, f'the Hub cannot be reached or refused: {first}')}")
