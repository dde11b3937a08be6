"""One file a task: load model and data, preprocess, collate."""
