"""Tasks of lm-evaluation-harness: loading them once, and measuring a model on them again and again."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from lightning_replay.benchmarks.figures import ERROR, Figure, figures_of_tasks, jackknife_error
from lightning_replay.benchmarks.harness import HarnessModel
from lightning_replay.models.head import OutputHeads
from lightning_replay.models.language_model import LanguageModel
from lightning_replay.utilities.distributed import Processes
from lightning_replay.utilities.validation import is_number, is_whole

__all__ = ["HarnessTasks"]

_RESAMPLES = 1000
"""Resamples of a bootstrap, of which the standard errors of perplexities are made; those of means need none."""
_NO_POOL = "DISABLE_MULTIPROC"
"""The variable that keeps the harness from forking a process for each core, within a process that trains."""


class HarnessTasks:
    """Some tasks of lm-evaluation-harness.

    Args:
        names: Names of tasks, groups or tags.
        limit: Documents of each task at most; a share of them if below 1.
        num_fewshot: Examples before each document; by default as many as the task says.
        include_path: A folder, or several, with task files of one's own.
        apply_chat_template: Whether to put requests through the tokenizer's chat template.
        batch_size: Rows in a forward.
        max_length: Tokens in a row at most; by default the model's context.
        seed: Seed of the few-shot examples.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        names: Sequence[str],
        limit: int | float | None = None,
        num_fewshot: int | None = None,
        include_path: str | Path | Sequence[str | Path] | None = None,
        apply_chat_template: bool | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        seed: int = 1234,
    ) -> None:
        if limit is not None and not is_whole(limit, 1) and not (is_number(limit) and 0 < limit < 1):
            raise ValueError(f"`limit` is documents of each task, at least 1, or a share below 1; got {limit!r}.")
        if num_fewshot is not None and not is_whole(num_fewshot, 0):
            raise ValueError(f"`num_fewshot` is a number of examples, at least 0, or None; got {num_fewshot!r}.")
        if not is_whole(batch_size, 1):
            raise ValueError(f"`batch_size` is rows in a forward, at least 1; got {batch_size!r}.")
        if max_length is not None and not is_whole(max_length, 2):
            raise ValueError(f"`max_length` is tokens in a row, at least 2, or None; got {max_length!r}.")
        self.names = list(names)
        self.limit = limit
        self.num_fewshot = num_fewshot
        self.folders = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
        self.apply_chat_template = bool(apply_chat_template)
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self._loaded: Any = None
        self._warned = False

    def load(self, processes: Processes) -> None:
        """Find the tasks and read their documents; all processes call this.

        Raises:
            MisconfigurationException: If one can't be loaded, with its name.
        """
        self._loaded = processes.run_on_all_ranks(self._load)

    def _load(self) -> Any:
        for folder in self.folders:
            if not Path(folder).is_dir():
                raise MisconfigurationException(f"`include_path` names folders of task files; {folder} is no folder.")
        manager = TaskManager(include_path=self.folders, include_defaults=False) if self.folders else None
        if manager is None or not set(self.names) <= set(manager.all_tasks):
            # The harness's own tasks are thousands of files.
            manager = TaskManager(include_path=self.folders or None)
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in self.names:
            try:
                for part, found in manager.load([name]).items():
                    loaded[part].update(found)
            except Exception as error:  # of any type: a task's file may name code, and its documents are anywhere
                where = ", ".join(map(str, self.folders)) or "none"
                raise MisconfigurationException(
                    f"The task {name!r} of lm-evaluation-harness can't be loaded: {type(error).__name__}: {error}. "
                    f"`lm-eval ls tasks` lists the names. Files of your own are read from `include_path`: {where}. "
                    "Without a network, the documents have to be on this machine."
                ) from error
        own = {name: task.get_config("num_fewshot") for name, task in loaded["tasks"].items()}
        without = [name for name, shots in own.items() if shots == 0 and self.num_fewshot]
        if without:
            rank_zero_warn(f"`num_fewshot` has no effect on {without}, whose files say that they take no examples.")
        for name, task in loaded["tasks"].items():
            shots = own[name] if self.num_fewshot is None or name in without else self.num_fewshot
            task.set_config(key="num_fewshot", value=shots or 0)
        return loaded

    def evaluate(
        self,
        model: LanguageModel,
        tokenizer: Any,
        heads: OutputHeads,
        processes: Processes,
        before_batch: Callable[[], object] = lambda: None,
    ) -> dict[str, Figure]:
        """Measure a model on the tasks; all processes call this and get the same figures.

        Args:
            model: The model, in evaluation mode and without gradients.
            tokenizer: Its tokenizer.
            heads: The output heads found so far.
            processes: What share the requests.
            before_batch: Called before each forward.

        Raises:
            MisconfigurationException: If the tokenizer is not of Hugging Face, has no chat template where one is asked
                for, or a task asks for what is not supported.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise MisconfigurationException(
                "Tasks of lm-evaluation-harness are text, so they need the model's Hugging Face tokenizer; got "
                f"{type(tokenizer).__name__}. Pass `tokenizer`, or give the datamodule or the module an attribute "
                "`tokenizer`."
            )
        if self.apply_chat_template and not tokenizer.chat_template:
            raise MisconfigurationException(
                "`apply_chat_template=True`, but the tokenizer has no chat template. Take the tokenizer of an "
                "instruction-tuned model, or set `tokenizer.chat_template`."
            )
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seed)
        harness = HarnessModel(model, tokenizer, self.batch_size, self.max_length, heads, processes, before_batch)
        with _quietly(processes.rank > 0):
            results = evaluate(
                lm=harness,
                task_dict=self._loaded,
                limit=self.limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=True,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=True,
            )
        if harness.cut and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{harness.cut} requests of the tasks {self.names} are longer than the model's rows of "
                f"{harness.max_length} tokens. Their beginning is cut off."
            )
        self._add_errors(results)
        return figures_of_tasks(results, self.names)

    def _add_errors(self, results: Any) -> None:
        """Add the standard errors of perplexities of words and bytes, which the harness leaves out."""
        for name, samples in results["samples"].items():
            metrics = results["results"][name]
            for metric, aggregate in self._loaded["tasks"][name].aggregation().items():
                key = f"{metric}{ERROR},none"
                if aggregate in (bits_per_byte, weighted_perplexity) and key in metrics and len(samples) > 1:
                    metrics[key] = jackknife_error(aggregate, [sample[metric] for sample in samples])


@contextmanager
def _quietly(hidden: bool) -> Iterator[None]:
    """Without other processes and, if wanted, without the harness's progress bars."""
    before = os.environ.get(_NO_POOL)
    os.environ[_NO_POOL] = "1"
    try:
        with ExitStack() as stack:
            if hidden:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        if before is None:
            del os.environ[_NO_POOL]
        else:
            os.environ[_NO_POOL] = before
