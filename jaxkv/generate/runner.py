"""The loop of a batch: keep the engine full, write each line's record when its last token is there.

Owns what is in flight (at most twice what the engine runs at once), signals and the progress bar. After a signal the
open lines are dropped unwritten and the next run does them again.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from jaxkv.config import ConfigError, EngineConfig
from jaxkv.generate.journal import Journal
from jaxkv.generate.lines import Lines, digest, pipeline
from jaxkv.generate.work import Preparer, Refused, Work
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.startup import build_engine
from jaxkv.serve.calls import Call

log = logging.getLogger("jaxkv")


def run(config: EngineConfig, input_path: Path, output_path: Path, *, shard: tuple[int, int] = (0, 1),
        overrides: Mapping[str, Any] | None = None, show_progress: bool = False) -> int:
    """Answers the lines of ``input_path`` that ``output_path`` has no record of. Returns the exit code.

    ConfigError for files that do not fit together and for settings that cannot work.
    """
    if output_path.exists() and input_path.exists() and output_path.samefile(input_path):
        raise ConfigError("output must not be the input file")
    with _Signals() as signals, contextlib.closing(Lines(input_path)) as lines, \
            contextlib.closing(Journal(output_path)) as journal:
        numbers = lines.shard(*shard)
        mine = set(numbers)
        journal.check(lambda number: digest(lines[number]) if number in mine else None)
        todo = [number for number in numbers if number not in journal.done]
        if journal.done:
            print(f"{output_path}: {len(journal.done)} of {len(numbers)} lines are done, going on", file=sys.stderr)
        if todo:
            engine = build_engine(config, show_progress=show_progress)
            signals.running = True
            preparer = Preparer(engine.model_name, engine.tokenizer, overrides or {}, config.seed, engine.default_sampling,
                                engine.max_model_len, engine.grammars)
            work = pipeline(lines, todo, preparer, ahead=config.sched.max_num_seqs)
            with _Progress(len(numbers), journal, show_progress) as progress:
                _Batch(engine, journal, work, 2 * config.sched.max_num_seqs, progress).run(signals)
    left = len(numbers) - len(journal.done)
    print(f"{output_path}: {len(journal.done)} of {len(numbers)} lines, {journal.num_errors} of them errors"
          + ("; run the same command again to go on" if left else ""), file=sys.stderr)
    return 128 + signals.number if left else 0


class _Batch:
    def __init__(self, engine: Engine, journal: Journal, work: Iterator[Work | Refused], max_sequences: int,
                 progress: _Progress) -> None:
        self._engine, self._journal, self._work, self._progress = engine, journal, work, progress
        self._max_sequences = max_sequences
        self._open: dict[str, tuple[Work, Call]] = {}  # by request id
        self._num_sequences = 0  # of the open lines

    def run(self, signals: _Signals) -> None:
        """Until every line has its record or a signal came; what is open then leaves the engine."""
        try:
            while not signals.number:
                self._top_up()
                if not self._engine.has_work:
                    return
                self._step()
        finally:
            for request_id in self._open:
                self._engine.abort(request_id)
        while self._engine.has_work:  # what the device is still at
            self._engine.step()

    def _step(self) -> None:
        for delta in self._engine.step():
            self._progress.count(len(delta.token_ids))
            if delta.request_id not in self._open:  # another call of its line has failed
                continue
            work, call = self._open[delta.request_id]
            if delta.finish_reason == "error":
                self._fail(work, delta.error)
                continue
            try:
                record = work.record() if work.take(call, delta) else None
            except Exception:  # ends this line and not the batch
                log.exception("the answer to line %d cannot be written", work.number)
                self._fail(work, "internal error: the answer cannot be written")
                continue
            if record is not None:
                self._close(work)
                self._write(work, record, error=False)

    def _top_up(self) -> None:
        while self._num_sequences < self._max_sequences and (item := next(self._work, None)) is not None:
            refused = item if isinstance(item, Refused) else self._add(item)
            if refused is not None:
                self._write(refused, refused.record, error=True)

    def _add(self, work: Work) -> Refused | None:
        """Hands a line to the engine, all of its prompts or none."""
        self._open |= {call.id: (work, call) for call in work.calls}
        self._num_sequences += work.num_sequences
        try:
            for call in work.calls:
                self._engine.add_request(call.id, call.prompt, call.params, call.hints)
        except ValueError as error:
            self._drop(work)
            return work.refuse(error)
        return None

    def _fail(self, work: Work, why: str) -> None:
        self._drop(work)
        self._write(work, work.fail(why).record, error=True)

    def _drop(self, work: Work) -> None:
        """Forgets a line, in the engine too."""
        for call in work.calls:
            self._engine.abort(call.id)
        self._close(work)

    def _close(self, work: Work) -> None:
        for call in work.calls:
            del self._open[call.id]
        self._num_sequences -= work.num_sequences

    def _write(self, item: Work | Refused, record: Mapping[str, Any], *, error: bool) -> None:
        self._journal.write(item.number, item.digest, record, error=error)
        self._progress.line()


class _Progress:
    """A bar over lines that shows generated tokens per second and errors."""

    def __init__(self, total: int, journal: Journal, shown: bool) -> None:
        self._journal = journal
        self._tokens = 0
        self._bar = tqdm(total=total, initial=len(journal.done), desc="lines", unit="line", disable=not shown,
                         dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def line(self) -> None:
        if not self._bar.disable:
            seconds = max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{self._tokens / seconds:.0f} tokens/s, {self._journal.num_errors} errors",
                                      refresh=False)
        self._bar.update()


class _Signals:
    """SIGINT and SIGTERM: at once while nothing runs, after the current step once it does."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self.running = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.running or self.number:
            raise SystemExit(128 + number)
        self.number = number
