"""A file's header by byte ranges: a few kilobytes of it are asked for, however large it is."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from huggingface_hub import get_hf_file_metadata, hf_hub_url

from texforce_hub.errors import HubError
from texforce_hub.header import LONGEST_CONFIG, Header, parse_config, parse_header, parse_layout
from texforce_hub.hub.client import find_endpoint, make_headers, open_range
from texforce_hub.hub.faults import explained
from texforce_hub.hub.repository import RemoteFile

_FIRST = 100_000  # bytes: holds the header of most adapters
_NEAR = 16_384  # bytes between two numbers below which they are asked for together
_MOST = 2_000  # requests for one file's single numbers
_MOST_BYTES = 50_000_000  # of these requests together
_WORKERS = 8


def read_remote_header(file: RemoteFile, *, numbers: bool = True) -> Header:
    """A safetensors file's checked header, single numbers and PEFT config, without the file being fetched.

    Without ``numbers`` its single numbers (alphas, which may lie scattered over the file) are not asked for.

    Raises:
        HubError: the Hub cannot be asked, or does not answer with byte ranges.
        FileError: the bytes are no safetensors file, or the header does not fit them.
    """
    ranges = _Ranges(file)
    config = None if file.config is None else parse_config(_read_config(file.config), str(file.config))
    layout = parse_layout(ranges, file.blob.size, name=str(file))
    if not numbers:
        return Header({name: span.info for name, span in layout.spans.items()}, layout.metadata, {}, config)
    ranges.prefetch([(span.begin, span.end) for span in layout.spans.values() if span.info.numel == 1])
    return parse_header(ranges, file.blob.size, name=str(file), config=config)


def _read_config(config: RemoteFile) -> bytes:
    if config.blob.size > LONGEST_CONFIG:
        raise HubError(f"{config}: {config.blob.size} bytes long; no PEFT config is")
    return _Ranges(config)(0, config.blob.size)


class _Ranges:
    """``read(offset, length)`` of a file on the Hub; what was read once is kept."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._blocks: list[tuple[int, bytes]] = []
        with explained(str(file)):
            self._url, self._headers = _find_bytes(file)

    def __call__(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self._file.blob.size)
        for start, block in self._blocks:
            if start <= offset and end <= start + len(block):
                return block[offset - start : end - start]
        self._blocks.append(self._ask(offset, max(end, _FIRST) if offset == 0 else end))
        return self._blocks[-1][1][: end - offset]

    def prefetch(self, spans: Sequence[tuple[int, int]]) -> None:
        """Ask for many small spans at once, neighbours together."""
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(spans):
            if any(start <= begin and end <= start + len(block) for start, block in self._blocks):
                continue
            if joined and begin - joined[-1][1] < _NEAR:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        if len(joined) > _MOST or sum(end - begin for begin, end in joined) > _MOST_BYTES:
            raise HubError(
                f"{self._file}: its {len(spans)} single numbers (alphas) lie scattered over the file, which "
                f"{len(joined)} requests would have to collect; fetch it: texforce-hub inspect --weights"
            )
        with ThreadPoolExecutor(_WORKERS) as pool:
            self._blocks += pool.map(lambda span: self._ask(*span), joined)

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
