"""Logging of the command line: nothing but errors of ours, unless -v asks."""

from __future__ import annotations

import logging

from engine_plugin.redaction import RedactingFormatter

__all__ = ["set_up_logging"]


def set_up_logging(level: str = "") -> None:
    """Write our records from `level` on, others' from INFO on, to standard error; without a level, none at all."""
    if not level:
        logging.basicConfig(handlers=[logging.NullHandler()])  # else logging's last resort prints warnings
        return
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("engine_plugin").setLevel(level)
