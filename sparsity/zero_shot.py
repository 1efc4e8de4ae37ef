"""Accuracy on tasks of the lm-evaluation-harness (lm-eval), such as the seven that pruning papers report.

The model is evaluated as it is, in this process: dense, masked, compressed or under adapters. lm-eval (the extra
``eval``) asks it for the log-likelihood of every answer and counts how often the right one is the most likely.

    acc = mean over questions of [ argmax over choices c of sum_t log p(c_t | question, c_<t) is the right one ]

``acc_norm`` divides each sum by the answer's length in bytes first. Wanda, PERP and Pruner-Zero report the mean of
``acc`` over the seven tasks. Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trisparse.sparsity.modes import evaluating
from trisparse.sparsity.provenance import provenance
from trisparse.sparsity.zero_shot_report import TaskResult, ZeroShotReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

# Where lm-eval's own tasks of the papers are: reading these folders takes no time, all of its 15,000 files 13 s.
_FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
PAPER_TASKS = tuple(_FOLDERS)
"""The tasks of Wanda (Table 2), PERP (appendix) and Pruner-Zero (Table 3)."""
TASK_SETS = {"zero-shot": PAPER_TASKS, "perp": PAPER_TASKS}


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] = "zero-shot",
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> ZeroShotReport:
    """Evaluate a causal language model on tasks of lm-eval.

    Args:
        model: a transformers language model, compressed or not, or a PeftModel; left in the mode that it came in.
        tokenizer: the model's; it must have a beginning or an end of text.
        tasks: names, also as one string with commas. ``"zero-shot"`` and ``"perp"`` stand for the papers' seven.
        limit: of each task take only the first so many questions.
        num_fewshot: examples before each question; None takes what the task says, which is 0 for the papers'.
        include_path: a folder of task files (YAML) of your own, which go before lm-eval's of the same name. Such a
            file is code: lm-eval runs the functions and the templates in it.
        batch_size: questions in one forward.
        seed: chooses the examples.
        trust_remote_code: let a task download and run a metric of the Hugging Face hub, or run the code that a model
            wrote; without it, a task that does so is refused.
        progress: show lm-eval's progress bars.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task, an argument out of range, a tokenizer without both tokens, a task that needs
            ``trust_remote_code``.
        ConnectionError: a task's data is neither in the cache nor to be had from the hub; says what to do.
    """
    names = _names(tasks)
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path must be a folder of task files, got {str(include_path)!r}")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have a beginning or an end of text (bos_token or eos_token): it has neither")
    evaluate, language_model, manager_class = _lm_eval()
    padding, drawn = tokenizer.pad_token, random.getstate()
    begun = time.perf_counter()
    with _quiet(progress) as notes, evaluating(model):
        try:
            manager = _manager(manager_class, names, include_path)
            found = _load_tasks(manager, names, num_fewshot, trust_remote_code)
            for task in found:
                if num_fewshot is not None or task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=num_fewshot or 0)
                task.set_fewshot_seed(seed=seed)
            answers = evaluate(
                language_model(model, tokenizer, batch_size, progress),
                {"tasks": {task.task_name: task for task in found}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=1000,  # of metrics that are no mean; that of a mean is a formula
                log_samples=False,
                confirm_run_unsafe_code=trust_remote_code,
            )
        finally:
            random.setstate(drawn)  # loading data draws from it
            tokenizer.pad_token = padding  # lm-eval gives the tokenizer one where it has none
    return ZeroShotReport(
        tasks=[_result(name, answers) for name in answers["results"] if name in answers["configs"]],
        limit=limit,
        seed=seed,
        truncated=notes.truncated,
        model=type(model).__name__,
        **provenance(model),
        seconds=round(time.perf_counter() - begun, 1),
    )


def _names(tasks: str | Sequence[str]) -> list[str]:
    given = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    names = [name.strip() for name in given]
    if not names or not all(names):
        raise ValueError(f"tasks must be names of tasks, such as 'boolq,rte', got {tasks!r}")
    return list(dict.fromkeys(one for name in names for one in TASK_SETS.get(name, (name,))))


def _lm_eval() -> tuple[Any, Any, Any]:
    """lm-eval's ``evaluate``, a function that wraps a model for it, and its ``TaskManager``."""
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"tasks are run by lm-eval, which is not there: pip install 'trisparse[eval]' ({error})"
        ) from error

    class InThisProcess(HFLM):  # type: ignore[misc]
        """lm-eval's wrapper of a loaded model, whose progress bars can be switched off."""

        def __init__(self, model: Any, tokenizer: Any, batch_size: int, progress: bool) -> None:
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
            self._quiet = not progress

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self._quiet)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or self._quiet)

    return evaluate, InThisProcess, TaskManager


def _load_tasks(manager: Any, names: list[str], num_fewshot: int | None, trust_remote_code: bool) -> list[Any]:
    """Tasks with their data."""
    import datasets

    for name in names:
        if name not in manager.all_tasks:
            where = f", nor has {manager.include_path[0]}" if manager.include_path else ""
            raise ValueError(f"lm-eval has no task {name!r}{where}")
    found: list[Any] = []
    for name in names:
        with _hub_metrics(name, trust_remote_code):
            try:
                found += list(manager.load([name])["tasks"].values())
            except datasets.exceptions.DatasetNotFoundError as error:
                raise ValueError(f"the data of task {name!r} is nowhere: {error}") from error
            except OSError as error:  # no network, the hub is down, offline mode, or a local file that is missing
                raise ConnectionError(
                    f"cannot load the data of task {name!r}: {error}. Without a network, run the same command once "
                    "where there is one and copy the cache of datasets (~/.cache/huggingface, or $HF_HOME) here, or "
                    "write a task file whose data is a local file (dataset_path: json) and pass its folder as "
                    "include_path (--include-path)"
                ) from error
    for task in found:
        if num_fewshot and task.get_config("num_fewshot") == 0:  # which lm-eval lets stand
            raise ValueError(f"num_fewshot is {num_fewshot}, but the task {task.config.task!r} fixes it to 0")
    return found


def _manager(manager_class: Any, names: list[str], include_path: str | Path | None) -> Any:
    """An index of tasks that has ``names``: of the folders where they should be, else of all that lm-eval has."""
    import lm_eval.tasks
    from lm_eval.tasks._index import Kind

    root = Path(lm_eval.tasks.__file__).parent
    own = [] if include_path is None else [str(include_path)]
    folders = {str(root / _FOLDERS[name]) for name in names if name in _FOLDERS}
    manager = manager_class(include_path=[*sorted(folders), *own], include_defaults=False)
    index = manager.task_index
    if all(name in index and index[name].kind in (Kind.TASK, Kind.PY_TASK) for name in names):
        return manager
    return manager_class(include_path=own or None)


@contextmanager
def _hub_metrics(task: str, trusted: bool) -> Iterator[None]:
    """Refuse metrics that lm-eval has not got itself: it would download their code from the hub and run it."""
    import evaluate

    wanted: list[str] = []

    def refuse(path: str, *args: Any, **options: Any) -> Any:
        wanted.append(path)
        raise PermissionError(path)  # which lm-eval logs and drops

    load = evaluate.load
    if not trusted:
        evaluate.load = refuse
    try:
        yield
    finally:
        evaluate.load = load
        if wanted:  # instead of what lm-eval makes of a metric that is missing
            raise ValueError(
                f"task {task!r} has the metric {wanted[0]!r}, which is code on the Hugging Face hub: pass "
                "trust_remote_code=True (--trust-remote-code) if you trust it"
            )


class _Notes(logging.Handler):
    """Takes what lm-eval logs: the defaults that it chose, and the questions that it shortened, which are counted."""

    truncated = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.truncated += "exceeds model's maximum length" in record.getMessage()


@contextmanager
def _quiet(progress: bool) -> Iterator[_Notes]:
    """Keep lm-eval's log off the screen, and without ``progress`` its bars and those of datasets."""
    import datasets
    import lm_eval.api.task

    logger, notes = logging.getLogger("lm_eval"), _Notes(logging.WARNING)
    propagate, bars, bar = logger.propagate, datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    logger.addHandler(notes)
    logger.propagate = False
    if not progress:
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = partial(bar, disable=True)  # of the questions, which nothing else switches off
    try:
        yield notes
    finally:
        lm_eval.api.task.tqdm = bar
        logger.removeHandler(notes)
        logger.propagate = propagate
        if not bars:
            datasets.enable_progress_bars()


def _result(name: str, answers: dict[str, Any]) -> TaskResult:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in answers["results"][name].items():
        metric, comma, which = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        shown = metric if which == "none" else f"{metric},{which}"
        if metric.endswith("_stderr"):
            errors[shown.replace("_stderr", "", 1)] = float(value)
        else:
            values[shown] = float(value)
    return TaskResult(
        name=name,
        version=answers["versions"].get(name),
        questions=answers["n-samples"][name]["effective"],
        num_fewshot=answers["n-shot"].get(name, 0),
        metrics=values,
        standard_errors=errors,
    )
