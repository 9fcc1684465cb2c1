"""Local files become tasks of lm-evaluation-harness; what is wrong with one is said before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_ultramem.errors import DataError
from megatron_ultramem.evaluation.tasks import write_tasks

TEXT = '{"text": "a"}\n'
QUESTION = '{"question": "a", "choices": ["b", "c"], "answer": 1}\n'


def test_a_task_for_every_file(tmp_path: Path) -> None:
    texts, questions = tmp_path / "held-out.jsonl", tmp_path / "quiz.jsonl"
    texts.write_text(TEXT)
    questions.write_text(QUESTION * 3)
    assert write_tasks(tmp_path, texts=[texts], choices=[questions]) == ["local_held_out", "local_quiz"]
    task = yaml.safe_load((tmp_path / "local_held_out.yaml").read_text())
    assert task["output_type"] == "loglikelihood_rolling"
    assert task["dataset_kwargs"] == {"data_files": {"test": str(texts)}}


@pytest.mark.parametrize(
    ("texts", "choices", "named"),
    [
        ("", "", "is empty"),
        ("{", "", "texts.jsonl, line 1: '{'; legal"),
        (TEXT + '{"word": "a"}', "", "line 2"),
        ('{"text": 3}', "", "line 1"),
        ("[]", "", "line 1"),
        (TEXT, QUESTION.replace("1}", "2}"), "choices.jsonl, line 1"),
        (TEXT, '{"question": "a", "choices": "b"}', "choices.jsonl, line 1"),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path: Path, texts: str, choices: str, named: str) -> None:
    (tmp_path / "texts.jsonl").write_text(texts)
    (tmp_path / "choices.jsonl").write_text(choices)
    with pytest.raises(DataError) as error:
        write_tasks(tmp_path, texts=[tmp_path / "texts.jsonl"], choices=[tmp_path / "choices.jsonl"])
    assert named in str(error.value)


def test_files_must_exist_and_have_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        write_tasks(tmp_path, texts=[tmp_path / "none.jsonl"])
    for name in ("a-b", "a_b"):
        (tmp_path / f"{name}.jsonl").write_text(TEXT)
    with pytest.raises(DataError, match="both become the task local_a_b"):
        write_tasks(tmp_path, texts=[tmp_path / "a-b.jsonl", tmp_path / "a_b.jsonl"])
