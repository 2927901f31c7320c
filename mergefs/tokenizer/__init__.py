"""The tokenizer of the merged model: its vocabulary, its files, and which row of which model each token gets."""
