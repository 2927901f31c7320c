"""What has to be known of whole tensors: gathered by streaming over blocks, kept in the catalog by content."""
