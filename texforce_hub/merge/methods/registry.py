"""The table of merge methods: names, options and laws, read from the functions themselves."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from torch import Tensor

from texforce_hub.adapter.dense import Dense, Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.errors import MergeError
from texforce_hub.settings import suggest_name

Mergeable = LowRank | Dense | Vector
MergeFunction = Callable[..., Mergeable]
#: ``f(terms, **options) -> coefficients (n)`` of a linear combination.
Coefficients = Callable[..., Sequence[float]]

#: Yields every layer's source positions and changes; may be asked for more than once.
Stream = Callable[[], Iterable[tuple[tuple[int, ...], Sequence[Mergeable]]]]
#: ``f(stream, options)``: the smallest magnitude kept of each source, or ``None`` where the options ask for no survey.
Survey = Callable[[Stream, Mapping[str, Any]], Mapping[int, float] | None]

#: identity: one source at weight 1 comes back as it was.
#: gauge: ``(up G, G⁻¹ down)`` instead of ``(up, down)`` changes nothing.
#: scale: all changes times c > 0, and the result is times c.
#: order: the sources' order does not matter.
#: negation: a source at +w and again at −w leave nothing.
Law = Literal["identity", "gauge", "scale", "order", "negation"]

METHODS: dict[str, "Method"] = {}

_AVERAGING = frozenset({"linear", "average", "mean", "weighted_average", "add"})


@dataclass(frozen=True, slots=True)
class Context:
    """What a method may need to know beyond the layer in hand.

    seed: of this layer, derived from the run's seed and the layer's name
    positions: which source each change belongs to (a source may lack the layer); empty: 0, 1, 2 …
    floors: smallest magnitude kept of each change, where the trim was surveyed over the whole adapter
    """

    seed: int = 0
    positions: tuple[int, ...] = ()
    floors: tuple[float, ...] | None = None

    def with_floors(self, floors: Mapping[int, float] | None) -> "Context":
        """The same context with the floors of the sources that have this layer."""
        return self if floors is None else replace(self, floors=tuple(floors[p] for p in self.positions))


class Terms(NamedTuple):
    """What a linear method chooses a layer's coefficients by.

    products: ``(n, n)`` float64, the inner products of the changes
    weights: of the sources that have the layer
    positions: which source each is
    """

    products: Tensor
    weights: Sequence[float]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method: its default, and its choices if it is a word."""

    default: Any
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, annotation: Any, default: Any) -> "Option":
        """The option that a parameter of this type stands for: a choice of words if that is a ``Literal``."""
        return cls(default, get_args(annotation) if get_origin(annotation) is Literal else ())


@dataclass(frozen=True, slots=True)
class Method:
    """A registered merge method.

    run: ``f(layers, weights, *, context, **options) -> layer``
    most: the largest number of sources it is defined for; ``None``: any
    survey: what it must know of all layers before it merges the first
    coefficients: of the combination, where the method is a linear one
    """

    name: str
    run: MergeFunction
    laws: frozenset[Law]
    summary: str
    options: Mapping[str, Option]
    most: int | None = None
    survey: Survey | None = field(default=None, repr=False)
    coefficients: Coefficients | None = field(default=None, repr=False)
    wants_context: bool = False

    def merge(
        self, layers: Sequence[Mergeable], weights: Sequence[float], options: Mapping[str, Any], context: Context
    ) -> Mergeable:
        """One merged layer; the context goes to the methods that ask for it."""
        asked = {"context": context} if self.wants_context else {}
        return self.run(layers, weights, **options, **asked)

    def checked(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options in full, defaults filled in.

        Raises:
            MergeError: an unknown option, or a value of the wrong type or not among the choices.
        """
        for name in options:
            if name not in self.options:
                hint = suggest_name(name, self.options, otherwise="it has")
                raise MergeError(f"{self.name} has no option {name!r}; {hint}")
        return {
            name: _checked_value(f"{self.name}: {name}", option, options.get(name, option.default))
            for name, option in self.options.items()
        }


def _checked_value(label: str, option: Option, value: Any) -> Any:
    if option.choices:
        if value not in option.choices:
            raise MergeError(f"{label} {value!r}; expected one of {', '.join(option.choices)}")
        return value
    if value is None and option.default is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise MergeError(f"{label} {value!r}; expected a share in (0, 1]")
    return float(value)


def merge_method(
    *,
    laws: set[Law],
    most: int | None = None,
    survey: Survey | None = None,
    coefficients: Coefficients | None = None,
    also: Mapping[str, Option] = MappingProxyType({}),
) -> Callable[[MergeFunction], MergeFunction]:
    """Register a merge method under its function's name.

    The summary is the docstring's first line; the options are the keyword-only parameters, and those in ``also``.
    """

    def register(function: MergeFunction) -> MergeFunction:
        name, parameters = function.__name__, inspect.signature(function).parameters
        METHODS[name] = Method(
            name=name,
            run=function,
            laws=frozenset(laws),
            summary=(inspect.getdoc(function) or "").partition("\n")[0],
            options=MappingProxyType({**_read_options(parameters.values()), **also}),
            most=most,
            survey=survey,
            coefficients=coefficients,
            wants_context="context" in parameters or coefficients is not None,
        )
        return function

    return register


def _read_options(parameters: Iterable[inspect.Parameter]) -> dict[str, Option]:
    return {
        parameter.name: Option.of(parameter.annotation, parameter.default)
        for parameter in parameters
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "context"
    }


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        MergeError: there is none; averaging of factors is refused with the reason.
    """
    if name in METHODS:
        return METHODS[name]
    if name in _AVERAGING:
        raise MergeError(
            f"{name!r} averages the factors, and the product of averages is not the average of products (cross terms "
            "upᵢ @ downⱼ; more than 100 % error on independent adapters); 'cat' is the exact sum, 'svd' the exact sum "
            "at a rank"
        )
    raise MergeError(f"no merge method {name!r}; {suggest_name(name, METHODS, otherwise='there are')}")
