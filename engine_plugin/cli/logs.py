"""Logging of the command line: off unless -v is given."""

from __future__ import annotations

import logging

from engine_plugin.redaction import RedactingFormatter

__all__ = ["set_up_logging"]


def set_up_logging(level: str = "") -> None:
    """Log to standard error: this package from `level` on, libraries from INFO on. Without a level, log nothing."""
    if not level:
        logging.basicConfig(handlers=[logging.NullHandler()])  # otherwise logging.lastResort prints warnings
        return
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("engine_plugin").setLevel(level)
