"""The figures of a soak, their limits, and the report as text and JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import linear_regression, median
from typing import TYPE_CHECKING, Any

from tests.patience import patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.soak.rig import Snapshot
    from tests.soak.tally import Tally

__all__ = ["Figures", "Sample", "at_rest", "compared", "mib", "spread"]

MIB = 1 << 20

# Limits. Memory is what the allocator has, not what is in use: threads' arenas and holes make it move by some MiB.
# With each stream that its client cancels, grpcio (1.85) itself loses some 190 bytes (grpc/grpc#43360, which a bare
# server shows as well): 0.05 MiB for a thousand streams here. What we would lose ourselves, objects and blocks show.
GROWTH_NOISE = 6 * MIB
GROWTH_PER_1000 = 0.25 * MIB
OBJECTS_NOISE = 1500
BLOCKS_NOISE = 4000
NATIVE_THREADS_NOISE = 6
_MESSAGES = 25
RECOVERY = patience(5)
SILENCE = patience(3.5)


@dataclass(frozen=True, slots=True)
class Sample:
    """The plugin under load: the loop's time, streams begun so far, resident bytes, open descriptors."""

    at: float
    streams: int
    rss: int
    fds: int


@dataclass(slots=True)
class Figures:
    """Filled in phase by phase. `before` and `after` are the plugin at rest, after the warm-up and at the end."""

    about: dict[str, Any]
    tally: Tally
    samples: list[Sample] = field(default_factory=list)
    before: Snapshot | None = None
    after: Snapshot | None = None
    seconds: float = 0.0
    partials: int = 0
    restarts: int = 0
    lives: int = 0
    complaints: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    cancel_seen: list[float] = field(default_factory=list)
    """Seconds from a client's leaving to the engine's noticing."""
    wrong: list[str] = field(default_factory=list)
    """What is wrong beyond the figures."""

    # Memory

    @property
    def per_1000(self) -> float:
        """Bytes that resident memory grew by while 1000 streams began, by linear regression."""
        if len({sample.streams for sample in self.samples}) < 2:
            return 0.0
        line = linear_regression([sample.streams for sample in self.samples], [sample.rss for sample in self.samples])
        return line.slope * 1000

    @property
    def growth(self) -> float:
        """Bytes between the medians of the first and the last third."""
        third = max(1, len(self.samples) // 3)
        sizes = [sample.rss for sample in self.samples]
        return median(sizes[-third:]) - median(sizes[:third]) if sizes else 0.0

    @property
    def growth_limit(self) -> float:
        """Bytes by which it may grow from the first third to the last."""
        streams = self.samples[-1].streams - self.samples[0].streams if self.samples else 0
        return GROWTH_NOISE + GROWTH_PER_1000 * streams * 2 / 3 / 1000

    # Judging

    def problems(self) -> list[str]:
        """Return the problems; empty when the soak is clean."""
        found = [*self.wrong, *(f"{count} × {text}" for text, count in self.tally.surprises.items())]
        found += [f"{count} × the plugin logged: {text}" for text, count in self.complaints.items()]
        found += [f"left behind: {thing}" for thing in self.left]
        found += compared(self.before, self.after)
        if self.partials:
            found.append(f"{self.partials} unfinished pulls are left after their models were deleted")
        if self.growth > self.growth_limit:
            found.append(f"memory grew by {mib(self.growth)}, allowed are {mib(self.growth_limit)}")
        if late := [crash for crash in self._recoveries(frozen=False) if crash > RECOVERY]:
            found.append(f"{len(late)} times it took more than {RECOVERY:g} s from a crash to an answer")
        if self.tally.longest_silence > SILENCE:
            found.append(f"no stream was completed for {self.tally.longest_silence:.1f} s")
        if not self.tally.counts["streams completed"]:
            found.append("no stream was completed at all")
        return found

    def _recoveries(self, *, frozen: bool) -> list[float]:
        crashes = [crash for crash in self.tally.crashes if crash.frozen is frozen]
        return [crash.answered - crash.at for crash in crashes if crash.answered is not None]

    # Telling

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {
            **self.about,
            "seconds": round(self.seconds, 1),
            "counts": dict(sorted(self.tally.counts.items())),
            "messages": dict(self.tally.messages.most_common()),
            "tokens_per_second": round(self.tally.counts["tokens"] / self.seconds, 1) if self.seconds else 0,
            "engine_lives": self.lives,
            "restarts": self.restarts,
            "crash_to_answer_seconds": spread(self._recoveries(frozen=False)),
            "frost_to_answer_seconds": spread(self._recoveries(frozen=True)),
            "cancel_to_engine_seconds": spread(self.cancel_seen),
            "longest_silence_seconds": round(self.tally.longest_silence, 2),
            "rss_mib": self._rss(),
            "descriptors_under_load": max((sample.fds for sample in self.samples), default=0),
            "at_rest_before": at_rest(self.before),
            "at_rest_after": at_rest(self.after),
            "partials": self.partials,
            "left": self.left,
            "waited_for": self.tally.waited_for,
            "problems": self.problems(),
        }

    def _rss(self) -> dict[str, Any]:
        sizes = [sample.rss for sample in self.samples]
        points = [sizes[min(len(sizes) - 1, len(sizes) * part // 4)] for part in range(5)] if sizes else []
        return {
            "quarters": [round(size / MIB, 1) for size in points],
            "peak": round(max(sizes, default=0) / MIB, 1),
            "growth": round(self.growth / MIB, 2),
            "growth_limit": round(self.growth_limit / MIB, 2),
            "per_1000_streams": round(self.per_1000 / MIB, 3),
        }

    def text(self) -> str:
        """The report for people."""
        counts, shape = self.tally.counts, self.to_json()
        memory = shape["rss_mib"]
        begun, completed, cancelled = (counts[f"streams {what}"] for what in ("begun", "completed", "cancelled"))
        killed, to_death = counts["engines killed"], counts["engines frozen to death"]
        rows = [
            ("load", f"{shape['seconds']} s, {self.about['streams']} streams at once, seed {self.about['seed']}"),
            (
                "streams",
                f"{begun} begun, {completed} completed, {cancelled} left, {self._broken()} ended by an error",
            ),
            ("tokens", f"{counts['tokens']}, {shape['tokens_per_second']} a second"),
            ("unary calls", f"{counts['unary calls']}, {counts['unary calls completed']} completed"),
            ("channels closed", f"{counts['channels closed']}"),
            ("engine processes", f"{self.lives}, {killed} killed, {to_death} frozen to death"),
            ("restarts", f"{self.restarts} by the plugin itself"),
            ("frozen for a moment", f"{counts['engines frozen']}"),
            ("stops and starts", f"{counts['engine stopped and started']}"),
            ("models unloaded", f"{counts['models unloaded']}"),
            ("pulls", f"{counts['pulls']}, {counts['pulls cancelled']} left; partials at the end: {self.partials}"),
            ("seconds from a kill", f"to an answer: {shape['crash_to_answer_seconds']}"),
            ("           from frost", f"to an answer: {shape['frost_to_answer_seconds']}"),
            ("         from leaving", f"to the engine's noticing: {shape['cancel_to_engine_seconds']}"),
            ("longest silence", f"{shape['longest_silence_seconds']} s"),
            ("memory under load", f"{memory['quarters']} MiB, peak {memory['peak']}"),
            ("  growth", f"{memory['growth']} MiB from first to last third (limit {memory['growth_limit']})"),
            ("  a thousand streams", f"{memory['per_1000_streams']} MiB"),
            ("at rest, before", f"{shape['at_rest_before']}"),
            ("at rest, after", f"{shape['at_rest_after']}"),
            ("descriptors under load", f"at most {shape['descriptors_under_load']}"),
            ("left behind", ", ".join(self.left) or "nothing"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
        errors = {what: count for what, count in sorted(counts.items()) if ": " in what}
        lines += ["", "errors that callers met:", *(f"{count:8} {what}" for what, count in errors.items())]
        lines += ["", *(f"{count:8} {message}" for message, count in self.tally.messages.most_common(_MESSAGES))]
        problems = shape["problems"]
        lines += ["", *(f"NOT CLEAN: {problem}" for problem in problems)] if problems else ["", "CLEAN"]
        if self.tally.waited_for:
            lines += ["", "what the plugin waited for when the first call did not end:", *self.tally.waited_for]
        return "\n".join(lines)

    def _broken(self) -> int:
        return sum(count for what, count in self.tally.counts.items() if what.startswith("stream, "))


def compared(before: Snapshot | None, after: Snapshot | None) -> list[str]:
    """Return what has grown at rest."""
    if before is None or after is None:
        return ["the plugin was not seen at rest"]
    found = []
    for what, then, now in (
        ("descriptors", before.fds, after.fds),
        ("tasks", before.tasks, after.tasks),
        ("threads", _without_pool(before.threads), _without_pool(after.threads)),
    ):
        if more := Counter(now) - Counter(then):
            found.append(f"{what} that were not there before: {dict(more)}")
    if after.children:
        found.append(f"{after.children} processes with the engine stopped")
    if after.native_threads > before.native_threads + NATIVE_THREADS_NOISE:
        found.append(f"threads went from {before.native_threads} to {after.native_threads}")
    if after.blocks > before.blocks + BLOCKS_NOISE:
        found.append(f"blocks of Python's memory went from {before.blocks} to {after.blocks}")
    if after.objects > before.objects + OBJECTS_NOISE:
        grown = dict((Counter(after.kinds) - Counter(before.kinds)).most_common(12))
        found.append(f"live objects went from {before.objects} to {after.objects}: {grown}")
    return found


def _without_pool(threads: dict[str, int]) -> dict[str, int]:
    """Less those of asyncio's pool, which has as many as were ever busy at once, up to its limit."""
    return {name: count for name, count in threads.items() if name != "asyncio_N"}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Seconds, their median and the longest."""
    if not values:
        return {}
    shape = {"median": median(values), "max": max(values), "of": len(values)}
    return {name: round(value, 3) for name, value in shape.items()}


def at_rest(snapshot: Snapshot | None) -> dict[str, Any]:
    """Return a short description of a snapshot."""
    if snapshot is None:
        return {}
    return {
        "rss_mib": round(snapshot.rss / MIB, 1),
        "descriptors": snapshot.fds,
        "processes": snapshot.children,
        "tasks": sum(snapshot.tasks.values()),
        "threads": snapshot.native_threads,
        "objects": snapshot.objects,
        "blocks": snapshot.blocks,
    }


def mib(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / MIB:.1f} MiB"
