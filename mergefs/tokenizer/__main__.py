"""The process that builds one tokenizer: ``python -m mergefs.tokenizer`` in the directory that holds the request."""

from pathlib import Path

import msgspec

from mergefs.errors import MergefsError
from mergefs.tokenizer.building import build
from mergefs.tokenizer.exchange import ANSWER, REFUSAL, REQUEST, Refusal, Request


def main() -> None:
    """Answer the request in the current directory."""
    request = msgspec.msgpack.decode(Path(REQUEST).read_bytes(), type=Request)
    try:
        answer = msgspec.msgpack.encode(build(request))
    except MergefsError as error:
        Path(REFUSAL).write_bytes(msgspec.msgpack.encode(Refusal(str(error))))
    else:
        Path(ANSWER).write_bytes(answer)


if __name__ == "__main__":
    main()
