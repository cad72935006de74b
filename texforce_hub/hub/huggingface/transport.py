"""The HTTP library under ``huggingface_hub``: ``httpx2`` since 2.0, before that ``httpx``, of the same interface."""

try:
    import httpx2 as httpx
except ModuleNotFoundError:  # huggingface_hub 1.x
    import httpx  # type: ignore[import-not-found, no-redef]

__all__ = ["httpx"]
