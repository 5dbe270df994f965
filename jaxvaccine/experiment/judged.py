"""By whom an evaluation's folder was judged, and where results by others are."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxvaccine.experiment.panel import DISAGREEMENTS, JUDGING
from jaxvaccine.json_files import read_json, write_json

RESULTS = "results.json"
JUDGE, EARLIER = "judge.json", "judged"


def give_way(run_dir: Path, judged_by: Mapping[str, Any]) -> None:
    """Results by another judge leave the folder's top for one of their own, and those by this judge come back.

    Answers stay: they do not depend on who judges them.

    judged_by: as of `judging.judge_record`.
    """
    def folder(record: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
        # Of a panel the text may be long, and have paths in it.
        judge = "".join(c if c.isalnum() or c in "_-." else "_" for c in record["flags"]["judge"])[:40]
        return run_dir / EARLIER / f"{judge}-{name}"

    def move(source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        # The results last: what has them is whole.
        for path in [*source.glob("predictions_*.jsonl"), source / "report.md", source / DISAGREEMENTS,
                     source / JUDGING, source / JUDGE, source / RESULTS]:
            if path.exists():
                os.replace(path, target / path.name)

    record = run_dir / JUDGE
    if record.exists() and read_json(record) != judged_by:
        if (run_dir / RESULTS).exists():
            earlier = folder(read_json(record))
            logging.warning("%s: results by another judge go to %s", run_dir, earlier)
            move(run_dir, earlier)
        record.unlink(missing_ok=True)
    if not record.exists():
        if folder(judged_by).is_dir():
            move(folder(judged_by), run_dir)
        write_json(record, judged_by)
