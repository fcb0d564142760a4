"""What a model file says of the network in it: read on a login node, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mvat_dist.config.sizes import Size
from mvat_dist.errors import UserError

FORMAT = "mvat_dist.model.1"

_OWN_KEYS = ("format", "name", "size", "sample_rate", "step")
_MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors header, as its own readers have it."""


@dataclass(frozen=True)
class Description:
    """What a file of `FORMAT` says of the network in it."""

    name: str
    size: Size
    step: int | None
    """Optimiser steps behind it; None where the file does not say."""
    about: Mapping[str, str]
    """All other keys of the file's metadata, such as those of an export."""


def read(file: Path) -> Description | None:
    """The description in `file`; None for a file of another origin, of whatever kind.

    Raises:
        UserError: it is of `FORMAT`, and its description is damaged.
    """
    metadata = _safetensors_metadata(file)
    if metadata.get("format") != FORMAT:
        return None
    try:
        name, size = metadata["name"], Size(**json.loads(metadata["size"]))
        if Path(name).name != name:  # an export is written to a file of this name
            raise ValueError(f"its name {name!r} cannot be that of a file")
        step = int(metadata["step"]) if "step" in metadata else None
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(f"{file}: its description is damaged ({error}): copy the file again") from error
    about = {key: value for key, value in metadata.items() if key not in _OWN_KEYS}
    return Description(name, size, step, about)


def _safetensors_metadata(file: Path) -> dict[str, str]:
    """The free part of a safetensors file's header; empty for any other file."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES or stream.read(1) != b"{":
            return {}
        try:
            metadata = json.loads(b"{" + stream.read(length - 1)).get("__metadata__")
        except (ValueError, RecursionError):
            return {}
    return metadata if isinstance(metadata, dict) else {}
