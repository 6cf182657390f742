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
        "not_stream_v1",
        "not_stream_v2",
        "not_document",
        "bad_document",  # a document that its schema refuses, or that refers to one that never came
        "missing_key",
        "wrong_type",
        "wrong_dtype",
        "wrong_shape",
        "bad_compression",
        "no_channel",
        "too_large",
        "bad_index",
        "stray_part",  # stream V1: a part without the parts that must come before it
        "missing_part",  # stream V1: a frame whose next part never came
        "wrong_hash",  # stream V1: the pixels are not those that the md5 was made of
        "unsafe_pickle",  # it would have executed code
        "outside_folder",  # a reference to a file that is not ours to read
        "no_reader",  # a reference of a kind that nothing here can read
        "file_absent",  # a referenced file that was not there, or not that far written, within the bound
        "file_damaged",
    )

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in self.REASONS:
            raise AssertionError(f"unregistered quarantine reason {reason!r}")
        # What a sender wrote (a uid, a path, a key) is of any length, and every refusal goes into the log.
        detail = detail if len(detail) <= 1000 else f"{detail[:1000]}..."
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ConfigError(Exception):
    """The operator's fault: exit 2 before a socket opens; the text names the file, the key and the remedy."""


class PriorError(ConfigError):
    """A prior that is missing, damaged, of another format version, or made for another geometry."""


class SinkUnavailable(Exception):  # noqa: N818 - it names a state of the world
    """The world's fault (disk, network, Tiled): retried with back-off while the ledger keeps count."""


class DiskFull(SinkUnavailable):
    """No room on the disk: it may last for hours, so an archive may be told to go on without (`archive.when_full`)."""


class OutOfMemory(Exception):  # noqa: N818 - it names a state of the world
    """The world's fault: a stage had no room for a batch, on the card or in main memory. The batch is computed again in halves.

    Parameters
    ----------
    stage : the stage that had none; it becomes a metric label.
    detail : what could not be had.
    """

    def __init__(self, stage: str, detail: str) -> None:
        super().__init__(f"{stage}: {detail or 'out of memory'}")
        self.stage = stage


class DeviceLost(Exception):  # noqa: N818 - it names a state of the world
    """The world's fault: the card answers every further call of this process with an error, and only a new process gets it back."""
