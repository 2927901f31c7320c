"""Everything that shows a merged model as a directory: the tree, its FUSE adapter, the daemon around it."""
