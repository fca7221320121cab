"""What a caller of the engine client does wrong, and a streamed answer that breaks off, are raised.

::

    EngineClientError
    |-- EngineAddressError (ValueError)   the base URL cannot be used
    |-- EngineRequestError (ValueError)   a method, path or header cannot be sent
    `-- AnswerCutError                    a streamed answer broke off after its head

Everything else that can go wrong on the wire is a `Fault`, a value.
"""

from __future__ import annotations

from pronghorn.domain.answers import Fault


class EngineClientError(Exception):
    """Something was asked of the engine client that it does not do."""


class EngineAddressError(EngineClientError, ValueError):
    """The engine's base URL cannot be used."""


class EngineRequestError(EngineClientError, ValueError):
    """A method, path or header cannot be sent to an engine."""


class AnswerCutError(EngineClientError):
    """A streamed answer broke off after its head; `fault` says how."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault
