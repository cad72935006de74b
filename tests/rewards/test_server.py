"""The reward server: right numbers or one line, whatever the network, a worker or a client does."""

import http.client
import http.server
import io
import json
import random
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from texforce_hub.errors import RewardError
from texforce_hub.rewards import wire
from texforce_hub.rewards.remote import Address, Remote
from texforce_hub.rewards.reward import Reward, resolve_reward, resolve_rewards
from texforce_hub.rewards.server import RewardServer
from texforce_hub.rewards.serving import as_arrays

IMAGES = torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "ä ☃", "a red circle", "d"]


def first_pixels(images, prompts):
    return images[:, 0, 0, 0] + torch.tensor([float(len(prompt)) for prompt in prompts])


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serve(*rewards):
    return RewardServer({reward.name: as_arrays(reward) for reward in rewards})


def workers(*servers):
    return [Address.parse(server.address) for server in servers]


@pytest.fixture
def server():
    with running(serve(Reward("mine", first_pixels), *resolve_rewards(["brightness", "jpeg"]))) as server:
        yield server


def test_a_server_gives_the_numbers_that_the_reward_gives_here(server):
    for name in ("brightness", "jpeg"):
        remote = resolve_reward(f"{server.address}/{name}=0.5")
        assert torch.equal(remote(IMAGES, PROMPTS), resolve_reward(name)(IMAGES, PROMPTS))
        assert (remote.weight, remote.differentiable) == (0.5, False)
    assert torch.equal(resolve_reward(f"{server.address}/mine")(IMAGES, PROMPTS), first_pixels(IMAGES, PROMPTS))


def test_png_pictures_are_read_too(server):
    files = []
    for image in (IMAGES * 255).round().byte():
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
        files.append(buffer.getvalue())
    images, prompts = wire.read_question(wire.write_png_question(files, PROMPTS))
    assert torch.equal(torch.from_numpy(images), (IMAGES * 255).round() / 255)
    assert prompts == PROMPTS


def test_float_pictures_that_were_received_are_not_copied_and_can_be_written_to():
    message = bytearray(wire.write_question(IMAGES.numpy(), PROMPTS))
    images, _ = wire.read_question(message)
    assert torch.equal(torch.from_numpy(images), IMAGES)
    message[-4:] = bytes(4)
    assert images[-1, -1, -1, -1] == 0
    shifted = bytes(wire.write_question(IMAGES.numpy(), ["a", "b", "c", "d"])).replace(b" ", b"", 1)
    length = int.from_bytes(shifted[:8], "little") - 1
    images, _ = wire.read_question(bytearray(length.to_bytes(8, "little") + shifted[8:]))
    assert torch.equal(torch.from_numpy(images), IMAGES)  # where a header's length leaves numbers between words


HEADERS = [
    "5",
    "{}",
    "[" * 10_000,
    '{"prompts": [1]}',
    '{"prompts": ["a"], "shape": [1, 3, -1, 2]}',
    '{"prompts": ["a"], "shape": [1, 3, 100000, 100000], "dtype": "float32"}',
    '{"prompts": ["a"], "shape": [2, 3, 1, 1], "dtype": "uint8"}',
    '{"prompts": ["a"], "png": [-1]}',
]


def post(server, path, data, headers=None):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request("POST", path, data, headers or {})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_what_is_no_question_is_refused_in_one_line(server):
    good = wire.write_question(IMAGES.numpy(), PROMPTS)
    bad = [b"", b"x", good[:30], good[:-1], good + b"x", (2**60).to_bytes(8, "little") + b"{}"]
    for header in HEADERS:
        text = header.encode()
        bad.append(len(text).to_bytes(8, "little") + text + b"123456")
    for message in bad:
        status, answer = post(server, "/brightness", message)
        assert status in (400, 413)
        assert "\n" not in answer["error"]
    status, answer = post(server, "/beauty", good)
    assert (status, "ask for one of mine, brightness, jpeg" in answer["error"]) == (400, True)
    status, _ = post(server, "/brightness", b"", {"Content-Length": str(10**12)})
    assert status == 413
    assert post(server, "/brightness", good)[0] == 200  # and it lives


def test_a_reward_that_fails_in_the_server_is_named_once_with_the_prompt(server):
    calls = []

    def fails(images, prompts):
        calls.append(len(prompts))
        raise ValueError("no circles")

    server.scores["mine"] = as_arrays(Reward("mine", fails))
    with pytest.raises(RewardError, match=r"for the prompt 'a'.*no circles"):
        resolve_reward(f"{server.address}/mine")(IMAGES[:1], PROMPTS[:1])
    assert len(calls) == 2  # the call and the search for the culprit; it is not asked again


@pytest.mark.parametrize("address", ["http://", "https://x/y", "http://host:port", "http://h:99999/x"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(RewardError, match=r"reward server|expected"):
        resolve_reward(address)


def test_a_server_that_is_not_there_is_one_line_after_all_attempts():
    waits = []
    score = Remote([Address("127.0.0.1:9", "/")], attempts=4, back_off=1, wait=waits.append)
    with pytest.raises(RewardError, match=r"no reward server answered 4 times for the prompt 'a'.*127\.0\.0\.1:9"):
        score(IMAGES, PROMPTS)
    assert waits == [1, 2, 4]


class Faulty(RewardServer):
    """A server that answers wrongly as long as there are faults to inject, never thrice in a row."""

    kinds = ("500", "break", "half", "garbage", "count", "nan", "null", "huge", "status", "silent")

    def __init__(self, faults, seed):
        super().__init__({"mine": as_arrays(Reward("mine", first_pixels))})
        self.faults, self.random, self.row, self.injected = faults, random.Random(seed), 0, []
        self.RequestHandlerClass = FaultyHandler
        self.released = threading.Event()

    def next_fault(self):
        with self.locks["mine"]:
            if len(self.injected) >= self.faults or self.row == 2 or self.random.random() < 0.3:
                self.row = 0
                return None
            self.row += 1
            self.injected.append(self.random.choice(self.kinds[: 10 if len(self.injected) % 20 == 0 else 9]))
            return self.injected[-1]


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        message = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.next_fault()
        scores = self.server.score(self.path, message)
        text = {
            "garbage": "{{{", "count": json.dumps({"scores": [*scores, 1.0]}), "null": json.dumps({"scores": None}),
            "nan": json.dumps({"scores": [float("nan")] * len(scores)}), "huge": " " * (wire.LONGEST_ANSWER + 9),
        }.get(fault or "", json.dumps({"scores": scores})).encode()  # fmt: skip
        if fault == "break":
            return
        if fault == "silent":
            self.server.released.wait(5)
            return
        self.send_response(503 if fault == "500" else 302 if fault == "status" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if fault == "half" else text)

    def log_message(self, *arguments):
        pass


def test_of_two_hundred_faults_none_loses_or_hangs_a_score():
    with running(Faulty(100, seed=1)) as first, running(Faulty(100, seed=2)) as second:
        waits = []
        score = Remote(workers(first, second), attempts=99, timeout=0.5, wait=waits.append)
        rounds = 0
        while len(first.injected) + len(second.injected) < 200:
            rounds += 1
            images = torch.rand(2, 3, 4, 4)
            prompts = [f"prompt {rounds}", "x"]
            assert torch.allclose(score(images, prompts), first_pixels(images, prompts))
        first.released.set()
        second.released.set()
        assert len(waits) == 200  # each fault cost one more attempt, and nothing else did
        assert {*first.injected, *second.injected} == set(Faulty.kinds)


def count_pictures(server, counts):
    asked = server.score

    def count(path, message):
        counts[server.address].append(len(wire.read_question(message)[1]))
        return asked(path, message)

    server.score = count


def test_workers_share_the_pictures_in_turn_and_in_order():
    mine = Reward("mine", first_pixels)
    with running(serve(mine)) as first, running(serve(mine)) as second:
        counts = {first.address: [], second.address: []}
        for server in (first, second):
            count_pictures(server, counts)
        score = Remote(workers(first, second))
        for number in (4, 1, 1, 3):
            wanted = first_pixels(IMAGES[:number], PROMPTS[:number])
            assert torch.equal(score(IMAGES[:number], PROMPTS[:number]), wanted)
        assert list(counts.values()) == [[2, 1, 2], [2, 1, 1]]


def test_a_port_that_is_taken_is_one_line(server):
    with pytest.raises(RewardError, match="cannot listen"):
        RewardServer({}, port=server.server_address[1])


def test_a_server_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import texforce_hub.rewards.server"
    subprocess.run([sys.executable, "-c", code], check=True)
