"""Tasks of lm-evaluation-harness from local files, which need no network.

A file of texts becomes a task of perplexity: `{"text": ...}` a line. A file of questions becomes one of multiple
choice: `{"question": ..., "choices": [...], "answer": 2}` a line, the answer counted from 0; the model's choice is the
one that is likeliest behind the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_ultramem.errors import DataError

_TEXTS: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in (
            ("bits_per_byte", "bits_per_byte"),
            ("byte_perplexity", "weighted_perplexity"),
            ("word_perplexity", "weighted_perplexity"),
        )
    ],
}
_CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def write_tasks(folder: Path, *, texts: Sequence[Path] = (), choices: Sequence[Path] = ()) -> list[str]:
    """Writes a task file for each data file into `folder` (for lm_eval's --include_path); returns the tasks' names.

    Raises DataError if a file cannot be read or a line of it has another form, and for two files of one name.
    """
    names: list[str] = []
    kinds: tuple[tuple[dict[str, Any], Sequence[Path], dict[str, type]], ...] = (
        (_TEXTS, texts, {"text": str}),
        (_CHOICES, choices, {"question": str, "choices": list, "answer": int}),
    )
    for kind, files, fields in kinds:
        for file in files:
            _check(file, fields)
            name = "local_" + re.sub(r"\W+", "_", file.stem)
            if name in names:
                raise DataError(f"{file}: two files would both become the task {name}; legal: files of different names")
            names.append(name)
            task = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
                "test_split": "test",
                **kind,
                "metadata": {"version": 1.0},
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return names


def _check(file: Path, fields: dict[str, type]) -> None:
    legal = ", ".join(f'"{name}": {kind.__name__}' for name, kind in fields.items())
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not lines:
        raise DataError(f"{file} is empty; legal: lines of {{{legal}}}")
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            fits = all(isinstance(found[name], kind) for name, kind in fields.items())
            fits = fits and ("answer" not in fields or 0 <= found["answer"] < len(found["choices"]))
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise DataError(f"{file}, line {number}: {line[:60]!r}; legal: {{{legal}}}")
