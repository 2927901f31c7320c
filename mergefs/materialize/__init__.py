"""Writing a merged model to disk, all or nothing, and checking what was written."""
