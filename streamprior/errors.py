"""What went wrong, sorted by whose fault it is; the daemon's answer follows from the class alone."""


class WireError(ValueError):
    """The sender's fault: the message (or frame) is quarantined with `reason`, counted, and the path goes on.

    Parameters
    ----------
    reason : str
        One of the fixed words in `REASONS`; it becomes a metric label, so it never holds free text.
    detail : str
        A sentence for a person: what was found and what was expected.
    """

    # Fixed, because every label value is registered at start so that alerts see zeros.
    REASONS = (
        "not_cbor",
        "not_stream_v2",
        "missing_key",
        "wrong_type",
        "wrong_dtype",
        "wrong_shape",
        "bad_compression",
        "no_channel",
        "too_large",
        "bad_index",
    )

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in self.REASONS:
            raise AssertionError(f"unregistered quarantine reason {reason!r}")
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ConfigError(Exception):
    """The operator's fault: exit 2 before a socket opens; the text names the file, the key and the remedy."""


class PriorError(ConfigError):
    """A prior that is missing, damaged, of another format version, or made for another geometry."""


class SinkUnavailable(Exception):  # noqa: N818 - it names a state of the world
    """The world's fault (disk, network, Tiled): retried with back-off while the ledger keeps count."""
