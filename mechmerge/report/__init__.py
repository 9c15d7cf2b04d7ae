"""What a run found, drawn and written down: figures and a Markdown summary."""
