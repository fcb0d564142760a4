"""Whether W&B is online, offline or off: the user's word, then WANDB_MODE, then what credentials allow."""

from __future__ import annotations

import netrc
import os
from typing import Literal
from urllib.parse import urlsplit

from mvat_dist.config.schema import TrackConfig
from mvat_dist.errors import UserError

Mode = Literal["online", "offline", "disabled"]

_MODES: dict[str, Mode] = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
"""W&B's words, old ones too."""


def mode(config: TrackConfig) -> Mode:
    """What `config` asks for; for ``auto`` WANDB_MODE, else online where credentials are, else offline.

    Raises:
        UserError: WANDB_MODE is asked, and is no such word.
    """
    chosen = os.environ.get("WANDB_MODE") if config.wandb == "auto" else config.wandb
    if not chosen:
        return "online" if has_credentials() else "offline"
    if chosen not in _MODES:
        raise UserError(f"WANDB_MODE is {chosen!r}: set it to online, offline or disabled, or unset it")
    return _MODES[chosen]


def has_credentials() -> bool:
    """Whether `wandb login` or WANDB_API_KEY has left a key for the server in use."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc().authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # none, or not readable as one
        return False


def in_words(error: Exception) -> str:
    """The first line of an error, without the user's key, should it quote that."""
    words = f"{type(error).__name__}: {error}".partition("\n")[0]
    key = os.environ.get("WANDB_API_KEY", "")
    return words.replace(key, "(key)") if key else words
