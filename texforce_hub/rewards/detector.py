"""MediaPipe's graphs that find hands and faces, without the rest of that package.

Only its graphs and messages are imported: its own ``__init__`` asks for jax, OpenCV and matplotlib, 1.2 GB that finding
a hand does not use. The models lie in its wheel.
"""

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
_PACKAGES = ("mediapipe", "mediapipe.python.solutions")
_MOST = 4  # hands or faces of a picture that are looked at
_SECOND = 1_000_000  # microseconds between pictures; the graphs are made for films, but told to remember nothing


@dataclass(frozen=True)
class Found:
    """A hand or a face in a picture.

    detection: how sure the detector is, in [0, 1]; presence: how sure the landmark model is, in [0, 1]
    points: landmarks ``(n, 3)`` in pixels, x to the right, y down, z away and on the scale of x
    world: the same in metres, seen as a body, where the graph knows them
    """

    detection: float
    presence: float
    points: Points
    world: Points | None = None


@dataclass(frozen=True)
class Graph:
    """A graph of MediaPipe, and its streams that a score needs.

    settings: beside how many to look for; threshold: the least score of a detection; logits: whether presence is one
    detections, boxes: what was detected; kept: the boxes looked at; points, world, presence: of each of these
    """

    file: str
    settings: Mapping[str, Any]
    threshold: float
    detections: str
    boxes: str
    kept: str
    points: str
    presence: str
    world: str | None = None
    logits: bool = False


HANDS = Graph(
    "hand_landmark/hand_landmark_tracking_cpu.binarypb",
    {"num_hands": _MOST, "model_complexity": 1, "use_prev_landmarks": False},
    threshold=0.3,
    detections="palm_detections",
    boxes="hand_rects_from_palm_detections",
    kept="hand_rects",
    points="single_hand_landmarks",
    presence="handlandmarkcpu__hand_presence_score",
    world="single_hand_world_landmarks",
)
FACES = Graph(
    "face_landmark/face_landmark_front_cpu.binarypb",
    {"num_faces": _MOST, "with_attention": False, "use_prev_landmarks": False},
    threshold=0.3,
    detections="face_detections",
    boxes="face_rects_from_detections",
    kept="face_rects",
    points="face_landmarks",
    presence="facelandmarkcpu__face_presence_score",
    logits=True,
)


class Detector:
    """A graph, started by the first picture. What it finds in one does not depend on those before."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._seen: dict[str, list[Any]] = {}
        self._lock, self._time = threading.Lock(), 0

    def find(self, picture: NDArray[np.uint8]) -> list[Found]:
        """What is in a picture ``(h, w, 3)``; nothing where the landmark model says that there is none."""
        with self._lock:
            self._seen = {}
            self._time += _SECOND
            frame = self._create.create_image_frame(
                image_format=self._bindings("image_frame").ImageFormat.SRGB, data=np.ascontiguousarray(picture)
            )
            self._running.add_packet_to_input_stream("image", frame.at(self._time))
            self._running.wait_until_idle()
            return list(self._read(*picture.shape[:2]))

    def _read(self, height: int, width: int) -> Iterator[Found]:
        graph, lists, messages = self.graph, self._get.get_proto_list, self._get.get_proto
        detections, boxes, kept = (
            [item for packet in self._seen.get(name, []) for item in lists(packet)]
            for name in (graph.detections, graph.boxes, graph.kept)
        )
        points, world = (
            {packet.timestamp.value: messages(packet) for packet in self._seen.get(name or "", [])}
            for name in (graph.points, graph.world)
        )  # both are of a loop over the boxes, whose steps their time counts
        for box, packet in zip(kept, self._seen.get(graph.presence, [])):
            step = packet.timestamp.value
            if step in points:
                detection = next(d for d, other in zip(detections, boxes) if other == box)
                presence = self._get.get_float(packet)
                yield Found(
                    float(detection.score[0]),
                    float(1 / (1 + np.exp(-presence))) if graph.logits else float(presence),
                    _stack(points[step]) * (width, height, width),
                    _stack(world[step]) if step in world else None,
                )

    @cached_property
    def _running(self) -> Any:
        graph = self.graph
        running = self._bindings("calculator_graph").CalculatorGraph(graph_config=self._read_config())
        for name in filter(
            None, (graph.detections, graph.boxes, graph.kept, graph.points, graph.presence, graph.world)
        ):
            running.observe_output_stream(name, self._note)
        make = {bool: self._create.create_bool, int: self._create.create_int}
        running.start_run({name: make[type(value)](value) for name, value in graph.settings.items()})
        return running

    def _note(self, stream: str, packet: Any) -> None:
        self._seen.setdefault(stream, []).append(packet)

    def _read_config(self) -> Any:
        """The graph's configuration with our threshold."""
        path = Path(self._package.__path__[0]) / "modules" / self.graph.file
        self._bindings("resource_util").set_resource_dir(str(path.parents[3]))
        whole = self._bindings("validated_graph_config").ValidatedGraphConfig()
        whole.initialize(binary_graph_path=str(path))
        config = import_module("mediapipe.framework.calculator_pb2").CalculatorGraphConfig()
        config.ParseFromString(whole.binary_config)
        for node in config.node:
            if node.calculator == "TensorsToDetectionsCalculator":
                _set_threshold(node, self.graph.threshold)
        return config

    def _bindings(self, name: str) -> Any:
        return import_module(f"{self._package.__name__}.python._framework_bindings.{name}")

    @cached_property
    def _create(self) -> Any:
        return import_module(f"{self._package.__name__}.python.packet_creator")

    @cached_property
    def _get(self) -> Any:
        return import_module(f"{self._package.__name__}.python.packet_getter")

    @cached_property
    def _package(self) -> ModuleType:
        return import_mediapipe()


def score_pictures(
    detector: Detector, images: NDArray[np.float32], score: Callable[[NDArray[np.uint8], Found], float]
) -> NDArray[np.float32]:
    """For each picture ``(b, 3, h, w)`` in [0, 1] the mean score of what is found in it; 0 where nothing is."""
    pictures = (images.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    rows = [[score(picture, finding) for finding in detector.find(picture)] for picture in pictures]
    return np.array([np.mean(row) if row else 0.0 for row in rows], np.float32)


def import_mediapipe() -> ModuleType:
    """The package, with its modules importable, but none of what its ``__init__`` files import.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")  # it tells of every delegate that it makes
    warnings.filterwarnings("ignore", message="SymbolDatabase", category=UserWarning)
    for name in _PACKAGES:
        if name not in sys.modules:
            source = find_spec(name)
            if source is None or source.submodule_search_locations is None:
                raise ImportError(f"{name} is not installed", name=name)
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = list(source.submodule_search_locations)
    for solution in ("hands", "face_mesh"):  # these import the messages that the graphs are configured by
        import_module(f"mediapipe.python.solutions.{solution}")
    return sys.modules["mediapipe"]


def _set_threshold(node: Any, threshold: float) -> None:
    """Of a node's options, which graphs write in one of two ways."""
    messages = import_module("mediapipe.calculators.tensor.tensors_to_detections_calculator_pb2")
    options = messages.TensorsToDetectionsCalculatorOptions
    for packed in node.node_options:
        message = options()
        packed.Unpack(message)
        message.min_score_thresh = threshold
        packed.Pack(message)
    if not node.node_options:
        node.options.Extensions[options.ext].min_score_thresh = threshold


def _stack(message: Any) -> Points:
    return np.array([(point.x, point.y, point.z) for point in message.landmark])
