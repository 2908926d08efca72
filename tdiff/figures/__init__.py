"""Pictures of a run, drawn by matplotlib from arrays: nothing here reads a file or asks a model."""
