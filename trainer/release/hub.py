"""Publish a finished run on the Hugging Face Hub: the checkpoint or the patch, with its card and how it was made.

Only a repair that its own evidence supports leaves the house: a run that is unfinished, whose audit failed, or whose
evaluation shows the model less safe than it was, is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from data_prep.errors import UserError
from trainer.release.card import Licence, model_card
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.figures import collect
from trainer.runtime.console import say, table
from trainer.runtime.files import sha256
from trainer.runtime.redaction import is_local, without_paths, without_tokens

PATCH = ("patch.safetensors", "patch.json")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Uploads = dict[str, Path | bytes]
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


def check_unchanged(run_dir: Path, outputs: Mapping[str, str]) -> None:
    """`UserError` where an exported file (path in the run folder -> sha256) is not the one that was audited."""
    for name, digest in outputs.items():
        if not (run_dir / name).is_file() or sha256(run_dir / name) != digest:
            raise UserError(f"{run_dir / name}: missing, or changed since the run's audit; export the run again")


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


# --- what is uploaded -----------------------------------------------------------------------------


def gather(run: Artefacts, made: Made, repo: str, *, patch_only: bool, edited: str | None = None) -> Uploads:
    """Every file of the commit: checkpoint, patch, card (which `edited` is for), reproduction.

    Raises:
        UserError: the run kept no checkpoint, or no patch where only that is wanted.
    """
    model, uploads = run.folder / "model", Uploads()
    if not patch_only:
        if not model.is_dir():
            raise UserError(f"{run.folder}: this run holds no model/; export it, or use --patch-only")
        uploads |= {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}
    patch = {name: run.folder / name for name in PATCH if (run.folder / name).is_file()}
    if patch_only and len(patch) < len(PATCH):
        raise UserError(f"{run.folder}: this run holds no patch ({', '.join(PATCH)}); push the checkpoint instead")
    uploads |= patch
    licence = licence_of(run.recipe.get("model") or {})
    has_patch = len(patch) == len(PATCH)
    card = model_card(run, repo, licence, has_model=not patch_only, has_patch=has_patch, edited=edited)
    uploads["README.md"] = without_tokens(card).encode()
    uploads["reproduction.json"] = without_tokens(json.dumps(reproduction(run, made), indent=1)).encode()
    return uploads


def reproduction(run: Artefacts, made: Made) -> dict[str, Any]:
    """All it takes to make the run again and to see that it came out the same; paths are cut to their last part."""
    return asdict(made) | {
        "recipe": without_paths(made.recipe),
        "expert_set": without_paths(run.expert_set),
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
    data = ModelCard.load(found, ignore_metadata_errors=True).data
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


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# --- upload ---------------------------------------------------------------------------------------


def publish(uploads: Uploads, repo: str, message: str, *, private: bool) -> str:
    """Upload as one commit, the repository made where there is none; returns the commit's address.

    The token is the one huggingface_hub itself finds (`hf auth login`, or HF_TOKEN).

    Raises:
        UserError: the Hub refuses or cannot be reached, or the repository is public and must not be.
    """
    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in uploads.items()
    ]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise UserError(f"{repo}: exists and is public; make it private on the Hub, or leave out --private")
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except (HTTPError, OSError) as error:
        raise _refusal(repo, error) from None
    except RuntimeError as error:
        # huggingface_hub wraps a failed upload of a large file.
        if not isinstance(error.__cause__, HTTPError | OSError):
            raise
        raise _refusal(repo, error.__cause__) from None


def _refusal(repo: str, error: Exception) -> UserError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    first = without_tokens((str(error).strip() or type(error).__name__).splitlines()[0])
    reasons = {
        401: "the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN",
        403: "you may not write there; the token needs the right to write, and the name must be yours",
        404: "not found on the Hub, or not visible to you; check the name",
    }
    return UserError(f"{repo}: {reasons.get(status or 0, f'the Hub cannot be reached or refused: {first}')}")
