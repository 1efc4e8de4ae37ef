"""The mean accuracy over the papers' zero-shot tasks, by lm-eval, whose data comes from the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any


def zero_shot_accuracy(model: Any, tokenizer: Any, tasks: Sequence[str]) -> float:
    """Mean over ``tasks`` of lm-eval's ``acc``, which the papers report, in [0, 1].

    Raises:
        ModuleNotFoundError: lm-eval is missing, with the command that installs it.
        ConnectionError: a task's data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the zero-shot tasks need lm-eval: run `pip install lm-eval`") from error
    logging.getLogger("lm-eval").setLevel(logging.ERROR)
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    try:
        found = simple_evaluate(language_model, tasks=list(tasks), num_fewshot=0, verbosity="ERROR")
    except OSError as error:
        raise ConnectionError(
            f"cannot load the data of {', '.join(tasks)} from the Hugging Face hub: {error}. "
            "Other scales use a local task"
        ) from error
    accuracies = [float(found["results"][task]["acc,none"]) for task in tasks]
    return sum(accuracies) / len(accuracies)
