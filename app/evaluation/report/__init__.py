"""Reports: what is written, drawn and shown."""
