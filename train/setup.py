"""Opens a run: data, model, engine and saver on this rank, and the newest checkpoint's state if the run resumes."""
