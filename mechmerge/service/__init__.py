"""The service: a job queue with an HTTP API above the pipeline, for teams. `app.py` says what is where."""
