"""What RASA adds to the report and the card; the report's own sections show the experts, the drift and the losses."""

from __future__ import annotations

from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import MethodReport


def report(run: Artefacts) -> MethodReport:
    routers = " and the routers" if run.audit.get("gate_weights_changed") else ""
    return MethodReport("repair", edited=f"Only the experts named below{routers} were trained")
