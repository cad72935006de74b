"""A file's header by byte ranges: a few kilobytes of it are asked for, however large it is."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, hf_hub_url

from texforce_hub.errors import HubError
from texforce_hub.files.dtypes import BITS
from texforce_hub.files.header import Header, Span, parse_config, parse_layout
from texforce_hub.files.limits import LONGEST_CONFIG
from texforce_hub.files.scalars import decode_scalar
from texforce_hub.hub.huggingface.client import find_endpoint, make_headers, open_range
from texforce_hub.hub.huggingface.faults import explained
from texforce_hub.hub.huggingface.repository import RemoteFile

_FIRST = 100_000  # bytes: holds the header of most adapters
_WHOLE = 4_000_000  # bytes of a file that is asked for at once, if its single numbers are wanted
_NEAR = 16_384  # bytes between two numbers below which they are asked for together
_MOST = 2  # requests for one file's single numbers: six in all, listing, address, header and PEFT's config included
_MOST_BYTES = 8_000_000  # of these requests together
_WORKERS = 8

Spans = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class RemoteHeader:
    """A header read from afar. Of its single numbers (alphas) ``read`` are known; ``unread`` are left out of it."""

    header: Header
    read: int
    unread: int = 0


def read_remote_header(file: RemoteFile, *, numbers: bool = True) -> RemoteHeader:
    """A safetensors file's checked header, single numbers and PEFT config, without the file being fetched.

    Single numbers may lie scattered over the file: those that more than ``_MOST`` requests would have to collect are
    read in as many stretches spread evenly over it. Without ``numbers``, only those beside the
    header are known.

    Raises:
        HubError: the Hub cannot be asked, or does not answer with byte ranges.
        FileError: the bytes are no safetensors file, or the header does not fit them.
    """
    ranges = _Ranges(file, _WHOLE if numbers and file.blob.size <= _WHOLE else _FIRST)
    config = None if file.config is None else parse_config(_read_config(file.config), str(file.config))
    layout = parse_layout(ranges, file.blob.size, name=str(file))
    single = {name: span for name, span in layout.spans.items() if span.info.numel == 1 and BITS[span.info.dtype] >= 8}
    if numbers:
        ranges.prefetch([(span.begin, span.end) for span in single.values()])
    read = {name: span for name, span in single.items() if ranges.holds(span.begin, span.end)}
    unread = {name for name, span in single.items() if name not in read and len(span.info.shape) < 2}  # no halves
    tensors = {name: span.info for name, span in layout.spans.items() if name not in unread}
    return RemoteHeader(Header(tensors, layout.metadata, dict(_decode(read, ranges)), config), len(read), len(unread))


def _decode(spans: Mapping[str, Span], ranges: "_Ranges") -> Iterator[tuple[str, float]]:
    for name, span in spans.items():
        value = decode_scalar(ranges(span.begin, span.end - span.begin), span.info.dtype)
        if value is not None:
            yield name, value


def _read_config(config: RemoteFile) -> bytes:
    if config.blob.size > LONGEST_CONFIG:
        raise HubError(f"{config}: {config.blob.size} bytes long; no PEFT config is")
    return _Ranges(config)(0, config.blob.size)


class _Ranges:
    """``read(offset, length)`` of a file on the Hub; what was read once is kept."""

    def __init__(self, file: RemoteFile, first: int = _FIRST) -> None:
        self._file = file
        self._first = first
        self._blocks: list[tuple[int, bytes]] = []
        with explained(str(file)):
            self._url, self._headers = _find_bytes(file)

    def __call__(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._file.blob.size)
        for index, (start, block) in enumerate(self._blocks):
            known = start + len(block)
            if start <= offset < known:  # a header can be longer than the first request: only its rest is asked for
                grown = block if end <= known else block + self._ask(known, end)[1]
                self._blocks[index] = (start, grown)
                return grown[offset - start : end - start]
        self._blocks.append(self._ask(offset, max(end, self._first) if offset == 0 else end))
        return self._blocks[-1][1][: end - offset]

    def holds(self, begin: int, end: int) -> bool:
        """Whether these bytes were read already."""
        return any(start <= begin and end <= start + len(block) for start, block in self._blocks)

    def prefetch(self, spans: Spans) -> None:
        """Ask for many small spans at once, neighbours together; for some of them only if they are too scattered."""
        wanted = _bound(sorted(span for span in spans if not self.holds(*span)))
        with ThreadPoolExecutor(_WORKERS) as pool:
            self._blocks += pool.map(lambda span: self._ask(*span), wanted)

    def _ask(self, begin: int, end: int) -> tuple[int, bytes]:
        end = min(end, self._file.blob.size)
        if begin >= end:
            return begin, b""
        with explained(str(self._file)), open_range(self._url, self._headers, begin, end) as answer:
            self._check(answer.status_code, answer.headers.get("Content-Range", ""))
            data = bytearray()
            for piece in answer.iter_bytes():
                data += piece
                if len(data) > end - begin:
                    raise HubError(f"{self._file}: the Hub sends more than it was asked for")
        return begin, bytes(data)

    def _check(self, status: int, content_range: str) -> None:
        if status != 206:
            raise HubError(f"{self._file}: the Hub sends the whole file when asked for a part of it; fetch it")
        total = content_range.rpartition("/")[2]
        if total != str(self._file.blob.size):
            raise HubError(f"{self._file}: listed with {self._file.blob.size} bytes, offered with {total or '?'}")


def _find_bytes(file: RemoteFile) -> tuple[str, dict[str, str]]:
    """Where the bytes of a file are, and the headers to ask with; the token goes to the Hub's own host only."""
    endpoint, headers = find_endpoint(), make_headers()
    url = hf_hub_url(file.repository.repo, file.path, revision=file.repository.commit, endpoint=endpoint)
    claim = get_hf_file_metadata(url, headers=dict(headers), endpoint=endpoint, retry_on_errors=True)
    if urlsplit(claim.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    return claim.location, headers


def _bound(spans: Spans) -> Spans:
    """At most ``_MOST`` requests of ``_MOST_BYTES`` together: for all spans, gaps included, or for some of them."""
    near = _NEAR
    while len(joined := _join(spans, near)) > _MOST:
        near *= 2
    if sum(end - begin for begin, end in joined) <= _MOST_BYTES:
        return joined
    return [_stretch(spans, index * len(spans) // _MOST) for index in range(_MOST)] if len(spans) > _MOST else spans


def _stretch(spans: Spans, first: int) -> tuple[int, int]:
    """From a number on, as many of those behind it as one request may have bytes for."""
    begin, end = spans[first]
    for _, other in spans[first + 1 :]:
        if other - begin <= _MOST_BYTES // _MOST:
            end = other
    return begin, end


def _join(spans: Spans, near: int) -> Spans:
    joined: Spans = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] < near:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
