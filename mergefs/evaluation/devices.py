"""Where models are run: on the processor, or on an accelerator that torch knows."""

from typing import Final

import torch

from mergefs.errors import EvaluationError

AUTOMATIC: Final = "auto"


def choose_device(name: str) -> torch.device:
    """Return the device called ``name`` (``cpu``, ``cuda``, ``cuda:1``, ``mps``); ``auto`` is a GPU where there is one.

    Raises EvaluationError for a device that torch does not know, that is not there, or that holds no values.
    """
    if name == AUTOMATIC:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise EvaluationError(f"the device {name} cannot be used ({reason}); give cpu, or name none") from error
    return device
