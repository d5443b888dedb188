"""Looking into the non-local blocks of a model: what they get, attend to, do and cost."""
