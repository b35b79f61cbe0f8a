"""Which of the models that are served a request means. It knows their names, and no requests."""

from collections.abc import Mapping
from typing import Protocol, TypeVar

from offramp_service.errors import InvalidInput
from offramp_service.served_model import DescribedModel


class _Named(Protocol):
    @property
    def model(self) -> DescribedModel: ...


Kind = TypeVar("Kind", bound=_Named)


def choose(served: Mapping[str, Kind], name: str | None, version: str | None) -> Kind:
    """That of the model that was asked for; None is the default, which is the first.

    Raises:
        InvalidInput: it is not served here.
    """
    one = served.get(name) if name is not None else next(iter(served.values()))
    if one is None:
        known = ", ".join(map(repr, served))
        raise InvalidInput(
            f"model {name[:80]!r} is not served here, {known} "  # type: ignore[index]
            f"{'is' if len(served) == 1 else 'are'}",
            param="model",
            status=404,
        )
    offered = one.model.version
    if version is not None and version != offered:
        raise InvalidInput(
            f"version {version[:80]!r} is not served here, {offered!r} is",
            param="version",
            status=404,
        )
    return one
