"""An endpoint that agents talk to. Nothing is here yet; it will use engines, text, runs and telemetry, never games."""
