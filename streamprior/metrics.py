"""Every metric's name, unit and labels, once; label values are registered at start so that alerts see zeros."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from streamprior.errors import WireError
from streamprior.ladder import Rung
from streamprior.records import Flag, MosaicImage, Place, Result

DROP_REASONS = (
    ("receive", "queue_full"),
    ("decode", "duplicate"),
    ("decode", "late"),
    ("classify", "overload"),
    *((stage, "out_of_memory") for stage in ("prepare", "classify", "match", "refine")),
    ("archive", "unavailable"),
    ("archive", "disk_full"),
    ("path", "shutdown"),
)

UNREFINED_REASONS = ("overload", "disk_short", "empty", "no_support")
"""Why a frame may be published with its mask alone."""

ARMS = ("prototype", "flat", "none")
"""Starts that a result may have come from; none: it was not refined."""

# From a tenth of a millisecond (one fused kernel) to the minute that a stuck disk may take; seconds.
_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)


_Told = Mapping[str, tuple[str, Callable[[], float]]]
"""Name of a gauge -> what it means, and where its value is looked up."""


class Meters:
    """The daemon's own registry and its children, made once: looking a label up for every frame costs more than counting."""

    def __init__(self, source: str, stages: Iterable[str], sinks: Iterable[str], classes: Iterable[str], signals: Iterable[str]) -> None:
        self.registry = CollectorRegistry()
        self.classes, self.signals = tuple(classes), tuple(signals)
        ns: dict[str, Any] = {"namespace": "streamprior", "registry": self.registry}
        self._received = Counter("frames_received_total", "Messages that are, or should be, images.", ["source"], **ns).labels(source)
        published = Counter("frames_published_total", "Frames that a sink has taken.", ["sink"], **ns)
        self._published = {sink: published.labels(sink) for sink in sinks}
        self._dropped = Counter("frames_dropped_total", "Frames left out on purpose or for want of room.", ["stage", "reason"], **ns)
        for stage, reason in DROP_REASONS:
            self._dropped.labels(stage, reason)
        unrefined = Counter("frames_unrefined_total", "Frames published without refinement although the recipe has it.", ["reason"], **ns)
        self._unrefined = {reason: unrefined.labels(reason) for reason in UNREFINED_REASONS}
        self._quarantined = Counter("frames_quarantined_total", "Messages the sender got wrong.", ["reason"], **ns)
        for reason in WireError.REASONS:
            self._quarantined.labels(reason)
        self._stage = _Histogram("stage_seconds", "Time a batch spends in a stage, per frame.", "stage", stages)
        outputs = ("mask", "reconstruction", "archive")
        self._latency = _Histogram("latency_seconds", "From the detector's time stamp to the output.", "output", outputs)
        for histogram in (self._stage, self._latency):
            self.registry.register(histogram)
        iou = Gauge("mask_iou", "Intersection over union of the newest mask.", ["class", "reference"], **ns)
        self._iou = {(name, reference): iou.labels(name, reference) for name in self.classes for reference in ("prior", "previous")}
        self._chi2 = Gauge("chi2", "chi2 of the newest reconstruction.", **ns)
        self._chi2_floor = Gauge("chi2_floor", "What photon noise alone makes of the newest reconstruction's chi2.", **ns)
        self._class_distance = Gauge("class_distance", "Mean quantisation distance of the newest frame, PCA units.", **ns)
        self._prior_distance = Gauge("prior_distance", "Part of the newest frame that its nearest prototype leaves unexplained.", **ns)
        kept = Counter("arm_kept_total", "Frames by the start that was kept; none: not refined.", ["arm"], **ns)
        self._kept = {arm: kept.labels(arm) for arm in ARMS}
        self._abstained = Counter("frames_abstained_total", "Frames that no prototype was near to.", **ns)
        score = Gauge("drift_score", "Deviation from the prior's baseline, in its standard deviations.", ["signal"], **ns)
        self._score = {signal: score.labels(signal) for signal in self.signals}
        self.drift_limit = Gauge("drift_limit", "Drift score beyond which a signal counts as drifted (drift.limit).", **ns)
        alarm = Gauge("drift_alarm", "1 while the drift score is beyond its limit.", ["signal"], **ns)
        self._alarm = {signal: alarm.labels(signal) for signal in self.signals}
        self._mosaic_frames, self._mosaic = _mosaic_gauges(ns)
        up = Gauge("sink_up", "1 while the sink takes what it is given.", ["sink"], **ns)
        self._up = {sink: up.labels(sink) for sink in sinks}
        self.degradation_level, self.refine_every, self.classify_every = 0, 1, 1
        degraded = Gauge(
            "degradation_level", "0: everything; 1: some frames not refined; 2: some not classified; 3: dropped at ingest.", **ns
        )
        degraded.set_function(lambda: self.degradation_level)
        every = Gauge("every_nth_frame", "Every n-th frame goes through a step; 0: none does.", ["step"], **ns)
        every.labels("refine").set_function(lambda: self.refine_every)
        every.labels("classify").set_function(lambda: self.classify_every)
        self._space = _space_gauges(ns)
        self._build = Info("build", "Version and identity of what runs.", **ns)

    def build_info(self, **facts: str) -> None:
        self._build.info(facts)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text of a scrape and its content type, as the scraper's Accept header asks."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def received(self, count: int = 1) -> None:
        self._received.inc(count)

    def published(self, sink: str, count: int) -> None:
        self._published[sink].inc(count)

    def dropped(self, stage: str, reason: str, count: int = 1) -> None:
        self._dropped.labels(stage, reason).inc(count)

    def unrefined(self, reasons: Iterable[str]) -> None:
        """Frames that were published without refinement, a reason each."""
        for reason in reasons:
            self._unrefined[reason].inc()

    def quarantined(self, reason: str) -> None:
        self._quarantined.labels(reason).inc()

    def stage(self, name: str, seconds: float) -> None:
        self._stage.observe(name, [seconds])

    def thought(self, results: Sequence[Result]) -> None:
        """Frames' starts, and the latency of mask and reconstruction from the detector's time stamp where there is a believable one."""
        for arm in ARMS:
            self._kept[arm].inc(sum(result.arm == arm for result in results))
        self._abstained.inc(sum(bool(result.flags & Flag.ABSTAINED) for result in results))
        since: dict[str, list[float]] = {"classify": [], "refine": []}
        through: dict[str, list[Result]] = {"classify": [], "refine": []}
        for result in results:
            for stage, at in result.clock:
                if stage in since:
                    since[stage].append(_since_exposure(result, at))
                    through[stage].append(result)
        self._latency.observe("mask", since["classify"], through["classify"])
        self._latency.observe("reconstruction", since["refine"], through["refine"])

    def archived(self, results: Sequence[Result], at: float) -> None:
        self._latency.observe("archive", [_since_exposure(result, at) for result in results], results)

    def newest(self, result: Result) -> None:
        """The newest frame's numbers; drift scores in standard deviations of the prior's baseline."""
        self._chi2.set(result.chi2)
        self._chi2_floor.set(result.chi2_floor)
        self._class_distance.set(result.class_distance)
        self._prior_distance.set(result.distance)
        for reference, values in (("prior", result.iou), ("previous", result.iou_previous)):
            for name, value in values.items():
                self._iou[name, reference].set(value)
        for signal, value in result.score.items():
            self._score[signal].set(value)
            self._alarm[signal].set(signal in result.alarms)

    def mosaic(self, image: MosaicImage) -> None:
        """The numbers of the newest image of the sample; NaN where one is not known."""
        for place, gauge in self._mosaic_frames.items():
            gauge.set((image.frames.place == place).sum())
        told = {
            "chi2": image.chi2,
            "disagreement": image.disagreement,
            "resolution_metres": image.resolution if image.unit == "m" else float("nan"),
            "resolution_pixels": image.resolution / (sum(image.pixel) / 2),
            "passes": image.passes,
            "warnings": len(image.warnings),
            "pixels": image.object.size,
        }
        for name, value in told.items():
            self._mosaic[name].set(value)

    def degraded(self, rung: Rung) -> None:
        """The ladder stands on another rung."""
        self.degradation_level, self.refine_every, self.classify_every = rung.level, rung.refine_every, rung.classify_every

    def sink_up(self, sink: str, up: bool) -> None:
        self._up[sink].set(up)

    def watch_path(self, stalled: Callable[[], bool]) -> None:
        """Whether the path moves, looked up when somebody scrapes."""
        self._gauges({"path_stalled": ("1 while a room of the path has been in one step for half a minute; the log names it.", stalled)})

    def watch_spool(self, nbytes: Callable[[], int], safe: Callable[[], bool]) -> None:
        """What a restart would find, looked up when somebody scrapes."""
        told: _Told = {
            "spool_bytes": ("Messages on disk that a restart would read again.", nbytes),
            "spool_up": ("1 while what a restart needs is written to disk; 0: were the process killed now, it would be lost.", safe),
        }
        self._gauges(told)

    def watch_crew(self, out_of_memory: Callable[[], int], card_lost: Callable[[], bool], away_from_card: Callable[[], int]) -> None:
        """How the workers fare, looked up when somebody scrapes."""
        told: _Told = {
            "card_lost": ("1: the card has failed, and this process computes on the CPU until it is restarted.", card_lost),
            "workers_away_from_card": ("Workers that compute on the CPU because the card has failed or has no room.", away_from_card),
        }
        self._gauges(told)
        text = "Batches for which there was no room, on a card or in main memory; they were computed again, in smaller ones."
        self.registry.register(_CountAtScrape("out_of_memory", text, out_of_memory))

    def watch_ledger(self, unaccounted: Callable[[], int], on_disk: Callable[[], bool]) -> None:
        """Whether the ledger can be trusted, looked up when somebody scrapes."""
        told: _Told = {
            "ledger_residue": ("Frames whose fate nobody knows and nobody will: anything but 0 is a fault of streamprior's.", unaccounted),
            "ledger_on_disk": ("1 while the ledger is written to disk; 0: it goes on in memory, and ends with the process.", on_disk),
        }
        self._gauges(told)

    def watch_webhook(self, up: Callable[[], bool], undelivered: Callable[[], int]) -> None:
        """Whether those who are to hear of alarms do, looked up when somebody scrapes; without a webhook everybody does."""
        self._gauges({"webhook_up": ("1 while messages about alarms are taken, or none was sent; 0: the last try failed.", up)})
        text = "Messages about alarms that were given up: refused, too old, or more than can wait."
        self.registry.register(_CountAtScrape("webhook_undelivered", text, undelivered))

    def _gauges(self, told: _Told) -> None:
        for name, (text, value) in told.items():
            Gauge(name, text, namespace="streamprior", registry=self.registry).set_function(value)

    def watch_space(self, free_bytes: Callable[[], float], level: Callable[[], float]) -> None:
        """Look the archive's disk up at every scrape: neither call may wait for that disk."""
        for gauge, look in zip(self._space, (free_bytes, level), strict=True):
            gauge.set_function(look)

    def watch(
        self,
        in_flight: Callable[[], int],
        missing: Callable[[], int],
        queues: Mapping[str, Callable[[], int]],
        refused: Callable[[], int] = lambda: 0,
    ) -> None:
        """Numbers that are looked up when somebody scrapes, instead of being kept up to date for nobody."""
        self.registry.register(_AtScrape(in_flight, missing, queues, refused))


def _space_gauges(ns: Mapping[str, Any]) -> tuple[Gauge, Gauge]:
    free = Gauge("archive_free_bytes", "Bytes free on the archive's disk; NaN where not known.", **ns)
    free.set(float("nan"))
    return free, Gauge("archive_space_level", "0: room; 1: nearly full, a warning; 2: full, nothing is archived.", **ns)


def _mosaic_gauges(ns: Mapping[str, Any]) -> tuple[dict[Place, Gauge], dict[str, Gauge]]:
    """(gauge of each place, gauges by name) of the image that ptychography builds up; other recipes leave them as they are."""
    frames = Gauge("mosaic_frames", "Frames of the newest mosaic's run by what became of them.", ["place"], **ns)
    helps = {
        "chi2": "chi2 of the mosaic's prediction of the newest frames.",
        "disagreement": "Rms difference of the images from odd and from even frames, over the contrast.",
        "resolution_metres": "Half period at which the halves' ring correlation falls below half a bit; NaN where not known.",
        "resolution_pixels": "The same in pixels of the mosaic; NaN where it is not known.",
        "passes": "Passes of frames through the mosaic beyond the first of each.",
        "warnings": "Sentences of warning that the newest mosaic carries.",
        "pixels": "Pixels of the newest mosaic, cropped to where light was.",
    }
    gauges = {name: Gauge(f"mosaic_{name}", text, **ns) for name, text in helps.items()}
    # Before the first mosaic these are not known, and 0 would be the best there can be.
    for name in ("chi2", "disagreement", "resolution_metres", "resolution_pixels"):
        gauges[name].set(float("nan"))
    return {place: frames.labels(place.name.lower()) for place in Place}, gauges


def _since_exposure(result: Result, at: float) -> float:
    """Seconds since the detector's time stamp; since the socket where that clock is absent or off by more than an hour.

    Not below 0, which a host's clock that was set back would make of it: a histogram's sum may only grow.
    """
    since = at - result.detector_time if result.detector_time is not None else -1.0
    return since if 0 <= since < 3600 else max(0.0, at - result.received)


class _Histogram(Collector):
    """A histogram that takes the values of a whole batch at once: prometheus_client's own takes a lock and a search for each.

    values : of its one label, registered at start. Where frames are given, the slowest of a batch is its bucket's exemplar: the frame
    that a dashboard leads to, told to scrapers that ask for OpenMetrics.
    """

    def __init__(self, name: str, documentation: str, label: str, values: Iterable[str]) -> None:
        self._name, self._documentation, self._label = f"streamprior_{name}", documentation, label
        self._counts = {value: [0] * (len(_BUCKETS) + 1) for value in values}
        self._sums = dict.fromkeys(self._counts, 0.0)
        self._slowest: dict[str, dict[int, Exemplar]] = {value: {} for value in self._counts}
        self._changing = threading.Lock()

    def observe(self, value: str, observed: Sequence[float], frames: Sequence[Result] = ()) -> None:
        with self._changing:
            counts = self._counts[value]
            for one in observed:
                counts[bisect_left(_BUCKETS, one)] += 1  # a value on a bound belongs to the bucket that ends there
            self._sums[value] += sum(observed)
            if frames:
                seconds = max(observed)
                self._slowest[value][bisect_left(_BUCKETS, seconds)] = _exemplar(frames[observed.index(seconds)], seconds)

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        bounds = [*map(floatToGoString, (*_BUCKETS, math.inf))]
        with self._changing:
            for value, counts in self._counts.items():
                told = self._slowest[value]
                buckets: list[Any] = [
                    (bound, count, told.get(i)) for i, (bound, count) in enumerate(zip(bounds, accumulate(counts), strict=True))
                ]
                family.add_metric([value], buckets, self._sums[value])
        yield family


def _exemplar(result: Result, seconds: float) -> Exemplar:
    """Of the result's name alone, which lets its arrays go. OpenMetrics allows 128 characters and a sender may choose a longer uid."""
    return Exemplar({"run": result.run[:64], "frame": str(result.index)}, seconds, result.received)


class _CountAtScrape(Collector):
    def __init__(self, name: str, documentation: str, count: Callable[[], int]) -> None:
        self._name, self._documentation, self._count = f"streamprior_{name}", documentation, count

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._documentation, value=self._count())


class _AtScrape(Collector):
    def __init__(
        self, in_flight: Callable[[], int], missing: Callable[[], int], queues: Mapping[str, Callable[[], int]], refused: Callable[[], int]
    ) -> None:
        self._in_flight, self._missing, self._queues, self._refused = in_flight, missing, queues, refused

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("streamprior_frames_in_flight", "Frames received whose fate is not known yet.", value=self._in_flight())
        yield CounterMetricFamily(
            "streamprior_frames_missing_total", "Frames that closed runs expected and never saw.", value=self._missing()
        )
        yield CounterMetricFamily(
            "streamprior_connections_refused_total", "Handshakes that failed for want of the right key.", value=self._refused()
        )
        queues = GaugeMetricFamily("streamprior_queue_bytes", "Bytes waiting in a bounded queue.", labels=["queue"])
        for name, size in self._queues.items():
            queues.add_metric([name], size())
        yield queues
