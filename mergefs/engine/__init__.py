"""From a plan to bytes: any range of any file of the merged model, computed when it is asked for."""
