"""Grades that were paid for once, by the hash of what was asked: a local file without any text."""

from __future__ import annotations

import json
import os
from pathlib import Path

from data_prep.errors import UserError
from data_prep.json_lines import read_json_lines
from trainer.evaluation.judges.grade import NOTHING, Grade


class GradeCache:
    """Hash -> grade, kept in a file (mode 0600) as they come; None: in memory alone.

    What the judge could not say is not kept, so that it is asked again. Raises `UserError` for a file of something
    else.
    """

    def __init__(self, path: str | None) -> None:
        self._path = Path(path) if path is not None else None
        self._grades: dict[str, Grade] = {}
        if self._path is not None and self._path.exists():
            for number, row in read_json_lines(self._path):
                known = {True, False, None}
                if set(row) != {"key", "refuses", "harmful"} or not {row["refuses"], row["harmful"]} <= known:
                    raise UserError(f"{self._path}, line {number}: no grade; allowed: a file that this judge wrote")
                self._grades[row["key"]] = Grade(row["refuses"], row["harmful"])

    def __contains__(self, key: str) -> bool:
        return key in self._grades

    def get(self, key: str) -> Grade:
        """The grade of a key; nothing where there is none."""
        return self._grades.get(key, NOTHING)

    def keep(self, key: str, grade: Grade) -> None:
        """Remember a grade, in the file too."""
        if grade == NOTHING:
            return
        self._grades[key] = grade
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "refuses": grade.refuses, "harmful": grade.harmful}) + "\n"
        # One write of one line: a file that a killed run leaves is whole.
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(line)
