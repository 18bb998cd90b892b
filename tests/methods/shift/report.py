from trainer.reporting.artefacts import Artefacts
from trainer.reporting.method_report import MethodReport, MethodSection


def report(run: Artefacts) -> MethodReport:
    moved = run.recipe["shift"]["parameter"]
    section = MethodSection("shift", "What was shifted", [("Attention output", moved)])
    return MethodReport("shift", [section], f"Only {moved} was moved.")
