"""What torch's flight recorder holds of this process's collectives in flight: which, of which sizes, in which state on the device."""

from __future__ import annotations

MAX_CHARS = 4000


def flight_record() -> str:
    """JSON text of the collectives in flight; empty where torch records none.

    torch's own dumps on a time-out are pickles, which nobody here reads; it offers the same as JSON under names that depend on the build. How much
    is recorded is torch's to say (TORCH_NCCL_TRACE_BUFFER_SIZE): a buffer of ours would cost time in every collective that is timed.
    """
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return ""
    try:
        text = dump(True, True)  # with collectives, only active ones
    except (RuntimeError, TypeError):
        return ""
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return text[:MAX_CHARS] if '"entries"' in text else ""
