"""The command line: a thin layer of click over the pipeline; stdout is data, stderr is talk."""
