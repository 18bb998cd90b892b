"""Publish a finished run on the Hub: what may be published is checked, then gathered, then uploaded."""

from __future__ import annotations

from pathlib import Path

from trainer.pipeline import evidence
from trainer.release.hub import (
    Made,
    check_audit,
    check_finished,
    check_name,
    check_safer,
    gather,
    publish,
    show,
)
from trainer.reporting import artefacts
from trainer.reporting.method_report import Report
from trainer.run.manifest import Manifest
from trainer.runtime.console import say


def push(
    run_dir: Path,
    repo: str,
    *,
    patch_only: bool = False,
    private: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> str | None:
    """Upload a run as one commit; returns the commit's address, None after a dry run, which prints what it would be.

    Args:
        report: what the run's method adds to the card.

    Raises:
        UserError: the run must not or cannot be published, or the Hub refuses or cannot be reached.
    """
    check_name(repo)
    manifest = Manifest.read(run_dir)
    stages = manifest.current
    check_finished(run_dir, {name: stage.status for name, stage in stages.items()})
    manifest.require_settled(run_dir)
    run = artefacts.read(run_dir)
    proven = evidence.check(manifest, stages, run)
    check_audit(run)
    check_safer(run)
    made = Made(
        recipe=manifest.recipe,
        recipe_hash=manifest.recipe_hash,
        seed=manifest.seed,
        versions=manifest.versions,
        stages={name: {"inputs": stage.inputs, "outputs": stage.outputs} for name, stage in proven.items()},
    )
    edited = report(run).edited if report else None
    uploads = gather(run, made, repo, proven["export"].outputs, patch_only=patch_only, edited=edited)
    if dry_run:
        show(uploads, repo)
        return None
    message = f"Repaired by RouteAlign {manifest.versions.get('routealign', '')}"
    address = publish(uploads, repo, message, private=private)
    say(f"pushed: {address}")
    return address
