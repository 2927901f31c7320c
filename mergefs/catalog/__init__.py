"""The catalog: an LMDB environment of typed records, all of which can be rebuilt from the models."""

from mergefs.catalog.catalog import Catalog, default_location

__all__ = ["Catalog", "default_location"]
