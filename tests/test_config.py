"""Configs: strict, frozen, with one canonical form, told apart by kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError

from rodimus_lab.config import Config, ConfigError, Variant
from rodimus_lab.errors import UserError


class Inner(Config):
    depth: int = 1


class Outer(Config):
    width: Annotated[int, Field(ge=1)]
    rate: float = 0.1
    inner: Inner = Inner()
    tags: tuple[str, ...] = ()


class Shape(Variant):
    name: str = "shape"


class Circle(Shape):
    kind = "circle"
    radius: float = 1.0


class Square(Shape):
    kind = "square"
    side: int = 2


class Drawing(Config):
    shapes: tuple[Shape, ...]


@pytest.fixture
def _forget_new_kinds() -> Iterator[None]:
    before = dict(Shape.family)
    yield
    Shape.family.clear()
    Shape.family.update(before)


@pytest.mark.parametrize("make", [lambda v: Outer(**v), Outer.from_dict])
def test_an_unknown_key_is_named_with_its_nearest_neighbour(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"Outer has no key 'widht'; did you mean 'width'\? known: inner, rate, tags"):
        make({"width": 2, "widht": 3})
    with pytest.raises(ConfigError, match=r"Inner has no key 'deph'; did you mean 'depth'\? known: depth"):
        make({"width": 2, "inner": {"deph": 3}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": "wide"}, r"Outer.width: .*valid integer.*\(got 'wide'\)"),
        ({"width": 0}, r"Outer.width: .*greater than or equal to 1 \(got 0\)"),
        ({"width": 2.5}, r"Outer.width: .*integer.*\(got 2.5\)"),
        ({"width": 2, "rate": float("inf")}, r"Outer.rate: .*finite"),
        ({"width": 2, "inner": 3}, r"Outer.inner: "),
        ({}, r"Outer.width: field required"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    for make in (lambda: Outer(**values), lambda: Outer.from_dict(values)):
        with pytest.raises(ConfigError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, UserError)


def test_a_config_is_frozen() -> None:
    config = Outer(width=2)
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 3  # type: ignore[misc]


def test_replace_validates_and_leaves_the_original() -> None:
    config = Outer(width=2, inner=Inner(depth=5))
    assert config.replace(rate=0.5) == Outer(width=2, rate=0.5, inner=Inner(depth=5))
    assert config.rate == 0.1
    with pytest.raises(ConfigError, match=r"Outer.width: .*\(got -1\)"):
        config.replace(width=-1)
    with pytest.raises(ConfigError, match="Outer has no key 'heigth'"):
        config.replace(heigth=1)
    assert Circle().replace(radius=2.0) == Circle(radius=2.0)


def test_round_trip_through_json() -> None:
    for config in (Outer(width=2, tags=("a", "b")), Drawing(shapes=(Circle(radius=3.0), Square()))):
        plain = json.loads(json.dumps(config.to_dict()))
        assert type(config).from_dict(plain) == config


def test_the_canonical_form_and_its_digest_are_stable() -> None:
    """These are ids of runs on disk: they may not change with a version of anything."""
    config = Drawing(shapes=(Circle(radius=3), Square(name="é")))
    assert config.canonical_json() == (
        '{"shapes":[{"kind":"circle","name":"shape","radius":3.0},{"kind":"square","name":"\\u00e9","side":2}]}'
    )
    assert config.digest() == "81f13866"
    assert Outer(rate=0.1, width=2).digest() == Outer.from_dict({"width": 2}).digest()
    assert Outer(width=2).digest() != Outer(width=3).digest()


def test_kind_chooses_the_class() -> None:
    assert Shape.from_dict({"kind": "square", "side": 4}) == Square(side=4)
    assert Square.from_dict({"side": 4}) == Square(side=4)
    assert Drawing.from_dict({"shapes": [{"kind": "circle"}, Square()]}) == Drawing(shapes=(Circle(), Square()))
    assert Circle().to_dict() == {"kind": "circle", "name": "shape", "radius": 1.0}
    assert next(iter(Circle().to_dict())) == "kind"


def test_equality_tells_kinds_apart() -> None:
    class_pair = Drawing(shapes=(Circle(),)), Drawing(shapes=(Square(),))
    assert class_pair[0] != class_pair[1]
    assert class_pair[0].digest() != class_pair[1].digest()


def test_a_bad_kind_lists_the_good_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown kind 'squar'; did you mean 'square'\? known: circle, square"):
        Shape.from_dict({"kind": "squar"})
    with pytest.raises(ConfigError, match=r"'kind' is missing; one of circle, square"):
        Shape.from_dict({"side": 2})
    with pytest.raises(ConfigError, match=r"shapes\.0: unknown kind 'blob'"):
        Drawing.from_dict({"shapes": [{"kind": "blob"}]})


def test_a_mistake_deep_inside_a_variant_is_named() -> None:
    with pytest.raises(ConfigError, match=r"has no key '(shapes.0.)?sid'; did you mean 'side'\?"):
        Drawing.from_dict({"shapes": [{"kind": "square", "sid": 2}]})


@pytest.mark.usefixtures("_forget_new_kinds")
def test_two_classes_may_not_claim_one_kind() -> None:
    with pytest.raises(TypeError, match="both claim the kind 'circle'"):

        class Disc(Shape):
            kind = "circle"


@pytest.mark.usefixtures("_forget_new_kinds")
def test_a_new_kind_joins_its_own_family_alone() -> None:
    class Triangle(Shape):
        kind = "triangle"

    class Beast(Variant):
        pass

    class Lion(Beast):
        kind = "lion"

    assert Shape.from_dict({"kind": "triangle"}) == Triangle()
    assert set(Beast.family) == {"lion"}
    assert "lion" not in Shape.family
    assert Beast.from_dict({"kind": "lion"}) == Lion()
