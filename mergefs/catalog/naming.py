"""What keys are made of, and what they are called for people."""

from blake3 import blake3

_LONGEST: int = 300


def key_of_entry(plan_id: str, name: str) -> bytes:
    """Return the key of one tensor of a plan; LMDB keys have at most 511 bytes, so a long name ends in its hash."""
    encoded = name.encode()
    short = encoded if len(encoded) <= _LONGEST else encoded[:200] + blake3(encoded).digest()
    return plan_id.encode() + b"/" + short


def name_of_key(key: bytes) -> str:
    """Return a key for people: text where it is text, else hexadecimal digits."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return key.hex()
    return text if text.isprintable() else key.hex()
