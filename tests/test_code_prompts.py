"""The built-in code tasks: solutions pass, wrong ones fail, splits share nothing."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from mechmerge.behaviors.code_prompts import CodeTask, code_tasks
from mechmerge.behaviors.prompts import SPLITS
from mechmerge.behaviors.sandbox import check_arguments, judge, run_code
from tests.test_sandbox import confined

TASKS = [task for split in SPLITS for task in code_tasks(split)]


def test_enough_of_them() -> None:
    assert len(TASKS) >= 120
    assert len(code_tasks("test")) >= 50
    assert {task.difficulty for task in code_tasks("test")} == {"easy", "medium"}
    assert len({task.name for task in TASKS}) == len({task.prompt.text for task in TASKS}) == len(TASKS)
    assert len(code_tasks("test", "unseen")) == len({task.prompt.topic for task in code_tasks("test")})
    assert code_tasks("train", "unseen") == code_tasks("calibrate", "unseen") == []


def test_splits_share_nothing() -> None:
    for what in ("family", "entry", "solution"):
        sets = []
        for split in SPLITS:
            tasks = code_tasks(split)
            sets.append(
                {
                    "family": {task.prompt.topic for task in tasks},
                    "entry": {task.prompt.arguments["entry"] for task in tasks},
                    "solution": {re.sub(r"\w+\(", "f(", task.solution, count=1) for task in tasks},
                }[what]
            )
        assert sum(map(len, sets)) == len(set.union(*sets)), what


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_say_all(split: str) -> None:
    for tier in ("seen", "unseen"):
        for task in code_tasks(split, tier):  # type: ignore[arg-type]
            entry = task.prompt.arguments["entry"]
            assert f"def {entry}(" in task.solution
            calls = re.findall(rf"{entry}\([^()]*\)", task.prompt.text)
            example = next(call for call in calls if f"def {call}" not in task.solution)
            assert repr(eval(example, _space(task))) in task.prompt.text  # noqa: S307
            assert not re.search(
                r"\$|\{(task|call|result|entry|signature)\}", task.prompt.text + task.prompt.arguments["tests"]
            )
            assert task.solution not in task.prompt.text
            check_arguments(task.prompt.arguments)


def _space(task: CodeTask) -> dict[str, object]:
    space: dict[str, object] = {}
    exec(task.solution, space)  # noqa: S102
    return space


@confined
@pytest.mark.parametrize("split", SPLITS)
def test_solutions_pass_and_wrong_ones_fail(split: str) -> None:
    def verdicts(task: CodeTask) -> tuple[bool, list[bool]]:
        entry, tests = task.prompt.arguments["entry"], task.prompt.arguments["tests"]
        return judge(f"```python\n{task.solution}```", task.prompt.arguments), [
            run_code(w, tests, entry).passed for w in task.wrong
        ]

    tasks = code_tasks(split)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        for task, (right, wrong) in zip(tasks, pool.map(verdicts, tasks), strict=True):
            assert right, task.name
            assert len(wrong) >= 3
            assert not any(wrong), (task.name, wrong)
