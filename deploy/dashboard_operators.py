"""What operators look at: is the daemon well, is anything lost, is it in time."""

from __future__ import annotations

from dashboard_panels import BAD, GOOD, LEVELS, OK_AT_0, OK_AT_1, ONLY_0, UP, WARNING, YES_NO, Dashboard, Panel, stat, states

LATENCY = 'streamprior:latency_seconds:quantile1m{{output="{output}", instance=~"$instance"}}'


def latency(output: str, description: str) -> Panel:
    ask = LATENCY.format(output=output)
    return Panel(
        f"Latency of the {output}",
        f"{description} From the detector's time stamp. Points are single slow frames: a click leads to what became of one.",
        "s",
        [(ask, "{{instance}} p{{quantile}}"), (EXEMPLARS.format(output=output), "p99, frames")],
        steps=((None, GOOD), (1, WARNING), (10, BAD)),
    )


EXEMPLARS = (
    "histogram_quantile(0.99, sum by (instance, le) "
    '(rate(streamprior_latency_seconds_bucket{{output="{output}", instance=~"$instance"}}[$__rate_interval])))'
)

OPERATORS = Dashboard(
    "streamprior-operators",
    "streamprior: operators",
    "Is the daemon well, is anything lost, is it in time. What to do about a fault is in docs/faults.md and in each alert's runbook.",
    [
        (
            "Now",
            [
                stat("Daemon", "Whether Prometheus reaches the daemon.", "none", "min by (instance) (up{i})", OK_AT_1, UP),
                stat(
                    "Frames a second",
                    "Messages that are, or should be, images; over a minute.",
                    "cps",
                    'sum by (instance) (streamprior:frames_received:rate1m{source=~"$source", instance=~"$instance"})',
                    decimals=1,
                ),
                stat(
                    "Lost without a trace",
                    "Frames of no known fate. Anything but 0 is a fault of streamprior's.",
                    "short",
                    "streamprior_ledger_residue{i}",
                    ONLY_0,
                ),
                stat(
                    "Degradation",
                    "What is left out because frames come faster than they are computed.",
                    "none",
                    "streamprior_degradation_level{i}",
                    LEVELS,
                    ((0, "nothing left out"), (1, "some not refined"), (2, "some without mask"), (3, "dropped at ingest")),
                    high=3,
                ),
                stat(
                    "Path stands still",
                    "A room of the path has been in one step for half a minute.",
                    "none",
                    "streamprior_path_stalled{i}",
                    OK_AT_0,
                    YES_NO,
                    high=1,
                ),
                stat(
                    "Alerts",
                    "Alerts of deploy/prometheus-rules.yaml that fire now.",
                    "short",
                    'count by (instance) (ALERTS{alertname=~"Streamprior.+", alertstate="firing", instance=~"$instance"}) '
                    "or 0 * min by (instance) (up{i})",
                    OK_AT_0,
                ),
            ],
        ),
        (
            "Frames",
            [
                Panel(
                    "In and out",
                    "Received, and taken by each sink. Live sinks (page, live, prometheus) skip frames under load; the archive does not.",
                    "cps",
                    [
                        (
                            "sum by (instance) (rate(streamprior_frames_received_total"
                            '{source=~"$source", instance=~"$instance"}[$__rate_interval]))',
                            "{{instance}} received",
                        ),
                        (
                            "sum by (instance, sink) (rate(streamprior_frames_published_total{i}[$__rate_interval]))",
                            "{{instance}} {{sink}}",
                        ),
                    ],
                ),
                Panel(
                    "Dropped, by reason",
                    "Frames left out on purpose or for want of room; `streamprior ledger --left-out` names them.",
                    "short",
                    [
                        (
                            "sum by (instance, stage, reason) (increase(streamprior_frames_dropped_total{i}[$__rate_interval]))",
                            "{{instance}} {{stage}}/{{reason}}",
                        )
                    ],
                    high=1,
                    firm=False,
                ),
                Panel(
                    "Published without refinement, by reason",
                    "Frames that have a mask alone. overload and disk_short: `streamprior catchup` makes up for them.",
                    "short",
                    [
                        (
                            "sum by (instance, reason) (increase(streamprior_frames_unrefined_total{i}[$__rate_interval]))",
                            "{{instance}} {{reason}}",
                        )
                    ],
                    high=1,
                    firm=False,
                ),
                Panel(
                    "Quarantined, by reason",
                    "Messages that the sender got wrong. docs/faults.md, The wire, says what each reason means.",
                    "short",
                    [
                        (
                            "sum by (instance, reason) (increase(streamprior_frames_quarantined_total{i}[$__rate_interval]))",
                            "{{instance}} {{reason}}",
                        )
                    ],
                    high=1,
                    firm=False,
                ),
                Panel(
                    "Missing",
                    "Frames that closed runs expected and never saw, since the daemon started.",
                    "short",
                    [("streamprior_frames_missing_total{i}", "{{instance}}")],
                    high=1,
                    firm=False,
                    steps=OK_AT_0,
                ),
                Panel(
                    "On their way",
                    "Frames received whose fate is not known yet. It returns to 0 between runs.",
                    "short",
                    [("streamprior_frames_in_flight{i}", "{{instance}}")],
                    high=10,
                    firm=False,
                ),
                Panel(
                    "Connections refused",
                    "Handshakes that failed for want of the right key.",
                    "short",
                    [("increase(streamprior_connections_refused_total{i}[$__rate_interval])", "{{instance}}")],
                    high=1,
                    firm=False,
                    steps=OK_AT_0,
                ),
                Panel(
                    "Share left out",
                    "Dropped over received, five minutes.",
                    "percentunit",
                    [("streamprior:frames_dropped:share5m{i}", "{{instance}}")],
                    high=1,
                    steps=((None, GOOD), (0.001, WARNING), (0.05, BAD)),
                ),
                Panel(
                    "Every n-th frame",
                    "Every n-th frame goes through a step; 1: all of them, 0: none.",
                    "short",
                    [("streamprior_every_nth_frame{i}", "{{instance}} {{step}}")],
                    high=8,
                    firm=False,
                ),
            ],
        ),
        (
            "Latency",
            [
                latency("mask", "When the class map was there."),
                latency("reconstruction", "When the refined object was there."),
                latency("archive", "When the frame was on disk."),
                Panel(
                    "Time in a stage, a frame",
                    "Mean over the frames of the interval; the stages run beside each other on as many workers as compute.workers says.",
                    "s",
                    [
                        (
                            "sum by (instance, stage) (rate(streamprior_stage_seconds_sum{i}[$__rate_interval])) / "
                            "sum by (instance, stage) (rate(streamprior_stage_seconds_count{i}[$__rate_interval]))",
                            "{{instance}} {{stage}}",
                        )
                    ],
                    width=12,
                ),
                Panel(
                    "Degradation over time",
                    "0: everything; 1: some frames not refined; 2: some not classified; 3: dropped at ingest.",
                    "none",
                    [("streamprior_degradation_level{i}", "{{instance}}")],
                    high=3,
                    steps=LEVELS,
                    width=12,
                ),
            ],
        ),
        (
            "Queues and disk",
            [
                Panel(
                    "Queues",
                    "Bytes waiting before each room and sink. The budgets are queues.receive_mb, queues.compute_mb and queues.outbox_mb.",
                    "bytes",
                    [("streamprior_queue_bytes{i}", "{{instance}} {{queue}}")],
                    high=2**20,
                    firm=False,
                ),
                Panel(
                    "Spool",
                    "Messages on disk that a restart would read again; only where recovery.mode is complete, and for documents.",
                    "bytes",
                    [("streamprior_spool_bytes{i}", "{{instance}}")],
                    high=2**20,
                    firm=False,
                ),
                Panel(
                    "Free on the archive's disk",
                    "Below archive.short_mb refinement is left out, below archive.full_mb nothing is archived.",
                    "bytes",
                    [("streamprior_archive_free_bytes{i}", "{{instance}}")],
                    steps=((None, BAD), (256 * 2**20, WARNING), (2048 * 2**20, GOOD)),
                ),
                states(
                    "Sinks",
                    "Whether each sink takes what it is given.",
                    [("streamprior_sink_up{i}", "{{instance}} {{sink}}")],
                    OK_AT_1,
                    UP,
                    high=1,
                ),
                states(
                    "What a restart needs, on disk",
                    "The ledger, and the spool where there is one. down: kept in memory, and gone with the process.",
                    [("streamprior_ledger_on_disk{i}", "{{instance}} ledger"), ("streamprior_spool_up{i}", "{{instance}} spool")],
                    OK_AT_1,
                    UP,
                    high=1,
                ),
                states(
                    "Room on the archive's disk",
                    "As the daemon sees it: archive.short_mb and archive.full_mb.",
                    [("streamprior_archive_space_level{i}", "{{instance}}")],
                    LEVELS,
                    ((0, "room"), (1, "nearly full"), (2, "full")),
                    high=2,
                ),
            ],
        ),
        (
            "Card and memory",
            [
                states(
                    "Card lost",
                    "The CUDA card has failed, and this process computes on the CPU until it is restarted.",
                    [("streamprior_card_lost{i}", "{{instance}}")],
                    OK_AT_0,
                    YES_NO,
                    high=1,
                ),
                Panel(
                    "Workers away from the card",
                    "Workers that compute on the CPU because the card has failed or has no room.",
                    "short",
                    [("streamprior_workers_away_from_card{i}", "{{instance}}")],
                    high=1,
                    firm=False,
                    steps=OK_AT_0,
                ),
                Panel(
                    "Out of memory",
                    "Batches for which there was no room, on a card or in main memory; they were computed again, in smaller ones.",
                    "short",
                    [("increase(streamprior_out_of_memory_total{i}[$__rate_interval])", "{{instance}}")],
                    high=1,
                    firm=False,
                    steps=OK_AT_0,
                ),
            ],
        ),
        (
            "What runs",
            [
                Panel(
                    "Version and identity",
                    "Version, prior and configuration (hashes) and the device, as they stand in every result's provenance.",
                    "none",
                    [("streamprior_build_info{i}", "")],
                    "table",
                    width=24,
                    height=5,
                )
            ],
        ),
    ],
)
