"""Publish a finished run on the Hugging Face Hub: the checkpoint or the patch, with its card and how it was made.

Only a repair that its own evidence supports leaves the house: a run that is unfinished, whose audit failed, or whose
evaluation shows the model less safe than it was, is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from data_prep.errors import UserError
from trainer.release.card import Licence, model_card
from trainer.reporting import artefacts
from trainer.reporting.artefacts import Artefacts
from trainer.reporting.figures import collect
from trainer.run.folder import Manifest
from trainer.runtime.console import say, table
from trainer.runtime.files import sha256
from trainer.runtime.redaction import is_local, portable_tree, without_tokens

PATCH = ("patch.safetensors", "patch.json")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Uploads = dict[str, Path | bytes]
"""Path in the repository -> file on disk, or content."""


def push(
    run_dir: Path, repo: str, *, patch_only: bool = False, private: bool = False, dry_run: bool = False
) -> str | None:
    """Upload a run as one commit; returns the commit's address, None after a dry run, which prints what it would be.

    The token is the one huggingface_hub itself finds (`hf auth login`, or HF_TOKEN).

    Raises:
        UserError: the run must not or cannot be published, or the Hub refuses or cannot be reached.
    """
    if not REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UserError(f"--repo: {repo!r} is no repository's name; allowed: user/name")
    manifest = Manifest.read(run_dir)
    check_finished(run_dir, manifest)
    run = artefacts.read(run_dir)
    check_audit(run)
    check_safer(run)
    check_unchanged(run_dir, manifest)
    uploads = gather(run, manifest, repo, patch_only)
    if dry_run:
        _print(uploads, repo)
        return None
    address = _upload(uploads, repo, private, f"Repaired by RouteAlign {manifest.versions.get('routealign', '')}")
    say(f"pushed: {address}")
    return address


# --- what may be published ------------------------------------------------------------------------


def check_finished(run_dir: Path, manifest: Manifest) -> None:
    """`UserError` unless every stage is finished and the evaluation and the audit are there."""
    open_stages = [name for name, stage in manifest.stages.items() if stage.status != "finished"]
    missing = [name for name in ("evaluation.json", "audit.json") if not (run_dir / name).is_file()]
    if open_stages or missing or "export" not in manifest.stages:
        what = [f"stage {name} is not finished" for name in open_stages] + [f"no {name}" for name in missing]
        raise UserError(f"{run_dir}: this run is not finished ({(what or ['nothing was exported'])[0]}); run it again")


def check_unchanged(run_dir: Path, manifest: Manifest) -> None:
    """`UserError` where an exported file is not the one that was audited."""
    for name, digest in manifest.stages["export"].outputs.items():
        if not (run_dir / name).is_file() or sha256(run_dir / name) != digest:
            raise UserError(f"{run_dir / name}: missing, or changed since the run's audit; export the run again")


def check_audit(run: Artefacts) -> None:
    """`UserError` unless the audit found nothing moved that must not, and the checkpoint read back the same."""
    path = run.folder / "audit.json"
    if run.audit.get("reload_ok") is not True:
        raise UserError(f"{path}: the audit failed: the checkpoint read back answers differently (reload_ok)")
    trained_all = run.recipe.get("repair", {}).get("scope") == "full"
    if not trained_all and run.audit.get("untouched_identical") is not True:
        raise UserError(f"{path}: the audit failed: weights outside the expert set moved (untouched_identical)")


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


def gather(run: Artefacts, manifest: Manifest, repo: str, patch_only: bool) -> Uploads:
    """Every file of the commit: checkpoint, patch, card, reproduction."""
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
    card = model_card(run, repo, licence, has_model=not patch_only, has_patch=len(patch) == len(PATCH))
    uploads["README.md"] = without_tokens(card).encode()
    uploads["reproduction.json"] = without_tokens(json.dumps(reproduction(run, manifest), indent=1)).encode()
    return uploads


def reproduction(run: Artefacts, manifest: Manifest) -> dict[str, Any]:
    """All it takes to make the run again and to see that it came out the same; paths are cut to their last part."""
    return {
        "recipe": portable_tree(manifest.recipe),
        "recipe_hash": manifest.recipe_hash,
        "seed": manifest.seed,
        "versions": manifest.versions,
        "stages": {name: {"inputs": s.inputs, "outputs": s.outputs} for name, s in manifest.stages.items()},
        "expert_set": portable_tree(run.expert_set),
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


def _print(uploads: Uploads, repo: str) -> None:
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


def _upload(uploads: Uploads, repo: str, private: bool, message: str) -> str:
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
