"""Reading ranges of source tensors: the grid of blocks, the reader, and the ledger that counts every byte."""
